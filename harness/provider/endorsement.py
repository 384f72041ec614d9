"""The EK of the hardware TPM and the vendor's certificates for it.

Invariants:
    1. The EK is the RSA-2048 one of template L-1: either the key that the vendor's certificate names, or one that
       this TPM made again from the template.
    2. Certificates leave here as plain DER, leaf first; what NV holds behind them is cut off.

Owner: `keys.HostKeys.provision`.

Spec: TCG EK Credential Profile 2.0, 2.2.1.4 (EK certificate), 2.2.1.5.2 (handles), 2.2.1.5.3 (certificate chain);
DESIGN 3.6.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from harness.attest import Public
from harness.credential import check_ek_rsa2048
from harness.errors import CapabilityMissing, MalformedMessage, UnacceptableKey
from harness.tpm_templates import KeyTemplate

if TYPE_CHECKING:
    from harness.tpm import Tpm

EK_CERTIFICATE_INDEX = 0x01C00002
CHAIN_FIRST_INDEX, CHAIN_LAST_INDEX = 0x01C00100, 0x01C001FF
EK_HANDLE = 0x81010001
"""Where swtpm_setup and most vendors leave the RSA EK."""
_OTHER_EK_HANDLE = 0x81014B00  # ours, when another key is at EK_HANDLE


async def ek_certificates(tpm: Tpm) -> tuple[bytes, ...]:
    """EK certificate and the certificates above it, from NV; empty when the vendor left none.

    Raises:
        CapabilityMissing: an index holds something else than certificates.
        TpmError: NV cannot be read.

    *Cancellation:* nothing is changed.
    """
    leaf = await tpm.nv_read(EK_CERTIFICATE_INDEX)
    if leaf is None:
        return ()
    found = split_certificates(leaf)[:1]
    for index in range(CHAIN_FIRST_INDEX, CHAIN_LAST_INDEX + 1):
        data = await tpm.nv_read(index)
        if data is None:
            break
        found += split_certificates(data)
    return tuple(found)


def split_certificates(data: bytes) -> list[bytes]:
    """DER objects at the beginning of an NV index; the filling after them (0x00 or 0xFF) is dropped.

    Raises:
        CapabilityMissing: the index does not begin with a complete DER SEQUENCE.
    """
    found: list[bytes] = []
    while data[:1] == b"\x30":
        end = _der_end(data)
        if end is None:
            break
        found.append(data[:end])
        data = data[end:]
    if not found:
        raise CapabilityMissing("an NV index for EK certificates does not hold a certificate")
    return found


def _der_end(data: bytes) -> int | None:
    """Length of the DER object at the beginning (X.690, 8.1.3); None when it is not complete."""
    if len(data) < 2:
        return None
    size, header = data[1], 2
    if size & 0x80:
        octets = size & 0x7F
        header += octets
        if not 1 <= octets <= 3 or len(data) < header:
            return None
        size = int.from_bytes(data[2:header], "big")
    end = header + size
    return end if end <= len(data) else None


async def find_ek(tpm: Tpm, certificates: tuple[bytes, ...]) -> tuple[int, Public]:
    """Persistent handle and public area of the EK, which is made persistent if it is not yet.

    Args:
        tpm: the TPM.
        certificates: from `ek_certificates`; spares making the key again, which takes a real TPM seconds.

    Raises:
        CapabilityMissing: both handles for an EK are taken by other keys.
        TpmError: the TPM did not do what it was asked.

    *Cancellation:* a transient key may be left; the next start flushes it.
    """
    present = {handle: await _read_ek(tpm, handle) for handle in (EK_HANDLE, _OTHER_EK_HANDLE)}
    certified = _certified_key(certificates)
    for handle, public in present.items():
        if isinstance(public, Public) and public.spki_digest() == certified:
            return handle, public
    made = await tpm.create_primary(KeyTemplate.EK_RSA2048, b"")
    again = await tpm.read_public(made)
    if again is None:
        raise CapabilityMissing("the TPM did not make an EK of template L-1")
    for handle, public in present.items():
        if isinstance(public, Public) and public.name == again.name:
            await tpm.flush(made)
            return handle, public
    for handle, public in present.items():
        if public is None:
            await tpm.persist(made, handle)
            return handle, again
    raise CapabilityMissing(f"0x{EK_HANDLE:08x} and 0x{_OTHER_EK_HANDLE:08x} are taken by keys that are not the EK")


async def _read_ek(tpm: Tpm, handle: int) -> Public | bool | None:
    """Public area of an acceptable EK; None when the handle is free, False when another key is there."""
    try:
        public = await tpm.read_public(handle)
        if public is not None:
            check_ek_rsa2048(public)
    except (MalformedMessage, UnacceptableKey):
        return False
    return public


def _certified_key(certificates: tuple[bytes, ...]) -> bytes | None:
    """SHA-256 of the public key in the EK certificate."""
    if not certificates:
        return None
    try:
        key = x509.load_der_x509_certificate(certificates[0]).public_key()
    except ValueError:  # some vendors' certificates are not strict DER; the key is then made again
        return None
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).digest()
