"""Certificates of a test that live for seconds, and their renewal on the same key."""

from __future__ import annotations

import asyncio
import datetime

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from harness.config import TlsSettings
from harness.pki import Issued, Role, load_certificate, load_key, now
from harness.tls import role_and_name
from tests.support.web_lab import Pki

LONG_S = 86400.0
_P256 = bytes.fromhex("06082a8648ce3d030107")
_EC_KEY = bytes.fromhex("06072a8648ce3d0201")
_ECDSA_SHA256 = bytes.fromhex("06082a8648ce3d040302")


def reissue(
    pki: Pki,
    tls: TlsSettings,
    *,
    seconds: float = LONG_S,
    authority: str | None = None,
    key: ec.EllipticCurvePrivateKey | None = None,
    role: Role | None = None,
    hosts: tuple[str, ...] = ("127.0.0.1",),
    at: datetime.datetime | None = None,
) -> Issued:
    """A certificate in place of the one in these settings; it is a renewal where nothing else is asked for."""
    own_role, name = role_and_name(load_certificate(tls.certificate))
    return pki.authority(authority or tls.certificate.parent.name).issue(
        role or own_role, name, hosts=hosts, key=key or load_key(tls.key), at=at, days=seconds / 86400
    )


def pem(issued: Issued) -> str:
    """The certificate as text."""
    return issued.certificate.public_bytes(Encoding.PEM).decode()


def odd(issued: Issued, what: str) -> x509.Certificate:
    """The certificate with a curve, an algorithm of its key, or one of its signature that nobody knows.

    It can be parsed: only what uses its key or its signature fails.
    """
    known, unknown = {
        "curve": (_P256, _P256[:-1] + b"\x7f"),
        "key algorithm": (_EC_KEY, _EC_KEY[:-1] + b"\x7f"),
        "signature algorithm": (_ECDSA_SHA256, _ECDSA_SHA256[:-1] + b"\x7f"),
    }[what]
    der = issued.certificate.public_bytes(Encoding.DER)
    assert known in der
    return x509.load_der_x509_certificate(der.replace(known, unknown))


def put_in_place(issued: Issued, tls: TlsSettings) -> None:
    """Writes the certificate to the file of these settings, as another tool would: in place."""
    tls.certificate.write_text(pem(issued))


async def until_expired(tls: TlsSettings) -> None:
    """Waits until the certificate in the file has expired."""
    end = load_certificate(tls.certificate).not_valid_after_utc
    while True:
        if now() > end:
            return
        await asyncio.sleep(0.05)
