"""The batcher on the host's own keys: a TPM that is busy, PCRs that move under a quote, and what is read of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from harness.attest import parse_attest
from harness.errors import BatchFailed, DeviceFault, DeviceUnavailable, ShuttingDown, TpmError
from harness.provider.batch import Answer
from tests.support.batching import WAIT_S, settle, until
from tests.support.bench import Bench, NewBench
from tests.support.pausing_tpm import PausingTpm, keys_on
from tests.support.pendings import a_request

RETRY, YIELDED, TESTING, FAILURE = 0x922, 0x908, 0x90A, 0x101


@asynccontextmanager
async def on_keys(bench: NewBench) -> AsyncIterator[tuple[Bench, PausingTpm]]:
    """A bench whose quotes are made by `HostKeys`."""
    async with bench() as made:
        tpm = PausingTpm(made.quoter.tpm)
        made.quoter.quotes = keys_on(tpm, made.quoter.tpm, made.clock).quote_batch
        try:
            yield made, tpm
        finally:
            for gate in tpm.gates.values():
                gate.set()


def once(act: Callable[[], None]) -> Callable[[str], None]:
    """Done before the first PCR_Read."""
    left = [act]
    return lambda command: left.pop()() if command == "read" and left else None


def answer_of(outcome: object) -> Answer:
    assert isinstance(outcome, Answer), outcome
    return outcome


def cause_of(outcome: object) -> BaseException | None:
    assert isinstance(outcome, BatchFailed), outcome
    return outcome.__cause__


@pytest.mark.parametrize("codes", [[RETRY], [YIELDED] * 5, [TESTING] * 19, [RETRY, YIELDED, TESTING]], ids=str)
async def test_a_busy_tpm_is_asked_again(bench: NewBench, codes: list[int]) -> None:
    """Nobody learns of it: one quote more of nothing, and an answer."""
    async with on_keys(bench) as (made, tpm):
        tpm.codes = list(codes)
        entry = made.enter(a_request())
        await settle()
        answer_of(entry.outcome)
        assert tpm.quotes == made.reports[0].tpm_quotes == 1
        assert len(tpm.waited_s) == len(codes)


@pytest.mark.parametrize("code", [RETRY, YIELDED, TESTING])
async def test_a_tpm_that_stays_busy_fails_one_batch(bench: NewBench, code: int) -> None:
    """Within a bound: then those who wait are told, and the next batch is tried."""
    async with on_keys(bench) as (made, tpm):
        tpm.codes = [code] * 20
        entry = made.enter(a_request())
        await settle()
        cause = cause_of(entry.outcome)
        assert isinstance(cause, DeviceFault)
        assert cause.response_code == code
        later = made.enter(a_request())
        await settle()
        answer_of(later.outcome)


async def test_a_fault_of_the_tpm_is_not_tried_again(bench: NewBench) -> None:
    """TPM_RC_FAILURE fails the batch at once; who came meanwhile is served."""
    async with on_keys(bench) as (made, tpm):
        tpm.codes = [FAILURE]
        tpm.gates["quote"].clear()
        entry = made.enter(a_request("a"))
        await until(lambda: bool(tpm.reached))
        later = made.enter(a_request("b"))
        tpm.gates["quote"].set()
        await settle()
        assert isinstance(cause_of(entry.outcome), DeviceFault)
        assert tpm.waited_s == []
        answer_of(later.outcome)


@pytest.mark.parametrize("layer", [0x000A0000, 0x00080000])
async def test_a_lost_connection_fails_one_batch(bench: NewBench, layer: int) -> None:
    """An error below the TPM is none of the next batch."""
    async with on_keys(bench) as (made, tpm):
        tpm.codes = [layer | 0x0A]
        entry = made.enter(a_request())
        await settle()
        assert isinstance(cause_of(entry.outcome), DeviceUnavailable)
        later = made.enter(a_request())
        await settle()
        answer_of(later.outcome)


async def test_a_pcr_that_moves_once_costs_one_more_quote(bench: NewBench) -> None:
    """Extended between quote and read: quoted again, and the answer shows the new value."""
    async with on_keys(bench) as (made, tpm):
        tpm.before = once(lambda: made.quoter.tpm.extend(7, b"event"))
        entries = [made.enter(a_request(f"t{number}")) for number in range(3)]
        await settle()
        answers = [answer_of(entry.outcome) for entry in entries]
        assert tpm.quotes == answers[0].shared.quote.tpm_quotes == made.reports[0].tpm_quotes == 2
        assert any(values[7] != bytes(len(values[7])) for values in answers[0].shared.quote.pcrs.values())


async def test_a_pcr_that_moves_each_time_fails_one_batch(bench: NewBench) -> None:
    """Two races are enough: a clean failure, no third quote; others' batches go on."""
    async with on_keys(bench) as (made, tpm):
        tpm.before = lambda command: made.quoter.tpm.extend(7, command.encode())
        entries = [made.enter(a_request(f"t{number}")) for number in range(3)]
        await settle()
        causes = [cause_of(entry.outcome) for entry in entries]
        assert {type(cause) for cause in causes} == {TpmError}
        assert tpm.quotes == 2
        tpm.before = lambda command: None
        later = made.enter(a_request())
        await settle()
        answer_of(later.outcome)
        assert [report.outcome for report in made.reports] == ["TpmError", "quoted"]


async def test_a_pcr_that_nobody_asked_for_may_move(bench: NewBench) -> None:
    """Only the signed selection counts."""
    async with on_keys(bench) as (made, tpm):
        tpm.before = lambda command: made.quoter.tpm.extend(3, command.encode())
        entry = made.enter(a_request(pcrs=[0, 7]))
        await settle()
        answer_of(entry.outcome)
        assert tpm.quotes == 1


async def test_values_that_still_hold_are_not_read_again(bench: NewBench) -> None:
    """They are read when they must be: first, and after a PCR has moved."""
    async with on_keys(bench) as (made, tpm):
        reads: list[int] = []
        for _ in range(4):
            if len(reads) == 2:
                made.quoter.tpm.extend(0, b"event")
            entry = made.enter(a_request())
            await settle()
            answer_of(entry.outcome)
            reads.append(tpm.reads)
        assert reads == [1, 1, 2, 2]


async def test_who_comes_between_two_quotes_of_a_race_is_in_the_next_batch(bench: NewBench) -> None:
    """A batch that is quoted twice is the same batch."""
    async with on_keys(bench) as (made, tpm):
        tpm.before = once(lambda: made.quoter.tpm.extend(7, b"event"))
        tpm.gates["read"].clear()
        first = made.enter(a_request("a"))
        await until(lambda: "read" in tpm.reached)
        second = made.enter(a_request("b"))
        tpm.gates["read"].set()
        await settle()
        assert answer_of(first.outcome).shared is not answer_of(second.outcome).shared
        assert [len(batch.members) for batch in made.quoter.batches] == [1, 1]


@pytest.mark.parametrize("command", ["quote", "read"])
async def test_stop_while_a_command_is_with_the_tpm(bench: NewBench, command: str) -> None:
    """Nobody waits for the TPM any more; what it does then reaches nobody."""
    async with on_keys(bench) as (made, tpm):
        tpm.gates[command].clear()
        entry = made.enter(a_request())
        await until(lambda: command in tpm.reached)
        made.batcher.stop()
        assert isinstance(entry.outcome, ShuttingDown)
        tpm.gates[command].set()
        await asyncio.wait([made.owner], timeout=WAIT_S)
        assert made.owner.result() is None


@pytest.mark.parametrize("command", ["quote", "read"])
async def test_the_owner_is_cancelled_while_a_command_is_with_the_tpm(bench: NewBench, command: str) -> None:
    """Everybody is released, and no further command is sent."""
    async with on_keys(bench) as (made, tpm):
        tpm.gates[command].clear()
        entry = made.enter(a_request())
        await until(lambda: command in tpm.reached)
        made.owner.cancel()
        await asyncio.wait([made.owner], timeout=WAIT_S)
        assert isinstance(entry.outcome, ShuttingDown)
        sent = list(tpm.reached)
        tpm.gates[command].set()
        await settle()
        assert tpm.reached == sent


async def test_clocks_of_two_batches_differ(bench: NewBench) -> None:
    """The device waits for a tick of its clock between two signatures (check 10 asks for a greater clock)."""
    async with on_keys(bench) as (made, _):
        clocks = []
        for _ in range(3):
            entry = made.enter(a_request())
            await settle()
            clocks.append(parse_attest(answer_of(entry.outcome).shared.quote.attest).clock_info.clock)
        assert clocks == sorted(set(clocks))
        assert made.clock.slept == pytest.approx([0.001, 0.001])
