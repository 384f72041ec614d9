"""The batcher and time: who would be late is refused at once, who waits too long is released."""

from __future__ import annotations

import random

import pytest

from harness.errors import DeadlineExceeded, DeviceUnavailable, WouldBeLate
from harness.provider.batch import RFC9162, Answer, TreeBuilder
from harness.provider.deadlines import SWEEP_S
from tests.support.batching import settle
from tests.support.bench import Bench, Bounds, Entry, NewBench
from tests.support.pendings import a_request, allow

L = 4.0
SMALL = TreeBuilder(name="small", build=RFC9162.build, limit=16)


async def known(made: Bench, seconds: float = L) -> None:
    """A batch has been quoted, so that it is known how long one takes; time stands still afterwards."""
    made.takes(seconds)
    made.enter(a_request("first"))
    await settle()
    assert made.reports[-1].quote_s == seconds
    made.clock.frozen = True


async def in_work(made: Bench) -> Entry:
    """A batch is with the TPM, and has just begun."""
    entry = made.enter(a_request("in work"))
    await settle()
    return entry


def late(entry: Entry) -> bool:
    return isinstance(entry.outcome, WouldBeLate)


def answered(*entries: Entry) -> bool:
    return all(isinstance(entry.outcome, Answer) for entry in entries)


# --- refused at once --------------------------------------------------------------------------------------------------


async def test_nobody_is_refused_for_a_time_that_is_not_known(bench: NewBench) -> None:
    """Before the first batch has been quoted even the shortest wait is taken: it might be enough."""
    async with bench() as made:
        made.clock.frozen = True
        made.takes(L)
        first, second = made.enter(a_request(wait_s=0.001)), made.enter(a_request(wait_s=0.001))
        await settle()
        assert first.outcome is second.outcome is None


@pytest.mark.parametrize(("wait_s", "refused"), [(L - 0.5, True), (L + 0.5, False)])
async def test_a_free_tpm_takes_one_batch(bench: NewBench, wait_s: float, refused: bool) -> None:
    """With nobody else there, an answer is one batch away."""
    async with bench() as made:
        await known(made)
        entry = made.enter(a_request(wait_s=wait_s))
        assert late(entry) is refused
        await made.pass_time(L, step_s=L)
        assert answered(entry) is not refused


@pytest.mark.parametrize(("wait_s", "refused"), [(2 * L - 0.5, True), (2 * L + 0.5, False)])
async def test_behind_a_batch_that_has_just_begun_it_takes_two(bench: NewBench, wait_s: float, refused: bool) -> None:
    """What is not refused is answered in time, by the batch after the one in work."""
    async with bench() as made:
        await known(made)
        await in_work(made)
        entry = made.enter(a_request(wait_s=wait_s))
        assert late(entry) is refused
        await made.pass_time(2 * L, step_s=L / 2)
        assert answered(entry) is not refused


async def test_what_the_batch_in_work_has_done_counts(bench: NewBench) -> None:
    """The later in a batch a request comes, the shorter a wait is enough."""
    async with bench() as made:
        await known(made)
        await in_work(made)
        assert late(made.enter(a_request(wait_s=1.5 * L)))
        await made.pass_time(0.75 * L, step_s=L / 4)
        entry = made.enter(a_request(wait_s=1.5 * L))
        assert not late(entry)
        await made.pass_time(1.25 * L, step_s=L / 4)
        assert answered(entry)


async def test_a_batch_that_is_overdue_counts_as_about_to_end(bench: NewBench) -> None:
    """What is not known refuses nobody."""
    async with bench() as made:
        await known(made)
        made.takes(L * 5)
        await in_work(made)
        await made.pass_time(2 * L, step_s=L)
        assert not late(made.enter(a_request(wait_s=L + 0.5)))


@pytest.mark.parametrize(("wait_s", "refused"), [(4 * L - 0.5, True), (4 * L + 0.5, False)])
async def test_pools_that_go_before_count(bench: NewBench, wait_s: float, refused: bool) -> None:
    """The third pool is served as the third after the batch in work."""
    async with bench() as made:
        await known(made)
        await in_work(made)
        for pcr in (1, 2):
            made.enter(a_request(f"t{pcr}", [pcr], allowlist=allow([pcr])))
        assert late(made.enter(a_request("t3", [3], allowlist=allow([3]), wait_s=wait_s))) is refused


async def test_who_joins_an_old_pool_goes_with_it(bench: NewBench) -> None:
    """The order of the pools counts, not that of the requests."""
    async with bench() as made:
        await known(made)
        await in_work(made)
        for pcr in (1, 2, 3):
            made.enter(a_request(f"t{pcr}", [pcr], allowlist=allow([pcr])))
        assert not late(made.enter(a_request("t1", [1], allowlist=allow([1]), wait_s=2 * L + 0.5)))
        assert late(made.enter(a_request("t3", [3], allowlist=allow([3]), wait_s=2 * L + 0.5)))


async def test_a_request_that_is_refused_takes_no_place(bench: NewBench) -> None:
    """Neither of the tenant's share nor among the pools."""
    async with bench(bounds=Bounds(tenant_share=1, max_pools=1)) as made:
        await known(made)
        for _ in range(3):
            assert late(made.enter(a_request("alice", [3], allowlist=allow([3]), wait_s=0.5)))
        assert (made.batcher.waiting, made.batcher.open_pools) == (0, 0)
        entry = made.enter(a_request("alice"))
        await made.pass_time(L, step_s=L)
        assert answered(entry)


async def test_when_to_come_again_is_when_it_would_be_in_time(bench: NewBench) -> None:
    """Retry-After: the time that is missing, and not less than one batch."""
    async with bench() as made:
        await known(made)
        await in_work(made)
        for pcr in (1, 2, 3):
            made.enter(a_request(f"t{pcr}", [pcr], allowlist=allow([pcr])))
        refusal = made.enter(a_request("t4", [4], allowlist=allow([4]), wait_s=1.5 * L)).outcome
        assert isinstance(refusal, WouldBeLate)
        assert refusal.retry_after_s == pytest.approx(3.5 * L)
        refusal = made.enter(a_request("t1", [1], allowlist=allow([1]), wait_s=1.5 * L)).outcome
        assert isinstance(refusal, WouldBeLate)
        assert refusal.retry_after_s == pytest.approx(L)


@pytest.mark.parametrize("wait_s", [0.0, -1.0])
async def test_no_time_at_all_is_refused_whatever_is_known(bench: NewBench, wait_s: float) -> None:
    """A request whose time passed on the way is not quoted for nobody."""
    async with bench() as made:
        assert late(made.enter(a_request(wait_s=wait_s)))


async def test_one_slow_batch_refuses_nobody(bench: NewBench) -> None:
    """The median counts: a TPM that hung once is not slow."""
    async with bench() as made:
        for seconds in (1.0, 60.0, 1.0):
            made.clock.frozen = False
            await known(made, seconds)
        assert not late(made.enter(a_request(wait_s=1.5)))


async def test_batches_that_failed_do_not_count(bench: NewBench) -> None:
    """A TPM that refuses at once is not fast: what it takes to be answered is what the others took."""
    async with bench() as made:
        await known(made)
        made.clock.frozen = False
        made.quoter.faults_before |= {number: DeviceUnavailable("gone") for number in range(2, 9)}
        for _ in range(7):
            made.enter(a_request())
            await settle()
        assert len(made.reports) == 8
        assert late(made.enter(a_request(wait_s=L - 0.5)))


async def test_in_a_limited_batch_turns_count(bench: NewBench) -> None:
    """Behind a flood of one tenant, another tenant's request is two batches away, and the next of the flood more."""
    async with bench(builder=SMALL) as made:
        await known(made)
        await in_work(made)
        for _ in range(64):
            made.enter(a_request("flood"))
        assert late(made.enter(a_request("flood", wait_s=5 * L + 0.5)))
        other = made.enter(a_request("other", wait_s=2 * L + 0.5))
        assert not late(other)
        await made.pass_time(2 * L, step_s=L)
        assert answered(other)


# --- released ---------------------------------------------------------------------------------------------------------


async def test_each_is_released_at_its_own_deadline(bench: NewBench, rng: random.Random) -> None:
    """Not before, and at most one look later; the others go on waiting."""
    async with bench() as made:
        made.clock.frozen = True
        made.takes(100.0)
        entries = [made.enter(a_request(f"t{number}", wait_s=rng.uniform(0.1, 20.0))) for number in range(50)]
        await settle()
        await made.pass_time(21.0, step_s=0.5)
        for entry in entries:
            assert isinstance(entry.outcome, DeadlineExceeded)
            assert -1e-6 <= entry.ended_s - entry.entered_s - entry.pending.wait_s <= SWEEP_S + 1e-6


async def test_nobody_waits_longer_than_the_batcher_allows(bench: NewBench) -> None:
    """Whatever a request says."""
    async with bench(answer_s=3.0) as made:
        made.clock.frozen = True
        made.takes(100.0)
        entry = made.enter(a_request(wait_s=1e9))
        await settle()
        made.clock.advance(2.9)
        assert entry.outcome is None
        made.clock.advance(0.2)
        assert isinstance(entry.outcome, DeadlineExceeded)


async def test_who_is_released_leaves_its_place(bench: NewBench) -> None:
    """Its share, its pool, and the PCRs that it asked for."""
    async with bench(bounds=Bounds(tenant_share=1, max_pools=1)) as made:
        made.clock.frozen = True
        made.takes(5.0)
        made.enter(a_request("early"))
        await settle()
        gone = made.enter(a_request("alice", [9], wait_s=1.0))
        made.clock.advance(1.0)
        assert isinstance(gone.outcome, DeadlineExceeded)
        stays = made.enter(a_request("alice", [0], allowlist=allow([0])))
        await made.pass_time(10.0, step_s=1.0)
        assert answered(stays)
        assert made.quoter.batches[1].selection == allow([0])


async def test_who_is_released_during_its_quote_leaves_a_leaf(bench: NewBench) -> None:
    """As one that gives up; it is answered to nobody."""
    async with bench() as made:
        made.clock.frozen = True
        made.takes(2.0)
        short, patient = made.enter(a_request("a", wait_s=1.0)), made.enter(a_request("b"))
        await settle()
        await made.pass_time(2.0, step_s=1.0)
        assert isinstance(short.outcome, DeadlineExceeded)
        assert answered(patient)
        assert len(made.quoter.batches[0].members) == 2
        assert made.reports[0].waits_s == (2.0,)


async def test_deadlines_that_were_forgotten_come_again(bench: NewBench) -> None:
    """Where the nearest deadline was that of a request that has its answer, the next one still holds."""
    async with bench() as made:
        made.enter(a_request("a", wait_s=1.0))
        await settle()
        made.clock.frozen = True
        made.takes(100.0)
        stuck = made.enter(a_request("b", wait_s=5.0))
        await settle()
        await made.pass_time(5.2, step_s=0.1)
        assert isinstance(stuck.outcome, DeadlineExceeded)
