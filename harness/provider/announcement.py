"""The host agent tells the provider registrar where it is, and says it again after each change and from time to time.

Invariants:
    1. A registrar that cannot be reached never stops the host agent: it is asked again, with growing pauses.

Owner: the task that runs it.

Spec: docs/protocol.md (provider registrar, hosts).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from harness import events
from harness.errors import HarnessError
from harness.provider.clock import Clock

AGAIN_S = 60.0
"""A registrar whose database was replaced learns of its hosts within this time."""
_FIRST_DELAY_S, _LAST_DELAY_S = 0.2, 10.0


async def keep_announced(
    announce: Callable[[], Awaitable[object]], changed: Callable[[], Coroutine[Any, Any, None]], clock: Clock
) -> None:
    """Announces this host, again after each change, for as long as it runs.

    Args:
        announce: calls to the registrar, with deadlines of their own.
        changed: returns at the next change of what is announced.
        clock: for the pauses.

    *Cancellation:* the registrar keeps what it was told last.
    """
    delay_s = _FIRST_DELAY_S
    said = False
    while True:
        news = asyncio.create_task(changed())  # before the call: what changes during it is announced next
        try:
            await announce()
            if not said:
                events.emit("announced")
            said, delay_s = True, _FIRST_DELAY_S
            await _first_of(news, asyncio.create_task(clock.sleep(AGAIN_S)))
        except HarnessError as error:
            events.emit("announcement_failed", level="warning", error=type(error).__name__, detail=error.detail)
            await clock.sleep(delay_s)
            delay_s = min(delay_s * 2, _LAST_DELAY_S)
        finally:
            news.cancel()


async def _first_of(*tasks: asyncio.Task[None]) -> None:
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
