"""TPM structures that arrive from outside: bytes to typed values, and signatures checked over the received bytes.

Pure Python and ``cryptography``: whoever appraises needs no TPM library.

Invariants:
    1. Parsing is complete: every length is checked, no byte is left over, and the input is kept as received.
    2. More can be *parsed* than is *accepted*: `credential` judges keys, `tenant.appraisal` judges quotes.

Spec: TPM 2.0 Part 2: TPMS_ATTEST 10.12.12, TPMT_SIGNATURE 11.3.4, TPMS_CLOCK_INFO 10.11.1, TPML_PCR_SELECTION 10.9.7.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils

from harness.errors import MalformedMessage, QuoteSignatureInvalid
from harness.public_area import RESERVED_ATTRIBUTES, KeyType, ObjectAttributes, Public, Scheme, parse_public
from harness.reader import Reader
from harness.values import HASH_ALGS, ClockInfo, HashAlg

__all__ = [
    "RESERVED_ATTRIBUTES",
    "ST_ATTEST_CERTIFY",
    "ST_ATTEST_QUOTE",
    "TPM_GENERATED_VALUE",
    "Attest",
    "CertifyInfo",
    "EcdsaSignature",
    "KeyType",
    "ObjectAttributes",
    "Public",
    "QuoteInfo",
    "RsassaSignature",
    "Scheme",
    "SelectionEntry",
    "Signature",
    "owner_qualified_name",
    "parse_attest",
    "parse_public",
    "parse_signature",
    "verify_signature",
]

TPM_GENERATED_VALUE = 0xFF544347
ST_ATTEST_CERTIFY = 0x8017
ST_ATTEST_QUOTE = 0x8018
_RH_OWNER = 0x40000001
_CLOCK = struct.Struct(">QIIBQ")
"""TPMS_CLOCK_INFO, and the firmware version behind it."""
_MAX_NAME = 68
_MAX_DATA = 66
_MAX_DIGEST = 64
_MAX_BANKS = 16
_MAX_RSA_BYTES = 512
_MAX_ECC_BYTES = 66
_HASHES: dict[HashAlg, Callable[[], hashes.HashAlgorithm]] = {
    HashAlg.SHA256: hashes.SHA256,
    HashAlg.SHA384: hashes.SHA384,
    HashAlg.SHA512: hashes.SHA512,
}
_ORDERS = {
    "secp256r1": 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551,
    "secp384r1": 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFC7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973,
}
"""Order n of each curve's group (FIPS 186-4, D.1.2)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionEntry:
    """TPMS_PCR_SELECTION as signed: a TPM_ALG_ID, the length of the bit map, and the map as a mask."""

    hash_alg: int
    size_of_select: int
    mask: int


@dataclass(frozen=True, slots=True, kw_only=True)
class QuoteInfo:
    """TPMS_QUOTE_INFO: selections in signed order and the digest over the selected PCRs."""

    selection: tuple[SelectionEntry, ...]
    pcr_digest: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class CertifyInfo:
    """TPMS_CERTIFY_INFO: Name and qualified name of the certified object."""

    name: bytes
    qualified_name: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Attest:
    """TPMS_ATTEST as received; nothing in it is believed yet. ``magic`` is not judged here."""

    magic: int
    type: int
    qualified_signer: bytes
    extra_data: bytes
    clock_info: ClockInfo
    firmware_version: int
    attested: QuoteInfo | CertifyInfo
    raw: bytes = field(repr=False)


def parse_attest(data: bytes) -> Attest:
    """Attestation structure of a quote or a certification.

    Args:
        data: TPMS_ATTEST, without the TPM2B length.

    Raises:
        MalformedMessage: cut short, trailing bytes, a length out of bounds, or another type.
    """
    reader = Reader(data, "TPMS_ATTEST")
    magic = reader.integer(4, "magic")
    kind = reader.integer(2, "type")
    signer = reader.tpm2b("qualifiedSigner", at_most=_MAX_NAME)
    extra_data = reader.tpm2b("extraData", at_most=_MAX_DATA)
    clock, resets, restarts, safe, firmware_version = _CLOCK.unpack(
        reader.take(_CLOCK.size, "clockInfo and firmwareVersion")
    )
    if safe > 1:
        raise MalformedMessage(f"TPMS_ATTEST: safe is {safe}, neither yes nor no")
    if kind == ST_ATTEST_QUOTE:
        attested: QuoteInfo | CertifyInfo = _quote_info(reader)
    elif kind == ST_ATTEST_CERTIFY:
        name = reader.tpm2b("name", at_most=_MAX_NAME)
        attested = CertifyInfo(name=name, qualified_name=reader.tpm2b("qualifiedName", at_most=_MAX_NAME))
    else:
        raise MalformedMessage(f"TPMS_ATTEST: type {kind:#06x} is neither a quote nor a certification")
    reader.end()
    return Attest(
        magic=magic,
        type=kind,
        qualified_signer=signer,
        extra_data=extra_data,
        clock_info=ClockInfo(clock=clock, reset_count=resets, restart_count=restarts, safe=safe == 1),
        firmware_version=firmware_version,
        attested=attested,
        raw=data,
    )


def _quote_info(reader: Reader) -> QuoteInfo:
    count = reader.integer(4, "pcrSelect.count")
    if count > _MAX_BANKS:
        raise MalformedMessage(f"TPMS_ATTEST: {count} PCR selections, at most {_MAX_BANKS} are allowed")
    entries = []
    for _ in range(count):
        hash_alg = reader.integer(2, "pcrSelect.hash")
        size = reader.integer(1, "pcrSelect.sizeofSelect")
        mask = int.from_bytes(reader.take(size, "pcrSelect.pcrSelect"), "little")
        entries.append(SelectionEntry(hash_alg=hash_alg, size_of_select=size, mask=mask))
    return QuoteInfo(selection=tuple(entries), pcr_digest=reader.tpm2b("pcrDigest", at_most=_MAX_DIGEST))


@dataclass(frozen=True, slots=True, kw_only=True)
class RsassaSignature:
    """TPMS_SIGNATURE_RSASSA."""

    hash_alg: HashAlg
    signature: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class EcdsaSignature:
    """TPMS_SIGNATURE_ECDSA."""

    hash_alg: HashAlg
    r: int
    s: int


Signature = RsassaSignature | EcdsaSignature


def parse_signature(data: bytes) -> Signature:
    """Signature in one of the two schemes of the protocol.

    Args:
        data: TPMT_SIGNATURE.

    Raises:
        MalformedMessage: another scheme or hash, cut short, or trailing bytes.
    """
    reader = Reader(data, "TPMT_SIGNATURE")
    scheme = reader.integer(2, "sigAlg")
    if scheme not in {Scheme.RSASSA, Scheme.ECDSA}:
        raise MalformedMessage(f"TPMT_SIGNATURE: scheme {scheme:#06x} is neither RSASSA nor ECDSA")
    hash_id = reader.integer(2, "hash")
    hash_alg = HASH_ALGS.get(hash_id)
    if hash_alg is None:
        raise MalformedMessage(f"TPMT_SIGNATURE: hash {hash_id:#06x} is not one of sha256, sha384, sha512")
    if scheme == Scheme.RSASSA:
        signature: Signature = RsassaSignature(hash_alg=hash_alg, signature=reader.tpm2b("sig", at_most=_MAX_RSA_BYTES))
    else:
        r, s = (int.from_bytes(reader.tpm2b(part, at_most=_MAX_ECC_BYTES), "big") for part in ("signatureR", "s"))
        signature = EcdsaSignature(hash_alg=hash_alg, r=r, s=s)
    reader.end()
    return signature


def verify_signature(public: Public, signature: Signature, message: bytes) -> None:
    """Checks a signature over the bytes as received.

    1. The signature's scheme and hash are those of the key.
    2. RSA: the signature is as long as the modulus; ECDSA: r and s are in [1, n - 1].
    3. It verifies.

    Args:
        public: the signing key; whether it is *acceptable* is the caller's business (`credential`).
        signature: parsed.
        message: what was signed, as received.

    Raises:
        QuoteSignatureInvalid: any of these does not hold.
    """
    scheme = Scheme.RSASSA if isinstance(signature, RsassaSignature) else Scheme.ECDSA
    if public.scheme is not scheme or public.scheme_hash is not signature.hash_alg:
        raise QuoteSignatureInvalid("the signature's scheme or hash is not the key's")
    hash_alg = _HASHES[signature.hash_alg]()
    try:
        key = public.key()
        if isinstance(signature, RsassaSignature) and isinstance(key, rsa.RSAPublicKey):
            if len(signature.signature) * 8 != public.size_bits:
                raise QuoteSignatureInvalid("the signature is not as long as the modulus")
            key.verify(signature.signature, message, padding.PKCS1v15(), hash_alg)
            return
        if isinstance(signature, EcdsaSignature) and isinstance(key, ec.EllipticCurvePublicKey):
            order = _ORDERS.get(key.curve.name, 0)
            if not (1 <= signature.r < order and 1 <= signature.s < order):
                raise QuoteSignatureInvalid("r or s is not in 1 to n - 1")
            key.verify(utils.encode_dss_signature(signature.r, signature.s), message, ec.ECDSA(hash_alg))
            return
    except InvalidSignature:
        raise QuoteSignatureInvalid("the signature does not verify over the received bytes") from None
    except MalformedMessage as error:
        raise QuoteSignatureInvalid(f"the key cannot be used: {error.detail}") from error
    raise QuoteSignatureInvalid("the signature's scheme does not belong to the key's type")


def owner_qualified_name(public: Public) -> bytes:
    """Qualified name of a key that is a primary of the owner hierarchy: nameAlg ‖ H(TPM_RH_OWNER ‖ Name).

    Spec: TPM 2.0 Part 1, 16 (qualified names); the hash is the key's nameAlg.
    """
    return public.once("owner's qualified name", lambda: _owner_qualified_name(public))


def _owner_qualified_name(public: Public) -> bytes:
    name = public.name
    hash_name = {0x0004: "sha1", 0x000B: "sha256", 0x000C: "sha384", 0x000D: "sha512"}[public.name_alg]
    return name[:2] + hashlib.new(hash_name, _RH_OWNER.to_bytes(4, "big") + name).digest()
