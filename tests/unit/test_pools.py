"""Pools: who may share a quote, which pool is next, and whose turn it is; without a task or a TPM."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.provider.batch import PendingQuote, Waiter
from harness.provider.pools import Pool, Pools, kind_of, sees_what_it_asks
from harness.values import HashAlg, PcrSelection
from tests.support.pendings import a_request, allow

PCRS = st.sets(st.integers(0, 15), min_size=1, max_size=4)
BANKS = st.sampled_from(list(HashAlg))


def waiter(pending: PendingQuote, arrived_s: float = 0.0) -> Waiter:
    return Waiter(pending=pending, arrived_s=arrived_s, kind=kind_of(pending))


def pool_of(*pendings: PendingQuote) -> Pool:
    pool = Pool(0.0)
    for arrived_s, pending in enumerate(pendings):
        assert pool.admits(kind_of(pending))
        pool.add(waiter(pending, float(arrived_s)))
    return pool


def put(pools: Pools, *waiters: Waiter) -> list[Pool]:
    """The pool of each, all of which must have found one."""
    found = []
    for each in waiters:
        pool = pools.find(each)
        assert pool is not None
        pools.add(pool, each)
        found.append(pool)
    return found


# --- who may share ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bank", "allowed", "sees"),
    [
        pytest.param(HashAlg.SHA256, allow([0, 7]), True, id="just-that"),
        pytest.param(HashAlg.SHA256, allow([0, 8]), False, id="one-is-missing"),
        pytest.param(HashAlg.SHA384, allow([0, 7]), False, id="another-bank"),
        pytest.param(HashAlg.SHA512, allow([0, 7], HashAlg.SHA512), True, id="highest-bank"),
        pytest.param(HashAlg.SHA256, PcrSelection(), False, id="nothing-allowed"),
    ],
)
def test_a_request_may_ask_what_its_own_allowlist_names(bank: HashAlg, allowed: PcrSelection, sees: bool) -> None:
    """Bank and PCR count, both."""
    kind = kind_of(a_request(pcrs=[0, 7], bank=bank, allowlist=allowed))
    assert sees_what_it_asks(kind) is Pool(0.0).admits(kind) is sees


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
    assert pool_of(member).admits(kind_of(newcomer)) is joins
    first, second = put(Pools(8), waiter(member), waiter(newcomer))
    assert (first is second) is joins


@given(st.lists(st.tuples(BANKS, PCRS, st.sets(st.integers(0, 15)), st.booleans()), max_size=12))
def test_a_pool_admits_what_all_its_members_would(steps: list[tuple[HashAlg, set[int], set[int], bool]]) -> None:
    """Whatever came and went: exactly what the members' own selections and allowlists, looked at one by one, allow."""
    pool, members = Pool(0.0), list[Waiter]()
    for bank, asked, allowed, leaves in steps:
        pending = a_request(pcrs=asked, allowlist=allow(asked | allowed, bank), bank=bank)
        union = pending.request.selection
        for member in members:
            union = union.union(member.pending.request.selection)
        everybody = [pending, *(member.pending for member in members)]
        admits = all(union.within(each.allowlist) for each in everybody)
        assert pool.admits(kind_of(pending)) is admits
        if admits:
            members.append(waiter(pending))
            pool.add(members[-1])
        if leaves and members:
            pool.discard(members.pop(0))
        assert len(pool) == len(members)


def test_discarding_twice_or_a_stranger_changes_nothing() -> None:
    """A waiter that is not in the pool cannot be taken out of it."""
    member, stranger = waiter(a_request(pcrs=[3])), waiter(a_request(pcrs=[3]))
    pool = Pool(0.0)
    pool.add(member)
    pool.discard(stranger)
    assert len(pool) == 1
    pool.discard(member)
    pool.discard(member)
    assert len(pool) == 0
    assert pool.admits(kind_of(a_request(pcrs=[0], allowlist=allow([0]))))


# --- whose turn it is -------------------------------------------------------------------------------------------------


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


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=40), st.integers(1, 9))
def test_nobody_is_more_than_one_ahead(tenants: list[str], limit: int) -> None:
    """Whatever is taken, a tenant that still waits has been served at least as often as any other, less one."""
    pool = pool_of(*(a_request(tenant) for tenant in tenants))
    served = dict.fromkeys(tenants, 0)
    while len(pool):
        for member in pool.take(limit, 0.0):
            served[member.pending.tenant] += 1
        waiting = {member.pending.tenant for member in pool.waiters()}
        assert all(served[tenant] >= max(served.values()) - 1 for tenant in waiting)
    assert sum(served.values()) == len(tenants)


@given(st.lists(st.sampled_from("abc"), max_size=30), st.integers(1, 5))
def test_turns_are_never_more_than_it_takes(tenants: list[str], limit: int) -> None:
    """The forecast of a request's turn is not later than its turn, and at most one batch earlier."""
    pool = pool_of(*(a_request(tenant) for tenant in tenants))
    forecast = pool.turns("a", limit)
    late = waiter(a_request("a"), 99.0)
    pool.add(late)
    taken = 1
    while late not in pool.take(limit, 0.0):
        taken += 1
    assert forecast <= taken <= forecast + -(-len(set(tenants)) // limit)


# --- which pool is next -----------------------------------------------------------------------------------------------


def test_the_oldest_pool_is_taken() -> None:
    """However many wait elsewhere."""
    pools = Pools(8)
    old = waiter(a_request("old", [0], allowlist=allow([0])), 1.0)
    put(pools, old, *(waiter(a_request("new", [7]), 2.0) for _ in range(5)))
    assert pools.take(99, 3.0) == [old]
    assert len(pools.take(99, 3.0)) == 5
    assert (len(pools), pools.waiting) == (0, 0)


def test_a_served_pool_waits_behind_one_that_was_not() -> None:
    """What is left in a pool counts as waiting since the pool was served, so that a flood cannot hold its place."""
    pools = Pools(8)
    other = waiter(a_request("b", [7], allowlist=allow([7])), 50.0)
    put(pools, *(waiter(a_request("flood", [0]), float(number)) for number in range(4)), other)
    assert [len(pools.take(2, now_s)) for now_s in (60.0, 61.0, 62.0)] == [2, 1, 2]


def test_a_pool_whose_oldest_left_is_as_old_as_its_next() -> None:
    """Who gives up keeps no place for the others."""
    pools = Pools(8)
    gone, young = waiter(a_request("a", [0], allowlist=allow([0])), 1.0), waiter(a_request("a", [0]), 3.0)
    other = waiter(a_request("b", [7], allowlist=allow([7])), 2.0)
    put(pools, gone, other)
    put(pools, waiter(a_request("a", [0], allowlist=allow([0])), 3.0), young)
    pools.discard(gone)
    assert pools.take(99, 4.0) == [other]


def test_too_many_pools_are_none() -> None:
    """A request that can share with nobody finds a pool up to the bound, and again when one is gone."""
    pools = Pools(2)
    members = [waiter(a_request(f"t{pcr}", [pcr], allowlist=allow([pcr]))) for pcr in range(3)]
    put(pools, *members[:2])
    assert pools.find(members[2]) is None
    pools.discard(members[0])
    put(pools, members[2])


def test_one_tenant_needs_one_pool(rng: random.Random) -> None:
    """Requests under one allowlist always share: no tenant can use up the pools."""
    pools = Pools(8)
    put(pools, *(waiter(a_request("a", rng.sample(range(8), 3), allowlist=allow(range(8)))) for _ in range(200)))
    assert len(pools) == 1


def test_where_nobody_shares_all_wait_in_one_line() -> None:
    """Allowlists part nobody when each request has a quote of its own."""
    pools = Pools(1, together=False)
    put(pools, *(waiter(a_request(f"t{pcr % 3}", [pcr], allowlist=allow([pcr]))) for pcr in range(9)))
    assert [pools.take(1, 0.0)[0].pending.tenant for _ in range(9)] == ["t0", "t1", "t2"] * 3


@given(st.data())
def test_a_waiter_lets_at_most_the_other_pools_pass(data: st.DataObject) -> None:
    """With k pools open when it comes, a request is in one of the next k batches, whatever comes or goes later."""
    pools, now_s = Pools(8), 0.0
    bound: dict[Waiter, int] = {}
    for _ in range(data.draw(st.integers(1, 40))):
        now_s += 1.0
        act = data.draw(st.sampled_from(["come", "come", "come", "go", "take"]))
        if act == "come":
            asked, allowed = data.draw(PCRS), data.draw(st.sets(st.integers(0, 15)))
            each = waiter(a_request(data.draw(st.sampled_from("abc")), asked, allowlist=allow(asked | allowed)), now_s)
            pool = pools.find(each)
            if pool is not None:
                pools.add(pool, each)
                bound[each] = len(pools)
        elif act == "go" and bound:
            gone = data.draw(st.sampled_from(list(bound)))
            pools.discard(gone)
            del bound[gone]
        elif bound:
            for each in pools.take(99, now_s):
                del bound[each]
            bound = {each: left - 1 for each, left in bound.items()}
            assert all(left >= 1 for left in bound.values())
    assert pools.waiting == len(bound) == len(pools.waiters())


def test_a_kind_whose_last_member_left_is_looked_at_anew() -> None:
    """Its place in a pool is not kept: somebody may have joined since who may not see what it asks."""
    pools = Pools(8)
    stays, gone = waiter(a_request("a", [0])), waiter(a_request("b", [7]))
    (home, _) = put(pools, stays, gone)
    pools.discard(gone)
    assert put(pools, waiter(a_request("c", [0], allowlist=allow([0])))) == [home]
    assert put(pools, waiter(a_request("b", [7]))) != [home]


KINDS = [
    a_request(f"t{number}", asked, allowlist=allow(allowed))
    for number, (asked, allowed) in enumerate(
        [([0], range(16)), ([7], range(16)), ([0], [0]), ([7], [0, 7]), ([1, 7], [1, 7]), ([1], [0, 1])]
    )
]


@given(st.lists(st.tuples(st.sampled_from(["come", "come", "go", "take"]), st.integers(0, 5)), max_size=60))
def test_pools_keep_members_apart_whatever_comes_and_goes(acts: list[tuple[str, int]]) -> None:
    """Requests of few kinds that come again and again: who is taken together may see what all of them ask."""
    pools, waiting = Pools(8), list[Waiter]()
    for number, (act, which) in enumerate([*acts, *[("take", 9)] * 6]):
        if act == "come":
            waiting.append(waiter(KINDS[which], float(number)))
            put(pools, waiting[-1])
        elif act == "go" and waiting:
            pools.discard(waiting.pop(which % len(waiting)))
        elif act == "take" and waiting:
            taken = pools.take(which or 1, float(number))
            waiting = [each for each in waiting if each not in taken]
            for each in taken:
                assert all(other.pending.request.selection.within(each.pending.allowlist) for other in taken)
    assert pools.waiting == len(waiting)
