"""What is to be sent, until its sender takes it: all that is there at once.

Invariants:
    1. Everything that was put is taken once, in order.

Owner: one sender; whoever puts does so in the same event loop.
"""

from __future__ import annotations

import asyncio
from typing import Generic, TypeVar

T = TypeVar("T")


class Outbox(Generic[T]):
    """A queue that is emptied in one step: what was put in one turn of the event loop is sent together."""

    def __init__(self) -> None:
        self._items: list[T] = []
        self._more = asyncio.Event()

    def put(self, item: T) -> None:
        """Adds one; never waits."""
        self._items.append(item)
        self._more.set()

    async def take(self) -> list[T]:
        """All that is there, at least one.

        *Cancellation:* nothing is lost.
        """
        await self._more.wait()
        self._more.clear()
        items, self._items = self._items, []
        return items
