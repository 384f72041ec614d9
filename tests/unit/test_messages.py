"""Strict JSON, and the forms of request and answer that DESIGN 3.1, 3.3 and 3.5 (check 1) ask for."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import MalformedEvidence, MalformedMessage, MessageTooLarge
from harness.messages import (
    encode_proof,
    parse_json,
    parse_provider_evidence,
    parse_verifier_query,
    success,
    verifier_query,
)
from harness.values import HashAlg
from tests.support.rounds import HOST, HostRound, drop, put

LIMIT = 4096

# --- JSON -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"{", id="cut"),
        pytest.param(b"{} {}", id="two-values"),
        pytest.param(b"{'a': 1}", id="other-quotes"),
        pytest.param(b'{"a": 1,}', id="trailing-comma"),
        pytest.param(b'{"a": 1} // x', id="comment"),
        pytest.param(b'{"a": 01}', id="leading-zero"),
        pytest.param(b'{"a": +1}', id="plus"),
        pytest.param(b'{"a": NaN}', id="nan"),
        pytest.param(b"[-Infinity]", id="infinity"),
        pytest.param(b'"\n"', id="control-character"),
        pytest.param(b'"\xff"', id="not-utf-8"),
        pytest.param(b'"\xed\xa0\x80"', id="surrogate-in-utf-8"),
        pytest.param(b"\xef\xbb\xbf{}", id="byte-order-mark"),
        pytest.param('{"a": 1}'.encode("utf-16"), id="utf-16"),
        pytest.param(b'{"a": 1, "a": 1}', id="repeated-member"),
        pytest.param(b'{"a": 1, "\\u0061": 2}', id="member-repeated-by-an-escape"),
        pytest.param(b'[{"x": {"a": 1, "b": 2, "a": 3}}]', id="repeated-below"),
        pytest.param(b"[" * 2000, id="nested-and-cut"),
        pytest.param(b"[" * 1500 + b"]" * 1500, id="nested-too-deeply"),
        pytest.param(b'{"a":' * 100 + b"[]" + b"}" * 100, id="objects-nested-too-deeply"),
        pytest.param(b"[" * 101 + b"]" * 101, id="one-level-too-deep"),
    ],
)
def test_what_is_not_strict_json_is_refused(data: bytes) -> None:
    """Two parsers must not read two messages in one, and no input costs more than its length."""
    with pytest.raises(MalformedMessage):
        parse_json(data, limit=LIMIT)


@pytest.mark.parametrize(
    ("data", "value"),
    [
        pytest.param(b' {"a": [1, -0, 2.5, true, null]} ', {"a": [1, 0, 2.5, True, None]}, id="all-types"),
        pytest.param(b'"\\ud83d\\ude00"', "\N{GRINNING FACE}", id="escapes"),
        pytest.param(b"18446744073709551615", (1 << 64) - 1, id="largest-integer"),
        pytest.param(b"[" * 100 + b"]" * 100, None, id="nested"),
        pytest.param(b"1" * 4000, float("inf"), id="no-work-goes-into-huge-integers"),
    ],
)
def test_json_is_read(data: bytes, value: object) -> None:
    """What RFC 8259 allows is parsed."""
    parsed = parse_json(data, limit=LIMIT)
    assert value is None or parsed == value


def test_a_message_above_its_limit_is_not_parsed() -> None:
    """The limit is in bytes and comes first."""
    assert parse_json(b"[" + b" " * 8 + b"]", limit=10) == []
    with pytest.raises(MessageTooLarge):
        parse_json(b"[" + b" " * 9 + b"]", limit=10)


@given(st.binary(max_size=200) | st.text(alphabet='{}[]",:0123456789.eE+-\\utrfalsn ', max_size=200).map(str.encode))
def test_no_bytes_raise_anything_else(data: bytes) -> None:
    """Every input is a value or a named error."""
    with contextlib.suppress(MalformedMessage, MessageTooLarge):
        parse_json(data, limit=100)


# --- request ----------------------------------------------------------------------------------------------------------

NONCE, BINDING, AGENT = "01" * 32, "ab" * 32, "a0bb03b7-39bb-4d7b-88e6-14a7e2004c8e"
GUEST = {"nonce": NONCE, "mask": "0x4091", "hash_alg": "sha256", "agent_id": AGENT, "binding": BINDING}
HOST_ONLY = {"nonce": NONCE, "mask": "0x4091", "hash_alg": "sha384", "host_id": str(HOST)}


@pytest.mark.parametrize(
    "pairs",
    [
        pytest.param(GUEST, id="guest"),
        pytest.param(HOST_ONLY, id="host-only"),
        pytest.param(GUEST | {"nonce": "00" * 16}, id="shortest-nonce"),
        pytest.param(GUEST | {"nonce": "ff" * 64}, id="longest-nonce"),
        pytest.param(GUEST | {"mask": "0x1"}, id="first-pcr"),
        pytest.param(GUEST | {"mask": "0x7effff"}, id="every-pcr-that-is-not-resettable"),
        pytest.param(GUEST | {"hash_alg": "sha512"}, id="sha512"),
    ],
)
def test_a_query_is_read_and_written_alike(pairs: dict[str, str]) -> None:
    """Both kinds of request survive the URL, in any order of parameters."""
    query = parse_verifier_query(list(pairs.items()))
    assert dict(verifier_query(query)) == pairs
    assert parse_verifier_query(list(reversed(pairs.items()))) == query


def test_leading_zeros_of_a_mask_are_no_matter() -> None:
    """The mask is a number in hex; what is hashed is the selection."""
    assert parse_verifier_query(list((GUEST | {"mask": "0x004091"}).items())).request.mask == 0x4091


BAD_QUERIES = {
    "nonce": [
        "", "01" * 15, "01" * 65, "0" * 33, "AB" * 32, "0x" + "01" * 31, "zz" * 32, " " + NONCE, NONCE + "\n", "０" * 64
    ],
    "mask": [
        "", "0x", "4091", "0X4091", "0x409A", "0x0", "0x000000", "0x1000000", "0x10000", "0x800000", "0x810000", "-0x1",
        "0x-1", "0x4091 ", "0x40_91", "16529", "0x٣", "0x" + "f" * 100,
    ],
    "hash_alg": ["", "sha1", "SHA256", "sha-256", "sha256 ", "sha224", "sha3-256", "sm3_256", "11"],
    "agent_id": [
        "", AGENT.upper(), "{" + AGENT + "}", "urn:uuid:" + AGENT, AGENT.replace("-", ""),
        AGENT[:-1], AGENT + "\n", "root"
    ],
    "binding": ["", "ab" * 31, "ab" * 33, "AB" * 32, "ab" * 31 + "a", "zz" * 32],
    "host_id": ["", str(HOST).upper(), "host-1", str(HOST) + " "],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD_QUERIES.items() for value in values])
def test_a_parameter_in_another_form_is_refused(name: str, value: str) -> None:
    """There is one form of each parameter, and the values outside the bounds of DESIGN 3.1 are 400."""
    honest = HOST_ONLY if name == "host_id" else GUEST
    with pytest.raises(MalformedMessage):
        parse_verifier_query(list((honest | {name: value}).items()))


@pytest.mark.parametrize(
    "pairs",
    [
        pytest.param([*GUEST.items(), ("mask", "0x4091")], id="repeated-with-the-same-value"),
        pytest.param([*GUEST.items(), ("nonce", "02" * 32)], id="repeated-nonce"),
        pytest.param([*GUEST.items(), ("requester", "00" * 32)], id="requester-is-never-sent"),
        pytest.param([*GUEST.items(), ("vtpm_ek", "00" * 32)], id="vtpm-ek-is-never-sent"),
        pytest.param([*GUEST.items(), ("extra", "")], id="unknown"),
        pytest.param([*GUEST.items(), ("Mask", "0x4091")], id="unknown-by-case"),
        pytest.param([], id="none"),
        pytest.param([*GUEST.items(), ("host_id", str(HOST))], id="host-and-guest"),
        pytest.param([pair for pair in HOST_ONLY.items() if pair[0] != "host_id"], id="neither-host-nor-guest"),
        pytest.param([*HOST_ONLY.items(), ("binding", BINDING)], id="binding-without-a-guest"),
        *(pytest.param([pair for pair in GUEST.items() if pair[0] != name], id=f"{name}-missing") for name in GUEST),
    ],
)
def test_parameters_that_do_not_belong_together_are_refused(pairs: list[tuple[str, str]]) -> None:
    """Unknown, repeated and missing parameters, and halves of pairs."""
    with pytest.raises(MalformedMessage):
        parse_verifier_query(pairs)


# --- answer -----------------------------------------------------------------------------------------------------------

VALUE = "ab" * 32
Edit = Callable[[dict[str, Any]], object]
MALFORMED: dict[str, Edit] = {
    **{f"no-{name}": drop(name) for name in ("host_id", "attest", "signature", "pcrs", "proof")},
    **{f"no-proof-{name}": drop("proof", name) for name in ("leaf_index", "tree_size", "hashes")},
    **{f"{name}-is-null": put(name, value=None) for name in ("host_id", "attest", "signature", "pcrs", "proof")},
    **{f"{name}-is-a-number": put(name, value=7) for name in ("host_id", "attest", "signature", "pcrs", "proof")},
    **{f"{name}-is-a-list": put(name, value=[]) for name in ("host_id", "attest", "signature", "pcrs", "proof")},
    **{
        f"{name}-is-{what}": put("proof", name, value=value)
        for name in ("leaf_index", "tree_size")
        for what, value in {
            "true": True, "false": False, "negative": -1, "2^63": 1 << 63, "a-float": 3.0, "text": "3", "null": None,
            "infinity": float("inf"), "a-list": [3],
        }.items()
    },
    **{
        f"base64-{what}": put("signature", value=value)
        for what, value in {
            "unpadded": "QQ", "half-padded": "QQ=", "overpadded": "QUJD====", "padding-inside": "QQ==QQ==",
            "url-alphabet": "-_-_", "newline": "QUJD\n", "space": "QU JD", "stray-bits": "QR==", "one-letter": "Q",
            "not-ascii": "QUJÐ", "surrogate": "\ud800", "above-4-kib": "A" * 5464,
        }.items()
    },
    "attest-above-4-kib": put("attest", value="A" * 5464),
    "hashes-are-text": put("proof", "hashes", value=VALUE),
    "hashes-are-an-object": put("proof", "hashes", value={}),
    "hash-is-null": put("proof", "hashes", value=[None]),
    "hash-too-short": put("proof", "hashes", value=["ab" * 31]),
    "hash-too-long": put("proof", "hashes", value=["ab" * 33]),
    "hash-empty": put("proof", "hashes", value=[""]),
    "hash-in-capitals": put("proof", "hashes", value=["AB" * 32]),
    "hash-with-prefix": put("proof", "hashes", value=["0x" + "ab" * 31]),
    "hash-is-no-hex": put("proof", "hashes", value=["xy" * 32]),
    "65-hashes": put("proof", "hashes", value=[VALUE] * 65),
    **{
        f"bank-{bank or 'empty'}": put("pcrs", bank, value={"0": VALUE})
        for bank in ("sha1", "SHA256", "sha3-256", "", "sm3_256", "11")
    },
    "empty-unknown-bank": put("pcrs", "sha1", value={}),
    "bank-is-a-list": put("pcrs", "sha256", value=[VALUE]),
    "bank-is-null": put("pcrs", "sha256", value=None),
    **{
        f"index-{index!r}": put("pcrs", "sha256", index, value=VALUE)
        for index in ("24", "07", "+7", "-1", "-0", "", " 7", "7 ", "7.0", "1e1", "0x7", "٧", "７", "²", "100", "00")
    },
    "value-is-null": put("pcrs", "sha256", "0", value=None),
    "value-is-a-number": put("pcrs", "sha256", "0", value=7),
    "value-in-capitals": put("pcrs", "sha256", "0", value="AB" * 32),
    "value-of-odd-length": put("pcrs", "sha256", "0", value="ab" * 31 + "a"),
    "value-of-65-bytes": put("pcrs", "sha256", "0", value="ab" * 65),
    "value-is-no-hex": put("pcrs", "sha256", "0", value="xy" * 32),
    "value-in-other-digits": put("pcrs", "sha256", "0", value="００" * 32),
}  # fmt: skip
WELL_FORMED: dict[str, Edit] = {
    "as-it-is": lambda _: None,
    "empty-base64": put("attest", value=""),
    "4-kib": put("attest", value="A" * 5460 + "AA=="),
    "largest-integer": put("proof", "tree_size", value=(1 << 63) - 1),
    "no-hashes": put("proof", "hashes", value=[]),
    "64-hashes": put("proof", "hashes", value=[VALUE] * 64),
    "no-banks": put("pcrs", value={}),
    "empty-bank": put("pcrs", "sha512", value={}),
    "empty-value": put("pcrs", "sha256", "0", value=""),
    "value-of-64-bytes": put("pcrs", "sha256", "0", value="ab" * 64),
    "every-index": put("pcrs", "sha256", value={str(pcr): VALUE for pcr in range(24)}),
    "any-text-as-host": put("host_id", value="\ud800"),
    "unknown-members": put("nonce_batch", value={"leaf_index": True}),
    "no-batch": drop("batch"),
    "batch-is-null": put("batch", value=None),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_evidence_in_another_form_is_malformed(name: str) -> None:
    """Check 1: types, bounds and encodings."""
    results = HostRound().results()
    MALFORMED[name](results)
    with pytest.raises(MalformedEvidence):
        parse_provider_evidence(results)


@pytest.mark.parametrize("results", [None, [], "x", 7, True, {}], ids=repr)
def test_evidence_is_an_object(results: object) -> None:
    """Also the answer itself has a type."""
    with pytest.raises(MalformedEvidence):
        parse_provider_evidence(results)


@pytest.mark.parametrize("name", WELL_FORMED)
def test_well_formed_evidence_is_left_to_the_later_checks(name: str) -> None:
    """What DESIGN 3.5 does not name under check 1 is not refused there."""
    results = HostRound().results()
    WELL_FORMED[name](results)
    parse_provider_evidence(results)


def test_evidence_is_what_was_sent() -> None:
    """Bytes, values and proof arrive unchanged; the input is not changed by parsing."""
    results = HostRound().results()
    before = json.dumps(results)
    evidence = parse_provider_evidence(results)
    assert json.dumps(results) == before
    assert evidence.host_id == str(HOST)
    assert encode_proof(evidence.proof) == results["proof"]
    assert {str(pcr): value.hex() for pcr, value in evidence.pcrs[HashAlg.SHA256].items()} == results["pcrs"]["sha256"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(["host_id", "attest", "signature", "pcrs", "proof", "batch"]), JSON)
def test_no_json_raises_anything_else(name: str, value: Any) -> None:
    """Whatever stands in a member, the evidence is typed or malformed."""
    results: dict[str, Any] = HostRound().results()
    results[name] = value
    with contextlib.suppress(MalformedEvidence):
        parse_provider_evidence(results)


def test_the_envelope_is_keylimes() -> None:
    """Code, status and results."""
    assert success({"a": 1}) == {"code": 200, "status": "Success", "results": {"a": 1}}
