"""Tells receivers of alarms, each at least once: one task for each, which tries until its receiver took or refused it.

Invariants:
    1. An alarm is marked as told after every receiver took it, or refused it for good; a kill in between tells it
       again, never less.
    2. A receiver that is away, slow or refuses holds up no other one: each has its own task and its own waits.
    3. A receiver that refuses one alarm is told the others; the refused one is tried once in a run, and is an event.
    4. A new alarm ends every wait.

Owner: the task that runs `run`.

Spec: docs/protocol.md (notifications).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
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
_LATER = frozenset({408, 425, 429})
"""4xx that say nothing against the alarm."""


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
    """The tasks.

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
        self._clock = clock
        self._alarmed = alarmed
        self._tellers = [_Teller(store, each, clock, chance, self._dealt_with) for each in receivers]
        self._unmarked: set[int] = set()
        self._marking = asyncio.Lock()

    async def run(self) -> None:
        """Tells until it is cancelled. *Cancellation:* what is being sent may arrive, and is sent again."""
        async with asyncio.TaskGroup() as group:
            for teller in self._tellers:
                group.create_task(teller.run(), name=f"notifier {teller.receiver.hook.name}")
            while True:
                await self._alarmed.wait()
                self._alarmed.clear()
                for teller in self._tellers:
                    teller.bell.set()

    async def _dealt_with(self, number: int | None) -> None:
        """Marks an alarm once no receiver is left to be told, and those that could not be marked before."""
        if number is not None and all(number in teller.done for teller in self._tellers):
            self._unmarked.add(number)
        async with self._marking:
            for each in sorted(self._unmarked):
                await self._store.told(each, self._clock.now())
                self._unmarked.discard(each)


class _Teller:
    """Tells one receiver. ``done`` are alarms that it took or refused, while others are still to be told of them."""

    def __init__(
        self,
        store: Untold,
        receiver: Receiver,
        clock: Clock,
        chance: Chance,
        dealt_with: Callable[[int | None], Awaitable[None]],
    ) -> None:
        self.receiver = receiver
        self.done: set[int] = set()
        self.bell = asyncio.Event()
        self._store = store
        self._clock = clock
        self._chance = chance
        self._dealt_with = dealt_with
        self._failures = 0

    async def run(self) -> None:
        while True:
            self.bell.clear()
            self._failures = 0 if await self._guarded() else self._failures + 1
            await self._rest()

    async def _guarded(self) -> bool:
        try:
            return await self._tell_all()
        except StoreError as error:
            events.emit("notices_not_read", level="error", detail=error.detail)
        except Exception:  # the task's border: whatever is wrong with a notice, sessions and other receivers go on
            events.emit("notifier_fault", level="error", exc_info=True)
        return False

    async def _rest(self) -> None:
        """Waits for an alarm, at most until the receiver is to be tried again."""
        wait_s = _LOOK_S
        if self._failures:
            own: float = _FIRST_S * 2 ** min(self._failures - 1, 30)
            wait_s = min(_LONGEST_S, own) * (1 + self._chance.jitter()) / 2
        try:
            async with self._clock.timeout(wait_s):
                await self.bell.wait()
        except TimeoutError:
            return

    async def _tell_all(self) -> bool:
        """Whether nothing is left to tell this receiver."""
        await self._dealt_with(None)
        after = 0
        while notices := await self._store.untold(after=after):
            last = notices[-1].id
            listed = {notice.id for notice in notices}
            self.done = {each for each in self.done if not after < each <= last or each in listed}
            for notice in notices:
                if notice.id in self.done:
                    continue
                if not await self._tell(notice):
                    return False
                self.done.add(notice.id)
                await self._dealt_with(notice.id)
            after = last
        self.done = {each for each in self.done if each <= after}
        return True

    async def _tell(self, notice: Notice) -> bool:
        """Whether the receiver needs not be told again."""
        name = self.receiver.hook.name
        try:
            await self.receiver.hook.post(self.receiver.form(notice))
        except HarnessError as error:
            if isinstance(error, PeerRefusedUs) and 400 <= error.status < 500 and error.status not in _LATER:
                events.emit("alarm_refused", level="error", id=notice.id, receiver=name, detail=error.detail)
                return True
            if self._failures == 0:
                events.emit("alarm_not_told", level="warning", id=notice.id, receiver=name, detail=error.detail)
            return False
        events.emit("alarm_told", id=notice.id, receiver=name)
        return True
