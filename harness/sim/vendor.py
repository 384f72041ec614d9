"""Simulated TPM vendor: a root, an issuing CA, and EK certificates in the TPM's NV memory.

The certificate is written through the TPM client after swtpm_setup has made the EK, and not by a ``create_certs_tool``:
such a tool is a program of its own, up to three starts of an interpreter for each TPM.

Invariants:
    1. The root's private key is dropped as soon as the issuing CA is certified: two levels, as vendors have them.
    2. Vendors in different folders have nothing in common; a tenant that pins one root refuses the other's TPMs.

Spec: TCG EK Credential Profile 2.5: 2.2.1.4 and 2.2.1.5 (NV indices), 3.2 (fields of the certificate).
"""

from __future__ import annotations

import datetime
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from harness.certificates import EK_OID
from harness.errors import SimulationError
from harness.private_file import write_private
from harness.sim.profiles import TpmModel
from harness.tpm import Tpm

EK_CERTIFICATE_RSA2048 = 0x01C0_0002
EK_CERTIFICATE_CHAIN = 0x01C0_0100
EK_HANDLE = 0x8101_0001
ROOT_CERTIFICATE = "root.pem"
"""File in a vendor's folder: the certificate that tenants pin."""

_ISSUING_CERTIFICATE, _ISSUING_KEY = "issuing.pem", "issuing.key"
_TPM_MANUFACTURER, _TPM_MODEL, _TPM_VERSION = (x509.ObjectIdentifier(f"2.23.133.2.{i}") for i in (1, 2, 3))
_DAY = datetime.timedelta(days=1)
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Vendor:
    """A vendor that can issue EK certificates. Made by `open_vendor`."""

    root: x509.Certificate
    issuing: x509.Certificate
    _key: ec.EllipticCurvePrivateKey

    def ek_certificate(self, ek: rsa.RSAPublicKey, tpm: TpmModel, *, now: datetime.datetime) -> bytes:
        """DER certificate of an EK: not a CA, for key encipherment only, with the chip's identity as SAN.

        Args:
            ek: public key of the EK.
            tpm: manufacturer, model and version to state.
            now: start of the validity, less a day; it lasts ten years.
        """
        attributes = ((_TPM_MANUFACTURER, tpm.manufacturer), (_TPM_MODEL, tpm.model), (_TPM_VERSION, tpm.version))
        identity = x509.Name(
            [x509.RelativeDistinguishedName([x509.NameAttribute(oid, text)]) for oid, text in attributes]
        )
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(self.issuing.subject)
            .public_key(ek)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _DAY)
            .not_valid_after(now + 3650 * _DAY)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(key_encipherment=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([EK_OID]), critical=False)
            # An empty subject makes the SAN critical (RFC 5280, 4.2.1.6).
            .add_extension(x509.SubjectAlternativeName([x509.DirectoryName(identity)]), critical=True)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)

    async def equip(self, tpm: Tpm, model: TpmModel, *, now: datetime.datetime) -> None:
        """Writes EK certificate and issuing CA into the NV memory of a TPM whose EK swtpm_setup has made persistent.

        Raises:
            SimulationError: the TPM has no RSA EK.
            TpmError: it does not take the certificates.

        *Cancellation:* one of the two may be written; call again.
        """
        public = await tpm.read_public(EK_HANDLE)
        key = public.key() if public is not None else None
        if not isinstance(key, rsa.RSAPublicKey):
            raise SimulationError(f"the TPM has no RSA EK at {EK_HANDLE:#x}")
        await tpm.nv_write(EK_CERTIFICATE_CHAIN, self.issuing.public_bytes(serialization.Encoding.DER))
        await tpm.nv_write(EK_CERTIFICATE_RSA2048, self.ek_certificate(key, model, now=now))


def open_vendor(folder: Path, *, name: str, now: datetime.datetime) -> Vendor:
    """Vendor kept in this folder; made there when the folder does not exist. Several processes may do so at once.

    Args:
        folder: of this vendor alone.
        name: for the certificates of a new vendor.
        now: start of a new vendor's validity, less a day; it lasts twenty years.

    Raises:
        SimulationError: the folder cannot be used.
    """
    try:
        if not folder.exists():
            _create(folder, name, now)
    except OSError as error:
        raise SimulationError(f"TPM vendor in {folder} cannot be made: {error.strerror}") from error
    key = _read(folder / _ISSUING_KEY, lambda data: serialization.load_pem_private_key(data, password=None))
    root = _read(folder / ROOT_CERTIFICATE, x509.load_pem_x509_certificate)
    issuing = _read(folder / _ISSUING_CERTIFICATE, x509.load_pem_x509_certificate)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise SimulationError(f"TPM vendor in {folder} cannot be used: not an EC key")
    return Vendor(root=root, issuing=issuing, _key=key)


def _read(path: Path, parse: Callable[[bytes], T]) -> T:
    try:
        return parse(path.read_bytes())
    except OSError as error:
        raise SimulationError(f"{path} of the TPM vendor cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise SimulationError(f"{path} of the TPM vendor is not in PEM; put the whole file back") from error


def _create(folder: Path, name: str, now: datetime.datetime) -> None:
    root_key, issuing_key = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP256R1())
    root_name, issuing_name = _name(f"{name} root CA"), _name(f"{name} issuing CA 1")
    root = _ca(root_name, root_name, root_key.public_key(), path_length=1, now=now).sign(root_key, hashes.SHA384())
    issuing = (
        _ca(issuing_name, root_name, issuing_key.public_key(), path_length=0, now=now)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key()), critical=False)
        .sign(root_key, hashes.SHA384())
    )
    pem = serialization.Encoding.PEM
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))  # mode 0700
    (building / ROOT_CERTIFICATE).write_bytes(root.public_bytes(pem))
    (building / _ISSUING_CERTIFICATE).write_bytes(issuing.public_bytes(pem))
    write_private(
        building / _ISSUING_KEY,
        issuing_key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )
    try:
        os.rename(building, folder)  # one step: others see no vendor or a whole one
    except OSError:
        shutil.rmtree(building)  # another process was faster; its vendor counts
        if not folder.exists():
            raise


def _ca(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, *, path_length: int, now: datetime.datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _DAY)
        .not_valid_after(now + 7300 * _DAY)
        .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
        .add_extension(_key_usage(cert_sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _key_usage(*, key_encipherment: bool = False, cert_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=key_encipherment,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=cert_sign,
        crl_sign=cert_sign,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
