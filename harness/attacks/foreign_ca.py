"""A create_certs_tool that certifies a vTPM with a CA of its own: what anybody can do who runs swtpm_setup elsewhere.

The certificate looks like ours in everything but the key that signed it. Refused by: enrolment, CertificateRefused.

Spec: swtpm_setup(8), create_certs_tool; DESIGN 3.6.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

_EK, _PLATFORM = x509.ObjectIdentifier("2.23.133.8.1"), x509.ObjectIdentifier("2.23.133.8.2")
_DAY = datetime.timedelta(days=1)
_CURVES: dict[str, type[ec.EllipticCurve]] = {"secp256r1": ec.SECP256R1, "secp384r1": ec.SECP384R1}


def main(argv: list[str]) -> int:
    """Runs the tool; returns its exit code."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("type", "ek", "dir", "vmid"):
        parser.add_argument("--" + name, required=True)
    given, _ = parser.parse_known_args(argv)
    key = _key(given.ek)
    certificate = _certificate(key, given.vmid.rpartition(":")[2], platform=given.type == "platform")
    path = Path(given.dir) / f"{given.type}.cert"
    path.write_bytes(certificate.public_bytes(serialization.Encoding.DER))
    return 0


def _key(text: str) -> rsa.RSAPublicKey | ec.EllipticCurvePublicKey:
    if text.startswith("x="):
        parts = dict(part.split("=", 1) for part in text.split(","))
        return ec.EllipticCurvePublicNumbers(
            int(parts["x"], 16), int(parts["y"], 16), _CURVES[parts["id"]]()
        ).public_key()
    return rsa.RSAPublicNumbers(65537, int(text, 16)).public_key()


def _certificate(
    key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey, agent_id: str, *, platform: bool
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    usage = x509.KeyUsage(False, False, not platform, False, False, False, False, False, False)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, agent_id)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "vTPM CA of host1")]))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _DAY)
        .not_valid_after(now + 3650 * _DAY)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([_PLATFORM if platform else _EK]), critical=False)
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"urn:uuid:{agent_id}")]), critical=False
        )
        .sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
