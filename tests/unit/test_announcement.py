"""A host that announces itself until it is heard, and again."""

from __future__ import annotations

import asyncio

from harness.errors import PeerUnreachable
from harness.provider.announcement import AGAIN_S, keep_announced
from tests.support.batching import settle
from tests.support.manual_clock import ManualClock


async def never() -> None:
    await asyncio.Event().wait()


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

    task = asyncio.create_task(keep_announced(announce, never, clock))
    await settle(100)
    assert not outcomes
    assert clock.slept == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0, AGAIN_S, 0.2, AGAIN_S]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_change_is_announced_at_once_also_one_that_came_during_the_call() -> None:
    """Nothing waits for the next minute."""
    clock = ManualClock()
    clock.frozen = True
    changes: list[asyncio.Event] = []
    announced = 0

    async def changed() -> None:
        changes.append(asyncio.Event())
        await changes[-1].wait()

    async def announce() -> None:
        nonlocal announced
        await asyncio.sleep(0)
        announced += 1
        if announced == 1:
            changes[-1].set()  # during the call

    task = asyncio.create_task(keep_announced(announce, changed, clock))
    await settle()
    assert announced == 2
    changes[-1].set()
    await settle()
    assert announced == 3
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
