"""Time as services of the provider see it; a constructor argument, so that tests can hold it still.

Owner: nobody; a clock has no state that its users share.
"""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    """Monotonic time, UTC, and a way to wait."""

    def monotonic(self) -> float:
        """Seconds since some moment; never goes back."""

    def utcnow(self) -> datetime:
        """UTC, with time zone."""

    async def sleep(self, seconds: float) -> None:
        """Waits that long. *Cancellation:* nothing has happened."""


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
