"""How long a request waits by the manual clock: 2 L with one pool, (k + 1) L with k; and who gets what order."""

from __future__ import annotations

import random
import statistics

import pytest

from harness.errors import PoolFull, ShareExhausted
from harness.provider.batch import RFC9162, Answer, TreeBuilder
from tests.support.batching import settle
from tests.support.bench import Bounds, Entry, NewBench
from tests.support.pendings import a_request, agent, allow

L, STEPS = 1.0, 8  # seconds of a quote, and steps of time in it
STEP_S = L / STEPS
SMALL = TreeBuilder(name="small", build=RFC9162.build, limit=16)


def waited_s(entry: Entry) -> float:
    assert isinstance(entry.outcome, Answer), entry.outcome
    return entry.ended_s - entry.entered_s


async def test_with_one_pool_nobody_waits_more_than_two_quotes(bench: NewBench, rng: random.Random) -> None:
    """Whatever the load: at most 2 L, 1.5 L on average, and one quote per L."""
    async with bench() as made:
        made.clock.frozen = True
        made.takes(L)
        made.enter(a_request("first"))
        await settle()
        late = []
        for _ in range(6 * STEPS):
            late += [made.enter(a_request(f"t{rng.randrange(9)}")) for _ in range(rng.randrange(12))]
            await made.pass_time(STEP_S, step_s=STEP_S)
        await made.pass_time(2 * L, step_s=STEP_S)
        waits = [waited_s(entry) for entry in late]
        assert max(waits) <= 2 * L
        assert 1.3 * L <= statistics.mean(waits) <= 1.75 * L
        assert len(made.quoter.batches) <= 8


@pytest.mark.parametrize("tenants", [2, 5, 12])
async def test_with_k_pools_nobody_waits_more_than_k_and_one_quotes(
    bench: NewBench, rng: random.Random, tenants: int
) -> None:
    """K counts the pools that are open when a request has come; what comes later lets nobody wait longer."""
    async with bench(bounds=Bounds(max_pools=64)) as made:
        made.clock.frozen = True
        made.takes(L)
        allowed = {f"t{number}": rng.sample(range(16), rng.randint(2, 16)) for number in range(tenants)}
        entries = []
        for _ in range(5 * STEPS):
            for tenant in rng.sample(list(allowed), rng.randrange(min(4, tenants))):
                pcrs = rng.sample(allowed[tenant], rng.randint(1, 2))
                entries.append(made.enter(a_request(tenant, pcrs, allowlist=allow(allowed[tenant]))))
            await made.pass_time(STEP_S, step_s=STEP_S)
        await made.pass_time((made.batcher.open_pools + 1) * L, step_s=STEP_S)
        assert all(waited_s(entry) <= (entry.pools + 1) * L for entry in entries)


async def test_a_pool_that_never_empties_lets_the_others_through(bench: NewBench) -> None:
    """A flood that fills batch after batch costs another pool one quote, not all of them."""
    async with bench(builder=SMALL) as made:
        made.clock.frozen = True
        made.takes(L)
        flood = [made.enter(a_request("flood", [0])) for _ in range(100)]
        await settle()
        other = made.enter(a_request("other", [7], allowlist=allow([7])))
        await made.pass_time(3 * L, step_s=L)
        assert waited_s(other) <= 3 * L
        assert sum(isinstance(entry.outcome, Answer) for entry in flood) == 32
        for entry in flood:
            if entry.outcome is None:
                made.leave(entry)


async def test_guests_and_pools_keep_the_bound_together(bench: NewBench, rng: random.Random) -> None:
    """Requests about guests, of which some leave or are absent, wait no longer than others."""
    async with bench() as made:
        made.clock.frozen = True
        made.takes(L)
        made.residency.states |= {agent(number): bytes([number]) * 32 for number in range(6)}
        entries = []
        for _ in range(4 * STEPS):
            entries.append(made.enter(a_request("a", agent_id=agent(rng.randrange(8)))))
            if rng.random() < 0.3:
                gone = made.enter(a_request("b", agent_id=agent(0)))
                made.leave(gone)
            await made.pass_time(STEP_S, step_s=STEP_S)
        await made.pass_time(2 * L, step_s=STEP_S)
        assert all(entry.ended_s - entry.entered_s <= 2 * L for entry in entries)


# --- floods -----------------------------------------------------------------------------------------------------------


async def test_a_flood_gets_its_share_and_the_others_their_answers(bench: NewBench, rng: random.Random) -> None:
    """10,000 requests of one tenant beside 50 of another: typed refusals above the share, none of the 50 is lost."""
    async with bench() as made:
        made.clock.frozen = True
        made.takes(L)
        request = a_request("flood")
        made.enter(a_request("early"))
        await settle()
        order = [True] * 10_000 + [False] * 50
        rng.shuffle(order)
        entries = [made.enter(request if flood else a_request("other")) for flood in order]
        await made.pass_time(2 * L, step_s=L)
        others = [entry for entry, flood in zip(entries, order, strict=True) if not flood]
        assert all(waited_s(entry) <= 2 * L for entry in others)
        refused = [entry.outcome for entry in entries if not isinstance(entry.outcome, Answer)]
        assert len(refused) == 10_000 - 1024
        assert {type(error) for error in refused} == {ShareExhausted}


async def test_each_tenant_is_in_the_very_next_limited_batch(bench: NewBench, rng: random.Random) -> None:
    """Where a batch takes 16 of 200, each of 16 tenants has one in it, whenever it came."""
    async with bench(builder=SMALL) as made:
        await made.in_flight()
        tenants = [f"t{number}" for number in range(15)]
        order = ["flood"] * 185 + tenants
        rng.shuffle(order)
        entries = [made.enter(a_request(tenant)) for tenant in order]
        made.quoter.step()
        await made.quoter.arrival(2)
        served = {waiter.pending.tenant for waiter in made.quoter.batches[1].members}
        assert served == {"flood", *tenants}
        made.quoter.let_go()
        await settle(400)
        assert all(isinstance(entry.outcome, Answer) for entry in entries)


async def test_two_floods_share_what_a_third_leaves(bench: NewBench) -> None:
    """Of each limited batch the floods have equal parts."""
    async with bench(builder=SMALL) as made:
        await made.in_flight()
        for _ in range(64):
            made.enter(a_request("a"))
        for _ in range(64):
            made.enter(a_request("b"))
        made.enter(a_request("c"))
        made.quoter.let_go()
        await settle(400)
        first = [waiter.pending.tenant for waiter in made.quoter.batches[1].members]
        assert sorted(first).count("c") == 1
        assert abs(first.count("a") - first.count("b")) <= 1


async def test_coming_and_going_gains_no_place(bench: NewBench) -> None:
    """A tenant that takes back and asks again stands at the end of its own line; its share stays bounded."""
    async with bench(builder=SMALL, bounds=Bounds(tenant_share=20)) as made:
        await made.in_flight()
        others = [made.enter(a_request(f"t{number}")) for number in range(15)]
        for _ in range(30):
            mine = [made.enter(a_request("churn")) for _ in range(20)]
            assert isinstance(made.enter(a_request("churn")).outcome, ShareExhausted)
            for entry in mine:
                made.leave(entry)
        made.quoter.let_go()
        await settle()
        assert all(isinstance(entry.outcome, Answer) for entry in others)
        assert len(made.quoter.batches) == 2


async def test_full_pools_have_room_again_after_a_batch(bench: NewBench) -> None:
    """PoolFull says when; then a request is taken."""
    async with bench(bounds=Bounds(pool_size=10)) as made:
        made.clock.frozen = True
        made.takes(L)
        made.enter(a_request("early"))
        await made.pass_time(L, step_s=L)
        for number in range(11):
            made.enter(a_request(f"t{number}"))
            await settle()
        refusal = made.enter(a_request("late")).outcome
        assert isinstance(refusal, PoolFull)
        assert L <= refusal.retry_after_s <= 2 * L
        await made.pass_time(refusal.retry_after_s, step_s=L)
        again = made.enter(a_request("late"))
        await made.pass_time(2 * L, step_s=L)
        assert isinstance(again.outcome, Answer)
