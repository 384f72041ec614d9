"""A clock that a test moves by hand: sleeps and timeouts end when the test says that it is time."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
from collections.abc import AsyncIterator, Callable


async def settle(turns: int = 50) -> None:
    """Lets every task that can run do so."""
    for _ in range(turns):
        await asyncio.sleep(0)


class ManualTime:
    """Implements the session's ``Clock``; time stands still between two calls of `advance`."""

    def __init__(self, *, monotonic: float = 1000.0, now: float = 1_800_000_000.0) -> None:
        self._monotonic = monotonic
        self._offset = now - monotonic
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self._monotonic

    def now(self) -> float:
        return self._monotonic + self._offset

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        woken = asyncio.Event()
        self._at(self._monotonic + seconds, woken.set)
        await woken.wait()

    @contextlib.asynccontextmanager
    async def timeout(self, seconds: float) -> AsyncIterator[None]:
        async with asyncio.timeout(None) as bound:
            over = False

            def expire() -> None:
                if not over:
                    bound.reschedule(0)  # long past on the loop's own clock

            self._at(self._monotonic + seconds, expire)
            try:
                yield
            finally:
                over = True

    def jump(self, seconds: float) -> None:
        """Moves time without letting anything run: a stall of the whole process."""
        self._monotonic += seconds

    def set_wall(self, seconds: float) -> None:
        """Somebody sets the system clock, forward or back; the monotonic clock does not notice."""
        self._offset += seconds

    async def advance(self, seconds: float) -> None:
        """Moves time, in steps from one due moment to the next, and lets tasks run at each."""
        until = self._monotonic + seconds
        await settle()
        while self._due and self._due[0][0] <= until:
            when, _, call = heapq.heappop(self._due)
            self._monotonic = max(self._monotonic, when)
            call()
            await settle()
        self._monotonic = until
        await settle()

    def _at(self, when: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._due, (when, next(self._order), call))
