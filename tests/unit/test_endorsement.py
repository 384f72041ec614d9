"""Certificates as vendors leave them in NV."""

from __future__ import annotations

import pytest

from harness.errors import CapabilityMissing
from harness.provider.endorsement import split_certificates

SHORT = b"\x30\x03abc"
MEDIUM = b"\x30\x81\x80" + bytes(128)
LONG = b"\x30\x82\x01\x00" + b"x" * 256


@pytest.mark.parametrize("der", [SHORT, MEDIUM, LONG], ids=["short", "one-octet", "two-octets"])
@pytest.mark.parametrize("filling", [b"", bytes(40), b"\xff" * 40], ids=["none", "zeros", "ones"])
def test_what_follows_the_certificate_is_cut_off(der: bytes, filling: bytes) -> None:
    """Vendors define indices that are larger than what they write."""
    assert split_certificates(der + filling) == [der]


def test_several_certificates_in_one_index_are_told_apart() -> None:
    """In their order."""
    assert split_certificates(LONG + SHORT + MEDIUM + bytes(9)) == [LONG, SHORT, MEDIUM]


def test_a_second_one_that_is_cut_short_is_filling() -> None:
    """The first is still good."""
    assert split_certificates(LONG + MEDIUM[:-1]) == [LONG]


@pytest.mark.parametrize(
    "data",
    [b"", b"\x30", bytes(20), b"\xff" * 20, LONG[:-1], b"\x30\x80abc", b"\x30\x84\x00\x00\x00\x01a", b"\x31\x01a"],
    ids=["empty", "tag-only", "zeros", "ones", "cut-short", "indefinite", "four-octets", "another-tag"],
)
def test_an_index_without_a_certificate_is_named_as_such(data: bytes) -> None:
    """Nothing is guessed from it."""
    with pytest.raises(CapabilityMissing):
        split_certificates(data)
