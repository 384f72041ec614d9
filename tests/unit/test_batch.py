"""Sealed batches, without a task or a TPM."""

from __future__ import annotations

import random
from dataclasses import asdict
from datetime import UTC, datetime

import pytest

from harness import merkle, protocol
from harness.config import BatchSettings
from harness.provider.batch import RFC9162, PendingQuote, SealedBatch, TreeBuilder, Waiter, seal
from harness.provider.batching import BatchReport, costs
from harness.provider.merklelib_tree import MERKLELIB, MerklelibTree
from tests.support.pendings import a_request, agent, allow

SEALED_AT = datetime(2026, 1, 2, tzinfo=UTC)


def waiter(pending: PendingQuote) -> Waiter:
    return Waiter(pending=pending, arrived_s=0.0)


def sealed(members: list[Waiter], rng: random.Random, builder: TreeBuilder = RFC9162) -> SealedBatch:
    return seal(dict.fromkeys(members), builder=builder, rng=rng, sealed_at=SEALED_AT)


# --- sealing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("builder", [RFC9162, MERKLELIB], ids=lambda builder: builder.name)
@pytest.mark.parametrize(("members", "leaves"), [(1, 16), (2, 16), (16, 16), (17, 32), (33, 64)])
def test_every_member_has_a_proof_to_the_root(
    members: int, leaves: int, builder: TreeBuilder, rng: random.Random
) -> None:
    """Each proof leads from the member's own leaf to the root; the tree is filled to a power of two of at least 16."""
    waiters = [waiter(a_request()) for _ in range(members)]
    batch = sealed(waiters, rng, builder)
    assert batch.tree.size == leaves
    proofs = batch.proofs()
    assert set(proofs) == set(waiters) == set(batch.members)
    for member, proof in proofs.items():
        data = protocol.leaf_data(member.pending.request, requester=member.pending.requester, vtpm_ek=None)
        assert merkle.root_from_proof(merkle.leaf_hash(data), proof) == batch.tree.root
    assert len({proof.leaf_index for proof in proofs.values()}) == members


def test_both_builders_give_the_same_tree(rng: random.Random) -> None:
    """merklelib's root and paths are those of RFC 9162, for every number of leaves."""
    for size in range(1, 40):
        leaves = [rng.randbytes(32) for _ in range(size)]
        ours, theirs = merkle.MerkleTree(leaves), MerklelibTree(leaves)
        assert theirs.root == ours.root
        assert theirs.paths() == ours.paths()


@pytest.mark.parametrize("leaves", [[], [b"\x01" * 32] * 2], ids=["none", "two-equal"])
def test_merklelib_is_not_given_what_it_gets_wrong(leaves: list[bytes]) -> None:
    """It would drop one of two equal leaves, and has no root for none."""
    with pytest.raises(ValueError, match="distinct"):
        MerklelibTree(leaves)


def test_the_quote_covers_what_the_members_ask_and_no_more(rng: random.Random) -> None:
    """The selection is the union of the members, whoever else was in the pool."""
    batch = sealed([waiter(a_request(pcrs=[0])), waiter(a_request(pcrs=[3, 7]))], rng)
    assert batch.selection == allow([0, 3, 7])


def test_leaves_are_in_random_order(rng: random.Random) -> None:
    """A member's index does not follow from its place in the pool."""
    waiters = [waiter(a_request()) for _ in range(16)]
    orders = set()
    for _ in range(8):
        proofs = sealed(waiters, rng).proofs()
        orders.add(tuple(proofs[member].leaf_index for member in waiters))
    assert len(orders) > 1


def test_filling_differs_from_batch_to_batch(rng: random.Random) -> None:
    """The same member gets another tree each time: filling is random, not constant."""
    member = waiter(a_request())
    assert sealed([member], rng).tree.root != sealed([member], rng).tree.root


@pytest.mark.parametrize("builder", [RFC9162, MERKLELIB], ids=lambda builder: builder.name)
def test_equal_requests_share_a_leaf(builder: TreeBuilder, rng: random.Random) -> None:
    """A client that uses its nonce twice gets two valid answers and harms nobody."""
    twins = [waiter(a_request(nonce=b"n" * 32)) for _ in range(2)]
    first, second = sealed(twins, rng, builder).proofs().values()
    assert first == second


def test_the_same_nonce_of_two_tenants_gives_two_leaves(rng: random.Random) -> None:
    """The requester is in the leaf."""
    both = [waiter(a_request(tenant, nonce=b"n" * 32)) for tenant in ("a", "b")]
    first, second = sealed(both, rng).proofs().values()
    assert first.leaf_index != second.leaf_index


def test_the_vtpm_is_in_the_leaf(rng: random.Random) -> None:
    """A guest's leaf carries the EK digest that sealing was given, not another one."""
    member = waiter(a_request(agent_id=agent(1)))
    batch = seal({member: b"e" * 32}, builder=RFC9162, rng=rng, sealed_at=SEALED_AT)
    proof = batch.proofs()[member]
    root_of = {
        ek: merkle.root_from_proof(
            merkle.leaf_hash(
                protocol.leaf_data(member.pending.request, requester=member.pending.requester, vtpm_ek=ek)
            ),
            proof,
        )
        for ek in (b"e" * 32, b"f" * 32)
    }
    assert root_of[b"e" * 32] == batch.tree.root != root_of[b"f" * 32]


def test_a_batch_event_leaves_out_how_long_each_waited() -> None:
    """A line of the log is short whatever the size of the batch; everything else of the report is in it."""
    report = BatchReport(
        batch_id="1", requests=2, refused=0, tree_size=16, tpm_quotes=1, waited_s=0.5, sealing_s=0.1, quote_s=0.2,
        waiting=0, outcome="quoted", waits_s=(0.7, 0.8),
    )  # fmt: skip
    assert report.event() == {key: value for key, value in asdict(report).items() if key != "waits_s"}
    assert report.event()["strategy"] == "batched"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, []),
        ({"tree": "merklelib"}, ["merklelib"]),
        ({"strategy": "single"}, ["single"]),
        ({"tree": "merklelib", "strategy": "window", "window_s": 7.0}, ["merklelib", "7 s"]),
    ],
)
def test_settings_for_comparison_say_what_they_cost(changes: dict[str, object], named: list[str]) -> None:
    """One sentence for each; the defaults cost nothing that is worth one."""
    settings = BatchSettings.model_validate(changes)
    sentences = costs(settings, {"rfc9162": RFC9162, "merklelib": MERKLELIB}[settings.tree])
    assert len(sentences) == len(named)
    assert all(name in sentence for name, sentence in zip(named, sentences, strict=True))


def test_a_batch_needs_a_member(rng: random.Random) -> None:
    """Nothing is sealed, and so nothing signed, for nobody."""
    with pytest.raises(ValueError, match="member"):
        sealed([], rng)


def test_durations_of_a_batch_event_are_short() -> None:
    """Twenty digits in a row would look like a secret in a log."""
    report = BatchReport(
        batch_id="1", requests=1, refused=0, tree_size=16, tpm_quotes=1, waited_s=0.00015628300025127828,
        sealing_s=0.1, quote_s=0.2, waiting=0, outcome="quoted",
    )  # fmt: skip
    assert report.event()["waited_s"] == 0.000156
