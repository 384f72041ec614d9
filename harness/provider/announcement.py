"""The host agent tells the provider registrar where it is, and says it again from time to time.

Invariants:
    1. A registrar that cannot be reached never stops the host agent: it is asked again, with growing pauses.

Owner: the task that runs it.

Spec: docs/protocol.md (provider registrar, hosts).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from harness import events
from harness.errors import HarnessError
from harness.provider.clock import Clock

AGAIN_S = 60.0
"""A registrar whose database was replaced learns of its hosts within this time."""
_FIRST_DELAY_S, _LAST_DELAY_S = 0.2, 10.0


async def keep_announced(announce: Callable[[], Awaitable[object]], clock: Clock) -> None:
    """Announces this host for as long as it runs.

    Args:
        announce: one call to the registrar, with a deadline of its own.
        clock: for the pauses.

    *Cancellation:* the registrar keeps what it was told last.
    """
    delay_s = _FIRST_DELAY_S
    said = False
    while True:
        try:
            await announce()
        except HarnessError as error:
            events.emit("announcement_failed", level="warning", error=type(error).__name__, detail=error.detail)
            await clock.sleep(delay_s)
            delay_s = min(delay_s * 2, _LAST_DELAY_S)
            continue
        if not said:
            events.emit("announced")
            said = True
        delay_s = _FIRST_DELAY_S
        await clock.sleep(AGAIN_S)
