"""Guests and guest agents that are kept running: who is started when, with time moved by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from harness.errors import GuestDidNotStart, HarnessError, NotFound, SimulationError
from harness.sim.guest import GuestDefinition
from harness.sim.guest_agents import KeptAgent
from harness.sim.guest_keeper import AT_ONCE, GuestKeeper
from tests.support.manual_time import ManualTime, settle
from tests.support.pendings import agent


class Guest:
    """A guest that starts when ``may_start`` is set, unless there is a ``fault``."""

    def __init__(self, number: int = 1, *, autostart: bool = True) -> None:
        self.definition = GuestDefinition(
            agent_id=agent(number),
            name=f"vm-{number}",
            scenario="guest-good",
            agent_config=None,
            tool=Path(),
            tool_config=Path(),
            autostart=autostart,
        )
        self.fault: Exception | None = None
        self.may_start = asyncio.Event()
        self.may_start.set()
        self.starting = False
        self.running = False
        self.tries = 0
        self._off = asyncio.Event()

    async def start(self) -> None:
        self.tries += 1
        self.starting = True
        try:
            await self.may_start.wait()
        finally:
            self.starting = False
        if self.fault is not None:
            raise self.fault
        self.running, self._off = True, asyncio.Event()

    async def off(self) -> None:
        await self._off.wait()

    def dies(self) -> None:
        self.running = False
        self._off.set()


@pytest.fixture
def time() -> ManualTime:
    return ManualTime()


@pytest.fixture
async def keeper(time: ManualTime) -> AsyncIterator[GuestKeeper]:
    made = GuestKeeper(sleep=time.sleep, clock=time.monotonic)
    yield made
    await made.close()


async def test_a_guest_that_dies_is_started_again(keeper: GuestKeeper, time: ManualTime) -> None:
    """After half a second: a crash of its vTPM is a power cycle."""
    guest = Guest()
    keeper.keep(guest)
    await settle()
    assert guest.running
    await time.advance(60)
    guest.dies()
    await settle()
    assert not guest.running
    await time.advance(0.5)
    assert guest.running
    assert guest.tries == 2


async def test_pauses_grow_up_to_ten_seconds_and_begin_anew_after_a_good_run(
    keeper: GuestKeeper, time: ManualTime
) -> None:
    """A host agent that is not there yet is asked seven times in half a minute, not thousands of times."""
    guest = Guest()
    guest.fault = GuestDidNotStart("no host agent")
    keeper.keep(guest)
    await time.advance(35.5)
    assert time.slept == [0.5, 1, 2, 4, 8, 10, 10, 10]
    guest.fault = None
    await time.advance(10)
    assert guest.running
    guest.dies()  # at once: as bad as a failure
    await settle()
    assert time.slept[8:] == [10]
    await time.advance(10)
    assert guest.running
    await time.advance(10)
    guest.dies()
    await settle()
    assert time.slept[9:] == [0.5]


@pytest.mark.parametrize("fault", [SimulationError("no swtpm"), ZeroDivisionError("a bug")])
async def test_whatever_keeps_a_guest_from_starting_it_is_tried_again(
    keeper: GuestKeeper, time: ManualTime, fault: Exception
) -> None:
    """Of our errors and of those that nobody thought of."""
    guest = Guest()
    guest.fault = fault
    keeper.keep(guest)
    await settle()
    guest.fault = None
    await time.advance(0.5)
    assert guest.running


async def test_a_bounded_number_of_guests_starts_at_once(keeper: GuestKeeper) -> None:
    """The others wait for their turn; one that fails or waits for its pause takes none."""
    guests = [Guest(number) for number in range(10)]
    for guest in guests:
        guest.may_start.clear()
        keeper.keep(guest)
    await settle()
    assert [guest.starting for guest in guests] == [True] * AT_ONCE + [False] * 6
    guests[0].fault = SimulationError("no")
    for guest in guests[:2]:
        guest.may_start.set()
    await settle()
    assert sum(guest.starting for guest in guests) == AT_ONCE
    for guest in guests:
        guest.may_start.set()
    await settle()
    assert [guest.running for guest in guests] == [False] + [True] * 9


async def test_a_guest_that_is_released_stays_as_it_is(keeper: GuestKeeper, time: ManualTime) -> None:
    """Also while it starts, and while it waits for its next try."""
    starting, waiting, running = (Guest(number) for number in range(3))
    starting.may_start.clear()
    waiting.fault = SimulationError("no")
    guests = (starting, waiting, running)
    for guest in guests:
        keeper.keep(guest)
    await settle()
    for guest in guests:
        await keeper.release(guest)
        await keeper.release(guest)  # twice is no error
    starting.may_start.set()
    waiting.fault = None
    running.dies()
    await time.advance(60)
    assert [guest.running for guest in guests] == [False] * 3
    assert [guest.tries for guest in guests] == [1, 1, 1]


async def test_a_guest_that_is_kept_twice_is_started_once(keeper: GuestKeeper) -> None:
    """And again when it was released in between."""
    guest = Guest()
    keeper.keep(guest)
    keeper.keep(guest)
    await settle()
    assert guest.tries == 1
    await keeper.release(guest)
    keeper.keep(guest)
    await settle()
    assert guest.tries == 2


async def test_a_guest_whose_definition_does_not_say_so_any_more_stays_off(
    keeper: GuestKeeper, time: ManualTime
) -> None:
    """The run in progress goes on to its end; one that was removed is forgotten."""
    guest, removed = Guest(), Guest(2)
    removed.fault = NotFound("no domain")
    keeper.keep(guest)
    keeper.keep(removed)
    await settle()
    guest.definition = Guest(1, autostart=False).definition
    assert guest.running
    guest.dies()
    await time.advance(60)
    assert (guest.tries, removed.tries) == (1, 1)


# --- agents -------------------------------------------------------------------------------------------------------


class Process:
    """A guest agent's process. ``fault`` is raised at its start."""

    def __init__(self) -> None:
        self.fault: HarnessError | OSError | None = None
        self.starts = 0
        self.running = False
        self._ended = asyncio.Event()
        self._ended.set()

    def start(self) -> None:
        self.starts += 1
        if self.fault is not None:
            raise self.fault
        self.running, self._ended = True, asyncio.Event()

    def ends(self) -> None:
        self.running = False
        self._ended.set()

    async def wait(self) -> int | None:
        await self._ended.wait()
        return 1

    async def stop(self) -> None:
        self.ends()


async def test_an_agent_that_ends_by_itself_is_started_again(time: ManualTime) -> None:
    """With pauses that grow; after `stop` it is not, also when the next start was due."""
    process = Process()
    kept = KeptAgent("vm", process, sleep=time.sleep, clock=time.monotonic)
    kept.start()
    for pause_s in (0.5, 1, 2):
        process.ends()
        await settle()
        assert not process.running
        await time.advance(pause_s)
        assert process.running
    process.ends()
    await settle()
    await kept.stop()
    await time.advance(60)
    assert process.starts == 4
    assert time.slept == [0.5, 1, 2, 4]


@pytest.mark.parametrize("fault", [SimulationError("no fork"), OSError("no fork")])
async def test_an_agent_that_cannot_be_started_again_is_tried_on(
    time: ManualTime, fault: HarnessError | OSError
) -> None:
    """The first start is the guest's own affair: its error is the caller's, and nothing is kept."""
    process = Process()
    process.fault = fault
    kept = KeptAgent("vm", process, sleep=time.sleep, clock=time.monotonic)
    with pytest.raises(type(fault)):
        kept.start()
    await time.advance(60)
    assert process.starts == 1
    process.fault = None
    kept.start()
    process.fault = fault
    process.ends()
    await time.advance(3)
    assert not process.running
    process.fault = None
    await time.advance(4)
    assert process.running
    await kept.stop()


async def test_an_agent_can_be_started_again_after_a_stop(time: ManualTime) -> None:
    """The next run of its guest; its pauses begin anew."""
    process = Process()
    kept = KeptAgent("vm", process, sleep=time.sleep, clock=time.monotonic)
    await kept.stop()  # before any start it does nothing
    for _ in range(2):
        kept.start()
        process.ends()
        await time.advance(0.5)
        assert process.running
        await kept.stop()
        assert not process.running
