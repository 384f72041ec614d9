"""What the tenant's verifier keeps: agents with their snapshot and progress, and the clock baselines of all AKs.

Invariants:
    1. A baseline's clock is only raised, and only under equal counters; other counters replace it in two ways: an
       allowed reboot (compare and set), or a later enrolment of the key.
    2. Reads of baselines see what is believed, which is never behind the table (`clocks`): one process owns it, and
       writes go through one lock. What is believed and not stored is part of the next transaction of a round
       (`rounds_store`), so that no success is stored without its clocks.
    3. V is stored until it was delivered, and is removed in the same transaction that records the delivery.
    4. A finding and its alarm, an operator's act and its audit entry, are one transaction each; an act that ends a
       session takes along the alarm that the session could not store.

Owner: the verifier's event loop.

Spec: DESIGN 3.5 (10), 3.8.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncSession

from harness import audit_store, events
from harness.audit import AuditEntry
from harness.errors import Conflict, HarnessError, StoreError
from harness.store import Store
from harness.tenant.clocks import Clocks
from harness.tenant.ports import Alarm, Progress, Reboot
from harness.tenant.progress_text import decode_progress, decode_seen, encode_progress, encode_seen
from harness.tenant.round import same_counters
from harness.tenant.rounds_store import RoundWriter, put_clocks
from harness.tenant.states import ACTIVE, Event, State, transition
from harness.tenant.tables import Agent, AlarmRow, AuditRow, Baseline
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

    ``alarmed`` is set whenever an alarm was stored; whoever tells of alarms clears it.
    """

    def __init__(self, store: Store, now: Callable[[], float]) -> None:
        self._store = store
        self._now = now
        self._writing = asyncio.Lock()
        self.alarmed = asyncio.Event()
        self._clocks = Clocks()
        self._rounds = RoundWriter(store, self._writing, self._clocks)

    async def load(self) -> list[StoredAgent]:
        """Reads everything; called once, before the first session. Active agents come back as SAVED.

        An agent's row that cannot be read is an event and is left out: it must not keep the others from being attested.

        Raises:
            StoreError: the clock of a key cannot be read.
        """
        async with self._store.begin() as session:
            for row in await session.scalars(select(Baseline)):
                self._clocks.replace(row.ak_name, (_baseline(row), row.enrolled_at))
            rows = list(await session.scalars(select(Agent).order_by(Agent.agent_id)))
        return [agent for row in rows if (agent := _stored(row)) is not None]

    async def add(self, agent: StoredAgent, entry: AuditEntry) -> None:
        """Stores a new agent, and the act.

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
                    progress=encode_progress(agent.progress),
                )
            )
            audit_store.record(session, AuditRow, entry)

    async def remove(self, agent_id: AgentId, entry: AuditEntry, alarm: Alarm | None = None) -> None:
        """Forgets an agent; baselines stay, they belong to keys, and so does an alarm that was not stored yet."""
        async with self._writing, self._store.begin() as session:
            await session.execute(delete(Agent).where(Agent.agent_id == str(agent_id)))
            audit_store.record(session, AuditRow, entry)
            self._add_alarm(session, alarm)
        self._tell_of(alarm)

    # --- acts of the operator, and what follows a guest ---------------------------------------------------

    async def resume(self, agent_id: AgentId, progress: Progress, entry: AuditEntry) -> None:
        """Stores that an operator resumes a stopped agent."""
        async with self._writing, self._store.begin() as session:
            await _put_progress(session, agent_id, progress)
            audit_store.record(session, AuditRow, entry)

    async def accept_reboot(self, agent_id: AgentId, progress: Progress, entry: AuditEntry, reboot: Reboot) -> None:
        """As `resume`; the counters that were refused become the baseline of their key.

        Raises:
            Conflict: the stored counters are neither the old nor the new ones: another reboot was accepted meanwhile.
        """
        async with self._writing:
            known, enrolled_at = self._clocks.known(reboot.ak_name) or (None, 0.0)
            done = same_counters(known, reboot.new)
            if not done and not same_counters(known, reboot.old):
                raise Conflict("other counters than the refused ones were accepted meanwhile; resume without them")
            async with self._store.begin() as session:
                await _put_progress(session, agent_id, progress)
                audit_store.record(session, AuditRow, entry)
                if not done:
                    await (await session.connection()).run_sync(put_clocks, {reboot.ak_name: (reboot.new, enrolled_at)})
            if not done:
                self._clocks.replace(reboot.ak_name, (reboot.new, enrolled_at))

    async def set_policy(
        self, agent_id: AgentId, request: str, progress: Progress, entry: AuditEntry, alarm: Alarm | None = None
    ) -> None:
        """Stores an agent's new request, what its session reached, an alarm that it could not store, and the act."""
        async with self._writing, self._store.begin() as session:
            row = await _put_progress(session, agent_id, progress)
            if row is not None:
                row.request = request
            audit_store.record(session, AuditRow, entry)
            self._add_alarm(session, alarm)
        self._tell_of(alarm)

    async def moved(self, agent_id: AgentId, request: str, snapshot: str) -> None:
        """Stores where a guest is reached now."""
        async with self._writing, self._store.begin() as session:
            row = await session.get(Agent, str(agent_id))
            if row is not None:
                row.request, row.snapshot = request, snapshot

    # --- Records ------------------------------------------------------------------------------------------

    async def save(self, agent_id: AgentId, progress: Progress, alarm: Alarm | None = None) -> None:
        """See `Records`. An agent that was removed meanwhile stays removed."""
        await self._rounds.save(agent_id, progress, None if alarm is None else self._columns(alarm))
        self._tell_of(alarm)

    async def baseline(self, ak_name: bytes) -> ClockBaseline | None:
        """See `Records`."""
        return self._clocks.baseline(ak_name)

    async def raise_clock(self, ak_name: bytes, seen: ClockBaseline) -> None:
        """See `Records`."""
        self._clocks.raise_to(ak_name, seen)

    async def settle(self) -> None:
        """See `Records`."""
        await self._rounds.settle()

    async def replace_baseline(self, reboot: Reboot, alarm: Alarm) -> bool:
        """See `Records`."""
        async with self._writing:
            known, enrolled_at = self._clocks.known(reboot.ak_name) or (None, 0.0)
            replaces = same_counters(known, reboot.old)
            async with self._store.begin() as session:
                if replaces:
                    await (await session.connection()).run_sync(put_clocks, {reboot.ak_name: (reboot.new, enrolled_at)})
                self._add_alarm(session, alarm)
            if replaces:
                self._clocks.replace(reboot.ak_name, (reboot.new, enrolled_at))
        self._tell_of(alarm)
        return replaces

    async def enrolled(self, ak_name: bytes, baseline: ClockBaseline, enrolled_at: float) -> None:
        """Takes the baseline of an enrolment if it is later than the one the stored baseline descends from."""
        async with self._writing:
            known = self._clocks.known(ak_name)
            if known is None or known[1] < enrolled_at:
                clocks = {ak_name: (baseline, enrolled_at)}
                await self._store.run(lambda connection: put_clocks(connection, clocks))
                self._clocks.replace(ak_name, (baseline, enrolled_at))

    def _tell_of(self, stored: Alarm | None) -> None:
        if stored is not None:
            self.alarmed.set()

    def _add_alarm(self, session: AsyncSession, alarm: Alarm | None) -> None:
        if alarm is not None:
            session.add(AlarmRow(**self._columns(alarm)))

    def _columns(self, alarm: Alarm) -> dict[str, Any]:
        agent_id = None if alarm.agent_id is None else str(alarm.agent_id)
        return {
            "at": self._now(),
            "kind": alarm.kind,
            "agent_id": agent_id,
            "host_id": alarm.host_id,
            "detail": alarm.detail,
        }


async def _put_progress(session: AsyncSession, agent_id: AgentId, progress: Progress) -> Agent | None:
    row = await session.get(Agent, str(agent_id))
    if row is not None:
        row.state, row.progress = progress.state.value, encode_progress(progress)
        row.seen = encode_seen(progress.seen)
        row.v = None if progress.v_released else row.v
    return row


def _stored(row: Agent) -> StoredAgent | None:
    try:
        agent_id, state = parse_agent_id(row.agent_id), State(row.state)
        if state in ACTIVE:  # the service was killed: nothing of the round that was under way counts
            state = transition(state, Event.SUSPEND).state
        progress = replace(decode_progress(row.progress, state), seen=decode_seen(row.seen))
    except (HarnessError, ValueError) as error:
        events.emit("agent_not_loaded", level="error", agent_id=row.agent_id, detail=str(error))
        return None
    return StoredAgent(agent_id=agent_id, request=row.request, snapshot=row.snapshot, v=row.v, progress=progress)


def _baseline(row: Baseline) -> ClockBaseline:
    try:
        clock, firmware_version = int(row.clock), int(row.firmware_version)
    except ValueError as error:  # left out, it would be a first use: nothing may be believed then
        raise StoreError(
            f"the clock of key {row.ak_name.hex()} in the verifier's database is damaged; `harness db restore` brings"
            " back a backup"
        ) from error
    return ClockBaseline(
        clock=clock,
        reset_count=row.reset_count,
        restart_count=row.restart_count,
        firmware_version=firmware_version,
    )
