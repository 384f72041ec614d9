"""Writes of one session into the tenant's records, each repeated until the database takes it.

A database that is locked, read-only or full is a part of ours that is away for a while, like a peer: what is to be
recorded waits for it, and nothing that depends on the record happens before.

Invariants:
    1. `write` returns only after the write was committed.
    2. While a write is outstanding, `fault` says why; whoever asks for "attested" is told no.
    3. A stop of the service cuts off no write that is under way, and waits for none that is not.

Owner: the session's task.

Spec: DESIGN 3.8 ("attested").
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from harness import events
from harness.errors import StoreError
from harness.tenant.plan import Timing
from harness.tenant.ports import Ports
from harness.tenant.states import Event
from harness.values import AgentId

_MOST_DOUBLINGS = 30


class Books:
    """Writes of one session.

    Args:
        agent_id: whose.
        ports: clock and jitter of the waits, and who is told of each try that failed.
        timing: first and longest wait.
    """

    def __init__(self, agent_id: AgentId, ports: Ports, timing: Timing) -> None:
        self._agent_id = agent_id
        self._ports = ports
        self._timing = timing
        self._fault: StoreError | None = None

    @property
    def fault(self) -> StoreError | None:
        """Why the database did not take, or give, what it was asked to last; None when it did."""
        return self._fault

    def failed(self, error: StoreError) -> None:
        """Notes a fault of the database that somebody else met."""
        if self._fault is None:
            events.emit("not_stored", level="error", agent_id=str(self._agent_id), detail=error.detail)
        self._fault = error

    def works(self) -> None:
        """Notes that the database answers."""
        if self._fault is not None:
            events.emit("stored_again", agent_id=str(self._agent_id))
        self._fault = None

    async def write(self, make: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Writes, and tries again with growing waits while the database fails.

        Args:
            make: makes the write; called once for each try, and safe to repeat.

        Raises:
            Exception: what the write raises besides StoreError.

        *Cancellation:* a try that is under way is finished; what it could not store is not stored.
        """
        tries = 0
        while True:
            try:
                await finished(make())
            except StoreError as error:
                self._refused(error)
            else:
                self.works()
                return
            own: float = self._timing.backoff_first_s * 2 ** min(tries, _MOST_DOUBLINGS)
            tries += 1
            jitter = self._ports.chance.jitter()
            await self._ports.clock.sleep(min(self._timing.backoff_longest_s, own) * (1 + jitter) / 2)

    async def write_once(self, make: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Writes if the database takes it now; if not, that is noted, and what follows writes it.

        Raises:
            Exception: what the write raises besides StoreError.

        *Cancellation:* as `write`.
        """
        try:
            await finished(make())
        except StoreError as error:
            self._refused(error)

    def _refused(self, error: StoreError) -> None:
        self.failed(error)
        self._ports.told(Event.TRANSPORT_FAILED, (), None, error, None)


async def finished(write: Coroutine[Any, Any, None]) -> None:
    """Waits until it is done, also when cancelled meanwhile. Bounded, because a transaction is.

    *Cancellation:* it was done, or a second cancellation stopped it.
    """
    task = asyncio.get_running_loop().create_task(write)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        try:
            await asyncio.wait({task})
        finally:
            task.cancel()
        if not task.cancelled() and (fault := task.exception()) is not None:  # must not hide the cancellation
            events.emit("session_fault", level="error", detail=str(fault))
        raise
