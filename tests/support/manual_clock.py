"""A clock of the provider's services that a test holds still."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable
from datetime import UTC, datetime, timedelta


class _Timer:
    """A call that is to come."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class ManualClock:
    """Time that passes only when the test says so, or when somebody sleeps.

    ``frozen``, a sleep does not move time: who sleeps wakes up when the test has moved it far enough.
    """

    def __init__(self) -> None:
        self.frozen = False
        self.now_s = 1000.0
        self.slept: list[float] = []
        self._due: list[tuple[float, int, _Timer]] = []
        self._order = itertools.count()

    def monotonic(self) -> float:
        return self.now_s

    def utcnow(self) -> datetime:
        return datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC) + timedelta(seconds=self.now_s)

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        if self.frozen:
            woken = asyncio.Event()
            timer = self.call_at(self.now_s + seconds, woken.set)
            try:
                await woken.wait()
            finally:
                timer.cancel()
            return
        self.advance(seconds)
        await asyncio.sleep(0)

    def call_at(self, when_s: float, callback: Callable[[], None]) -> _Timer:
        timer = _Timer(callback)
        heapq.heappush(self._due, (when_s, next(self._order), timer))
        return timer

    def advance(self, seconds: float) -> None:
        """Moves time on; calls what is due on the way, each at its own moment."""
        until_s = self.now_s + seconds
        while self._due and self._due[0][0] <= until_s:
            when_s, _, timer = heapq.heappop(self._due)
            self.now_s = max(self.now_s, when_s)
            if timer.callback is not None:
                timer.callback()
        self.now_s = until_s
