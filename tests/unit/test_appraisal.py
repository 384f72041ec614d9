"""Host evidence: the honest round is accepted; one change, and the one named check refuses it."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from harness.merkle import MerkleTree, leaf_hash
from harness.messages import encode_proof
from harness.protocol import leaf_data
from harness.tenant.appraisal import Accepted, advance
from harness.tenant.policy import Policy
from harness.values import ClockBaseline, HashAlg, HostId, Nonce, PcrSelection
from tests.support.forge import AK_ATTRIBUTES, P384, SHA1, SHA256, SHA384, SHA512, ecc_key, rsa_key, value_of
from tests.support.rounds import BASELINE, TWO_BANKS, HostRound, drop, put, recode, refused, selection_of

B256, B384, B512 = HashAlg.SHA256, HashAlg.SHA384, HashAlg.SHA512


# --- honest rounds ----------------------------------------------------------------------------------------------------

HONEST = {
    "ecdsa-p256": HostRound(),
    "ecdsa-p384": HostRound(key=ecc_key(curve=P384, hash_alg=SHA384)),
    "rsassa-2048": HostRound(key=rsa_key()),
    "rsassa-3072-sha512": HostRound(key=rsa_key(bits=3072, hash_alg=SHA512)),
    "host-only": HostRound(guest=None),
    "one-leaf": HostRound(place=(0, 1)),
    "last-leaf-of-an-odd-tree": HostRound(place=(6, 7)),
    "other-bank-in-the-union": HostRound(bank=B384, requested=(0, 4), selection=TWO_BANKS),
    "banks-signed-in-another-order": HostRound(selection=selection_of((B512, (3,)), (B256, (0, 4, 7, 14)))),
    "an-all-zero-entry-beside": HostRound(selection=selection_of((B384, ()), (B256, (0, 4, 7, 14)))),
    "no-baseline": HostRound(trust={"baseline": None}),
    "firmware-unknown": HostRound(trust={"baseline": replace(BASELINE, firmware_version=None)}),
    "clock-one-later": HostRound(attest={"clock": 901}),
    "free-attributes": HostRound(key=ecc_key(attributes=AK_ATTRIBUTES | 1 << 7 | 1 << 10)),
    "unknown-members": HostRound(edits=[put("extra", value=[{}]), put("proof", "sides", value="LR")]),
    "no-batch": HostRound(edits=[drop("batch")]),
    "batch-of-another-type": HostRound(edits=[put("batch", value=7)]),
    "several-allowed-values": HostRound(
        trust={"policy": Policy({B256: {0: frozenset({bytes(32), b"", value_of(B256, 0)})}})}
    ),
}


@pytest.mark.parametrize("name", HONEST)
def test_honest_evidence_is_accepted(name: str) -> None:
    """Every kind of acceptable key, tree and selection passes."""
    verdict = HONEST[name].verdict()
    assert isinstance(verdict, Accepted), verdict


def test_accepted_evidence_tells_what_was_not_judged_and_what_to_store() -> None:
    """Requested PCRs that the policy does not name are reported; the clock is the signed one."""
    verdict = HostRound().verdict()
    assert isinstance(verdict, Accepted)
    assert verdict.evidence.unjudged == PcrSelection.from_lists({B256: (7, 14)})
    assert verdict.evidence.baseline == replace(BASELINE, clock=1000)
    assert set(verdict.evidence.values[B256]) == {0, 1, 2, 3, 4, 5, 6, 7, 14}


# --- 2, 3, 5: host, tree, request -------------------------------------------------------------------------------------

WRONG_HOST = (2, "WrongHost")
NO_PROOF = (3, "InclusionProofInvalid")
NOT_OURS = (5, "QualifyingDataMismatch")


def with_request(**changes: Any) -> dict[str, Any]:
    """A sent request that differs from the one in the leaf."""
    honest = HostRound().sent_request()
    return {"request": replace(honest.request, **changes)}


def proof_of(size: int, index: int) -> dict[str, Any]:
    """Proof of our leaf at another place."""
    return encode_proof(MerkleTree([bytes([n]) * 32 for n in range(size)]).proof(index))


def inner_node_as_leaf(results: dict[str, Any]) -> None:
    """The path from the parent of our leaf: right for index 1 of 4 in the tree above."""
    proof = results["proof"]
    results["proof"] = {"leaf_index": 1, "tree_size": 4, "hashes": proof["hashes"][1:]}


ROUNDS = [
    pytest.param(HostRound(edits=[put("host_id", value=str(uuid.UUID(int=8)))]), WRONG_HOST, id="other-host"),
    pytest.param(
        HostRound(edits=[lambda r: r.update(host_id=r["host_id"].upper())]), WRONG_HOST, id="host-in-capitals"
    ),
    pytest.param(HostRound(edits=[put("host_id", value="")]), WRONG_HOST, id="no-host"),
    pytest.param(HostRound(trust={"host_id": HostId(uuid.UUID(int=8))}), WRONG_HOST, id="enrolled-elsewhere"),
    pytest.param(HostRound(edits=[put("proof", "tree_size", value=0)]), NO_PROOF, id="empty-tree"),
    pytest.param(HostRound(edits=[put("proof", "leaf_index", value=7)]), NO_PROOF, id="index-is-the-size"),
    pytest.param(HostRound(edits=[put("proof", "leaf_index", value=3 + 8)]), NO_PROOF, id="index-bits-beyond-the-path"),
    pytest.param(HostRound(edits=[put("proof", "tree_size", value=(1 << 20) + 1)]), NO_PROOF, id="tree-too-large"),
    pytest.param(HostRound(edits=[put("proof", "tree_size", value=16)]), NO_PROOF, id="size-asks-for-a-longer-path"),
    pytest.param(HostRound(edits=[put("proof", "hashes", value=[])]), NO_PROOF, id="no-path"),
    pytest.param(HostRound(edits=[lambda r: r["proof"]["hashes"].pop()]), NO_PROOF, id="path-too-short"),
    pytest.param(HostRound(edits=[lambda r: r["proof"]["hashes"].append("00" * 32)]), NO_PROOF, id="path-too-long"),
    pytest.param(HostRound(edits=[put("proof", "tree_size", value=8)]), NOT_OURS, id="other-size-with-an-equal-path"),
    pytest.param(HostRound(edits=[put("proof", "leaf_index", value=2)]), NOT_OURS, id="other-index"),
    pytest.param(HostRound(edits=[lambda r: r["proof"]["hashes"].reverse()]), NOT_OURS, id="path-from-root-to-leaf"),
    pytest.param(HostRound(edits=[put("proof", value=proof_of(7, 3))]), NOT_OURS, id="proof-of-another-tree"),
    pytest.param(HostRound(edits=[inner_node_as_leaf]), NOT_OURS, id="inner-node-as-leaf"),
    pytest.param(HostRound(sent=with_request(nonce=Nonce(bytes(32)))), NOT_OURS, id="other-nonce"),
    pytest.param(HostRound(sent=with_request(mask=0x4081)), NOT_OURS, id="other-mask"),
    pytest.param(HostRound(sent=with_request(bank=B384)), NOT_OURS, id="other-bank"),
    pytest.param(HostRound(sent=with_request(agent_id=uuid.UUID(int=1))), NOT_OURS, id="other-guest"),
    pytest.param(HostRound(sent=with_request(binding=bytes(32))), NOT_OURS, id="other-binding"),
    pytest.param(HostRound(sent={"requester": bytes(32)}), NOT_OURS, id="another-tenants-quote"),
    pytest.param(HostRound(sent={"requester": b""}), NOT_OURS, id="no-requester"),
    pytest.param(HostRound(sent={"vtpm_ek": bytes(32)}), NOT_OURS, id="other-vtpm"),
    pytest.param(HostRound(attest={"extra_data": b""}), NOT_OURS, id="no-extra-data"),
    pytest.param(HostRound(attest={"extra_data": bytes(32)}), NOT_OURS, id="other-extra-data"),
    pytest.param(HostRound(attest={"extra_data": bytes(range(100, 132))}), NOT_OURS, id="raw-nonce-signed"),
]


# --- 4: a quote made inside a TPM -------------------------------------------------------------------------------------

NO_QUOTE = (4, "NotATpmQuote")
FOUR_BANKS = (*selection_of((B256, (0, 4, 7, 14)), (B384, (0,)), (B512, (0,))), (SHA1, b"\x01\x00\x00"))

ROUNDS += [
    pytest.param(HostRound(attest={"magic": 0xFF544348}), NO_QUOTE, id="magic"),
    pytest.param(HostRound(attest={"magic": 0}), NO_QUOTE, id="no-magic"),
    pytest.param(HostRound(attest={"type": 0x8017}), NO_QUOTE, id="certify"),
    pytest.param(HostRound(attest={"type": 0x8019}), NO_QUOTE, id="other-type"),
    pytest.param(HostRound(attest={"tail": b"\x00"}), NO_QUOTE, id="trailing-byte"),
    pytest.param(HostRound(attest={"safe": 2}), NO_QUOTE, id="safe-is-neither-yes-nor-no"),
    pytest.param(HostRound(attest={"selection": ()}), NO_QUOTE, id="no-selection"),
    pytest.param(HostRound(attest={"selection": FOUR_BANKS}), NO_QUOTE, id="four-banks"),
    pytest.param(HostRound(attest={"selection": FOUR_BANKS[3:]}), NO_QUOTE, id="sha1-bank"),
    pytest.param(HostRound(attest={"selection": ((0x27, b"\x91\x40\x00"),)}), NO_QUOTE, id="unknown-bank"),
    pytest.param(HostRound(attest={"selection": ((SHA256, b"\x91\x40"),)}), NO_QUOTE, id="two-bytes-of-select"),
    pytest.param(
        HostRound(attest={"selection": ((SHA256, b"\x91\x40\x00\x00"),)}), NO_QUOTE, id="four-bytes-of-select"
    ),
    pytest.param(
        HostRound(attest={"selection": selection_of((B256, (0, 4)), (B256, (7, 14)))}), NO_QUOTE, id="bank-twice"
    ),
    pytest.param(HostRound(edits=[recode("attest", lambda _: b"")]), NO_QUOTE, id="empty-attest"),
    pytest.param(HostRound(edits=[recode("attest", lambda data: data[:-1])]), NO_QUOTE, id="cut-attest"),
    pytest.param(HostRound(edits=[recode("attest", lambda data: b"\x00\x91" + data)]), NO_QUOTE, id="sized-attest"),
]


@pytest.mark.parametrize(("spoilt", "expected"), ROUNDS)
def test_one_change_is_refused_by_its_check(spoilt: HostRound, expected: tuple[int, str]) -> None:
    """Exactly the check that DESIGN 3.5 gives for the defect refuses the evidence."""
    assert refused(spoilt.verdict()) == expected


# --- order ------------------------------------------------------------------------------------------------------------

DEFECTS: dict[int, Callable[[HostRound], object]] = {
    1: lambda r: r.edits.append(put("proof", "leaf_index", value=True)),
    2: lambda r: r.edits.append(put("host_id", value="other")),
    3: lambda r: r.edits.append(lambda results: results["proof"]["hashes"].append("00" * 32)),
    4: lambda r: r.attest.update(magic=0),
    5: lambda r: r.sent.update(requester=bytes(32)),
    6: lambda r: r.edits.append(recode("signature", lambda data: data[:-1])),
    7: lambda r: setattr(r, "selection", selection_of((B256, (0, 4)))),
    8: lambda r: r.edits.append(put("pcrs", "sha256", "4", value="00" * 32)),
    9: lambda r: r.trust.update(policy=None),
    10: lambda r: r.trust.update(baseline=replace(BASELINE, clock=5000)),
    11: lambda r: setattr(r, "appraised_binding", bytes(32)),
}


@pytest.mark.parametrize("check", DEFECTS)
def test_each_defect_alone_fails_its_check(check: int) -> None:
    """The defects below are what they are said to be."""
    spoilt = HostRound()
    DEFECTS[check](spoilt)
    assert refused(spoilt.verdict())[0] == check


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(DEFECTS, 2)))
def test_of_two_defects_the_first_check_is_reported(first: int, second: int) -> None:
    """The checks are made in the order of DESIGN 3.5, and the first failure is the verdict."""
    spoilt = HostRound()
    DEFECTS[second](spoilt)
    DEFECTS[first](spoilt)
    assert refused(spoilt.verdict())[0] == first


def test_an_unacceptable_key_is_no_matter_before_its_check() -> None:
    """A pinned key that may not be an AK does not hide that the quote is not for our request."""
    spoilt = HostRound(key=ecc_key(attributes=AK_ATTRIBUTES ^ 1 << 16), sent={"requester": bytes(32)})
    assert refused(spoilt.verdict()) == NOT_OURS


# --- baseline ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "seen", "kept"),
    [
        pytest.param(None, BASELINE, BASELINE, id="first"),
        pytest.param(BASELINE, replace(BASELINE, clock=901), replace(BASELINE, clock=901), id="raised"),
        pytest.param(BASELINE, replace(BASELINE, clock=899), BASELINE, id="overtaken-answer"),
        pytest.param(BASELINE, BASELINE, BASELINE, id="equal"),
        pytest.param(BASELINE, replace(BASELINE, clock=999, reset_count=6), BASELINE, id="reboot-stored-meanwhile"),
        pytest.param(BASELINE, replace(BASELINE, clock=999, restart_count=1), BASELINE, id="restart-stored-meanwhile"),
    ],
)
def test_accepting_raises_the_stored_clock_and_never_lowers_it(
    stored: ClockBaseline | None, seen: ClockBaseline, kept: ClockBaseline
) -> None:
    """Answers that overtake each other leave the highest clock; counters change by a reported reboot only."""
    assert advance(stored, seen) == kept


def test_two_guests_in_one_batch_are_both_accepted() -> None:
    """Equal clocks under one stored baseline are honest: the baseline is that of each nonce's creation."""
    first, second = HostRound(place=(2, 7)), HostRound(place=(5, 7))
    assert isinstance(first.verdict(), Accepted)
    assert isinstance(second.verdict(), Accepted)


def test_the_leaf_is_ours_not_what_came_back() -> None:
    """A leaf hash in the answer changes nothing: nobody reads it."""
    sent = HostRound().sent_request()
    own = leaf_hash(leaf_data(sent.request, requester=sent.requester, vtpm_ek=sent.vtpm_ek))
    spoilt = HostRound(sent={"requester": bytes(32)}, edits=[put("proof", "leaf_hash", value=own.hex())])
    assert refused(spoilt.verdict()) == NOT_OURS
