"""Pools and sealed batches, without a task or a TPM."""

from __future__ import annotations

import random
from dataclasses import asdict
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import merkle, protocol
from harness.provider.batch import RFC9162, PendingQuote, Pool, SealedBatch, TreeBuilder, Waiter, seal
from harness.provider.batching import BatchReport
from harness.provider.merklelib_tree import MERKLELIB, MerklelibTree
from harness.values import HashAlg, PcrSelection
from tests.support.pendings import a_request, agent, allow

SEALED_AT = datetime(2026, 1, 2, tzinfo=UTC)
PCRS = st.sets(st.integers(0, 15), min_size=1, max_size=4)


def waiter(pending: PendingQuote, arrived_s: float = 0.0) -> Waiter:
    return Waiter(pending=pending, arrived_s=arrived_s)


def pool_of(*pendings: PendingQuote) -> Pool:
    pool = Pool()
    for arrived_s, pending in enumerate(pendings):
        assert pool.admits(pending)
        pool.add(waiter(pending, float(arrived_s)))
    return pool


def sealed(members: list[Waiter], rng: random.Random, builder: TreeBuilder = RFC9162) -> SealedBatch:
    return seal(dict.fromkeys(members), builder=builder, rng=rng, sealed_at=SEALED_AT)


# --- pools ------------------------------------------------------------------------------------------------------------


def test_an_empty_pool_admits_a_request_inside_its_own_allowlist_only() -> None:
    """A request whose own mask is outside its allowlist fits no pool."""
    assert Pool().admits(a_request(pcrs=[0, 7], allowlist=allow([0, 7])))
    assert not Pool().admits(a_request(pcrs=[0, 8], allowlist=allow([0, 7])))


@pytest.mark.parametrize(
    ("member", "newcomer", "joins"),
    [
        pytest.param(a_request("a", [0]), a_request("b", [7]), True, id="both-may-see-the-union"),
        pytest.param(a_request("a", [0], allowlist=allow([0])), a_request("b", [7]), False, id="member-may-not"),
        pytest.param(a_request("a", [0, 10]), a_request("b", [7], allowlist=allow([7])), False, id="newcomer-may-not"),
        pytest.param(
            a_request("a", [0], allowlist=allow([0, 7])),
            a_request("b", [7], allowlist=allow([0, 7])),
            True,
            id="narrow-lists-that-agree",
        ),
        pytest.param(
            a_request("a", [0]),
            a_request("b", [0], bank=HashAlg.SHA384),
            False,
            id="same-pcr-of-a-bank-that-the-other-may-not-see",
        ),
    ],
)
def test_a_request_joins_where_everybody_may_see_the_union(
    member: PendingQuote, newcomer: PendingQuote, joins: bool
) -> None:
    """Membership is decided by every allowlist, the newcomer's included."""
    assert pool_of(member).admits(newcomer) is joins


@given(st.lists(st.tuples(PCRS, st.sets(st.integers(0, 15)), st.booleans()), max_size=12))
def test_the_union_stays_inside_every_allowlist(steps: list[tuple[set[int], set[int], bool]]) -> None:
    """Whatever comes and goes, the pool's selection is the members' union and no member may not see it."""
    pool = Pool()
    members: list[Waiter] = []
    for asked, allowed, leaves in steps:
        pending = a_request(pcrs=asked, allowlist=allow(asked | allowed))
        if pool.admits(pending):
            members.append(waiter(pending))
            pool.add(members[-1])
        if leaves and members:
            pool.discard(members.pop(0))
        union = PcrSelection()
        for member in members:
            union = union.union(member.pending.request.selection)
        assert pool.selection == union
        assert len(pool) == len(members)
        assert all(union.within(member.pending.allowlist) for member in members)


def test_discarding_twice_or_a_stranger_changes_nothing() -> None:
    """A waiter that is not in the pool cannot be taken out of it."""
    member, stranger = waiter(a_request(pcrs=[3])), waiter(a_request(pcrs=[3]))
    pool = Pool()
    pool.add(member)
    pool.discard(stranger)
    assert len(pool) == 1
    pool.discard(member)
    pool.discard(member)
    assert len(pool) == 0
    assert pool.selection == PcrSelection()


def test_tenants_take_turns_where_not_everybody_fits() -> None:
    """A tenant with many requests does not crowd out one with few; each tenant's oldest goes first."""
    pool = pool_of(*(a_request("flood") for _ in range(10)), a_request("b"), a_request("c"))
    first = pool.take(4, 100.0)
    assert [member.pending.tenant for member in first] == ["flood", "b", "c", "flood"]
    assert [member.arrived_s for member in first if member.pending.tenant == "flood"] == [0.0, 1.0]
    assert len(pool) == 8


def test_turns_go_on_from_batch_to_batch() -> None:
    """Who was served last stands at the end in the next batch."""
    pool = pool_of(*(a_request(tenant) for tenant in "aabb"))
    assert [member.pending.tenant for member in pool.take(1, 0.0) + pool.take(1, 0.0)] == ["a", "b"]


def test_a_served_pool_waits_behind_one_that_was_not() -> None:
    """What is left in a pool counts as waiting since the pool was served, so that a flood cannot hold its place."""
    flood, other = pool_of(*(a_request("flood") for _ in range(4))), Pool()
    other.add(waiter(a_request("b"), 50.0))
    assert flood.waiting_since_s < other.waiting_since_s
    flood.take(2, 60.0)
    assert other.waiting_since_s < flood.waiting_since_s


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
    """merklelib's root and proofs are those of RFC 9162, for every number of leaves."""
    for size in range(1, 40):
        leaves = [rng.randbytes(32) for _ in range(size)]
        ours, theirs = merkle.MerkleTree(leaves), MerklelibTree(leaves)
        assert theirs.root == ours.root
        assert theirs.proofs() == list(ours.proofs())


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


def test_a_batch_needs_a_member(rng: random.Random) -> None:
    """Nothing is sealed, and so nothing signed, for nobody."""
    with pytest.raises(ValueError, match="member"):
        sealed([], rng)
