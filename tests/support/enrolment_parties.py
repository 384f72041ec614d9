"""The other side of an enrolment, in memory: a TPM vendor, a host and a vTPM with real keys and soft TPMs."""

from __future__ import annotations

import hmac
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.decrepit.ciphers.modes import CFB
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.x509.oid import NameOID

from harness import protocol
from harness.attest import Public, owner_qualified_name, parse_public
from harness.credential import Credential, parse_keylime_blob
from harness.errors import HarnessError
from harness.tenant.enrolment import HostIdentity
from harness.tenant.registrar_store import GuestKeys
from harness.tpm_templates import KeyTemplate
from harness.values import AgentId, ClockBaseline, HostId
from tests.support.soft_tpm import public_of, sized

NOW = datetime(2026, 6, 1, tzinfo=UTC)
EK_USE = x509.ObjectIdentifier("2.23.133.8.1")
PLATFORM_USE = x509.ObjectIdentifier("2.23.133.8.2")


def ek_public(key: rsa.RSAPrivateKey) -> Public:
    """Public area of an EK of template L-1."""
    template = KeyTemplate.EK_RSA2048.public(b"")
    modulus = key.public_key().public_numbers().n.to_bytes(256, "big")
    return parse_public(sized(template[2 : -2 - 256] + sized(modulus)))


def changed_attributes(public: Public, *, flip: int) -> bytes:
    """TPM2B_PUBLIC with attribute bits flipped."""
    data = bytearray(public.marshal())
    data[6:10] = (int.from_bytes(data[6:10], "big") ^ flip).to_bytes(4, "big")
    return bytes(data)


def open_credential(key: rsa.RSAPrivateKey, name: bytes, credential: Credential) -> bytes:
    """TPM2_ActivateCredential in software, for an EK of template L-1 and an object with this Name.

    Raises:
        ValueError: made for another EK or another Name.
    """
    oaep = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), b"IDENTITY\x00")
    seed = key.decrypt(credential.encrypted_secret[2:], oaep)
    integrity, identity = credential.id_object[4:36], credential.id_object[36:]

    def kdfa(label: bytes, context: bytes, bits: int) -> bytes:
        message = (1).to_bytes(4, "big") + label + b"\x00" + context + bits.to_bytes(4, "big")
        return hmac.digest(seed, message, "sha256")[: bits // 8]

    if hmac.digest(kdfa(b"INTEGRITY", b"", 256), identity + name, "sha256") != integrity:
        raise ValueError("integrity")
    cipher = Cipher(algorithms.AES(kdfa(b"STORAGE", name, 128)), CFB(bytes(16)))
    decryptor = cipher.decryptor()
    return (decryptor.update(identity) + decryptor.finalize())[2:]


def certificate(
    public_key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey,
    signer: ec.EllipticCurvePrivateKey,
    *,
    subject: str,
    issuer: str,
    ca: bool = False,
    use: x509.ObjectIdentifier | None = None,
    uris: tuple[str, ...] = (),
    usage: bool = True,
    begin: datetime = NOW - timedelta(days=1),
    end: datetime | None = None,
) -> x509.Certificate:
    """A certificate with exactly these statements."""
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in (subject, issuer)]
    builder = (
        x509.CertificateBuilder()
        .subject_name(names[0])
        .issuer_name(names[1])
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end or begin + timedelta(days=365))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    )
    if use is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage([use]), critical=False)
    if uris:
        san = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri) for uri in uris])
        builder = builder.add_extension(san, critical=True)
    if usage:
        flags = dict.fromkeys(
            ("digital_signature", "content_commitment", "data_encipherment", "key_agreement", "crl_sign"), False
        )
        key_usage = x509.KeyUsage(
            **flags, key_encipherment=not ca, key_cert_sign=ca, encipher_only=False, decipher_only=False
        )
        builder = builder.add_extension(key_usage, critical=True)
    return builder.sign(signer, hashes.SHA256())


def der(cert: x509.Certificate) -> bytes:
    return cert.public_bytes(serialization.Encoding.DER)


class Vendor:
    """A TPM vendor: root and issuing CA, whose certificates are valid from a day before ``at``."""

    def __init__(self, *, at: datetime = NOW) -> None:
        self._root_key, self._key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
        self._begin = at - timedelta(days=1)
        self.root = self._sign(self._root_key.public_key(), self._root_key, subject="root", issuer="root", ca=True)
        self.issuing = self._sign(self._key.public_key(), self._root_key, subject="issuing", issuer="root", ca=True)

    def certify(self, ek: rsa.RSAPublicKey) -> bytes:
        return der(self._sign(ek, self._key, subject="tpm", issuer="issuing", use=EK_USE))

    def _sign(
        self,
        key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey,
        signer: ec.EllipticCurvePrivateKey,
        *,
        subject: str,
        issuer: str,
        ca: bool = False,
        use: x509.ObjectIdentifier | None = None,
    ) -> x509.Certificate:
        return certificate(key, signer, subject=subject, issuer=issuer, ca=ca, use=use, begin=self._begin)


class SoftHost:
    """A host: EK, AK and CA key in one soft TPM, and its provider's answers.

    ``identity_changes`` replace members of the identity; ``activations`` and ``certifications`` record calls.
    """

    def __init__(self, vendor: Vendor, requester: bytes) -> None:
        self.ek_key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self.ak_key, self.ca_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
        self.ek, self.ak = ek_public(self.ek_key), public_of(self.ak_key)
        self.ca = public_of(self.ca_key, KeyTemplate.CA_P256)
        self.requester = requester
        self.vendor = vendor
        self.ca_certificate = der(
            certificate(self.ca_key.public_key(), self.ca_key, subject="ca", issuer="ca", ca=True)
        )
        self.identity_changes: dict[str, object] = {}
        self.attest_changes: dict[str, object] = {}
        self.activate_fault: HarnessError | None = None
        self.answer_change: bytes | None = None
        self.activations = 0
        self.clock, self.resets = 5000, 9

    @property
    def host_id(self) -> HostId:
        return protocol.host_id_of(self.ek.name)

    @property
    def baseline(self) -> ClockBaseline:
        return ClockBaseline(clock=self.clock, reset_count=self.resets, restart_count=1, firmware_version=77)

    # --- HostAccess ---------------------------------------------------------------------------------------

    async def identity(self, host_id: HostId) -> HostIdentity:
        members: dict[str, object] = {
            "host_id": self.host_id,
            "ek": self.ek.marshal(),
            "ek_certificates": (self.vendor.certify(self.ek_key.public_key()), der(self.vendor.issuing)),
            "ak": self.ak.marshal(),
            "ca": self.ca.marshal(),
            "ca_certificate": self.ca_certificate,
        }
        return HostIdentity(**(members | self.identity_changes))  # type: ignore[arg-type]

    async def activate(self, host_id: HostId, credential: bytes) -> bytes:
        self.activations += 1
        if self.activate_fault is not None:
            raise self.activate_fault
        if self.answer_change is not None:
            return self.answer_change
        secret = open_credential(self.ek_key, self.ak.name, parse_keylime_blob(credential))
        return protocol.enrol_answer(secret, requester=self.requester, host_id=self.host_id, ak_name=self.ak.name)

    async def certify(self, host_id: HostId, nonce: bytes) -> tuple[bytes, bytes]:
        members: dict[str, object] = {
            "magic": bytes.fromhex("ff544347"),
            "type": bytes.fromhex("8017"),
            "signer": owner_qualified_name(self.ak),
            "extra_data": protocol.certify_qualifying(nonce, self.ca.name),
            "name": self.ca.name,
            "qualified_name": owner_qualified_name(self.ca),
            "key": self.ak_key,
            "trailing": b"",
        }
        members |= self.attest_changes
        raw: dict[str, bytes] = {name: value for name, value in members.items() if isinstance(value, bytes)}
        attest = (
            raw["magic"]
            + raw["type"]
            + sized(raw["signer"])
            + sized(raw["extra_data"])
            + self.clock.to_bytes(8, "big")
            + self.resets.to_bytes(4, "big")
            + (1).to_bytes(4, "big")
            + b"\x01"
            + (77).to_bytes(8, "big")
            + sized(raw["name"])
            + sized(raw["qualified_name"])
            + raw["trailing"]
        )
        key = members["key"]
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        r, s = decode_dss_signature(key.sign(attest, ec.ECDSA(hashes.SHA256())))
        return attest, bytes.fromhex("0018000b") + sized(r.to_bytes(32, "big")) + sized(s.to_bytes(32, "big"))


class SoftVtpm:
    """A vTPM: EK and AK; its certificate is whatever a host's CA key signs."""

    def __init__(self) -> None:
        self.ek_key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self.ak_key = ec.generate_private_key(ec.SECP256R1())
        self.ek, self.ak = ek_public(self.ek_key), public_of(self.ak_key)

    def certified(self, agent_id: AgentId, signer: ec.EllipticCurvePrivateKey, **changes: object) -> bytes:
        """EK certificate as the vTPM CA makes it, with statements changed."""
        members: dict[str, object] = {
            "subject": "vtpm",
            "issuer": "ca",
            "use": EK_USE,
            "uris": (f"urn:uuid:{agent_id}",),
        }
        return der(certificate(self.ek_key.public_key(), signer, **(members | changes)))  # type: ignore[arg-type]

    def keys(self, ek_certificate: bytes) -> GuestKeys:
        return GuestKeys(
            ek=self.ek.marshal(),
            ek_certificate=ek_certificate,
            ak=self.ak.marshal(),
            mtls_cert="pem",
            ip="127.0.0.1",
            port=9000,
        )

    def activate(self, blob: bytes) -> bytes:
        """Secret of a challenge for this vTPM's EK and AK."""
        return open_credential(self.ek_key, self.ak.name, parse_keylime_blob(blob))
