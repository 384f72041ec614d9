"""Tells receivers of alarms, each at least once: one task, which tries until the receiver took it.

Invariants:
    1. An alarm is marked as told after every receiver took it; a kill in between tells it again, never less.
    2. A receiver that is away holds up no other one.
    3. A receiver that refuses one alarm is told the others.

Owner: the task that runs `run`.

Spec: docs/protocol.md (notifications).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from harness import events
from harness.errors import HarnessError, PeerRefusedUs, StoreError
from harness.tenant.notices import Notice
from harness.tenant.ports import Chance, Clock

_FIRST_S = 1.0
_LONGEST_S = 60.0
_LOOK_S = 30.0
"""Alarms of another process that shares the database are seen this late at most."""


class Untold(Protocol):
    """The alarms, as the notifier sees them."""

    async def untold(self, *, after: int = 0) -> list[Notice]:
        """Some alarms to tell, oldest first; none when there are no more."""

    async def told(self, number: int, at: float) -> None:
        """Marks one."""


class Hook(Protocol):
    """Where a body is sent."""

    name: str
    """For the log; without what in a URL may be secret."""

    async def post(self, body: object) -> None:
        """Sends it, or raises HarnessError."""


@dataclass(frozen=True, slots=True, eq=False)
class Receiver:
    """Somebody to tell.

    Args:
        hook: where.
        form: makes the body.
    """

    hook: Hook
    form: Callable[[Notice], object]


class Notifier:
    """The task.

    Args:
        store: the alarms.
        receivers: at least one.
        clock, chance: for the waits.
        alarmed: set when an alarm was stored.
    """

    def __init__(
        self, store: Untold, receivers: Sequence[Receiver], clock: Clock, chance: Chance, alarmed: asyncio.Event
    ) -> None:
        self._store = store
        self._receivers = receivers
        self._clock = clock
        self._chance = chance
        self._alarmed = alarmed
        self._took: dict[int, set[Receiver]] = {}
        self._failures = 0

    async def run(self) -> None:
        """Tells until it is cancelled. *Cancellation:* what is being sent may arrive, and is sent again."""
        while True:
            self._alarmed.clear()
            try:
                done = await self._tell_all()
            except StoreError as error:
                events.emit("notices_not_read", level="error", detail=error.detail)
                done = False
            except Exception:  # the task's border: whatever is wrong with a notice, sessions go on
                events.emit("notifier_fault", level="error", exc_info=True)
                done = False
            await self._rest(done=done)

    async def _rest(self, *, done: bool) -> None:
        self._failures = 0 if done else self._failures + 1
        if not done:
            own: float = _FIRST_S * 2 ** min(self._failures - 1, 30)
            await self._clock.sleep(min(_LONGEST_S, own) * (1 + self._chance.jitter()) / 2)
            return
        try:
            async with self._clock.timeout(_LOOK_S):
                await self._alarmed.wait()
        except TimeoutError:
            return

    async def _tell_all(self) -> bool:
        """Whether nothing is left to tell."""
        away: set[Receiver] = set()
        after = 0
        left: dict[int, set[Receiver]] = {}
        while notices := await self._store.untold(after=after):
            for notice in notices:
                took = left[notice.id] = self._took.setdefault(notice.id, set())
                for receiver in self._receivers:
                    if receiver not in took and receiver not in away:
                        await self._tell(receiver, notice, took, away)
                if len(took) == len(self._receivers):
                    await self._store.told(notice.id, self._clock.now())
                    del left[notice.id]
            after = notices[-1].id
        self._took = left
        return not left

    async def _tell(self, receiver: Receiver, notice: Notice, took: set[Receiver], away: set[Receiver]) -> None:
        try:
            await receiver.hook.post(receiver.form(notice))
        except HarnessError as error:
            if not isinstance(error, PeerRefusedUs):
                away.add(receiver)
            if self._failures == 0:
                events.emit("alarm_not_told", level="warning", id=notice.id, detail=error.detail)
        else:
            took.add(receiver)
            events.emit("alarm_told", id=notice.id, receiver=receiver.hook.name)
