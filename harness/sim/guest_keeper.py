"""Keeps guests running: each is started, and started again when it is off, until somebody stops it.

Invariants:
    1. A bounded number of guests starts at once: a start makes a vTPM and reads an EK, seconds of a processor.
    2. What keeps a guest from starting is told once, and again when it changes; the tries go on, with back-off.
    3. After `release` nothing starts the guest.

Owner: the guest manager.

Spec: DESIGN 5 (process guests), 6 (a swtpm restart is a power cycle).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Protocol

from harness import events
from harness.errors import HarnessError, NotFound
from harness.sim.back_off import BackOff
from harness.sim.guest import GuestDefinition

AT_ONCE = 4


class Guest(Protocol):
    """What is kept; see `harness.sim.guest.ProcessGuest`."""

    definition: GuestDefinition

    async def start(self) -> None:
        """Starts it; does nothing when it runs. Raises HarnessError; NotFound when it was removed."""

    async def off(self) -> None:
        """Waits until it is off."""


class GuestKeeper:
    """The tasks that keep guests running, one for each.

    Args:
        sleep: waits; tests give their own.
        clock: seconds on a clock that never goes back.
    """

    def __init__(
        self,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sleep = sleep
        self._clock = clock
        self._turns = asyncio.Semaphore(AT_ONCE)
        self._tasks: dict[Guest, asyncio.Task[None]] = {}

    def keep(self, guest: Guest) -> None:
        """Keeps a guest running from now on, as long as its definition says so; does nothing when it is kept."""
        task = self._tasks.get(guest)
        if task is None or task.done():
            self._tasks[guest] = asyncio.create_task(self._keep(guest))

    async def release(self, guest: Guest) -> None:
        """Leaves a guest as it is; a start of it that was in work is given up.

        *Cancellation:* it is released all the same.
        """
        task = self._tasks.pop(guest, None)
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def close(self) -> None:
        """Releases all guests. *Cancellation:* they are released all the same."""
        await asyncio.gather(*(self.release(guest) for guest in list(self._tasks)))

    async def _keep(self, guest: Guest) -> None:
        back_off, told = BackOff(), ""
        while guest.definition.autostart:
            lasted_s = 0.0
            try:
                async with self._turns:
                    await guest.start()
                began, told = self._clock(), ""
                await guest.off()
                lasted_s = self._clock() - began
            except NotFound:
                return
            except HarnessError as error:
                if error.detail != told:
                    told = error.detail
                    events.emit("guest_not_started", level="error", guest=guest.definition.name, detail=told)
            except Exception:  # the border of the task: whatever it was, the guest is tried again
                events.emit("internal_fault", level="error", guest=guest.definition.name, exc_info=True)
            await self._sleep(back_off.after(lasted_s))
