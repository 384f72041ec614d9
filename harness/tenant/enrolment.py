"""Enrolment of a host at the tenant's registrar: what must hold before its keys are pinned (DESIGN 3.6).

The provider gives every value here and is not believed: names, host_id and qualified names are recomputed, the EK must
chain to a vendor root that the tenant pinned, and the AK must live beside that EK, because only then can its TPM open
our challenge.

Invariants:
    1. Nothing is returned before all checks passed; there is no partly enrolled host.
    2. A challenge is used once: it is burnt by any answer, right, wrong or late.
    3. Every failure of a challenge is the same `ChallengeFailed`; its cause goes to the log only.

Owner: the registrar's event loop.

Spec: DESIGN 3.6; TPM 2.0 Part 1, 24 (credential protection); Part 3, 18.2 (TPM2_Certify).
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from harness import events
from harness.attest import (
    ST_ATTEST_CERTIFY,
    TPM_GENERATED_VALUE,
    CertifyInfo,
    Public,
    owner_qualified_name,
    parse_attest,
    parse_public,
    parse_signature,
    verify_signature,
)
from harness.certificates import verify_ek_chain
from harness.credential import check_ak, check_ca_key, check_ek_rsa2048, make_credential
from harness.errors import (
    AppraisalError,
    CertificateRefused,
    ChallengeFailed,
    HarnessError,
    Overloaded,
    ProtocolError,
    UnacceptableKey,
)
from harness.protocol import certify_qualifying, enrol_answer, host_id_of
from harness.tenant.challenges import Challenges
from harness.values import ClockBaseline, HostId

SECRET_SIZE = 32
CHALLENGE_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HostIdentity:
    """What the provider says of a host: received, not believed.

    Args:
        host_id: the id under which the provider lists it.
        ek, ak, ca: marshalled TPM2B_PUBLIC.
        ek_certificates: DER, the leaf first.
        ca_certificate: the CA key's self-signed certificate, DER.
    """

    host_id: HostId
    ek: bytes
    ek_certificates: tuple[bytes, ...]
    ak: bytes
    ca: bytes
    ca_certificate: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class EnrolledHost:
    """A host whose keys may be pinned: every check of this module passed.

    ``ek_chain`` holds the issuers that ``ek_certificate`` was believed by, from its own to the vendor's root; DER.
    """

    host_id: HostId
    url: str
    ek: Public
    ek_certificate: bytes
    ek_chain: tuple[bytes, ...]
    ak: Public
    ak_qualified_name: bytes
    ca: Public
    ca_certificate: bytes
    baseline: ClockBaseline
    enrolled_at: float


class HostAccess(Protocol):
    """The provider's side of an enrolment, over the wire."""

    async def identity(self, host_id: HostId) -> HostIdentity:
        """What the provider says of the host."""

    async def activate(self, host_id: HostId, credential: bytes) -> bytes:
        """The host's answer to a challenge (Keylime blob in, digest out)."""

    async def certify(self, host_id: HostId, nonce: bytes) -> tuple[bytes, bytes]:
        """TPM2_Certify of the CA key by the AK: attest and signature."""


class HostEnroller:
    """Takes a host through the enrolment.

    Args:
        roots: vendor roots that the tenant pinned.
        requester: SHA-256 of the SubjectPublicKeyInfo of our own client certificate.
        challenges: bounds of this tenant's open challenges.
        challenge_s: seconds for one answer.
        random: source of secrets and nonces.
        now: wall clock, for certificates and the record.
    """

    def __init__(
        self,
        roots: Sequence[x509.Certificate],
        requester: bytes,
        challenges: Challenges,
        *,
        challenge_s: float = CHALLENGE_S,
        random: Callable[[int], bytes] = secrets.token_bytes,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._roots = roots
        self._requester = requester
        self._challenges = challenges
        self._challenge_s = challenge_s
        self._random = random
        self._now = now

    async def enrol(self, url: str, host_id: HostId, access: HostAccess) -> EnrolledHost:
        """Keys of a host, after all checks. The caller pins them, or refuses a change.

        1. EK, AK and CA key are acceptable in their roles;
        2. the EK's certificate chains to a pinned vendor root and holds this EK;
        3. the id is the one that follows from the EK;
        4. the TPM with this EK answers our challenge for this AK;
        5. this AK certifies the CA key; the clock in it is the first baseline;
        6. the CA certificate holds the CA key.

        Left to the caller: uniqueness over all records, and comparison with what is pinned already.

        Raises:
            UnacceptableKey, CertificateRefused, ChallengeFailed: a check failed.
            ProtocolError: the provider's answers do not parse.
            TransportError, Refused: the provider did not answer.
            Overloaded: too many challenges were made, or the provider asks for a later try.

        *Cancellation:* the open challenge is burnt.
        """
        identity = await access.identity(host_id)
        ek, ak, ca = parse_keys(identity)
        certificate, *others = identity.ek_certificates
        issuers = verify_ek_chain(certificate, others, self._roots, ek, self._now())
        if not host_id == identity.host_id == host_id_of(ek.name):
            raise CertificateRefused(f"host_id {host_id} is not the one that follows from the host's EK")
        await self._challenge(host_id, ek, ak, access)
        baseline = await self._certified(host_id, ak, ca, access)
        check_ca_certificate(identity.ca_certificate, ca)
        return EnrolledHost(
            host_id=host_id,
            url=url,
            ek=ek,
            ek_certificate=certificate,
            ek_chain=tuple(issuer.public_bytes(Encoding.DER) for issuer in issuers),
            ak=ak,
            ak_qualified_name=owner_qualified_name(ak),
            ca=ca,
            ca_certificate=identity.ca_certificate,
            baseline=baseline,
            enrolled_at=self._now().timestamp(),
        )

    async def _challenge(self, host_id: HostId, ek: Public, ak: Public, access: HostAccess) -> None:
        secret = self._random(SECRET_SIZE)
        blob = make_credential(ek, ak.name, secret).keylime_blob()
        expected = enrol_answer(secret, requester=self._requester, host_id=host_id, ak_name=ak.name)
        with self._challenges.open(host_id):
            try:
                async with asyncio.timeout(self._challenge_s):
                    answer = await access.activate(host_id, blob)
            except Overloaded:  # nobody has answered: it says "later", and nothing of the keys
                raise
            except (HarnessError, TimeoutError) as error:
                events.emit("challenge_failed", host_id=str(host_id), cause=type(error).__name__)
                raise ChallengeFailed from error
        if not hmac.compare_digest(answer, expected):
            events.emit("challenge_failed", host_id=str(host_id), cause="wrong answer")
            raise ChallengeFailed

    async def _certified(self, host_id: HostId, ak: Public, ca: Public, access: HostAccess) -> ClockBaseline:
        nonce = self._random(SECRET_SIZE)
        attest, signature = await access.certify(host_id, nonce)
        return check_certification(attest, signature, ak=ak, ca=ca, nonce=nonce)


def parse_keys(identity: HostIdentity) -> tuple[Public, Public, Public]:
    """EK, AK and CA key, each acceptable in its role, and three different keys.

    Raises:
        UnacceptableKey: attributes or algorithm of DESIGN 3.6, or one key in two roles.
        MalformedMessage: a public area that does not parse.
    """
    ek, ak, ca = parse_public(identity.ek), parse_public(identity.ak), parse_public(identity.ca)
    check_ek_rsa2048(ek)
    check_ak(ak)
    check_ca_key(ca)
    if len({ek.name, ak.name, ca.name}) != 3:
        raise UnacceptableKey("one key is given in two roles of the host")
    if not identity.ek_certificates:
        raise CertificateRefused("the host has no EK certificate")
    return ek, ak, ca


def check_certification(attest: bytes, signature: bytes, *, ak: Public, ca: Public, nonce: bytes) -> ClockBaseline:
    """Clock of a TPM2_Certify of the CA key by the AK, believed after six checks.

    1. attest parses completely;
    2. magic is TPM_GENERATED_VALUE: made inside a TPM;
    3. type is TPM_ST_ATTEST_CERTIFY;
    4. extraData is for our nonce and this CA key;
    5. the certified Name is the CA key's, recomputed; its qualified name that of an owner primary;
    6. qualifiedSigner is the AK's as an owner primary; the signature parses and verifies over the received bytes.

    Raises:
        UnacceptableKey: a check failed.
    """
    try:
        certified = parse_attest(attest)  # 1
    except ProtocolError as error:
        raise UnacceptableKey(f"the CA key's certification does not parse: {error.detail}") from error
    if certified.magic != TPM_GENERATED_VALUE:  # 2
        raise UnacceptableKey("the CA key's certification was not made inside a TPM")
    if certified.type != ST_ATTEST_CERTIFY or not isinstance(certified.attested, CertifyInfo):  # 3
        raise UnacceptableKey("the CA key's certification is not the output of TPM2_Certify")
    if not hmac.compare_digest(certified.extra_data, certify_qualifying(nonce, ca.name)):  # 4
        raise UnacceptableKey("the CA key's certification was not made for our nonce")
    if certified.attested != CertifyInfo(name=ca.name, qualified_name=owner_qualified_name(ca)):  # 5
        raise UnacceptableKey("the certification is of another key than the CA key")
    if certified.qualified_signer != owner_qualified_name(ak):  # 6
        raise UnacceptableKey("the CA key was certified by another key than the AK")
    try:
        verify_signature(ak, parse_signature(signature), certified.raw)
    except (ProtocolError, AppraisalError) as error:
        raise UnacceptableKey(f"the signature of the CA key's certification: {error.detail}") from error
    clock = certified.clock_info
    return ClockBaseline(
        clock=clock.clock,
        reset_count=clock.reset_count,
        restart_count=clock.restart_count,
        firmware_version=certified.firmware_version,
    )


def check_ca_certificate(der: bytes, ca: Public) -> None:
    """Checks that a certificate holds the CA key; nothing else in it is relied upon.

    Raises:
        CertificateRefused: it does not parse, or holds another key.
    """
    try:
        key = x509.load_der_x509_certificate(der).public_key()
        spki = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    except (ValueError, x509.InvalidVersion, UnsupportedAlgorithm) as error:
        raise CertificateRefused("the vTPM CA's certificate does not parse") from error
    if spki != ca.spki():
        raise CertificateRefused("the vTPM CA's certificate holds another key than the CA key")
