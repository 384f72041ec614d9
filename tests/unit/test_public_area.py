"""Public areas of keys: what parses, what the key in them is, and its Name."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from harness.credential import check_ak
from harness.errors import MalformedMessage, UnacceptableKey
from harness.public_area import (
    RESERVED_ATTRIBUTES,
    KeyType,
    ObjectAttributes,
    Public,
    Scheme,
    Symmetric,
    parse_public,
)
from harness.tpm_templates import KeyTemplate
from harness.values import HashAlg
from tests.support import vectors
from tests.support.enrolment_parties import ek_public
from tests.support.forge import AK_ATTRIBUTES, P384, P521, SHA1, SHA384, SHA512, SoftKey, ecc_key, rsa_key, u16
from tests.support.soft_tpm import sized

RSA_AREA, ECC_AREA = rsa_key().area, ecc_key().area
SCHEME_AT = 12  # after type, nameAlg, objectAttributes, empty authPolicy and no symmetric cipher
KEYS = [
    pytest.param(rsa_key(), id="rsa-2048"),
    pytest.param(rsa_key(bits=3072, hash_alg=SHA512), id="rsa-3072"),
    pytest.param(rsa_key(exponent=3), id="rsa-with-another-exponent"),
    pytest.param(ecc_key(), id="p256"),
    pytest.param(ecc_key(curve=P384, hash_alg=SHA384), id="p384"),
    pytest.param(ecc_key(curve=P521, hash_alg=SHA512), id="p521"),
]


def area(original: bytes, at: int, new: bytes) -> bytes:
    """TPM2B_PUBLIC of an area with other bytes at a place."""
    return sized(original[:at] + new + original[at + len(new) :])


@pytest.mark.parametrize("key", KEYS)
def test_the_key_is_the_one_that_was_described(key: SoftKey) -> None:
    """It comes out as the library's own, marshals to what was received, and is named by its digest."""
    public = parse_public(key.marshalled)
    spki = key.private.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert public.key().public_numbers() == key.private.public_key().public_numbers()
    assert public.spki() == spki
    assert public.spki_digest() == hashlib.sha256(spki).digest()
    assert public.marshal() == key.marshalled
    assert public.name == b"\x00\x0b" + hashlib.sha256(key.area).digest()
    assert int(public.attributes) == AK_ATTRIBUTES


def test_fields_of_an_rsa_key() -> None:
    """Zero stands for the default exponent; another one stays."""
    public = rsa_key(hash_alg=SHA384).public
    assert (public.type, public.scheme, public.scheme_hash) == (KeyType.RSA, Scheme.RSASSA, HashAlg.SHA384)
    assert (public.size_bits, public.exponent, public.symmetric, public.curve) == (2048, 65537, None, 0)
    assert rsa_key(exponent=3).public.exponent == 3


def test_fields_of_an_ecc_key() -> None:
    """Curve and point; no bits of an RSA key."""
    public = ecc_key().public
    assert (public.type, public.scheme, public.scheme_hash) == (KeyType.ECC, Scheme.ECDSA, HashAlg.SHA256)
    assert (public.size_bits, public.exponent, public.modulus, public.curve) == (0, 0, 0, 3)
    numbers = ecc_key().private.public_key().public_numbers()
    assert isinstance(numbers, ec.EllipticCurvePublicNumbers)
    assert public.point == (numbers.x, numbers.y)


def test_fields_of_an_ek() -> None:
    """Policy and symmetric cipher of template L-1; no scheme."""
    public = ek_public(rsa.generate_private_key(65537, 2048))
    assert public.symmetric == Symmetric(algorithm=0x0006, key_bits=128, mode=0x0043)
    assert public.auth_policy == KeyTemplate.EK_RSA2048.public(b"")[12:44]
    assert (public.scheme, public.scheme_hash) == (Scheme.NULL, None)


@pytest.mark.parametrize("name", ["ek_tpm", "aik_tpm"])
def test_captured_keys_are_read(name: str) -> None:
    """Public areas that a stock agent registered with."""
    data = base64.b64decode(vectors.load("keylime/register_request.json")[name])
    public = parse_public(data)
    assert (public.marshal(), public.size_bits) == (data, 2048)
    assert isinstance(public.key(), rsa.RSAPublicKey)


@pytest.mark.parametrize("name_alg", [SHA1, SHA384, SHA512])
def test_the_name_is_by_the_keys_own_algorithm(name_alg: int) -> None:
    """SHA-1 too: whether it is acceptable is not a question of parsing."""
    public = ecc_key(name_alg=name_alg).public
    algorithm = {SHA1: "sha1", SHA384: "sha384", SHA512: "sha512"}[name_alg]
    assert public.name == u16(name_alg) + hashlib.new(algorithm, public.area).digest()


def test_every_byte_is_in_the_name() -> None:
    """Two encodings of one key are two objects."""
    implied, stated = RSA_AREA, RSA_AREA[:18] + (65537).to_bytes(4, "big") + RSA_AREA[22:]
    one, other = parse_public(sized(implied)), parse_public(sized(stated))
    assert one.key() == other.key()
    assert one.name != other.name


def test_reserved_attributes_are_those_without_a_name() -> None:
    """And they are kept, so that the checklists can refuse them."""
    assert RESERVED_ATTRIBUTES == 0xFFF0_F309
    public = parse_public(area(ECC_AREA, 4, b"\xff\xff\xff\xff"))
    assert int(public.attributes) == 0xFFFF_FFFF
    assert ObjectAttributes.X509_SIGN in public.attributes


OTHER_SCHEMES = [
    pytest.param(RSA_AREA[:SCHEME_AT] + u16(0x15) + RSA_AREA[SCHEME_AT + 4 :], Scheme.RSAES, None, id="rsaes"),
    pytest.param(RSA_AREA[:SCHEME_AT] + u16(0x17) + RSA_AREA[SCHEME_AT + 2 :], Scheme.OAEP, HashAlg.SHA256, id="oaep"),
    pytest.param(rsa_key(scheme=0x16).area, Scheme.RSAPSS, HashAlg.SHA256, id="pss"),
    pytest.param(RSA_AREA[:14] + u16(SHA1) + RSA_AREA[16:], Scheme.RSASSA, None, id="sha1"),
    pytest.param(
        ECC_AREA[:12] + u16(0x1A) + u16(SHA384) + u16(1) + ECC_AREA[16:], Scheme.ECDAA, HashAlg.SHA384,
        id="ecdaa-with-its-count",
    ),
    pytest.param(ECC_AREA[:SCHEME_AT] + u16(0x10) + ECC_AREA[SCHEME_AT + 4 :], Scheme.NULL, None, id="none"),
    pytest.param(
        ECC_AREA[: SCHEME_AT + 6] + u16(0x20) + u16(SHA384) + ECC_AREA[SCHEME_AT + 8 :], Scheme.ECDSA, HashAlg.SHA256,
        id="kdf-with-its-hash",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("data", "scheme", "hash_alg"), OTHER_SCHEMES)
def test_other_keys_parse_too(data: bytes, scheme: Scheme, hash_alg: HashAlg | None) -> None:
    """So that the refusal can say what is wrong with them."""
    public = parse_public(sized(data))
    assert (public.scheme, public.scheme_hash) == (scheme, hash_alg)


@pytest.mark.parametrize("key", KEYS)
def test_a_public_area_has_exactly_its_bytes(key: SoftKey) -> None:
    """Cut or continued, outside or inside its own length, it is malformed."""
    for size in range(len(key.marshalled)):
        with pytest.raises(MalformedMessage, match="ends inside"):
            parse_public(key.marshalled[:size])
    for size in range(len(key.area)):
        with pytest.raises(MalformedMessage, match="ends inside"):
            parse_public(sized(key.area[:size]))
    for longer in (key.marshalled + b"\x00", sized(key.area + b"\x00")):
        with pytest.raises(MalformedMessage, match="1 trailing bytes"):
            parse_public(longer)


MALFORMED = [
    pytest.param(area(ECC_AREA, 0, u16(0x08)), "neither RSA nor ECC", id="keyed-hash"),
    pytest.param(area(ECC_AREA, 0, u16(0x25)), "neither RSA nor ECC", id="symmetric-cipher"),
    pytest.param(area(ECC_AREA, 0, u16(0)), "neither RSA nor ECC", id="no-type"),
    pytest.param(area(ECC_AREA, 2, u16(0x10)), "nameAlg", id="no-name-alg"),
    pytest.param(area(ECC_AREA, 2, u16(0x12)), "nameAlg", id="sm3-name"),
    pytest.param(area(ECC_AREA, 2, u16(0x27)), "nameAlg", id="sha3-name"),
    pytest.param(area(ECC_AREA, 10, u16(0x0A)), "symmetric", id="xor"),
    pytest.param(area(ECC_AREA, 10, u16(0)), "symmetric", id="error-as-cipher"),
    pytest.param(area(ECC_AREA, SCHEME_AT, u16(0x14)), "scheme", id="rsassa-on-a-curve"),
    pytest.param(area(RSA_AREA, SCHEME_AT, u16(0x18)), "scheme", id="ecdsa-with-rsa"),
    pytest.param(area(RSA_AREA, SCHEME_AT, u16(0x05)), "scheme", id="hmac"),
    pytest.param(sized(ECC_AREA[:8] + sized(bytes(65)) + ECC_AREA[10:]), "at most 64", id="policy-too-long"),
    pytest.param(sized(RSA_AREA[:-258] + sized(bytes(513))), "at most 512", id="modulus-too-long"),
    pytest.param(sized(ECC_AREA[:-68] + sized(bytes(81)) * 2), "at most 80", id="coordinate-too-long"),
    pytest.param(sized(bytes(1025)), "at most 1024", id="area-too-long"),
    pytest.param(b"\xff\xff" + RSA_AREA, "at most 1024", id="size-beyond-everything"),
    pytest.param(sized(b""), "ends inside type", id="empty-area"),
    pytest.param(RSA_AREA, "at most 1024|ends inside|trailing", id="without-its-length"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "what"), MALFORMED)
def test_what_is_no_public_area_of_a_key(data: bytes, what: str) -> None:
    """The sentence names the field."""
    with pytest.raises(MalformedMessage, match=what):
        parse_public(data)


UNUSABLE = [
    pytest.param(replace(rsa_key().public, size_bits=1024), id="fewer-bits-stated"),
    pytest.param(replace(rsa_key().public, size_bits=3072), id="more-bits-stated"),
    pytest.param(replace(rsa_key().public, size_bits=0, modulus=0, unique=(b"",)), id="no-modulus"),
    pytest.param(replace(rsa_key().public, unique=(b"\x00" + rsa_key().public.unique[0],)), id="leading-zero"),
    pytest.param(replace(rsa_key().public, modulus=rsa_key().public.modulus & ~1), id="even-modulus"),
    pytest.param(replace(rsa_key().public, exponent=1), id="exponent-1"),
    pytest.param(replace(rsa_key().public, exponent=65536), id="even-exponent"),
    pytest.param(replace(ecc_key().public, unique=(b"\x00" + ECC_AREA[-66:-34], ECC_AREA[-32:])), id="padded-x"),
    pytest.param(replace(ecc_key().public, unique=(ECC_AREA[-66:-34], b"\x00" + ECC_AREA[-32:])), id="padded-y"),
    pytest.param(replace(ecc_key().public, curve=0x0010), id="curve-of-another-kind"),
    pytest.param(replace(ecc_key().public, curve=0), id="no-curve"),
    pytest.param(replace(ecc_key().public, curve=P384), id="point-of-another-curve"),
    pytest.param(replace(ecc_key().public, point=(0, 0)), id="no-point"),
    pytest.param(replace(ecc_key().public, point=(ecc_key().public.point[0], 1)), id="point-off-its-curve"),
    pytest.param(replace(ecc_key().public, point=(1 << 256, ecc_key().public.point[1])), id="coordinate-too-large"),
]


@pytest.mark.parametrize("public", UNUSABLE)
def test_numbers_that_are_no_key_are_said_to_be_none(public: Public) -> None:
    """They parse, and every use of the key is one named error."""
    for use in (public.key, public.spki, public.spki_digest):
        with pytest.raises(MalformedMessage):
            use()


def test_a_coordinate_may_lack_its_leading_zeros() -> None:
    """Some TPMs leave them out: the same point, and a Name of its own, as the TPM computes it."""
    generated = (ec.derive_private_key(secret, ec.SECP256R1()).public_key() for secret in itertools.count(1))
    numbers = next(found for key in generated if (found := key.public_numbers()).x < 1 << 248)
    x, y = (number.to_bytes((number.bit_length() + 7) // 8, "big") for number in (numbers.x, numbers.y))
    public = parse_public(sized(ECC_AREA[:-68] + sized(x) + sized(y)))
    assert public.key().public_numbers() == numbers
    assert public.name == b"\x00\x0b" + hashlib.sha256(ECC_AREA[:-68] + sized(x) + sized(y)).digest()


@given(st.sampled_from([RSA_AREA, ECC_AREA]), st.data())
def test_any_change_is_another_key_or_none(original: bytes, data: st.DataObject) -> None:
    """Flipped bytes give a public area with another Name, or a named error; so does taking the key out of it."""
    spoilt = bytearray(original)
    for at in data.draw(st.sets(st.integers(0, len(original) - 1), min_size=1, max_size=3)):
        spoilt[at] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(MalformedMessage):
        public = parse_public(sized(bytes(spoilt)))
        assert public.name != parse_public(sized(original)).name
        assert public.marshal() == sized(bytes(spoilt))
        public.key()


@given(st.binary(max_size=120), st.booleans())
def test_any_bytes_are_a_public_area_or_malformed(data: bytes, in_its_length: bool) -> None:
    """Nothing else is raised."""
    with contextlib.suppress(MalformedMessage):
        parse_public(sized(data) if in_its_length else data)


def test_what_follows_from_an_area_is_computed_once() -> None:
    """Name, key and acceptance of a pinned key are not made anew for each answer."""
    public = ecc_key().public
    assert public.key() is public.key()
    assert public.name is public.name
    calls: list[int] = []
    for _ in range(3):
        public.once("x", lambda: calls.append(1))
    assert calls == [1]


def test_what_was_refused_is_refused_again() -> None:
    """A key that cannot be used never becomes one by asking twice."""
    public = replace(ecc_key().public, curve=0x7777)
    for _ in range(2):
        with pytest.raises(MalformedMessage, match="curve"):
            public.key()
        with pytest.raises(UnacceptableKey):
            check_ak(public)


def test_a_changed_area_knows_nothing_of_the_one_before() -> None:
    """A public area that was copied with another field computes its own."""
    public = ecc_key().public
    check_ak(public)
    assert public.key() is not None
    with pytest.raises(UnacceptableKey):
        check_ak(replace(public, scheme_hash=None))
