"""Certificates whose signature comes from elsewhere."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, decode_dss_signature
from cryptography.x509.oid import NameOID

from harness.provider.tpm_certificate import assemble, to_be_signed

NAME = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "vTPM CA")])


def certificate(signer: ec.EllipticCurvePrivateKey, ca: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    builder = (
        x509.CertificateBuilder()
        .subject_name(NAME)
        .issuer_name(NAME)
        .public_key(ca.public_key())
        .serial_number(7)
        .not_valid_before(datetime.now(UTC))
        .not_valid_after(datetime.now(UTC) + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    )
    tbs, digest = to_be_signed(builder)
    signature = decode_dss_signature(signer.sign(digest, ec.ECDSA(Prehashed(hashes.SHA256()))))
    return x509.load_der_x509_certificate(assemble(tbs, signature))


def test_the_certificate_verifies_with_the_signers_key() -> None:
    """What was signed is what is in the certificate; repeated, because lengths of r and s vary."""
    for _ in range(40):
        key = ec.generate_private_key(ec.SECP256R1())
        made = certificate(key, key)
        made.verify_directly_issued_by(made)
        assert made.serial_number == 7


def test_another_signer_does_not_verify() -> None:
    """The throw-away key of the builder leaves no trace, and no other key passes."""
    ca, other = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    made = certificate(other, ca)
    with pytest.raises(InvalidSignature):
        made.verify_directly_issued_by(made)
