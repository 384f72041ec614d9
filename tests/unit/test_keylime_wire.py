"""Keylime's text form of a quote: what stock Keylime accepted, and what no agent sends."""

from __future__ import annotations

import base64
import contextlib
import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.attest import parse_public
from harness.errors import MalformedEvidence
from harness.keylime_wire import encode_quote, parse_quote
from harness.tenant.appraisal import Accepted, GuestTrust, appraise_guest, verify_transport_key
from harness.tenant.policy import Policy
from harness.values import HashAlg, PcrSelection
from tests.support import vectors
from tests.support.forge import value_of

B256, B384 = HashAlg.SHA256, HashAlg.SHA384
NONCE = b"Abcdefghij0123456789"


def results(name: str) -> dict[str, Any]:
    """Results of an answer that stock Keylime accepted."""
    answer = vectors.load(f"keylime/{name}.json")["response"]["results"]
    assert isinstance(answer, dict)
    return answer


@pytest.mark.parametrize("name", ["agent_identity", "agent_integrity"])
def test_the_form_is_the_one_that_stock_keylime_reads(name: str) -> None:
    """A captured quote is parsed, and written again byte by byte."""
    quote = results(name)["quote"]
    evidence = parse_quote(quote)
    assert encode_quote(evidence.attest, evidence.signature, evidence.pcrs) == quote


def test_a_captured_quote_is_accepted() -> None:
    """An integrity quote of an agent that stock Keylime accepted passes our checks, transport key included."""
    ak = parse_public(base64.b64decode(vectors.load("keylime/register_request.json")["aik_tpm"]))
    answer = results("agent_integrity")
    evidence, pem = parse_quote(answer["quote"]), answer["pubkey"].encode()
    policy = Policy.of(B256, {0: evidence.pcrs[B256][0]})
    trust = GuestTrust(ak=ak, policy=policy, baseline=None, transport_key_pem=pem)
    assert isinstance(appraise_guest(evidence, NONCE, trust, PcrSelection.of(B256, 1)), Accepted)
    identity = results("agent_identity")
    verify_transport_key(parse_quote(identity["quote"]), NONCE, ak, identity["pubkey"].encode())


def test_parts_are_padded_as_tpm2_tools_pads_them() -> None:
    """668 bytes for 1 to 8 PCRs, 532 more for each further 8."""
    for pcrs, size in ((1, 668), (8, 668), (9, 1200), (17, 1732)):
        text = encode_quote(b"", b"", {B256: {pcr: value_of(B256, pcr) for pcr in range(pcrs)}})
        assert len(base64.b64decode(text.split(":")[2])) == size


@given(st.dictionaries(st.sampled_from(list(HashAlg)), st.sets(st.integers(0, 23), min_size=1), min_size=1))
def test_every_selection_survives(selected: dict[HashAlg, set[int]]) -> None:
    """Values of all banks come back, in whatever order they were given."""
    pcrs = {bank: {pcr: value_of(bank, pcr) for pcr in indices} for bank, indices in selected.items()}
    evidence = parse_quote(encode_quote(b"attest", b"signature", pcrs))
    assert (evidence.attest, evidence.signature, evidence.pcrs) == (b"attest", b"signature", pcrs)


PCRS = {B256: {pcr: value_of(B256, pcr) for pcr in (0, 7)}, B384: {4: value_of(B384, 4)}}
HONEST = encode_quote(b"attest", b"signature", PCRS)
LISTS = 4 + 16 * 8


def blob(change: Callable[[bytearray], object]) -> str:
    """The honest quote with other PCR bytes."""
    head, _, part = HONEST.rpartition(":")
    data = bytearray(base64.b64decode(part))
    change(data)
    return f"{head}:{base64.b64encode(data).decode()}"


def put32(offset: int, value: int) -> Callable[[bytearray], object]:
    """Change that writes a little-endian number."""
    return lambda data: struct.pack_into("<I", data, offset, value)


def twenty_five_lists(data: bytearray) -> None:
    """More lists than PCRs, all there and all empty."""
    struct.pack_into("<I", data, 0, 0)
    struct.pack_into("<I", data, LISTS, 25)
    data[LISTS + 4 :] = bytes(25 * 532)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param("r", id="no-parts"),
        pytest.param(HONEST[1:], id="no-r"),
        pytest.param("d" + HONEST[1:], id="other-letter"),
        pytest.param(HONEST.rpartition(":")[0], id="two-parts"),
        pytest.param(HONEST + ":", id="four-parts"),
        pytest.param(HONEST.replace(":", ";"), id="other-separator"),
        pytest.param(HONEST + "!", id="not-base64"),
        pytest.param(HONEST[:-1] + "Ð", id="not-ascii"),
        pytest.param("r" + "A" * 70000 + "::", id="too-long"),
        pytest.param("r" + "A" * 5464 + ":" + HONEST.split(":", 1)[1], id="attest-above-4-kib"),
        pytest.param("r::", id="no-values"),
        pytest.param(blob(lambda data: data.pop()), id="values-cut"),
        pytest.param(blob(lambda data: data.append(0)), id="values-trailing-byte"),
        pytest.param(blob(lambda data: data.clear()), id="values-empty"),
        pytest.param(blob(put32(0, 17)), id="17-banks"),
        pytest.param(blob(put32(0, 1)), id="more-values-than-selected"),
        pytest.param(blob(put32(0, 3)), id="bank-0"),
        pytest.param(blob(put32(LISTS, 2)), id="more-lists-than-sent"),
        pytest.param(blob(put32(LISTS, 0)), id="no-lists"),
        pytest.param(blob(put32(LISTS, 0xFFFFFFFF)), id="lists-beyond-reason"),
        pytest.param(blob(twenty_five_lists), id="25-lists"),
        pytest.param(blob(put32(LISTS + 4, 9)), id="nine-values-in-a-list"),
        pytest.param(blob(put32(LISTS + 4, 2)), id="fewer-values-than-selected"),
        pytest.param(blob(lambda data: struct.pack_into("<H", data, 4, 4)), id="sha1-bank"),
        pytest.param(blob(lambda data: struct.pack_into("<H", data, 12, 0xB)), id="bank-twice"),
        pytest.param(blob(lambda data: struct.pack_into("<H", data, LISTS + 8, 65)), id="value-above-64-bytes"),
    ],
)
def test_another_form_is_malformed(text: str) -> None:
    """Nothing longer, shorter or ambiguous is read."""
    assert parse_quote(HONEST).pcrs == PCRS
    with pytest.raises(MalformedEvidence):
        parse_quote(text)


@given(st.text(max_size=40) | st.binary(max_size=1300).map(lambda data: "r::" + base64.b64encode(data).decode()))
def test_no_text_raises_anything_else(text: str) -> None:
    """Every text is evidence or malformed."""
    with contextlib.suppress(MalformedEvidence):
        parse_quote(text)
