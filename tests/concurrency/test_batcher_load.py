"""The batcher with ten thousand waiters: what goes on while they are told, and that each of them is."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from harness.errors import BatchFailed, DeadlineExceeded, DeviceUnavailable, ShuttingDown
from harness.provider.batch import Answer, PendingQuote, SealedBatch
from harness.provider.handout import SLICE
from tests.support.batching import settle, until
from tests.support.bench import Bench, Bounds, Entry, NewBench
from tests.support.pendings import a_request

MANY, SOME = 10_000, 2 * SLICE + 100
BOUNDS = Bounds(tenant_share=MANY)


@pytest.fixture(scope="module")
def requests() -> list[PendingQuote]:
    """Made once: most of a test's time would go there."""
    return [a_request(f"t{number % 20}", wait_s=20.0) for number in range(MANY)]


async def all_wait(made: Bench, requests: list[PendingQuote]) -> list[Entry]:
    """One batch is with the TPM, and these wait for the next."""
    made.clock.frozen = True
    await made.in_flight()
    return [made.enter(request) for request in requests]


def told(entries: list[Entry]) -> int:
    return sum(entry.outcome is not None for entry in entries)


async def test_ten_thousand_share_one_quote(bench: NewBench, requests: list[PendingQuote]) -> None:
    """One quote, ten thousand proofs; they are told slice by slice, and between slices others have their turn."""
    async with bench(bounds=BOUNDS) as made:
        entries = await all_wait(made, requests)
        made.quoter.let_go()
        left = [made.batcher.waiting]
        for _ in range(200):
            await asyncio.sleep(0)
            left.append(made.batcher.waiting)
        assert told(entries) == MANY
        assert max(before - after for before, after in itertools.pairwise(left)) <= SLICE
        assert made.quoter.tpm.quotes == 2
        assert len(made.reports[1].waits_s) == made.reports[1].requests == MANY


async def test_stop_releases_all_of_them(bench: NewBench, requests: list[PendingQuote]) -> None:
    """Within the call, not slice by slice."""
    async with bench(bounds=BOUNDS) as made:
        entries = await all_wait(made, requests[:SOME])
        made.batcher.stop()
        assert {type(entry.outcome) for entry in entries} == {ShuttingDown}


async def test_the_next_quote_is_begun_before_the_first_is_told(bench: NewBench, requests: list[PendingQuote]) -> None:
    """The TPM does not wait for those who are told."""
    async with bench(bounds=BOUNDS) as made:
        entries = await all_wait(made, requests[:SOME])
        made.quoter.step()
        await made.quoter.arrival(2)
        made.enter(a_request("next"))
        made.quoter.step()
        begun = []

        def asked(batch: SealedBatch) -> None:
            made.sealed(batch)
            begun.append(told(entries))

        made.quoter.asked = asked
        await made.quoter.arrival(3)
        assert begun == [0]
        made.quoter.let_go()
        await settle()
        assert told(entries) == SOME


async def test_half_of_them_leave_during_the_quote(bench: NewBench, requests: list[PendingQuote]) -> None:
    """Their leaves stay; the others are told, and nothing is waited for."""
    async with bench(bounds=BOUNDS) as made:
        entries = await all_wait(made, requests[:SOME])
        made.quoter.step()
        await made.quoter.arrival(2)
        for entry in entries[::2]:
            made.leave(entry)
        made.quoter.let_go()
        await settle()
        assert all(isinstance(entry.outcome, Answer) for entry in entries[1::2])
        assert len(made.quoter.batches[1].members) == SOME
        assert len(made.reports[1].waits_s) == SOME // 2


async def test_half_of_them_leave_while_they_are_told(bench: NewBench, requests: list[PendingQuote]) -> None:
    """A stream that breaks between two slices costs the others nothing."""
    async with bench(bounds=BOUNDS) as made:
        entries = await all_wait(made, requests[:SOME])
        made.quoter.let_go()
        await until(lambda: made.batcher.waiting < SOME)
        late = [entry for entry in entries if entry.outcome is None][::2]
        for entry in late:
            made.leave(entry)
        await settle()
        assert told(entries) == SOME - len(late)
        assert made.batcher.waiting == 0


async def test_their_batch_fails(bench: NewBench, requests: list[PendingQuote]) -> None:
    """Each gets an error of its own, all with the one cause; the next batch goes on."""
    async with bench(bounds=BOUNDS) as made:
        made.quoter.faults_after[2] = DeviceUnavailable("gone")
        entries = await all_wait(made, requests[:SOME])
        made.quoter.let_go()
        await settle()
        errors = [entry.outcome for entry in entries]
        assert {type(error) for error in errors} == {BatchFailed}
        assert len({id(error) for error in errors}) == SOME
        later = made.enter(a_request("later"))
        await settle()
        assert isinstance(later.outcome, Answer)


async def test_their_deadline_passes(bench: NewBench, requests: list[PendingQuote]) -> None:
    """All are released at once, in one look; the one in the batch in work as well."""
    async with bench(bounds=BOUNDS, answer_s=25.0) as made:
        entries = await all_wait(made, requests[:SOME])
        made.clock.advance(20.0)
        assert {type(entry.outcome) for entry in entries} == {DeadlineExceeded}
        assert made.batcher.waiting == 1
        made.clock.advance(5.0)
        assert made.batcher.waiting == 0


async def test_a_slow_delivery_delays_only_itself(bench: NewBench, requests: list[PendingQuote]) -> None:
    """Batches whose answers have not gone out yet are told in their order, none of them twice."""
    async with bench(bounds=BOUNDS) as made:
        first = await all_wait(made, requests[:SOME])
        made.quoter.let_go()
        await made.quoter.arrival(2)
        second = [made.enter(request) for request in requests[:SOME]]
        await until(lambda: not made.batcher.waiting)
        assert told(first) == told(second) == SOME
