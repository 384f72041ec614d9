"""The task that tells receivers of alarms: at least once, in order, whatever is away meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import pytest

from harness.errors import HarnessError, PeerRefusedUs, PeerUnreachable, StoreError
from harness.tenant.notices import Notice
from harness.tenant.notifier import Notifier, Receiver
from harness.tenant.ports import Chance
from tests.support.manual_time import ManualTime, settle

AWAY = PeerUnreachable("away")


def notice(number: int) -> Notice:
    return Notice(id=number, at=1.0, kind="KeyChanged", agent_id=None, host_id=None, detail="guest: other keys")


@dataclass
class MemoryNotices:
    """Alarms in memory."""

    rows: list[Notice]
    marked: dict[int, float] = field(default_factory=dict)
    fault: Exception | None = None
    at_once: int = 2

    async def untold(self, *, after: int = 0) -> list[Notice]:
        if self.fault is not None:
            raise self.fault
        left = [row for row in self.rows if row.id not in self.marked and row.id > after]
        return left[: self.at_once]

    async def told(self, number: int, at: float) -> None:
        if self.fault is not None:
            raise self.fault
        assert number not in self.marked
        self.marked[number] = at


class FakeHook:
    """A receiver; ``failure`` says what happens to a body."""

    def __init__(self) -> None:
        self.name = "https://receiver"
        self.got: list[int] = []
        self.tries = 0
        self.failure: Callable[[int], HarnessError | None] = lambda _: None
        self.gate = asyncio.Event()
        self.gate.set()

    async def post(self, body: object) -> None:
        self.tries += 1
        assert isinstance(body, int)
        await self.gate.wait()
        if (error := self.failure(body)) is not None:
            raise error
        self.got.append(body)


@dataclass
class Telling:
    store: MemoryNotices
    hooks: list[FakeHook]
    time: ManualTime = field(default_factory=ManualTime)
    alarmed: asyncio.Event = field(default_factory=asyncio.Event)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        receivers = [Receiver(hook, lambda each: each.id) for hook in self.hooks]
        notifier = Notifier(self.store, receivers, self.time, Chance(jitter=lambda: 0.0), self.alarmed)
        task = asyncio.get_running_loop().create_task(notifier.run())
        try:
            await settle()
            yield
        finally:
            assert not task.done(), "the notifier ended by itself"
            task.cancel()
            await asyncio.wait({task})


def telling(rows: int, receivers: int = 1) -> Telling:
    return Telling(
        MemoryNotices([notice(number + 1) for number in range(rows)]), [FakeHook() for _ in range(receivers)]
    )


async def test_each_receiver_is_told_each_alarm_once_and_in_order() -> None:
    """More alarms than are read at once; then nothing is repeated."""
    case = telling(5, receivers=2)
    async with case.running():
        assert [hook.got for hook in case.hooks] == [[1, 2, 3, 4, 5]] * 2
        assert list(case.store.marked) == [1, 2, 3, 4, 5]
        await case.time.advance(600)
        assert [hook.tries for hook in case.hooks] == [5, 5]


async def test_a_new_alarm_is_told_at_once() -> None:
    """The notifier is woken; an alarm of another process is seen within half a minute."""
    case = telling(0)
    async with case.running():
        case.store.rows.append(notice(1))
        case.alarmed.set()
        await settle()
        assert case.hooks[0].got == [1]
        case.store.rows.append(notice(2))
        await case.time.advance(31)
        assert case.hooks[0].got == [1, 2]


async def test_a_receiver_that_is_away_is_told_when_it_is_back() -> None:
    """An hour later: everything comes, in order, once; meanwhile it is not asked more than once a minute or so."""
    case = telling(3)
    case.hooks[0].failure = lambda _: AWAY
    async with case.running():
        await case.time.advance(3600)
        assert case.store.marked == {}
        assert 50 < case.hooks[0].tries < 200
        case.hooks[0].failure = lambda _: None
        await case.time.advance(60)
        assert case.hooks[0].got == [1, 2, 3]


async def test_a_receiver_that_is_away_holds_up_no_other() -> None:
    """The other one has all alarms, each once, also those that come later; marked they are when both have them."""
    case = telling(5, receivers=2)
    gone, well = case.hooks
    gone.failure = lambda _: AWAY
    async with case.running():
        assert well.got == [1, 2, 3, 4, 5]
        case.store.rows.append(notice(6))
        await case.time.advance(300)
        assert well.got == [1, 2, 3, 4, 5, 6]
        assert case.store.marked == {}
        gone.failure = lambda _: None
        await case.time.advance(60)
        assert gone.got == well.got
        assert len(case.store.marked) == 6


async def test_an_alarm_that_a_receiver_refuses_holds_up_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    """400 for one body: the others are delivered, and the refused one is given up after it was tried, once."""
    case = telling(3)
    case.hooks[0].failure = lambda body: PeerRefusedUs("bad", status=400) if body == 2 else None
    async with case.running():
        await case.time.advance(600)
        assert case.hooks[0].got == [1, 3]
        assert list(case.store.marked) == [1, 2, 3]
        assert case.hooks[0].tries == 3
    assert [line for line in capsys.readouterr().err.splitlines() if "alarm_refused" in line and '"id": 2' in line]


@pytest.mark.parametrize("status", [302, 408, 425, 429])
async def test_an_answer_that_says_nothing_against_the_alarm_is_no_refusal(status: int) -> None:
    """Later, or elsewhere: the receiver is told again, with growing waits, until it takes the alarm."""
    case = telling(2)
    case.hooks[0].failure = lambda _: PeerRefusedUs("later", status=status)
    async with case.running():
        await case.time.advance(300)
        assert (case.hooks[0].got, case.store.marked) == ([], {})
        case.hooks[0].failure = lambda _: None
        await case.time.advance(60)
        assert case.hooks[0].got == [1, 2]


@pytest.mark.parametrize("trouble", ["away", "hangs", "refuses"])
async def test_a_healthy_receiver_is_told_at_once_whatever_the_other_one_does(trouble: str) -> None:
    """The other one has failed for an hour, or holds our call: a new alarm is told without any time passing."""
    case = telling(1, receivers=2)
    other, well = case.hooks
    if trouble == "hangs":
        other.gate.clear()
    else:
        other.failure = lambda _: AWAY if trouble == "away" else PeerRefusedUs("no", status=403)
    async with case.running():
        await case.time.advance(3600)
        assert well.got == [1]
        case.store.rows.append(notice(2))
        case.alarmed.set()
        await settle()
        assert well.got == [1, 2]
        assert (2 in case.store.marked) == (trouble == "refuses")


async def test_a_new_alarm_ends_the_wait_for_a_receiver_that_was_away() -> None:
    """It is back within our longest wait: with the next alarm it is told all, at once and in order."""
    case = telling(1)
    case.hooks[0].failure = lambda _: AWAY
    async with case.running():
        await case.time.advance(3600)
        case.hooks[0].failure = lambda _: None
        case.store.rows.append(notice(2))
        case.alarmed.set()
        await settle()
        assert case.hooks[0].got == [1, 2]


async def test_what_could_not_be_marked_is_marked_later_and_not_told_again() -> None:
    """The database fails between the delivery and the mark: within one run that is no second delivery."""
    case = telling(1, receivers=2)

    def full_afterwards(_: int) -> None:
        case.store.fault = StoreError("disk full")

    case.hooks[0].failure = full_afterwards
    async with case.running():
        case.store.fault, case.hooks[0].failure = None, lambda _: None
        await case.time.advance(60)
        assert [hook.got for hook in case.hooks] == [[1], [1]]
        assert list(case.store.marked) == [1]


async def test_what_was_told_and_not_marked_is_told_again_after_a_restart() -> None:
    """The database failed right after the delivery, and then the service was killed: at least once, never less."""
    case = telling(1)

    def full_afterwards(_: int) -> None:
        case.store.fault = StoreError("disk full")

    case.hooks[0].failure = full_afterwards
    async with case.running():
        await case.time.advance(60)
        assert case.hooks[0].got == [1]
    case.store.fault, case.hooks[0].failure = None, lambda _: None
    async with case.running():
        assert case.hooks[0].got == [1, 1]
        assert list(case.store.marked) == [1]


@pytest.mark.parametrize("fault", [StoreError("locked"), RuntimeError("bug")])
async def test_nothing_ends_the_notifier(fault: Exception) -> None:
    """Neither a database that is away nor a fault of ours: sessions share its task group."""
    case = telling(1)
    case.store.fault = fault
    async with case.running():
        await case.time.advance(600)
        assert case.hooks[0].got == []
        case.store.fault = None
        await case.time.advance(60)
        assert case.hooks[0].got == [1]


async def test_an_alarm_that_was_acknowledged_meanwhile_is_forgotten() -> None:
    """The receiver is away and an operator has dealt with it: it is not told any more."""
    case = telling(1)
    case.hooks[0].failure = lambda _: AWAY
    async with case.running():
        case.store.rows.clear()
        case.hooks[0].failure = lambda _: None
        await case.time.advance(120)
        assert case.hooks[0].got == []
