"""Time as services of the provider see it; a constructor argument, so that tests can hold it still.

::

    async with timeout(clock, 2.0):
        ...

Owner: nobody; a clock has no state that its users share.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Protocol


class Timer(Protocol):
    """A call that is to come."""

    def cancel(self) -> None:
        """The call does not come, if it has not come yet."""


class Clock(Protocol):
    """Monotonic time, UTC, and two ways to wait."""

    def monotonic(self) -> float:
        """Seconds since some moment; never goes back."""

    def utcnow(self) -> datetime:
        """UTC, with time zone."""

    async def sleep(self, seconds: float) -> None:
        """Waits that long. *Cancellation:* nothing has happened."""

    def call_at(self, when_s: float, callback: Callable[[], None]) -> Timer:
        """Calls from the event loop when `monotonic` has come to ``when_s``; soon if it has passed."""


class SystemClock:
    """The machine's clock."""

    def monotonic(self) -> float:
        """Seconds since some moment; never goes back."""
        return time.monotonic()

    def utcnow(self) -> datetime:
        """UTC, with time zone."""
        return datetime.now(UTC)

    async def sleep(self, seconds: float) -> None:
        """Waits that long. *Cancellation:* nothing has happened."""
        await asyncio.sleep(seconds)

    def call_at(self, when_s: float, callback: Callable[[], None]) -> Timer:
        """Calls from the event loop when `monotonic` has come to ``when_s``; soon if it has passed."""
        return asyncio.get_running_loop().call_later(max(0.0, when_s - time.monotonic()), callback)


@contextlib.asynccontextmanager
async def timeout(clock: Clock, seconds: float) -> AsyncIterator[None]:
    """A deadline for what is awaited inside.

    Args:
        clock: whose time counts.
        seconds: from now.

    Raises:
        TimeoutError: it has passed; what was awaited has been cancelled.

    *Cancellation:* passes through.
    """
    async with asyncio.timeout(None) as scope:
        timer = clock.call_at(clock.monotonic() + seconds, lambda: scope.reschedule(0))  # long past on the loop's clock
        try:
            yield
        finally:
            timer.cancel()
