"""One timer for the deadlines of all waiters.

Most waiters are answered long before their deadline, so nothing is kept for each of them: when the nearest deadline has
come, all who still wait are looked at together.

Invariants:
    1. A waiter is expired not before its deadline, and at most `SWEEP_S` (and what the event loop is late) after it.
    2. However many deadlines there are, waiters are looked at at most once per `SWEEP_S`.

Owner: `batcher.Batcher`; `stream_link.HostLink`.

Spec: DESIGN 4 (nobody waits for ever).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Generic, Protocol, TypeVar

from harness.provider.clock import Clock, Timer

SWEEP_S = 0.1
"""Seconds between two looks, at the least."""
_NEVER = float("inf")


class Dated(Protocol):
    """Whoever waits until ``due_s`` (monotonic) at the longest."""

    due_s: float


W = TypeVar("W", bound=Dated)


class Deadlines(Generic[W]):
    """The timer.

    Args:
        clock: runs it.
        waiters: all who wait now.
        expire: ends the wait of one of them.
    """

    def __init__(self, clock: Clock, waiters: Callable[[], Iterable[W]], expire: Callable[[W], None]) -> None:
        self._clock = clock
        self._waiters = waiters
        self._expire = expire
        self._timer: Timer | None = None
        self._next_s = _NEVER
        self._last_s = -_NEVER

    def watch(self, due_s: float) -> None:
        """Somebody waits until ``due_s`` (monotonic) at the longest."""
        if due_s >= self._next_s:
            return
        self.stop()
        self._next_s = max(due_s, self._last_s + SWEEP_S)
        self._timer = self._clock.call_at(self._next_s, self._sweep)

    def stop(self) -> None:
        """Forgets what it was told."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._next_s = _NEVER

    def _sweep(self) -> None:
        self.stop()
        now_s = self._last_s = self._clock.monotonic()
        nearest_s = _NEVER
        for waiter in list(self._waiters()):
            if waiter.due_s <= now_s:
                self._expire(waiter)
            else:
                nearest_s = min(nearest_s, waiter.due_s)
        if nearest_s < _NEVER:
            self.watch(nearest_s)
