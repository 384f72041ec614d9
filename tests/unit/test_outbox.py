"""What is to be sent is taken together, once, in order."""

from __future__ import annotations

import asyncio

from harness.provider.outbox import Outbox


async def test_all_that_was_put_is_taken_in_one_step() -> None:
    """In order; then the next take waits for more."""
    box: Outbox[int] = Outbox()
    for number in range(3):
        box.put(number)
    assert await box.take() == [0, 1, 2]
    waiting = asyncio.create_task(box.take())
    await asyncio.sleep(0)
    assert not waiting.done()
    box.put(3)
    box.put(4)
    assert await waiting == [3, 4]


async def test_a_sender_that_is_cancelled_loses_nothing() -> None:
    """Whether it was cancelled before or after something was put."""
    box: Outbox[int] = Outbox()
    for put_first in (False, True):
        waiting = asyncio.create_task(box.take())
        await asyncio.sleep(0)
        if put_first:
            box.put(1)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        if not put_first:
            box.put(1)
        assert await box.take() == [1]
