"""Reference values: the text form, and what is no policy."""

from __future__ import annotations

import pytest

from harness.errors import MalformedMessage
from harness.tenant.policy import Policy, parse_policy
from harness.values import HashAlg, PcrSelection

TEXT = {"sha256": {"0": ["ab" * 32, "cd" * 32], "14": []}, "sha512": {"7": ["ef" * 64]}}


def test_a_policy_is_read_and_written_alike() -> None:
    """Banks, indices and allowed values survive; PCRs with an empty list are named too."""
    policy = parse_policy(TEXT)
    assert policy.encode() == TEXT
    assert policy.selection == PcrSelection.from_lists({HashAlg.SHA256: (0, 14), HashAlg.SHA512: (7,)})


def test_one_value_for_each_pcr() -> None:
    """The short way to state a policy."""
    assert Policy.of(HashAlg.SHA256, {4: bytes(32)}) == parse_policy({"sha256": {"4": ["00" * 32]}})


@pytest.mark.parametrize("text", [{}, {"sha256": {}}], ids=["empty", "empty-bank"])
def test_an_empty_policy_is_well_formed_and_names_nothing(text: object) -> None:
    """It accepts nothing (check 9), but it can be read."""
    assert parse_policy(text).selection == PcrSelection()


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(None, id="null"),
        pytest.param([], id="list"),
        pytest.param("sha256", id="text"),
        pytest.param({"sha1": {"0": ["ab" * 20]}}, id="sha1"),
        pytest.param({"SHA256": {}}, id="bank-in-capitals"),
        pytest.param({"sha256": []}, id="bank-is-a-list"),
        pytest.param({"sha256": None}, id="bank-is-null"),
        pytest.param({"sha256": {"24": []}}, id="index-24"),
        pytest.param({"sha256": {"07": []}}, id="index-with-a-zero"),
        pytest.param({"sha256": {"+7": []}}, id="index-with-a-sign"),
        pytest.param({"sha256": {"٧": []}}, id="index-in-other-digits"),
        pytest.param({"sha256": {"": []}}, id="no-index"),
        pytest.param({"sha256": {"0": "ab" * 32}}, id="value-without-a-list"),
        pytest.param({"sha256": {"0": None}}, id="values-are-null"),
        pytest.param({"sha256": {"0": {"a": 1}}}, id="values-are-an-object"),
        pytest.param({"sha256": {"0": [7]}}, id="value-is-a-number"),
        pytest.param({"sha256": {"0": ["AB" * 32]}}, id="value-in-capitals"),
        pytest.param({"sha256": {"0": ["0x" + "ab" * 32]}}, id="value-with-prefix"),
        pytest.param({"sha256": {"0": ["ab" * 31 + "a"]}}, id="value-of-odd-length"),
        pytest.param({"sha256": {"0": ["ab" * 65]}}, id="value-above-64-bytes"),
    ],
)
def test_another_form_is_no_policy(text: object) -> None:
    """A policy that is not understood in every part is not used in any."""
    with pytest.raises(MalformedMessage):
        parse_policy(text)
