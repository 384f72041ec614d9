"""TPM structures with every field in the test's hand, signed by keys in software: what a lying provider could send."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from harness.attest import Public, owner_qualified_name, parse_public
from harness.values import HashAlg
from tests.support.soft_tpm import sized

AK_ATTRIBUTES = 0x00050072
"""fixedTPM, fixedParent, sensitiveDataOrigin, userWithAuth, restricted, sign."""
RSA, ECC = 0x0001, 0x0023
RSASSA, ECDSA, NULL = 0x0014, 0x0018, 0x0010
SHA1, SHA256, SHA384, SHA512 = 0x0004, 0x000B, 0x000C, 0x000D
P256, P384, P521 = 0x0003, 0x0004, 0x0005
_CURVES: dict[int, ec.EllipticCurve] = {P256: ec.SECP256R1(), P384: ec.SECP384R1(), P521: ec.SECP521R1()}
_HASHES: dict[int, hashes.HashAlgorithm] = {
    SHA1: hashes.SHA1(),  # noqa: S303 - what an AK must not use
    SHA256: hashes.SHA256(),
    SHA384: hashes.SHA384(),
    SHA512: hashes.SHA512(),
}


def u16(value: int) -> bytes:
    """Two bytes, big-endian."""
    return value.to_bytes(2, "big")


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftKey:
    """A key pair and the public area that describes it, truly or not."""

    private: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
    area: bytes
    hash_alg: int

    @property
    def marshalled(self) -> bytes:
        """TPM2B_PUBLIC."""
        return sized(self.area)

    @property
    def public(self) -> Public:
        """The public area, parsed."""
        return parse_public(self.marshalled)

    def sign(self, message: bytes, *, hash_alg: int | None = None) -> bytes:
        """TPMT_SIGNATURE by the key's scheme; with its hash unless another is given."""
        alg = hash_alg or self.hash_alg
        if isinstance(self.private, rsa.RSAPrivateKey):
            signature = self.private.sign(message, padding.PKCS1v15(), _HASHES[alg])
            return u16(RSASSA) + u16(alg) + sized(signature)
        r, s = decode_dss_signature(self.private.sign(message, ec.ECDSA(_HASHES[alg])))
        return ecdsa_signature(r, s, hash_alg=alg, size=(self.private.curve.key_size + 7) // 8)


def ecdsa_signature(r: int, s: int, *, hash_alg: int = SHA256, size: int = 32) -> bytes:
    """TPMT_SIGNATURE with these two numbers."""
    return u16(ECDSA) + u16(hash_alg) + sized(r.to_bytes(size, "big")) + sized(s.to_bytes(size, "big"))


@functools.cache
def ecc_key(
    *,
    curve: int = P256,
    hash_alg: int = SHA256,
    scheme: int = ECDSA,
    attributes: int = AK_ATTRIBUTES,
    name_alg: int = SHA256,
) -> SoftKey:
    """An ECC key; one for each set of arguments."""
    private = ec.generate_private_key(_CURVES[curve])
    numbers, size = private.public_key().public_numbers(), (private.curve.key_size + 7) // 8
    area = (
        u16(ECC) + u16(name_alg) + attributes.to_bytes(4, "big") + sized(b"") + u16(NULL)
        + (u16(scheme) if scheme == NULL else u16(scheme) + u16(hash_alg)) + u16(curve) + u16(NULL)
        + sized(numbers.x.to_bytes(size, "big")) + sized(numbers.y.to_bytes(size, "big"))
    )  # fmt: skip
    return SoftKey(private=private, area=area, hash_alg=hash_alg)


@functools.cache
def rsa_key(
    *,
    bits: int = 2048,
    hash_alg: int = SHA256,
    scheme: int = RSASSA,
    attributes: int = AK_ATTRIBUTES,
    exponent: int = 65537,
) -> SoftKey:
    """An RSA key; one for each set of arguments."""
    private = rsa.generate_private_key(exponent, bits)
    modulus = private.public_key().public_numbers().n.to_bytes(bits // 8, "big")
    area = (
        u16(RSA) + u16(SHA256) + attributes.to_bytes(4, "big") + sized(b"") + u16(NULL)
        + (u16(scheme) if scheme == NULL else u16(scheme) + u16(hash_alg)) + u16(bits)
        + (0 if exponent == 65537 else exponent).to_bytes(4, "big") + sized(modulus)
    )  # fmt: skip
    return SoftKey(private=private, area=area, hash_alg=hash_alg)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttestFields:
    """TPMS_ATTEST of a quote, field by field. ``selection`` holds (TPM_ALG_ID, bit map) in signed order."""

    signer: bytes
    extra_data: bytes
    selection: tuple[tuple[int, bytes], ...]
    pcr_digest: bytes
    magic: int = 0xFF544347
    type: int = 0x8018
    clock: int = 1000
    resets: int = 7
    restarts: int = 3
    safe: int = 1
    firmware: int = 0x20260101
    tail: bytes = b""

    def marshal(self) -> bytes:
        """The structure; ``tail`` is appended to it."""
        entries = b"".join(u16(alg) + bytes([len(bits)]) + bits for alg, bits in self.selection)
        return (
            self.magic.to_bytes(4, "big") + u16(self.type) + sized(self.signer) + sized(self.extra_data)
            + self.clock.to_bytes(8, "big") + self.resets.to_bytes(4, "big") + self.restarts.to_bytes(4, "big")
            + bytes([self.safe]) + self.firmware.to_bytes(8, "big")
            + len(self.selection).to_bytes(4, "big") + entries + sized(self.pcr_digest) + self.tail
        )  # fmt: skip


def bits_of(mask: int) -> bytes:
    """Bit map of three bytes."""
    return mask.to_bytes(3, "little")


def value_of(bank: HashAlg, pcr: int) -> bytes:
    """The value that a PCR has in these tests."""
    return bank.digest(b"measured" + bytes([pcr]))


def owner_name(key: SoftKey) -> bytes:
    """Qualified name of the key as a primary of the owner hierarchy."""
    return owner_qualified_name(key.public)


def endorsement_name(key: SoftKey) -> bytes:
    """Qualified name of the key as a primary of the endorsement hierarchy."""
    name = key.public.name
    return name[:2] + hashlib.sha256(bytes.fromhex("4000000b") + name).digest()
