"""Outcomes on their way to waiters: a slice of them at each turn of the event loop.

A batch may have ten thousand members. The owner of the pools goes on with the next batch while they are told, and what
else the process does goes on between two slices.

Invariants:
    1. Every outcome that was put is given, in order; `flush` gives at once what is left.
    2. An outcome is made when it is given, not before.
    3. When all of a batch are told, and only then, its ``done`` is called.

Owner: `batcher.Batcher`.

Spec: DESIGN 4.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator

from harness.provider.batch import Outcome, Waiter

SLICE = 512


class Handout:
    """What is left to be told.

    Args:
        give: ends the wait of one waiter.
    """

    def __init__(self, give: Callable[[Waiter, Outcome], None]) -> None:
        self._give = give
        self._left: deque[tuple[Iterator[tuple[Waiter, Outcome]], Callable[[], None]]] = deque()
        self._next: asyncio.Handle | None = None

    def put(self, outcomes: Iterator[tuple[Waiter, Outcome]], done: Callable[[], None]) -> None:
        """Has these given from the next turn of the event loop on; ``done`` is called after the last."""
        self._left.append((outcomes, done))
        self._go_on()

    def flush(self) -> None:
        """Gives all that is left."""
        while self._left:
            self._slice(SLICE)
        if self._next is not None:
            self._next.cancel()
            self._next = None

    def _go_on(self) -> None:
        if self._next is None and self._left:
            self._next = asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        self._next = None
        try:
            self._slice(SLICE)
        finally:
            self._go_on()

    def _slice(self, size: int) -> None:
        outcomes, done = self._left[0]
        for _ in range(size):
            told = next(outcomes, None)
            if told is None:
                self._left.popleft()
                done()
                return
            self._give(*told)
