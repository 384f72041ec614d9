"""Refusals of guests: one alarm each, also when the database is away at first."""

from __future__ import annotations

import asyncio
import uuid

from harness.errors import ChallengeFailed, EnrolmentError, KeyChanged, StoreError
from harness.tenant.enrolment_alarms import EnrolmentAlarms
from harness.tenant.ports import Alarm
from harness.tenant.refusals import Refusals
from harness.values import AgentId
from tests.support.manual_time import settle

AGENT = AgentId(uuid.UUID(int=1))
REFUSAL = KeyChanged("other keys")
NOTED = {"error": "KeyChanged", "detail": "other keys"}


class MemoryAlarms:
    """The alarms, in memory."""

    def __init__(self) -> None:
        self.kinds: list[str] = []
        self.fault: StoreError | None = None
        self.gate = asyncio.Event()
        self.gate.set()

    async def add(self, alarm: Alarm, _now: float) -> None:
        await self.gate.wait()
        if self.fault is not None:
            raise self.fault
        self.kinds.append(alarm.kind)


def refusals() -> tuple[Refusals, MemoryAlarms]:
    alarms = MemoryAlarms()
    return Refusals(EnrolmentAlarms(alarms, now=lambda: 1.0)), alarms  # type: ignore[arg-type]


async def test_an_alarm_that_could_not_be_stored_is_stored_with_the_next_refusal() -> None:
    """The database is away for one request: the caller's own error is not hidden, and the retry raises the alarm."""
    kept, alarms = refusals()
    alarms.fault = StoreError("locked")
    await kept.note(AGENT, REFUSAL)
    assert (kept.of(AGENT), alarms.kinds) == (None, [])
    alarms.fault = None
    await kept.note(AGENT, REFUSAL)
    await kept.note(AGENT, REFUSAL)
    assert (kept.of(AGENT), alarms.kinds) == (NOTED, ["KeyChanged"])


async def test_the_same_refusal_is_one_alarm_for_every_one_of_many_guests() -> None:
    """However many guests are refused, each by its second try: as many alarms as guests."""
    kept, alarms = refusals()
    guests = [AgentId(uuid.UUID(int=number)) for number in range(5000)]
    for _ in range(2):
        for guest in guests:
            await kept.note(guest, REFUSAL)
    assert len(alarms.kinds) == len(guests)


async def test_requests_that_meet_raise_one_alarm() -> None:
    """The second comes while the first one's alarm is being stored."""
    kept, alarms = refusals()
    alarms.gate.clear()
    first = asyncio.create_task(kept.note(AGENT, REFUSAL))
    await settle()
    await kept.note(AGENT, REFUSAL)
    alarms.gate.set()
    await first
    assert alarms.kinds == ["KeyChanged"]


async def test_another_refusal_or_one_after_a_registration_is_new() -> None:
    """Other words are another alarm; a challenge that failed is noted and is none; forgotten is forgotten."""
    kept, alarms = refusals()
    refused: list[EnrolmentError] = [REFUSAL, KeyChanged("the EK"), ChallengeFailed()]
    for error in refused:
        await kept.note(AGENT, error)
    assert alarms.kinds == ["KeyChanged"] * 2
    assert kept.of(AGENT) == {"error": "ChallengeFailed", "detail": ChallengeFailed().detail}
    kept.forget(AGENT)
    assert kept.of(AGENT) is None
    await kept.note(AGENT, REFUSAL)
    assert alarms.kinds == ["KeyChanged"] * 3
