"""Attestation structures and signatures: what parses, what does not, and which signatures verify."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from hypothesis import example, given
from hypothesis import strategies as st

from harness.attest import (
    CertifyInfo,
    EcdsaSignature,
    KeyType,
    QuoteInfo,
    RsassaSignature,
    SelectionEntry,
    owner_qualified_name,
    parse_attest,
    parse_signature,
    verify_signature,
)
from harness.errors import MalformedMessage, QuoteSignatureInvalid
from harness.values import ClockInfo, HashAlg
from tests.support.forge import (
    P384,
    P521,
    SHA1,
    SHA256,
    SHA384,
    SHA512,
    AttestFields,
    SoftKey,
    ecc_key,
    ecdsa_signature,
    rsa_key,
    u16,
)
from tests.support.soft_tpm import SoftTpm, public_of, sized

FIELDS = AttestFields(
    signer=b"\x00\x0b" + bytes(range(32)),
    extra_data=bytes(range(100, 132)),
    selection=((SHA256, b"\x91\x40\x00"), (SHA384, b"\x01\x00\x80")),
    pcr_digest=bytes(range(200, 232)),
    clock=(1 << 63) + 5,
    resets=(1 << 32) - 1,
    firmware=(1 << 64) - 1,
)
QUOTE = FIELDS.marshal()
CERTIFY, _ = SoftTpm().certify(b"\x00\x0b" + bytes(range(32)), b"certify this")
MESSAGE = b"what was signed"
RSA_SIGNATURE, ECC_SIGNATURE = rsa_key().sign(MESSAGE), ecc_key().sign(MESSAGE)

# --- TPMS_ATTEST ------------------------------------------------------------------------------------------------------


def test_a_quote_is_read_field_by_field() -> None:
    """Every field has its value, at the ends of its range too; the bytes are kept as received."""
    attest = parse_attest(QUOTE)
    assert (attest.magic, attest.type, attest.raw) == (0xFF544347, 0x8018, QUOTE)
    assert (attest.qualified_signer, attest.extra_data) == (FIELDS.signer, FIELDS.extra_data)
    assert attest.clock_info == ClockInfo(clock=(1 << 63) + 5, reset_count=(1 << 32) - 1, restart_count=3, safe=True)
    assert attest.firmware_version == (1 << 64) - 1
    assert attest.attested == QuoteInfo(
        selection=(
            SelectionEntry(hash_alg=SHA256, size_of_select=3, mask=0x4091),
            SelectionEntry(hash_alg=SHA384, size_of_select=3, mask=0x800001),
        ),
        pcr_digest=FIELDS.pcr_digest,
    )


def test_a_certification_is_read() -> None:
    """Name and qualified name of the certified object, and our data."""
    attest = parse_attest(CERTIFY)
    name = b"\x00\x0b" + bytes(range(32))
    assert attest.attested == CertifyInfo(name=name, qualified_name=name)
    assert attest.extra_data == b"certify this"


@pytest.mark.parametrize(
    ("parse", "data"),
    [
        pytest.param(parse_attest, QUOTE, id="quote"),
        pytest.param(parse_attest, CERTIFY, id="certification"),
        pytest.param(parse_signature, RSA_SIGNATURE, id="rsassa"),
        pytest.param(parse_signature, ECC_SIGNATURE, id="ecdsa"),
    ],
)
def test_a_structure_has_exactly_its_bytes(parse: Callable[[bytes], object], data: bytes) -> None:
    """Cut anywhere, or with one byte more, it is malformed."""
    parse(data)
    for size in range(len(data)):
        with pytest.raises(MalformedMessage, match="ends inside"):
            parse(data[:size])
    with pytest.raises(MalformedMessage, match="1 trailing bytes"):
        parse(data + b"\x00")


# Offsets and sizes of the length fields of QUOTE, CERTIFY and the signatures.
SIGNER_AT = 6
EXTRA_AT = SIGNER_AT + 2 + 34
COUNT_AT = EXTRA_AT + 2 + 32 + 8 + 4 + 4 + 1 + 8
DIGEST_AT = COUNT_AT + 4 + 2 * 6
CERTIFIED_AT = len(CERTIFY) - 2 * 36
LENGTHS = [
    pytest.param(parse_attest, QUOTE, SIGNER_AT, 2, id="qualifiedSigner"),
    pytest.param(parse_attest, QUOTE, EXTRA_AT, 2, id="extraData"),
    pytest.param(parse_attest, QUOTE, COUNT_AT, 4, id="count-of-selections"),
    pytest.param(parse_attest, QUOTE, COUNT_AT + 4 + 2, 1, id="first-sizeofSelect"),
    pytest.param(parse_attest, QUOTE, COUNT_AT + 4 + 6 + 2, 1, id="second-sizeofSelect"),
    pytest.param(parse_attest, QUOTE, DIGEST_AT, 2, id="pcrDigest"),
    pytest.param(parse_attest, CERTIFY, CERTIFIED_AT, 2, id="name"),
    pytest.param(parse_attest, CERTIFY, CERTIFIED_AT + 36, 2, id="qualifiedName"),
    pytest.param(parse_signature, RSA_SIGNATURE, 4, 2, id="rsa-signature"),
    pytest.param(parse_signature, ECC_SIGNATURE, 4, 2, id="r"),
    pytest.param(parse_signature, ECC_SIGNATURE, 4 + 34, 2, id="s"),
]


@pytest.mark.parametrize(("parse", "data", "at", "size"), LENGTHS)
def test_every_length_counts(parse: Callable[[bytes], object], data: bytes, at: int, size: int) -> None:
    """No other value of a length field gives a structure."""
    honest = int.from_bytes(data[at : at + size], "big")
    for wrong in {0, 1, honest - 1, honest + 1, honest * 2, honest << 8, (1 << 8 * size) - 1, 1 << 8 * size - 1}:
        spoilt = data[:at] + (wrong % (1 << 8 * size)).to_bytes(size, "big") + data[at + size :]
        if spoilt != data:
            with pytest.raises(MalformedMessage):
                parse(spoilt)


@pytest.mark.parametrize(
    ("largest", "too_large"),
    [
        pytest.param({"signer": bytes(68)}, {"signer": bytes(69)}, id="qualifiedSigner"),
        pytest.param({"extra_data": bytes(66)}, {"extra_data": bytes(67)}, id="extraData"),
        pytest.param({"pcr_digest": bytes(64)}, {"pcr_digest": bytes(65)}, id="pcrDigest"),
        pytest.param({"selection": ((1, b""),) * 16}, {"selection": ((1, b""),) * 17}, id="selections"),
    ],
)
def test_no_field_is_larger_than_its_type(largest: dict[str, bytes], too_large: dict[str, bytes]) -> None:
    """Bounds of TPM 2.0 Part 2, even where the bytes are there."""
    parse_attest(replace(FIELDS, **largest).marshal())  # type: ignore[arg-type]
    with pytest.raises(MalformedMessage, match="at most"):
        parse_attest(replace(FIELDS, **too_large).marshal())  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [0, 0x8014, 0x8015, 0x8016, 0x8019, 0x801A, 0x801C, 0x801D, 0xFFFF], ids=hex)
def test_other_attestations_are_not_parsed(kind: int) -> None:
    """Time, audit, creation and NV attestations are no evidence of ours."""
    with pytest.raises(MalformedMessage, match="neither a quote nor a certification"):
        parse_attest(replace(FIELDS, type=kind).marshal())


def test_a_quote_is_not_read_as_a_certification() -> None:
    """Nor the other way round: the type says what follows."""
    for data, kind in ((QUOTE, b"\x80\x17"), (CERTIFY, b"\x80\x18")):
        with pytest.raises(MalformedMessage):
            parse_attest(data[:4] + kind + data[6:])


def test_what_appraisal_judges_is_only_read() -> None:
    """Magic, odd selections and empty fields parse, so that the check that is about them can name them."""
    fields = AttestFields(signer=b"", extra_data=b"", selection=(), pcr_digest=b"", magic=0, safe=0)
    attest = parse_attest(fields.marshal())
    assert (attest.magic, attest.clock_info.safe) == (0, False)
    assert attest.attested == QuoteInfo(selection=(), pcr_digest=b"")
    odd = replace(fields, selection=((SHA1, b""), (0x27, bytes(255))))
    assert isinstance(parse_attest(odd.marshal()).attested, QuoteInfo)


@pytest.mark.parametrize("safe", [2, 0x80, 0xFF])
def test_safe_is_yes_or_no(safe: int) -> None:
    """TPMI_YES_NO has two values."""
    with pytest.raises(MalformedMessage, match="safe"):
        parse_attest(replace(FIELDS, safe=safe).marshal())


@given(st.binary(max_size=200))
@example(b"")
def test_any_bytes_are_a_structure_or_malformed(data: bytes) -> None:
    """Nothing else comes out of a parser, also when the first bytes are right."""
    for parse, start in ((parse_attest, QUOTE[:6]), (parse_attest, CERTIFY[:6]), (parse_signature, ECC_SIGNATURE[:4])):
        for whole in (data, start + data):
            with contextlib.suppress(MalformedMessage):
                parse(whole)


@given(st.integers(0, len(QUOTE) - 1), st.integers(1, 255))
def test_no_byte_of_a_quote_is_ignored(at: int, flip: int) -> None:
    """Another byte anywhere is another quote or none: nothing that is signed is skipped."""
    spoilt = bytearray(QUOTE)
    spoilt[at] ^= flip
    with contextlib.suppress(MalformedMessage):
        assert replace(parse_attest(bytes(spoilt)), raw=b"") != replace(parse_attest(QUOTE), raw=b"")


# --- TPMT_SIGNATURE ---------------------------------------------------------------------------------------------------


def test_signatures_are_read() -> None:
    """Scheme, hash and numbers; leading zeros of r and s are no matter."""
    assert parse_signature(u16(0x14) + u16(SHA512) + sized(b"ab")) == RsassaSignature(
        hash_alg=HashAlg.SHA512, signature=b"ab"
    )
    expected = EcdsaSignature(hash_alg=HashAlg.SHA384, r=1, s=0x102)
    assert parse_signature(u16(0x18) + u16(SHA384) + sized(b"\x01") + sized(b"\x01\x02")) == expected
    assert parse_signature(ecdsa_signature(1, 0x102, hash_alg=SHA384, size=66)) == expected


@pytest.mark.parametrize("scheme", [0, 0x05, 0x10, 0x15, 0x16, 0x1A, 0x1B, 0x1C, 0xFFFF], ids=hex)
def test_other_schemes_are_refused(scheme: int) -> None:
    """RSAPSS, ECDAA, SM2, HMAC and no signature at all are none of the protocol's."""
    for signature in (RSA_SIGNATURE, ECC_SIGNATURE):
        with pytest.raises(MalformedMessage, match="neither RSASSA nor ECDSA"):
            parse_signature(u16(scheme) + signature[2:])


@pytest.mark.parametrize("hash_alg", [0, SHA1, 0x10, 0x12, 0x27, 0xFFFF], ids=hex)
def test_other_hashes_are_refused(hash_alg: int) -> None:
    """SHA-1 above all."""
    for signature in (RSA_SIGNATURE, ECC_SIGNATURE):
        with pytest.raises(MalformedMessage, match="not one of sha256, sha384, sha512"):
            parse_signature(signature[:2] + u16(hash_alg) + signature[4:])


@pytest.mark.parametrize(
    ("start", "largest"), [(u16(0x14) + u16(SHA256), 512), (u16(0x18) + u16(SHA256), 66)], ids=["rsassa", "ecdsa"]
)
def test_no_signature_is_larger_than_its_type(start: bytes, largest: int) -> None:
    """RSA-4096 and P-521 are the largest that are read."""
    tail = b"" if start[1] == 0x14 else sized(b"\x01")
    parse_signature(start + sized(bytes(largest)) + tail)
    with pytest.raises(MalformedMessage, match="at most"):
        parse_signature(start + sized(bytes(largest + 1)) + tail)


# --- verification -----------------------------------------------------------------------------------------------------

KEYS = {
    "p256": ecc_key(),
    "p256-sha512": ecc_key(hash_alg=SHA512),
    "p384": ecc_key(curve=P384, hash_alg=SHA384),
    "rsa-2048": rsa_key(),
    "rsa-3072-sha384": rsa_key(bits=3072, hash_alg=SHA384),
}


@pytest.mark.parametrize("name", KEYS)
def test_a_signature_is_of_its_key_over_its_bytes(name: str) -> None:
    """It verifies; over one byte more or less, or with one bit flipped in it, it does not."""
    key = KEYS[name]
    signature = key.sign(MESSAGE)
    verify_signature(key.public, parse_signature(signature), MESSAGE)
    for other in (MESSAGE + b"\x00", MESSAGE[:-1], b""):
        with pytest.raises(QuoteSignatureInvalid, match="does not verify"):
            verify_signature(key.public, parse_signature(signature), other)
    spoilt = signature[:-1] + bytes([signature[-1] ^ 1])
    with pytest.raises(QuoteSignatureInvalid):
        verify_signature(key.public, parse_signature(spoilt), MESSAGE)


ALIKE = {"ecdsa": SoftTpm().ak, "rsassa": rsa_key(exponent=3).public}


@pytest.mark.parametrize(("key", "other"), [(ecc_key(), ALIKE["ecdsa"]), (rsa_key(), ALIKE["rsassa"])], ids=ALIKE)
def test_another_key_did_not_sign(key: SoftKey, other: object) -> None:
    """Equal type, scheme and size do not make a key the signer."""
    with pytest.raises(QuoteSignatureInvalid, match="does not verify"):
        verify_signature(other, parse_signature(key.sign(MESSAGE)), MESSAGE)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("key", "signature"),
    [
        pytest.param(ecc_key(), ecc_key().sign(MESSAGE, hash_alg=SHA512), id="ecdsa-with-another-hash"),
        pytest.param(rsa_key(), rsa_key().sign(MESSAGE, hash_alg=SHA384), id="rsassa-with-another-hash"),
        pytest.param(ecc_key(), RSA_SIGNATURE, id="rsassa-for-an-ecc-key"),
        pytest.param(rsa_key(), ECC_SIGNATURE, id="ecdsa-for-an-rsa-key"),
        pytest.param(rsa_key(scheme=0x16), rsa_key(scheme=0x16).sign(MESSAGE), id="key-for-pss"),
        pytest.param(ecc_key(scheme=0x10), ecc_key(scheme=0x10).sign(MESSAGE), id="key-without-a-scheme"),
        pytest.param(ecc_key(hash_alg=SHA1), ecc_key(hash_alg=SHA1).sign(MESSAGE, hash_alg=SHA256), id="key-for-sha1"),
    ],
)
def test_scheme_and_hash_are_the_keys(key: SoftKey, signature: bytes) -> None:
    """Whoever sends the signature does not choose how it is verified."""
    with pytest.raises(QuoteSignatureInvalid, match="scheme or hash is not the key's"):
        verify_signature(key.public, parse_signature(signature), MESSAGE)


ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551


@pytest.mark.parametrize("which", ["r", "s"])
@pytest.mark.parametrize("value", [0, ORDER, ORDER + 1, (1 << 256) - 1, 1 << 520], ids=hex)
def test_r_and_s_are_below_the_order(which: str, value: int) -> None:
    """0 and n are no numbers of a signature, nor is r + n another form of r."""
    honest = parse_signature(ECC_SIGNATURE)
    assert isinstance(honest, EcdsaSignature)
    changed = replace(honest, r=value) if which == "r" else replace(honest, s=value)
    with pytest.raises(QuoteSignatureInvalid, match="1 to n - 1"):
        verify_signature(ecc_key().public, changed, MESSAGE)
    one_turn_more = replace(honest, r=honest.r + ORDER) if which == "r" else replace(honest, s=honest.s + ORDER)
    with pytest.raises(QuoteSignatureInvalid, match="1 to n - 1"):
        verify_signature(ecc_key().public, one_turn_more, MESSAGE)


@pytest.mark.parametrize(
    "change", [lambda s: b"\x00" + s, lambda s: s[:-1], lambda s: s + b"\x00", lambda _: b""],
    ids=["leading-zero", "cut", "trailing-zero", "empty"],
)  # fmt: skip
def test_an_rsa_signature_is_as_long_as_the_modulus(change: Callable[[bytes], bytes]) -> None:
    """RFC 8017, 8.2.2, step 1."""
    signature = change(RSA_SIGNATURE[6:])
    with pytest.raises(QuoteSignatureInvalid, match="as long as the modulus"):
        verify_signature(rsa_key().public, RsassaSignature(hash_alg=HashAlg.SHA256, signature=signature), MESSAGE)


def test_a_pss_signature_is_not_taken_for_rsassa() -> None:
    """The padding is part of the scheme."""
    private = rsa_key().private
    assert isinstance(private, rsa.RSAPrivateKey)
    pss = private.sign(MESSAGE, padding.PSS(padding.MGF1(hashes.SHA256()), 32), hashes.SHA256())
    with pytest.raises(QuoteSignatureInvalid, match="does not verify"):
        verify_signature(rsa_key().public, RsassaSignature(hash_alg=HashAlg.SHA256, signature=pss), MESSAGE)


def test_keys_that_cannot_be_used_verify_nothing() -> None:
    """A point off its curve, a curve whose order is not listed, and a type that is not the scheme's."""
    off_curve = replace(ecc_key().public, point=(1, 1))
    with pytest.raises(QuoteSignatureInvalid, match="key cannot be used"):
        verify_signature(off_curve, parse_signature(ECC_SIGNATURE), MESSAGE)
    p521 = ecc_key(curve=P521, hash_alg=SHA512)
    with pytest.raises(QuoteSignatureInvalid, match="1 to n - 1"):
        verify_signature(p521.public, parse_signature(p521.sign(MESSAGE)), MESSAGE)
    mixed = replace(rsa_key().public, scheme=ecc_key().public.scheme)
    assert mixed.type is KeyType.RSA
    with pytest.raises(QuoteSignatureInvalid, match="does not belong to the key's type"):
        verify_signature(mixed, parse_signature(ECC_SIGNATURE), MESSAGE)


# --- qualified names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name_alg", [SHA256, SHA384, SHA512], ids=["sha256", "sha384", "sha512"])
def test_the_qualified_name_of_an_owner_primary(name_alg: int) -> None:
    """The digest, by the key's nameAlg, of the owner's handle and the Name (TPM 2.0 Part 1, 16)."""
    public = ecc_key(name_alg=name_alg).public
    digest = HashAlg(name_alg).digest(bytes.fromhex("40000001") + public.name)
    assert owner_qualified_name(public) == u16(name_alg) + digest


def test_a_signature_of_a_plain_library_verifies() -> None:
    """What the soft TPM's key signs by itself is the signature that the structure carries."""
    private = ec.generate_private_key(ec.SECP256R1())
    r, s = decode_dss_signature(private.sign(MESSAGE, ec.ECDSA(hashes.SHA256())))
    public = public_of(private)
    verify_signature(public, EcdsaSignature(hash_alg=HashAlg.SHA256, r=r, s=s), MESSAGE)
    with pytest.raises(QuoteSignatureInvalid):
        verify_signature(public, EcdsaSignature(hash_alg=HashAlg.SHA256, r=s, s=r), MESSAGE)
    assert hashlib.sha256(public.area).digest() == public.name[2:]
