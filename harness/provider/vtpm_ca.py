"""The CA that certifies vTPMs; its key lives in the host's hardware TPM.

The key is used only when this host's own records say that a vTPM is being manufactured. Issuing never asks libvirt or
the guest manager: both may be waiting for the very swtpm_setup that waits for us.

Invariants:
    1. A certificate is issued only for a domain that is known as defined, persistent and not running.
    2. The journal has it first: one EK of each kind per guest, one guest per EK.
    3. The UUID in a request is the caller's claim; who the caller is was checked at the socket (`local_socket`).
    4. A platform certificate never passes for an EK certificate: it has another extended key usage, and no UUID.

Spec: DESIGN 3.6; TCG EK Credential Profile 2.5, 3.2; TCG Platform Certificate Profile 1.1.
"""

from __future__ import annotations

import datetime
import hashlib
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from harness.attest import Public
from harness.certificates import EK_OID, PLATFORM_OID, URN_UUID
from harness.errors import MalformedMessage
from harness.provider.journal import ECC_EK, PLATFORM, RSA_EK, Journal
from harness.values import AgentId, parse_agent_id

_DAY = datetime.timedelta(days=1)
_VALID_DAYS = 3650
_RSA = re.compile(r"[89a-fA-F][0-9a-fA-F]{510}[13579bdfBDF]")  # 2048 bits, odd
_ECC = re.compile(r"x=([0-9a-fA-F]{1,96}),y=([0-9a-fA-F]{1,96}),id=(secp256r1|secp384r1)")
_CURVES: Mapping[str, type[ec.EllipticCurve]] = {"secp256r1": ec.SECP256R1, "secp384r1": ec.SECP384R1}
_TPM_OIDS = {
    "manufacturer": x509.ObjectIdentifier("2.23.133.2.1"),
    "model": x509.ObjectIdentifier("2.23.133.2.2"),
    "version": x509.ObjectIdentifier("2.23.133.2.3"),
}
_MAX_COMMON_NAME = 64
_TPM_TEXT = re.compile(r"[ -~]{1,64}")

PublicKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey
Sign = Callable[[x509.CertificateBuilder], Awaitable[bytes]]
"""Signs with the CA key in the TPM; returns DER."""


class Domains(Protocol):
    """What the host agent knows about domains, from events (`guests.GuestCache`)."""

    def check_manufacturing(self, agent_id: AgentId) -> None:
        """Raises GuestNotHere or NotReady unless the domain is defined, persistent and not running."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IssueRequest:
    """What swtpm_setup's tool asks for.

    Args:
        kind: `journal.RSA_EK`, `ECC_EK` or `PLATFORM`.
        key: the vTPM's EK.
        agent_id: the UUID in ``--vmid``, a claim.
        name: the name in ``--vmid``.
        tpm: manufacturer, model and version to state.
    """

    kind: str
    key: PublicKey
    agent_id: AgentId
    name: str
    tpm: Mapping[str, str]


def parse_issue_request(members: Mapping[str, object]) -> IssueRequest:
    """Request from the members of the local socket's ``issue``.

    Raises:
        MalformedMessage: unknown type, a key that is no EK of swtpm, or a vmid without a UUID.
    """
    kind, ek, vmid = (members.get(name) for name in ("type", "ek", "vmid"))
    if kind not in ("ek", "platform") or not isinstance(ek, str) or not isinstance(vmid, str):
        raise MalformedMessage("type must be ek or platform; ek and vmid must be text")
    key = _key(ek)
    name, _, uuid_text = vmid.rpartition(":")
    tpm = members.get("tpm", {})
    if not isinstance(tpm, dict) or any(not isinstance(text, str) for text in tpm.values()):
        raise MalformedMessage("tpm must be an object of texts")
    of_ek = RSA_EK if isinstance(key, rsa.RSAPublicKey) else ECC_EK
    known = {field: tpm[field] for field in _TPM_OIDS if _TPM_TEXT.fullmatch(tpm.get(field, ""))}
    return IssueRequest(
        kind=of_ek if kind == "ek" else PLATFORM,
        key=key,
        agent_id=parse_agent_id(uuid_text.lower()),
        name=name,
        tpm=known,
    )


def _key(text: str) -> PublicKey:
    try:
        if _RSA.fullmatch(text):
            return rsa.RSAPublicNumbers(65537, int(text, 16)).public_key()
        if match := _ECC.fullmatch(text):
            numbers = ec.EllipticCurvePublicNumbers(int(match[1], 16), int(match[2], 16), _CURVES[match[3]]())
            return numbers.public_key()
    except ValueError as error:
        raise MalformedMessage("ek is not a key") from error
    raise MalformedMessage("ek is neither an RSA-2048 modulus nor an ECC point")


class VtpmCa:
    """The CA.

    Args:
        ca: public area of the CA key.
        sign: signs with it.
        journal: of this host.
        domains: what runs here.
        host: the host's name, for the issuer's name.
        now: with time zone.
    """

    def __init__(
        self,
        ca: Public,
        sign: Sign,
        journal: Journal,
        domains: Domains,
        *,
        host: str,
        now: Callable[[], datetime.datetime] = lambda: datetime.datetime.now(datetime.UTC),
    ) -> None:
        self._key = ca.key()
        self._sign = sign
        self._journal = journal
        self._domains = domains
        self._now = now
        self._issuer = _common_name(f"vTPM CA of {host}")

    async def self_certificate(self) -> bytes:
        """Self-signed certificate of the CA key, DER; stock verifiers keep it in their store.

        Raises:
            TpmError: the TPM did not sign.

        *Cancellation:* nothing is kept.
        """
        builder = (
            self._builder(self._issuer, self._key)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._key), critical=False)
        )
        return await self._sign(builder)

    async def issue(self, request: IssueRequest) -> bytes:
        """Certificate for a vTPM that is being manufactured, DER.

        Raises:
            GuestNotHere, NotReady: the domain is not known as defined and not running.
            Conflict, CloneSuspected: the journal does not allow it.
            TpmError: the TPM did not sign; the key stays in the journal until it is released.

        *Cancellation:* as for TpmError.
        """
        self._domains.check_manufacturing(request.agent_id)
        builder = self._certificate(request)
        serial = x509.random_serial_number()
        await self._journal.record(request.agent_id, request.kind, spki_digest(request.key), serial)
        return await self._sign(builder.serial_number(serial))

    def _certificate(self, request: IssueRequest) -> x509.CertificateBuilder:
        platform = request.kind == PLATFORM
        is_rsa = isinstance(request.key, rsa.RSAPublicKey)
        subject = _common_name(request.name or str(request.agent_id))
        identity = x509.Name(
            [
                x509.RelativeDistinguishedName([x509.NameAttribute(_TPM_OIDS[key], text)])
                for key, text in request.tpm.items()
            ]
        )
        names: list[x509.GeneralName] = [x509.DirectoryName(identity)] if request.tpm else []
        if not platform:
            names.append(x509.UniformResourceIdentifier(f"{URN_UUID}{request.agent_id}"))
        builder = (
            self._builder(subject, request.key, numbered=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(
                _usage(signature=platform, encipherment=is_rsa and not platform, agreement=not is_rsa), critical=True
            )
            .add_extension(x509.ExtendedKeyUsage([PLATFORM_OID if platform else EK_OID]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key), critical=False)
        )
        return builder.add_extension(x509.SubjectAlternativeName(names), critical=False) if names else builder

    def _builder(self, subject: x509.Name, key: PublicKey, *, numbered: bool = True) -> x509.CertificateBuilder:
        now = self._now()
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._issuer)
            .public_key(key)
            .not_valid_before(now - _DAY)
            .not_valid_after(now + _VALID_DAYS * _DAY)
        )
        return builder.serial_number(x509.random_serial_number()) if numbered else builder


def _common_name(text: str) -> x509.Name:
    """Name with this common name, cut to the 64 bytes that X.520 allows (ub-common-name)."""
    cut = text.encode("utf-8", "replace")[:_MAX_COMMON_NAME].decode("utf-8", "ignore")
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, cut)])


def spki_digest(key: PublicKey) -> bytes:
    """SHA-256 of a key's DER SubjectPublicKeyInfo (DESIGN 3.2, vtpm_ek)."""
    spki = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(spki).digest()


def _usage(
    *, certificates: bool = False, signature: bool = False, encipherment: bool = False, agreement: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=signature,
        content_commitment=False,
        key_encipherment=encipherment,
        data_encipherment=False,
        key_agreement=agreement,
        key_cert_sign=certificates,
        crl_sign=certificates,
        encipher_only=False,
        decipher_only=False,
    )
