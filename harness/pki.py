"""Service certificates of a lab: one authority for the provider and one for each tenant.

Who a peer is stands in its certificate: the authority that signed it, and one URI
``urn:kvm-deep-attestation:<role>:<name>`` among the subject alternative names.

Invariants:
    1. Private keys are in files of mode 0600; files appear whole.
    2. A renewed certificate keeps its key, and so its owner's ``requester`` (DESIGN 3.2).

Spec: RFC 5280; RFC 9525 (names of services).
"""

from __future__ import annotations

import datetime
import enum
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from harness.errors import CertificateRefused, ConfigError
from harness.private_file import write_private

URN = "urn:kvm-deep-attestation:"
_DAY = datetime.timedelta(days=1)
_CA_DAYS = 3650
_LEAF_DAYS = 365
_USES = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)


class Role(enum.StrEnum):
    """What a certificate's owner may be."""

    HOST_AGENT = "host-agent"
    PROVIDER_VERIFIER = "provider-verifier"
    PROVIDER_REGISTRAR = "provider-registrar"
    PROVIDER_OPERATOR = "provider-operator"
    TENANT_REGISTRAR = "tenant-registrar"
    TENANT_VERIFIER = "tenant-verifier"
    TENANT_OPERATOR = "tenant-operator"
    GUEST_AGENT = "guest-agent"


TENANT_ROLES = frozenset({Role.TENANT_REGISTRAR, Role.TENANT_VERIFIER, Role.TENANT_OPERATOR, Role.GUEST_AGENT})
"""What a tenant's authority may make somebody; the other roles are the provider's to give."""


def now() -> datetime.datetime:
    """The machine's time, UTC."""
    return datetime.datetime.now(datetime.UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Issued:
    """A certificate and its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    def write(self, folder: Path, name: str) -> tuple[Path, Path]:
        """Writes ``name.pem`` and ``name.key``; returns their paths."""
        certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
        write_private(certificate, self.certificate.public_bytes(serialization.Encoding.PEM))
        write_private(
            key,
            self.key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            ),
        )
        return certificate, key


class Authority:
    """A certification authority. Made by `create` or `load`.

    Args:
        issued: its own certificate and key.
    """

    def __init__(self, issued: Issued) -> None:
        self._own = issued

    @property
    def certificate(self) -> x509.Certificate:
        """Its self-signed certificate."""
        return self._own.certificate

    @classmethod
    def create(cls, name: str, *, at: datetime.datetime | None = None) -> Authority:
        """New authority with a key of its own.

        Args:
            name: common name; two authorities may have the same one.
            at: begin of validity, now when None.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = (
            _builder(subject, subject, key, at or now(), _CA_DAYS)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(signs_certificates=True), critical=True)
            .sign(key, hashes.SHA256())
        )
        return cls(Issued(certificate=certificate, key=key))

    @classmethod
    def load(cls, folder: Path) -> Authority:
        """Authority from the files that `write` made.

        Raises:
            ConfigError: a file is missing or unusable, or the key is not the certificate's.
        """
        return cls(load_issued(folder / "ca.pem", folder / "ca.key"))

    def write(self, folder: Path) -> Path:
        """Writes ``ca.pem`` and ``ca.key``; returns the certificate's path."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return self._own.write(folder, "ca")[0]

    def issue(
        self,
        role: Role,
        name: str,
        *,
        hosts: Sequence[str] = ("127.0.0.1", "localhost"),
        key: ec.EllipticCurvePrivateKey | None = None,
        at: datetime.datetime | None = None,
        days: float = _LEAF_DAYS,
    ) -> Issued:
        """Certificate for a service or an operator, for use as server and as client.

        Args:
            role: what its owner may do.
            name: its owner's name.
            hosts: addresses and names under which it serves.
            key: key to keep (renewal); a new one when None.
            at: begin of validity, now when None.
            days: length of validity.
        """
        key = key or ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{role.value} {name}"[:64])])
        names = [x509.UniformResourceIdentifier(f"{URN}{role.value}:{name}"), *map(_general_name, hosts)]
        certificate = (
            _builder(subject, self.certificate.subject, key, at or now(), days)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(_USES), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._own.key.public_key()), critical=False
            )
            .sign(self._own.key, hashes.SHA256())
        )
        return Issued(certificate=certificate, key=key)


def renew(
    authority: Authority, issued: Issued, *, days: float = _LEAF_DAYS, at: datetime.datetime | None = None
) -> Issued:
    """The same certificate, valid anew: same key, role, name and addresses.

    Args:
        authority: signs it; the one that signed the old one.
        issued: the old certificate and its key.
        days: length of validity.
        at: begin of validity, now when None.

    Raises:
        ConfigError: the certificate does not state one role and name, or another authority signed it.
    """
    try:
        issued.certificate.verify_directly_issued_by(authority.certificate)
        names = issued.certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        [uri] = names.get_values_for_type(x509.UniformResourceIdentifier)
        role, _, name = uri.removeprefix(URN).partition(":")
        owner = Role(role)
    except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound) as error:
        raise ConfigError("the certificate is none that this authority made for a service or an operator") from error
    hosts = [str(address) for address in names.get_values_for_type(x509.IPAddress)]
    hosts += names.get_values_for_type(x509.DNSName)
    return authority.issue(owner, name, hosts=hosts, key=issued.key, at=at, days=days)


def load_issued(certificate: Path, key: Path) -> Issued:
    """Certificate and key from the files that `Issued.write` made, for example to renew it.

    Raises:
        ConfigError: a file is missing or unusable, or the key is not the certificate's.
    """
    loaded = Issued(certificate=load_certificate(certificate), key=load_key(key))
    try:
        public = public_key_of(loaded.certificate)
    except CertificateRefused as error:
        raise ConfigError(f"{certificate}: {error.detail}") from error
    if public != loaded.key.public_key():
        raise ConfigError(f"{key}: is not the key of {certificate}")
    return loaded


def load_certificate(path: Path) -> x509.Certificate:
    """Certificate from a PEM file.

    Raises:
        ConfigError: the file cannot be read or holds no certificate.
    """
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, x509.InvalidVersion) as error:
        raise ConfigError(f"{path}: holds no PEM certificate") from error


def public_key_of(certificate: x509.Certificate) -> CertificatePublicKeyTypes:
    """The key of a certificate that was made by anybody.

    Raises:
        CertificateRefused: no key of a kind that is known here: a certificate can be parsed although its key cannot.
    """
    try:
        return certificate.public_key()
    except (ValueError, UnsupportedAlgorithm) as error:
        raise CertificateRefused("its key cannot be used: its curve or algorithm is not known here") from error


def load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Private key from a PEM file.

    Raises:
        ConfigError: the file cannot be read or holds no elliptic-curve key.
    """
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path}: holds no PEM private key") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path}: is not an elliptic-curve key")
    return key


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, at: datetime.datetime, days: float
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(at - _DAY)
        .not_valid_after(at + days * _DAY)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
