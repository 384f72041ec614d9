"""X.509 certificates whose signature a TPM makes: what is to be signed, and the certificate around the signature.

Invariants:
    1. The bytes that are signed are those that end up in the certificate.

Spec: RFC 5280, 4.1; RFC 5758, 3.2 (ecdsa-with-SHA256, no parameters).
"""

from __future__ import annotations

import hashlib

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

_ECDSA_WITH_SHA256 = bytes.fromhex("300a06082a8648ce3d040302")


def to_be_signed(builder: x509.CertificateBuilder) -> tuple[bytes, bytes]:
    """TBSCertificate for a P-256 signer, and its SHA-256 digest.

    `cryptography` gives it out only together with a signature. That signature is made by a key that is thrown away;
    nothing in a TBSCertificate depends on the signer's key but what the builder put there.
    """
    tbs = builder.sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256()).tbs_certificate_bytes
    return tbs, hashlib.sha256(tbs).digest()


def assemble(tbs: bytes, signature: tuple[int, int]) -> bytes:
    """DER certificate.

    Args:
        tbs: from `to_be_signed`.
        signature: (r, s) over its digest.
    """
    bits = b"\x00" + encode_dss_signature(*signature)
    return _der(0x30, tbs + _ECDSA_WITH_SHA256 + _der(0x03, bits))


def _der(tag: int, content: bytes) -> bytes:
    size = len(content)
    if size < 0x80:
        return bytes([tag, size]) + content
    octets = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(octets)]) + octets + content
