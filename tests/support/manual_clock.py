"""A clock of the provider's services that a test holds still."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta


class ManualClock:
    """Time that passes only when the test says so, or when somebody sleeps; ``frozen``, nobody wakes up."""

    def __init__(self) -> None:
        self.frozen = False
        self.now_s = 1000.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now_s

    def utcnow(self) -> datetime:
        return datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC) + timedelta(seconds=self.now_s)

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        if self.frozen:
            await asyncio.Event().wait()
        self.now_s += seconds
        await asyncio.sleep(0)
