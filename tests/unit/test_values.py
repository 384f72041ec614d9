"""Small values: what is valid, and the one text form of each."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import MalformedMessage
from harness.reader import Reader
from harness.values import (
    HashAlg,
    Nonce,
    PcrSelection,
    mask_of,
    parse_agent_id,
    parse_hex,
    parse_host_id,
    parse_mask,
    pcrs_in,
)

B256, B384, B512 = HashAlg.SHA256, HashAlg.SHA384, HashAlg.SHA512
UUID = "a0bb03b7-39bb-4d7b-88e6-14a7e2004c8e"
MASKS = st.integers(1, (1 << 24) - 1)
SELECTIONS = st.dictionaries(st.sampled_from(list(HashAlg)), MASKS).map(
    lambda banks: PcrSelection(tuple(banks.items()))
)


# --- hash algorithms, hex, ids ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alg", "text", "number"), [(B256, "sha256", 11), (B384, "sha384", 12), (B512, "sha512", 13)])
def test_an_algorithm_has_its_name_number_and_size(alg: HashAlg, text: str, number: int) -> None:
    """The TPM_ALG_ID is the value; the digest is the library's."""
    assert (alg.text, alg.value, HashAlg.parse(text)) == (text, number, alg)
    assert alg.digest(b"x") == hashlib.new(text, b"x").digest()
    assert alg.digest_size == len(alg.digest(b""))


@pytest.mark.parametrize("text", ["", "sha1", "SHA256", "sha-256", "sha3_256", "sm3_256", "sha256 ", "11", "md5"])
def test_other_algorithms_are_refused(text: str) -> None:
    """SHA-1 by name; no second spelling of any."""
    with pytest.raises(MalformedMessage, match="sha256, sha384, sha512"):
        HashAlg.parse(text)


def test_a_refused_name_is_not_repeated_at_length() -> None:
    """An error is one sentence, whatever was sent."""
    with pytest.raises(MalformedMessage) as caught:
        HashAlg.parse("x" * 10_000)
    assert len(caught.value.detail) < 120


@given(st.binary(max_size=64))
def test_bytes_have_one_hex_form(data: bytes) -> None:
    """Lower case, two digits a byte."""
    assert parse_hex(data.hex(), "x", at_most=64) == data
    if data.hex().upper() != data.hex():
        with pytest.raises(MalformedMessage):
            parse_hex(data.hex().upper(), "x", at_most=64)


@pytest.mark.parametrize(
    "text",
    ["a", "abc", "AB", "0x00", "zz", "00 ", " 00", "00\n", "\n00", "0_00", "００", "٠٠", "+0", "a" * 9999, "\ud800"],
    ids=ascii,
)  # fmt: skip
def test_other_hex_is_refused(text: str) -> None:
    """No prefix, no blank, no other digits, not even at the end of the text."""
    with pytest.raises(MalformedMessage, match="x must be lower-case hex"):
        parse_hex(text, "x")


def test_lengths_of_hex_are_in_bytes() -> None:
    """An exact size overrides the bounds; both ends of the bounds are allowed."""
    assert parse_hex("0011", "x", size=2, at_least=5) == b"\x00\x11"
    assert [parse_hex("00" * n, "x", at_least=1, at_most=2) for n in (1, 2)] == [b"\x00", b"\x00\x00"]
    for size in (0, 3):
        with pytest.raises(MalformedMessage, match="1 to 2 bytes"):
            parse_hex("00" * size, "x", at_least=1, at_most=2)
    for size in (1, 3):
        with pytest.raises(MalformedMessage, match="of 2 bytes"):
            parse_hex("00" * size, "x", size=2)


@pytest.mark.parametrize("parse", [parse_agent_id, parse_host_id])
def test_ids_have_one_form(parse: Callable[[str], uuid.UUID]) -> None:
    """The canonical one, though the library reads many more."""
    assert str(parse(UUID)) == UUID
    for text in (
        "", UUID.upper(), UUID.replace("-", ""), "{" + UUID + "}", "urn:uuid:" + UUID, UUID + "\n", " " + UUID,
        UUID[:-1], UUID + "0", UUID.replace("-", "‐"), UUID.replace("0", "٠"), "../" + UUID, UUID[:8] + UUID[9:] + "-",
    ):  # fmt: skip
        with pytest.raises(MalformedMessage, match="canonical lower-case"):
            parse(text)


@pytest.mark.parametrize("size", [16, 17, 32, 64])
def test_a_nonce_has_16_to_64_bytes(size: int) -> None:
    """From bytes and from text; it does not show itself."""
    nonce = Nonce(bytes([7]) * size)
    assert Nonce.parse("07" * size) == nonce
    assert "07" not in repr(nonce)
    assert "x07" not in repr(nonce)


@pytest.mark.parametrize("size", [0, 15, 65])
def test_a_nonce_of_another_length_does_not_exist(size: int) -> None:
    """15 bytes are guessable sooner, 65 fit into no field."""
    with pytest.raises(MalformedMessage):
        Nonce(bytes(size))
    with pytest.raises(MalformedMessage):
        Nonce.parse("00" * size)


# --- masks and selections ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "pcrs"),
    [
        ("0x1", {0}), ("0x800", {11}), ("0x400000", {22}), ("0x4091", {0, 4, 7, 14}), ("0x0000001", {0}),
        ("0xff", set(range(8))),
    ],
)  # fmt: skip
def test_bit_i_of_a_mask_is_pcr_i(text: str, pcrs: set[int]) -> None:
    """The lowest bit is PCR 0."""
    assert set(pcrs_in(parse_mask(text))) == pcrs
    assert mask_of(pcrs) == int(text, 16)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "lower-case hex"), ("0x", "lower-case hex"), ("1", "lower-case hex"), ("0X1", "lower-case hex"),
        ("0xA", "lower-case hex"), ("0x1 ", "lower-case hex"), ("0x1\n", "lower-case hex"), ("0x_1", "lower-case hex"),
        ("-0x1", "lower-case hex"), ("0x١", "lower-case hex"), ("0x" + "0" * 64 + "1", "lower-case hex"),
        ("0x0", "names no PCR"), ("0x000", "names no PCR"), ("0x1000000", "above 23"), ("0x" + "f" * 64, "above 23"),
        ("0x10000", "16 or 23"), ("0x800000", "16 or 23"), ("0xffffff", "16 or 23"), ("0x10001", "16 or 23"),
    ],
)  # fmt: skip
def test_a_mask_that_names_nothing_or_too_much_is_refused(text: str, what: str) -> None:
    """Form, no PCR, beyond 23, and the PCRs that anyone may reset."""
    with pytest.raises(MalformedMessage, match=what):
        parse_mask(text)


@pytest.mark.parametrize("pcr", [-1, 24, 100])
def test_there_are_24_pcrs(pcr: int) -> None:
    """An index outside is a bug of ours."""
    with pytest.raises(ValueError, match="0 to 23"):
        mask_of([0, pcr])


@given(st.sets(st.integers(0, 23)))
def test_masks_and_indices_are_the_same(pcrs: set[int]) -> None:
    """There and back, ascending."""
    assert list(pcrs_in(mask_of(pcrs))) == sorted(pcrs)


def test_a_selection_is_marshalled_in_ascending_banks() -> None:
    """TPML_PCR_SELECTION: count, then bank, 3, and the bit map with PCR 0 in the first byte's lowest bit."""
    selection = PcrSelection(((B512, 0x800000), (B256, 0x4091)))
    assert selection.marshal().hex() == "00000002" + "000b03914000" + "000d03000080"
    assert selection == PcrSelection(((B256, 0x4091), (B512, 0x800000)))
    assert list(selection) == [(B256, 0), (B256, 4), (B256, 7), (B256, 14), (B512, 23)]
    assert PcrSelection().marshal() == bytes(4)


@pytest.mark.parametrize(
    "banks", [((B256, 1), (B256, 2)), ((B256, 0),), ((B256, 1 << 24),), ((B256, -1),)],
    ids=["bank-twice", "all-zero", "above-23", "negative"],
)  # fmt: skip
def test_a_selection_that_no_tpm_takes_does_not_exist(banks: tuple[tuple[HashAlg, int], ...]) -> None:
    """Each bank once, and with at least one PCR."""
    with pytest.raises(ValueError, match=r"twice|outside"):
        PcrSelection(banks)


def test_selections_from_lists_have_no_empty_banks() -> None:
    """A bank without a PCR is not selected."""
    assert PcrSelection.from_lists({B256: [3, 1, 3], B384: []}) == PcrSelection.of(B256, 0b1010)
    assert PcrSelection.of(B256, 1).mask(B384) == 0


@given(SELECTIONS, SELECTIONS)
def test_a_union_is_the_smallest_that_holds_both(one: PcrSelection, other: PcrSelection) -> None:
    """Nothing is lost, nothing is added, and the order of the two is no matter."""
    union = one.union(other)
    assert set(union) == set(one) | set(other)
    assert union == other.union(one)
    assert one.within(union)
    assert other.within(union)
    assert union.within(one) == other.within(one)


@given(SELECTIONS, SELECTIONS)
def test_within_means_every_pcr_in_its_own_bank(one: PcrSelection, other: PcrSelection) -> None:
    """A PCR of another bank covers nothing; the empty selection is within all."""
    assert one.within(other) == (set(one) <= set(other))
    assert PcrSelection().within(one)
    assert one.within(PcrSelection()) == (not one.banks)


# --- the reader -------------------------------------------------------------------------------------------------------


def test_a_reader_takes_what_is_there_and_says_what_is_not() -> None:
    """Big-endian integers, sized bytes, and the end."""
    reader = Reader(bytes.fromhex("0102030004aabbccdd05"), "a structure")
    assert (reader.integer(2, "first"), reader.take(1, "second")) == (0x0102, b"\x03")
    assert reader.tpm2b("third", at_most=4) == bytes.fromhex("aabbccdd")
    with pytest.raises(MalformedMessage, match="a structure has 1 trailing bytes"):
        reader.end()
    with pytest.raises(MalformedMessage, match="a structure ends inside fourth"):
        reader.integer(2, "fourth")
    assert reader.integer(1, "fourth") == 5
    reader.end()


def test_a_reader_looks_at_a_size_before_the_bytes() -> None:
    """Too large is said even where the bytes are missing; nothing is read beyond the end."""
    with pytest.raises(MalformedMessage, match="field has 65535 bytes, at most 8"):
        Reader(b"\xff\xff", "x").tpm2b("field", at_most=8)
    with pytest.raises(MalformedMessage, match="ends inside field"):
        Reader(b"\x00\x08seven..", "x").tpm2b("field", at_most=8)
    assert Reader(b"\x00\x00", "x").tpm2b("field", at_most=0) == b""
