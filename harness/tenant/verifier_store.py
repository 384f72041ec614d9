"""What the tenant's verifier keeps: agents with their snapshot and progress, and the clock baselines of all AKs.

Invariants:
    1. A baseline's clock is only raised, and only under equal counters; other counters replace it in two ways: an
       allowed reboot (compare and set), or a later enrolment of the key.
    2. Reads of baselines see every committed write: one process owns the table, and writes go through one lock.
    3. V is stored until it was delivered, and is removed in the same transaction that records the delivery.

Owner: the verifier's event loop.

Spec: DESIGN 3.5 (10), 3.8.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from sqlalchemy import delete, select

from harness.errors import Conflict
from harness.store import Store
from harness.tenant.ports import Alarm, Progress
from harness.tenant.round import same_counters
from harness.tenant.states import ACTIVE, Event, State, transition
from harness.tenant.tables import Agent, AlarmRow, Baseline
from harness.values import AgentId, ClockBaseline, parse_agent_id


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredAgent:
    """An agent as stored: what was asked, what was pinned then, and what was reached.

    Args:
        agent_id: the guest.
        request: JSON text of the POST that added it, without V.
        snapshot: JSON text of the registrar's answers when it was added.
        v: our half of the payload key while it is not delivered.
        progress: what was reached.
    """

    agent_id: AgentId
    request: str
    snapshot: str
    v: bytes | None = field(repr=False)
    progress: Progress


class VerifierStore:
    """The verifier's tables; implements `harness.tenant.ports.Records`.

    Args:
        store: the tenant's database.
        now: wall clock, for alarms.
    """

    def __init__(self, store: Store, now: Callable[[], float]) -> None:
        self._store = store
        self._now = now
        self._writing = asyncio.Lock()
        self._baselines: dict[bytes, tuple[ClockBaseline, float]] = {}

    async def load(self) -> list[StoredAgent]:
        """Reads everything; called once, before the first session. Active agents come back as SAVED."""
        async with self._store.begin() as session:
            for row in await session.scalars(select(Baseline)):
                self._baselines[row.ak_name] = (_baseline(row), row.enrolled_at)
            return [_stored(row) for row in await session.scalars(select(Agent).order_by(Agent.agent_id))]

    async def add(self, agent: StoredAgent) -> None:
        """Stores a new agent.

        Raises:
            Conflict: it exists.
        """
        async with self._writing, self._store.begin() as session:
            if await session.get(Agent, str(agent.agent_id)) is not None:
                raise Conflict(f"agent {agent.agent_id} exists; delete it first")
            session.add(
                Agent(
                    agent_id=str(agent.agent_id),
                    request=agent.request,
                    snapshot=agent.snapshot,
                    v=agent.v,
                    state=agent.progress.state.value,
                    progress=_encode(agent.progress),
                )
            )

    async def remove(self, agent_id: AgentId) -> None:
        """Forgets an agent; baselines stay, they belong to keys."""
        async with self._writing, self._store.begin() as session:
            await session.execute(delete(Agent).where(Agent.agent_id == str(agent_id)))

    # --- Records ------------------------------------------------------------------------------------------

    async def save(self, agent_id: AgentId, progress: Progress) -> None:
        """See `Records`. An agent that was removed meanwhile stays removed."""
        async with self._writing, self._store.begin() as session:
            row = await session.get(Agent, str(agent_id))
            if row is not None:
                row.state, row.progress = progress.state.value, _encode(progress)
                row.v = None if progress.v_released else row.v

    async def alarm(self, alarm: Alarm) -> None:
        """See `Records`."""
        async with self._writing, self._store.begin() as session:
            agent_id = None if alarm.agent_id is None else str(alarm.agent_id)
            session.add(
                AlarmRow(at=self._now(), kind=alarm.kind, agent_id=agent_id, host_id=alarm.host_id, detail=alarm.detail)
            )

    async def baseline(self, ak_name: bytes) -> ClockBaseline | None:
        """See `Records`."""
        known = self._baselines.get(ak_name)
        return None if known is None else known[0]

    async def raise_clock(self, ak_name: bytes, seen: ClockBaseline) -> None:
        """See `Records`."""
        async with self._writing:
            known, enrolled_at = self._baselines.get(ak_name, (None, 0.0))
            if known is None or (same_counters(known, seen) and seen.clock > known.clock):
                await self._put(ak_name, seen, enrolled_at)

    async def replace_baseline(self, ak_name: bytes, *, old: ClockBaseline | None, new: ClockBaseline) -> bool:
        """See `Records`."""
        async with self._writing:
            known, enrolled_at = self._baselines.get(ak_name, (None, 0.0))
            if not same_counters(known, old):
                return False
            await self._put(ak_name, new, enrolled_at)
            return True

    async def enrolled(self, ak_name: bytes, baseline: ClockBaseline, enrolled_at: float) -> None:
        """Takes the baseline of an enrolment if it is later than the one the stored baseline descends from."""
        async with self._writing:
            known = self._baselines.get(ak_name)
            if known is None or known[1] < enrolled_at:
                await self._put(ak_name, baseline, enrolled_at)

    async def _put(self, ak_name: bytes, baseline: ClockBaseline, enrolled_at: float) -> None:
        async with self._store.begin() as session:
            row = await session.get(Baseline, ak_name)
            if row is None:
                row = Baseline(ak_name=ak_name)
                session.add(row)
            row.clock, row.firmware_version = str(baseline.clock), str(baseline.firmware_version or 0)
            row.reset_count, row.restart_count = baseline.reset_count, baseline.restart_count
            row.enrolled_at = enrolled_at
        self._baselines[ak_name] = (baseline, enrolled_at)


def _encode(progress: Progress) -> str:
    return json.dumps(asdict(replace(progress, state=State(progress.state))))


def _stored(row: Agent) -> StoredAgent:
    members: dict[str, Any] = json.loads(row.progress)
    own = members.pop("host_baseline")
    state = State(row.state)
    if state in ACTIVE:  # the service was killed: nothing of the round that was under way counts
        state = transition(state, Event.SUSPEND).state
    members["state"] = state
    progress = Progress(host_baseline=None if own is None else ClockBaseline(**own), **members)
    return StoredAgent(
        agent_id=parse_agent_id(row.agent_id), request=row.request, snapshot=row.snapshot, v=row.v, progress=progress
    )


def _baseline(row: Baseline) -> ClockBaseline:
    return ClockBaseline(
        clock=int(row.clock),
        reset_count=row.reset_count,
        restart_count=row.restart_count,
        firmware_version=int(row.firmware_version),
    )
