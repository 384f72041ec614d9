"""A key's public area: TPM2B_PUBLIC to a typed value, with its Name and its SubjectPublicKeyInfo.

Keys of any RSA or ECC kind parse, so that `credential` can say what is unacceptable about them.

Invariants:
    1. The Name is the digest of the public area as received.
    2. Whether modulus and point make a key is not a question of parsing: `Public.key` answers it, and the checklists of
       `credential` ask.
    3. What follows from a public area alone is computed once (`Public.once`); what was refused is refused again.

Spec: TPM 2.0 Part 2: TPMT_PUBLIC 12.2.4, TPMS_RSA_PARMS 12.2.3.5, TPMS_ECC_PARMS 12.2.3.6, TPMA_OBJECT 8.3; Part 1, 16.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from harness.errors import MalformedMessage
from harness.reader import Reader
from harness.values import HashAlg

T = TypeVar("T")
PublicKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey
DEFAULT_EXPONENT = 65537
_NAME_HASHES = {0x0004: "sha1", 0x000B: "sha256", 0x000C: "sha384", 0x000D: "sha512"}
_CURVES: dict[int, type[ec.EllipticCurve]] = {
    0x0002: ec.SECP224R1,
    0x0003: ec.SECP256R1,
    0x0004: ec.SECP384R1,
    0x0005: ec.SECP521R1,
}
_ALG_NULL = 0x0010
_MAX_RSA_BYTES = 512
_MAX_ECC_BYTES = 80
_MAX_DIGEST = 64


class KeyType(enum.Enum):
    """Type of a key; the value is its TPM_ALG_ID."""

    RSA = 0x0001
    ECC = 0x0023


class Scheme(enum.IntEnum):
    """Schemes that a public area can name (TPM_ALG_ID)."""

    NULL = 0x0010
    RSASSA = 0x0014
    RSAES = 0x0015
    RSAPSS = 0x0016
    OAEP = 0x0017
    ECDSA = 0x0018
    ECDH = 0x0019
    ECDAA = 0x001A
    SM2 = 0x001B
    ECSCHNORR = 0x001C
    ECMQV = 0x001D


_SCHEMES = {
    KeyType.RSA: {Scheme.NULL, Scheme.RSASSA, Scheme.RSAES, Scheme.RSAPSS, Scheme.OAEP},
    KeyType.ECC: {
        Scheme.NULL,
        Scheme.ECDSA,
        Scheme.ECDH,
        Scheme.ECDAA,
        Scheme.SM2,
        Scheme.ECSCHNORR,
        Scheme.ECMQV,
    },
}


class ObjectAttributes(enum.IntFlag, boundary=enum.KEEP):
    """TPMA_OBJECT."""

    FIXED_TPM = 1 << 1
    ST_CLEAR = 1 << 2
    FIXED_PARENT = 1 << 4
    SENSITIVE_DATA_ORIGIN = 1 << 5
    USER_WITH_AUTH = 1 << 6
    ADMIN_WITH_POLICY = 1 << 7
    NO_DA = 1 << 10
    ENCRYPTED_DUPLICATION = 1 << 11
    RESTRICTED = 1 << 16
    DECRYPT = 1 << 17
    SIGN = 1 << 18
    X509_SIGN = 1 << 19


RESERVED_ATTRIBUTES = 0xFFFF_FFFF & ~sum(ObjectAttributes)
"""Bits of TPMA_OBJECT that must be zero."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Symmetric:
    """TPMT_SYM_DEF_OBJECT of a storage or endorsement key: TPM_ALG_IDs of cipher and mode, and the key's bits."""

    algorithm: int
    key_bits: int
    mode: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Public:
    """Public area of a key. Made by `parse_public`.

    ``scheme_hash`` is None where the scheme has none or one that the protocol does not allow. ``point`` is (x, y) for
    an ECC key, ``modulus`` the modulus of an RSA key (else 0); ``size_bits`` is keyBits or 0. ``stated_exponent`` is
    the exponent as it stands there; 0 means 65537.
    """

    type: KeyType
    name_alg: int
    attributes: ObjectAttributes
    auth_policy: bytes
    symmetric: Symmetric | None
    scheme: Scheme
    scheme_hash: HashAlg | None
    size_bits: int = 0
    exponent: int = 0
    stated_exponent: int = 0
    modulus: int = 0
    curve: int = 0
    point: tuple[int, int] = (0, 0)
    unique: tuple[bytes, ...] = field(default=(), repr=False)
    area: bytes = field(default=b"", repr=False)
    _known: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def once(self, what: str, compute: Callable[[], T]) -> T:
        """What ``compute`` gives, from the second time on without computing it.

        Args:
            what: names the result; it follows from this public area and nothing else.
            compute: makes it; what it raises is raised, and it is called again the next time.
        """
        if what not in self._known:
            self._known[what] = compute()
        return self._known[what]  # type: ignore[no-any-return]

    @property
    def name(self) -> bytes:
        """Name: nameAlg (2 bytes, big-endian) and the digest of the public area (Part 1, 16)."""
        return self.once("name", self._make_name)

    def _make_name(self) -> bytes:
        return self.name_alg.to_bytes(2, "big") + hashlib.new(_NAME_HASHES[self.name_alg], self.area).digest()

    def marshal(self) -> bytes:
        """TPM2B_PUBLIC as received."""
        return len(self.area).to_bytes(2, "big") + self.area

    def key(self) -> PublicKey:
        """The key for ``cryptography``.

        Raises:
            MalformedMessage: a curve, modulus or exponent that no key of ours can have, a modulus of another length
                than stated or an even one, or a point off its curve or with a padded coordinate.
        """
        return self.once("key", self._make_key)

    def _make_key(self) -> PublicKey:
        try:
            if self.type is KeyType.RSA:
                if not self.size_bits == self.modulus.bit_length() == 8 * len(self.unique[0]):
                    raise MalformedMessage(f"the modulus does not have the stated {self.size_bits} bits")
                if not self.modulus & 1:  # the library takes it, and fails only where the key is used
                    raise MalformedMessage("the modulus is even")
                return rsa.RSAPublicNumbers(self.exponent, self.modulus).public_key()
            if self.curve not in _CURVES:
                raise MalformedMessage(f"curve {self.curve:#06x} is not supported")
            curve = _CURVES[self.curve]()
            # Shorter is a number without its leading zeros; longer would be the same key under another Name.
            if any(len(coordinate) > (curve.key_size + 7) // 8 for coordinate in self.unique):
                raise MalformedMessage(f"a coordinate is longer than those of {curve.name}")
            return ec.EllipticCurvePublicNumbers(*self.point, curve).public_key()
        except (ValueError, UnsupportedAlgorithm) as error:
            raise MalformedMessage(f"public area does not hold a usable {self.type.name} key") from error

    def spki(self) -> bytes:
        """DER SubjectPublicKeyInfo (RFC 5280, 4.1.2.7)."""
        return self.key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)

    def spki_digest(self) -> bytes:
        """SHA-256 of `spki`; 32 bytes."""
        return hashlib.sha256(self.spki()).digest()


def parse_public(data: bytes) -> Public:
    """Public area from a TPM2B_PUBLIC.

    Args:
        data: two bytes of length, then the TPMT_PUBLIC.

    Raises:
        MalformedMessage: not a complete public area of an RSA or ECC key.
    """
    outer = Reader(data, "TPM2B_PUBLIC")
    area = outer.tpm2b("publicArea", at_most=1024)
    outer.end()
    reader = Reader(area, "TPMT_PUBLIC")
    type_id = reader.integer(2, "type")
    try:
        key_type = KeyType(type_id)
    except ValueError:
        raise MalformedMessage(f"key type {type_id:#06x} is neither RSA nor ECC") from None
    name_alg = reader.integer(2, "nameAlg")
    if name_alg not in _NAME_HASHES:
        raise MalformedMessage(f"nameAlg {name_alg:#06x} is not a known hash")
    attributes = ObjectAttributes(reader.integer(4, "objectAttributes"))
    auth_policy = reader.tpm2b("authPolicy", at_most=_MAX_DIGEST)
    symmetric = _symmetric(reader)
    scheme, scheme_hash = _scheme(reader, key_type)
    kind = _rsa_fields(reader) if key_type is KeyType.RSA else _ecc_fields(reader)
    reader.end()
    return Public(
        type=key_type,
        name_alg=name_alg,
        attributes=attributes,
        auth_policy=auth_policy,
        symmetric=symmetric,
        scheme=scheme,
        scheme_hash=scheme_hash,
        area=area,
        **kind,  # type: ignore[arg-type]
    )


def _symmetric(reader: Reader) -> Symmetric | None:
    algorithm = reader.integer(2, "symmetric")
    if algorithm == _ALG_NULL:
        return None
    if algorithm not in {0x0006, 0x0013, 0x0026}:  # AES, SM4, CAMELLIA
        raise MalformedMessage(f"symmetric algorithm {algorithm:#06x} is not a block cipher")
    return Symmetric(algorithm=algorithm, key_bits=reader.integer(2, "keyBits"), mode=reader.integer(2, "mode"))


def _scheme(reader: Reader, key_type: KeyType) -> tuple[Scheme, HashAlg | None]:
    number = reader.integer(2, "scheme")
    if number not in {int(scheme) for scheme in _SCHEMES[key_type]}:
        raise MalformedMessage(f"scheme {number:#06x} does not belong to an {key_type.name} key")
    scheme = Scheme(number)
    if scheme in {Scheme.NULL, Scheme.RSAES}:
        return scheme, None
    hash_id = reader.integer(2, "scheme's hashAlg")
    if scheme is Scheme.ECDAA:
        reader.integer(2, "count")
    allowed = {alg.value: alg for alg in HashAlg}
    return scheme, allowed.get(hash_id)


def _rsa_fields(reader: Reader) -> dict[str, object]:
    bits = reader.integer(2, "keyBits")
    stated_exponent = reader.integer(4, "exponent")
    modulus = reader.tpm2b("modulus", at_most=_MAX_RSA_BYTES)
    number = int.from_bytes(modulus, "big")
    return {
        "size_bits": bits,
        "exponent": stated_exponent or DEFAULT_EXPONENT,
        "stated_exponent": stated_exponent,
        "modulus": number,
        "unique": (modulus,),
    }


def _ecc_fields(reader: Reader) -> dict[str, object]:
    curve = reader.integer(2, "curveID")
    if reader.integer(2, "kdf") != _ALG_NULL:
        reader.integer(2, "kdf's hashAlg")
    x = reader.tpm2b("point.x", at_most=_MAX_ECC_BYTES)
    y = reader.tpm2b("point.y", at_most=_MAX_ECC_BYTES)
    return {"curve": curve, "point": (int.from_bytes(x, "big"), int.from_bytes(y, "big")), "unique": (x, y)}
