"""A host that announces itself until it is heard, and again."""

from __future__ import annotations

import asyncio

from harness.errors import PeerUnreachable
from harness.provider.announcement import AGAIN_S, keep_announced
from tests.support.batching import settle
from tests.support.manual_clock import ManualClock


async def test_a_registrar_that_is_down_is_asked_again_with_growing_pauses() -> None:
    """Until it answers; then again after a minute, and from the first pause on after a later fault."""
    outcomes = [PeerUnreachable("down")] * 8 + [None, PeerUnreachable("down"), None]
    clock = ManualClock()

    async def announce() -> None:
        outcome = outcomes.pop(0)
        if not outcomes:
            clock.frozen = True
        if outcome is not None:
            raise outcome

    task = asyncio.create_task(keep_announced(announce, clock))
    await settle(100)
    assert not outcomes
    assert clock.slept == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0, AGAIN_S, 0.2, AGAIN_S]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
