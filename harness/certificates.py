"""Certificates of EKs: a hardware TPM's chain to its vendor, and a vTPM's to its host's CA key.

`cryptography.x509.verification` builds chains for web servers: it wants a DNS or IP name in the leaf; certificates of
EKs have none. So the few rules that matter here are checked one by one, on the library's parser and signatures.

Invariants:
    1. Whatever is wrong, parsing included, is a CertificateRefused.
    2. The certified key is compared with the EK that was received: a certificate alone proves nothing.
    3. A critical extension that is not checked here is a refusal (RFC 5280, 4.2).

Spec: RFC 5280, 4.2 and 6.1; TCG EK Credential Profile 2.5, 3.2; DESIGN 3.6.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from harness.attest import Public
from harness.errors import CertificateRefused, MalformedMessage
from harness.values import AgentId

EK_OID = x509.ObjectIdentifier("2.23.133.8.1")
"""tcg-kp-EKCertificate"""
PLATFORM_OID = x509.ObjectIdentifier("2.23.133.8.2")
"""tcg-kp-PlatformAttributeCertificate"""
E = TypeVar("E", bound=x509.ExtensionType)
URN_UUID = "urn:uuid:"
_MAX_CERTIFICATE = 8192
_MAX_INTERMEDIATES = 8
# Policies restrict nothing here: no chain is asked for one, and the extensions that would ask are not in this list.
_UNDERSTOOD = (
    x509.BasicConstraints,
    x509.KeyUsage,
    x509.ExtendedKeyUsage,
    x509.SubjectAlternativeName,
    x509.CertificatePolicies,
)


def verify_ek_chain(
    ek_certificate: bytes,
    intermediates: Sequence[bytes],
    roots: Sequence[x509.Certificate],
    ek: Public,
    now: datetime.datetime,
) -> tuple[x509.Certificate, ...]:
    """Checks the EK certificate of a hardware TPM.

    1. It certifies exactly this EK, is not a CA's, and is for EKs (EKU 2.23.133.8.1).
    2. Signatures lead to a pinned root through CAs that may sign certificates, within their path lengths.
    3. Every certificate on the way is in its validity.

    Args:
        ek_certificate: DER.
        intermediates: DER, in any order; at most 8.
        roots: pinned.
        ek: public area of the EK.
        now: with time zone.

    Returns:
        The issuers that were relied upon, from the EK certificate's own up to the pinned root.

    Raises:
        CertificateRefused: which of these does not hold.
    """
    if len(intermediates) > _MAX_INTERMEDIATES:
        raise CertificateRefused(f"more than {_MAX_INTERMEDIATES} intermediate certificates")
    certificate = _load(ek_certificate, "the EK certificate")
    others = [_load(data, "an intermediate certificate") for data in intermediates]
    _check_leaf(certificate, ek, now)
    # One level at a time, because a CA may be certified twice (by its old and its new issuer) and only one of these
    # certificates need lead to a pinned root. The first time a CA is met is the nearest to the leaf, where its path
    # length allows most: it is never tried again, so that the provider's choice of certificates costs little.
    level: dict[x509.Certificate, tuple[x509.Certificate, ...]] = {certificate: ()}  # with what is below each
    below, refusals = 0, list[CertificateRefused]()
    while level:
        if reached := _issuers(level, roots, below, now, refusals):
            root, chain = next(iter(reached.items()))
            return (*chain[1:], root)
        level = _issuers(level, others, below, now, refusals)
        others = [other for other in others if other not in level]
        below += 1
    raise refusals[0] if refusals else CertificateRefused("the EK certificate does not chain to a pinned vendor root")


def verify_vtpm_certificate(
    certificate: bytes, *, ca: Public, agent_id: AgentId, ek: Public, now: datetime.datetime
) -> None:
    """Checks the EK certificate of a vTPM.

    1. It certifies exactly this EK, is not a CA's, and is for EKs (EKU 2.23.133.8.1, not that of a platform).
    2. keyUsage holds keyEncipherment or keyAgreement.
    3. It names exactly one URI, and that is ``urn:uuid:`` and this agent id.
    4. It is in its validity.
    5. The pinned vTPM CA *key* of the host signed it, directly.

    Args:
        certificate: DER.
        ca: pinned CA key of the host that the tenant's operator stated.
        agent_id: the guest.
        ek: public area of the vTPM's EK.
        now: with time zone.

    Raises:
        CertificateRefused: which of these does not hold.
    """
    parsed = _load(certificate, "the EK certificate")
    _check_leaf(parsed, ek, now)
    usage = _extension(parsed, x509.KeyUsage)
    if usage is None or not (usage.key_encipherment or usage.key_agreement):
        raise CertificateRefused("the EK certificate's key usage allows neither key encipherment nor key agreement")
    names = _extension(parsed, x509.SubjectAlternativeName)
    uris = names.get_values_for_type(x509.UniformResourceIdentifier) if names is not None else []
    if uris != [f"{URN_UUID}{agent_id}"]:
        raise CertificateRefused("the EK certificate does not name exactly this agent_id")
    try:
        key = ca.key()
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(
            parsed.signature_hash_algorithm, hashes.SHA256
        ):
            raise CertificateRefused("the EK certificate is not signed with ECDSA and SHA-256")
        key.verify(parsed.signature, parsed.tbs_certificate_bytes, ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, MalformedMessage, UnsupportedAlgorithm, ValueError):
        raise CertificateRefused("the EK certificate is not signed by the vTPM CA key of this guest's host") from None


def _load(data: bytes, what: str) -> x509.Certificate:
    if len(data) > _MAX_CERTIFICATE:
        raise CertificateRefused(f"{what} has more than {_MAX_CERTIFICATE} bytes")
    try:
        return x509.load_der_x509_certificate(data)
    except (ValueError, TypeError, x509.InvalidVersion) as error:
        raise CertificateRefused(f"{what} is not a DER certificate") from error


def _check_leaf(certificate: x509.Certificate, ek: Public, now: datetime.datetime) -> None:
    try:
        spki = certificate.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        same = spki == ek.spki()
    except (ValueError, UnsupportedAlgorithm, MalformedMessage):
        same = False
    if not same:
        raise CertificateRefused("the EK certificate is for another key")
    constraints = _extension(certificate, x509.BasicConstraints)
    if constraints is not None and constraints.ca:
        raise CertificateRefused("the EK certificate is that of a CA")
    uses = _extension(certificate, x509.ExtendedKeyUsage)
    if uses is None or EK_OID not in uses or PLATFORM_OID in uses:
        raise CertificateRefused("the certificate is not one for an EK (extended key usage 2.23.133.8.1)")
    _check_critical(certificate)
    _check_validity(certificate, now)


def _issuers(
    certificates: Mapping[x509.Certificate, tuple[x509.Certificate, ...]],
    candidates: Sequence[x509.Certificate],
    below: int,
    now: datetime.datetime,
    refusals: list[CertificateRefused],
) -> dict[x509.Certificate, tuple[x509.Certificate, ...]]:
    """The CAs among these that signed one of the certificates and may do so, each with the chain below it.

    ``below`` counts the CAs between them and the leaf. Why a signer may not have signed is added to ``refusals``.
    """
    found = {}
    for candidate in candidates:
        signed = next((each for each in certificates if _issued_by(each, candidate)), None)
        if signed is not None:
            try:
                _check_ca(candidate, below, now)
            except CertificateRefused as error:
                refusals.append(error)
            else:
                found[candidate] = (*certificates[signed], signed)
    return found


def _check_ca(certificate: x509.Certificate, below: int, now: datetime.datetime) -> None:
    constraints = _extension(certificate, x509.BasicConstraints)
    if constraints is None or not constraints.ca:
        raise CertificateRefused("a certificate in the chain is not that of a CA")
    if constraints.path_length is not None and constraints.path_length < below:
        raise CertificateRefused("the chain is longer than a CA in it allows")
    usage = _extension(certificate, x509.KeyUsage)
    if usage is not None and not usage.key_cert_sign:
        raise CertificateRefused("a CA in the chain may not sign certificates")
    _check_critical(certificate)
    _check_validity(certificate, now)


def _check_critical(certificate: x509.Certificate) -> None:
    for extension in _extensions(certificate):
        if extension.critical and not isinstance(extension.value, _UNDERSTOOD):
            raise CertificateRefused("a certificate has a critical extension that is not understood")


def _check_validity(certificate: x509.Certificate, now: datetime.datetime) -> None:
    if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
        raise CertificateRefused("a certificate is not in its validity")


def _issued_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def _extension(certificate: x509.Certificate, kind: type[E]) -> E | None:
    try:
        return _extensions(certificate).get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def _extensions(certificate: x509.Certificate) -> x509.Extensions:
    try:
        return certificate.extensions
    except (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
        raise CertificateRefused("a certificate has unreadable extensions") from error
