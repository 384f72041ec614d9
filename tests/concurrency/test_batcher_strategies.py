"""Who shares a quote by setting: all who wait (batched), nobody (single), all who come in a fixed time (window)."""

from __future__ import annotations

import random

import pytest

from harness.errors import DeviceUnavailable, ShuttingDown, WouldBeLate
from harness.provider.batch import RFC9162, Answer, TreeBuilder
from harness.provider.merklelib_tree import MERKLELIB
from tests.support.batching import settle
from tests.support.bench import Bounds, Entry, NewBench
from tests.support.pendings import a_request, agent, allow

SINGLE, WINDOW = Bounds(strategy="single"), Bounds(strategy="window", window_s=10.0)
L = 1.0


def answered(entries: list[Entry]) -> bool:
    return all(isinstance(entry.outcome, Answer) for entry in entries)


@pytest.mark.parametrize("strategy", ["batched", "single", "window"])
@pytest.mark.parametrize("builder", [RFC9162, MERKLELIB], ids=lambda builder: builder.name)
async def test_whatever_the_strategy_and_the_tree(
    bench: NewBench, rng: random.Random, builder: TreeBuilder, strategy: str
) -> None:
    """Tenants, guests and allowlists as they come: every request is answered, and every answer verifies."""
    async with bench(builder=builder, bounds=Bounds(strategy=strategy, window_s=0.5)) as made:
        made.residency.states |= {agent(number): bytes([number]) * 32 for number in range(4)}
        entries = []
        for _ in range(40):
            allowed = rng.choice([range(16), range(8), [0, 1, 14]])
            guest = rng.choice([None, agent(rng.randrange(4))])
            pcrs = rng.sample(list(allowed), 2)
            entries.append(made.enter(a_request(rng.choice("abc"), pcrs, allowlist=allow(allowed), agent_id=guest)))
            await settle(rng.randrange(8))
        await settle(3000)
        assert answered(entries)
        assert {report.strategy for report in made.reports} == {strategy}


# --- single -----------------------------------------------------------------------------------------------------------


async def test_single_asks_one_quote_for_each(bench: NewBench) -> None:
    """As many quotes as requests, each of them over one leaf, and showing nothing but what it asked for."""
    async with bench(bounds=SINGLE) as made:
        entries = [made.enter(a_request("t", [number])) for number in range(8)]
        await settle(600)
        assert answered(entries)
        assert [len(batch.members) for batch in made.quoter.batches] == [1] * 8
        assert [batch.selection for batch in made.quoter.batches] == [allow([number]) for number in range(8)]


async def test_single_takes_turns(bench: NewBench) -> None:
    """In the order of arrival, tenants in turn: a flood before it costs another tenant one quote."""
    async with bench(bounds=SINGLE) as made:
        await made.in_flight()
        for tenant in "aaaabbc":
            made.enter(a_request(tenant))
        made.quoter.let_go()
        await settle(600)
        order = [batch.members[0].pending.tenant for batch in made.quoter.batches]
        assert "".join(order[1:]) == "abcabaa"


async def test_single_needs_no_pools(bench: NewBench) -> None:
    """Requests that may not share wait in one line: the bound on pools refuses nobody."""
    async with bench(bounds=Bounds(strategy="single", max_pools=1)) as made:
        entries = [made.enter(a_request(f"t{pcr}", [pcr], allowlist=allow([pcr]))) for pcr in range(6)]
        await settle(600)
        assert answered(entries)


async def test_single_fails_one(bench: NewBench) -> None:
    """An error of the TPM reaches the one whose quote it was."""
    async with bench(bounds=SINGLE) as made:
        made.quoter.faults_after[2] = DeviceUnavailable("gone")
        entries = [made.enter(a_request()) for _ in range(4)]
        await settle(600)
        assert [isinstance(entry.outcome, Answer) for entry in entries] == [True, False, True, True]


async def test_single_refuses_who_is_too_far_back(bench: NewBench) -> None:
    """In a line of ten the eleventh knows that it takes eleven quotes, and a tenant with nothing there two."""
    async with bench(bounds=SINGLE) as made:
        made.takes(L)
        made.enter(a_request("first"))
        await settle()
        made.clock.frozen = True
        line = [made.enter(a_request("flood")) for _ in range(10)]
        await settle()
        assert isinstance(made.enter(a_request("flood", wait_s=9 * L)).outcome, WouldBeLate)
        other = made.enter(a_request("other", wait_s=3.5 * L))
        await made.pass_time(12 * L, step_s=L)
        assert answered([*line, other])
        assert other.ended_s - other.entered_s <= 3 * L


async def test_single_stops(bench: NewBench) -> None:
    """The whole line is released."""
    async with bench(bounds=SINGLE) as made:
        await made.in_flight()
        entries = [made.enter(a_request()) for _ in range(5)]
        made.batcher.stop()
        assert {type(entry.outcome) for entry in entries} == {ShuttingDown}


# --- window -----------------------------------------------------------------------------------------------------------


async def test_window_sleeps_whatever_comes(bench: NewBench) -> None:
    """The TPM is idle, and yet nobody is served before the time is over; then all who came share one quote."""
    async with bench(bounds=WINDOW) as made:
        made.clock.frozen = True
        entries = []
        for _ in range(9):
            entries.append(made.enter(a_request()))
            await made.pass_time(1.0, step_s=1.0)
        assert made.quoter.batches == []
        await made.pass_time(1.0, step_s=1.0)
        assert answered(entries)
        assert [len(batch.members) for batch in made.quoter.batches] == [9]


async def test_window_serves_every_pool_that_came_in_it(bench: NewBench) -> None:
    """One sleep, then a quote for each pool, and another sleep for what comes after."""
    async with bench(bounds=WINDOW) as made:
        made.clock.frozen = True
        entries = [made.enter(a_request(f"t{pcr}", [pcr], allowlist=allow([pcr]))) for pcr in range(3)]
        await made.pass_time(10.0, step_s=10.0)
        assert answered(entries)
        assert made.clock.slept == [10.0]
        late = made.enter(a_request())
        await made.pass_time(9.0, step_s=1.0)
        assert late.outcome is None
        await made.pass_time(1.0, step_s=1.0)
        assert answered([late])


@pytest.mark.parametrize("end", ["stop", "cancel"])
async def test_window_ends_while_it_sleeps(bench: NewBench, end: str) -> None:
    """Nobody waits for the sleep to be over."""
    async with bench(bounds=WINDOW) as made:
        made.clock.frozen = True
        entry = made.enter(a_request())
        await settle()
        made.batcher.stop() if end == "stop" else made.owner.cancel()
        await settle()
        assert isinstance(entry.outcome, ShuttingDown)


async def test_window_tells_who_cannot_wait_for_it(bench: NewBench) -> None:
    """Once a batch is known, a request that has less time than the sleep takes is refused at once."""
    async with bench(bounds=WINDOW) as made:
        made.takes(L)
        made.clock.frozen = True
        made.enter(a_request("first"))
        await made.pass_time(11.0, step_s=1.0)
        assert isinstance(made.enter(a_request(wait_s=9.0)).outcome, WouldBeLate)
        entry = made.enter(a_request(wait_s=11.5))
        await made.pass_time(11.0, step_s=1.0)
        assert answered([entry])
