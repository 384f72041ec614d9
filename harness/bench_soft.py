"""Evidence for benchmarks of the tenant's side: the bytes that a TPM would give, signed by a key in software.

A chip's time is not what these benchmarks measure; structures, lengths and signatures are those of a real one.

Spec: TPM 2.0 Part 2: TPMS_ATTEST 10.12.12, TPMT_SIGNATURE 11.3.4, TPMT_PUBLIC 12.2.4.
"""

from __future__ import annotations

import hashlib

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from harness.attest import ST_ATTEST_QUOTE, TPM_GENERATED_VALUE, Public, owner_qualified_name, parse_public
from harness.protocol import tpm2b
from harness.public_area import Scheme
from harness.tpm_templates import KeyTemplate
from harness.values import ClockBaseline, HashAlg, PcrSelection

BANK = HashAlg.SHA256
_FIRMWARE = 0x2026_0101
_RESETS, _RESTARTS = 7, 3
_KEY_SIZE = 32
_TAIL = {KeyTemplate.AK_RSA2048: 2, KeyTemplate.AK_P256: 4}
"""Length of the empty ``unique`` at the end of a template."""


class SoftTpm:
    """PCRs of the SHA-256 bank, a clock and one AK.

    Args:
        template: of the AK.
    """

    def __init__(self, template: KeyTemplate) -> None:
        self._key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey
        if template is KeyTemplate.AK_RSA2048:
            self._key = rsa.generate_private_key(65537, 2048)
            modulus = self._key.public_key().public_numbers().n
            unique = tpm2b(modulus.to_bytes(256, "big"))
        else:
            self._key = ec.generate_private_key(ec.SECP256R1())
            numbers = self._key.public_key().public_numbers()
            unique = tpm2b(numbers.x.to_bytes(_KEY_SIZE, "big")) + tpm2b(numbers.y.to_bytes(_KEY_SIZE, "big"))
        area = template.public(b"")[2 : -_TAIL[template]] + unique
        self.ak: Public = parse_public(tpm2b(area))
        self.ak_qualified_name = owner_qualified_name(self.ak)
        self.pcrs = {pcr: hashlib.sha256(b"measured" + bytes([pcr])).digest() for pcr in range(24)}
        self._clock = 1_000

    @property
    def baseline(self) -> ClockBaseline:
        """Clock and counters now."""
        return ClockBaseline(
            clock=self._clock, reset_count=_RESETS, restart_count=_RESTARTS, firmware_version=_FIRMWARE
        )

    def values(self, selection: PcrSelection) -> dict[HashAlg, dict[int, bytes]]:
        """Values of these PCRs."""
        return {BANK: {pcr: self.pcrs[pcr] for _, pcr in selection}}

    def quote(self, extra_data: bytes, selection: PcrSelection) -> tuple[bytes, bytes]:
        """TPMS_ATTEST and TPMT_SIGNATURE of a quote; each has a greater clock than the one before."""
        self._clock += 1
        digest = hashlib.sha256(b"".join(self.pcrs[pcr] for _, pcr in selection)).digest()
        attest = (
            TPM_GENERATED_VALUE.to_bytes(4, "big")
            + ST_ATTEST_QUOTE.to_bytes(2, "big")
            + tpm2b(self.ak_qualified_name)
            + tpm2b(extra_data)
            + self._clock.to_bytes(8, "big")
            + _RESETS.to_bytes(4, "big")
            + _RESTARTS.to_bytes(4, "big")
            + b"\x01"
            + _FIRMWARE.to_bytes(8, "big")
            + selection.marshal()
            + tpm2b(digest)
        )
        return attest, self._sign(attest)

    def _sign(self, message: bytes) -> bytes:
        alg = BANK.value.to_bytes(2, "big")
        if isinstance(self._key, rsa.RSAPrivateKey):
            signature = self._key.sign(message, padding.PKCS1v15(), hashes.SHA256())
            return Scheme.RSASSA.to_bytes(2, "big") + alg + tpm2b(signature)
        numbers = decode_dss_signature(self._key.sign(message, ec.ECDSA(hashes.SHA256())))
        halves = b"".join(tpm2b(number.to_bytes(_KEY_SIZE, "big")) for number in numbers)
        return Scheme.ECDSA.to_bytes(2, "big") + alg + halves
