"""A guest's agent, started again when it ends by itself: what systemd does inside a guest.

Invariants:
    1. While an agent is kept there is one process of it, or a pause before the next.
    2. After `stop` there is none, and none comes.

Owner: the guest that it runs in.

Spec: DESIGN 5 (process guests).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Protocol

from harness import events
from harness.errors import HarnessError
from harness.sim.back_off import BackOff


class AgentProcess(Protocol):
    """The guest agent, as the composition root made it."""

    def start(self) -> None:
        """Starts it, also after it has ended. Raises HarnessError or OSError when the system does not let it."""

    async def wait(self) -> int | None:
        """Exit code, or None when nobody knows it, as soon as the process has ended; at once when it does not run."""

    async def stop(self) -> None:
        """Ends it and waits for its end."""


class KeptAgent:
    """The agent of one guest.

    Args:
        name: of the guest.
        process: its agent, not started.
        sleep: waits; tests give their own.
        clock: seconds on a clock that never goes back.
    """

    def __init__(
        self,
        name: str,
        process: AgentProcess,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._process = process
        self._sleep = sleep
        self._clock = clock
        self._keeping: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Starts the agent, and keeps it.

        Raises:
            HarnessError, OSError: the system does not let it start; it is not kept.
        """
        self._process.start()
        self._keeping = asyncio.create_task(self._keep())

    async def stop(self) -> None:
        """Ends the agent for good; does nothing when it was not started.

        *Cancellation:* the agent is ended.
        """
        keeping, self._keeping = self._keeping, None
        if keeping is not None:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)
        await self._process.stop()

    async def _keep(self) -> None:
        back_off = BackOff()
        while True:
            began = self._clock()
            code = await self._process.wait()
            pause_s = back_off.after(self._clock() - began)
            events.emit("guest_agent_ended", level="warning", guest=self._name, code=code, again_in_s=pause_s)
            await self._sleep(pause_s)
            try:
                self._process.start()
            except (HarnessError, OSError) as error:
                events.emit("guest_agent_not_started", level="error", guest=self._name, detail=str(error))
