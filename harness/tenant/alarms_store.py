"""Alarms for the tenant's operator, and the audit trail: what registrar and verifier keep in the same way.

Invariants:
    1. An alarm is acknowledged once, by one operator with a reason; it is never changed otherwise and never deleted.
    2. An acknowledgement and its audit entry are one transaction.

Owner: `registrar` and `verifier`, each for its own database; both may use one.

Spec: docs/protocol.md (alarms), docs/operations.md.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from sqlalchemy import select

from harness import audit_store
from harness.audit import AuditEntry
from harness.audit_store import Trail
from harness.errors import Conflict, NotFound
from harness.store import Store
from harness.tenant.ports import Alarm
from harness.tenant.tables import AlarmRow, AuditRow
from harness.values import parse_agent_id

SHOWN = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class AlarmRecord:
    """A stored alarm.

    Args:
        id: its number in this database.
        at: seconds since the epoch, as `acknowledged_at`.
        alarm: what was found.
        acknowledged_at, acknowledged_by, reason: None until an operator acknowledged it.
    """

    id: int
    at: float
    alarm: Alarm
    acknowledged_at: float | None = None
    acknowledged_by: str | None = None
    reason: str | None = None

    def as_json(self) -> dict[str, object]:
        """Members as the REST API shows them."""
        return {
            "id": self.id,
            "at": self.at,
            "kind": self.alarm.kind,
            "agent_id": None if self.alarm.agent_id is None else str(self.alarm.agent_id),
            "host_id": self.alarm.host_id,
            "detail": self.alarm.detail,
            "acknowledged_at": self.acknowledged_at,
            "acknowledged_by": self.acknowledged_by,
            "reason": self.reason,
        }


class AlarmStore(Trail):
    """Alarms and audit entries of one database.

    Args:
        store: the tenant's database.
    """

    def __init__(self, store: Store) -> None:
        super().__init__(store, AuditRow)
        self.alarmed = asyncio.Event()
        """Set when an alarm was added here."""

    async def add(self, alarm: Alarm, now: float) -> None:
        """Adds an alarm. *Cancellation:* it is stored or not."""
        async with self._store.begin() as session:
            agent_id = None if alarm.agent_id is None else str(alarm.agent_id)
            session.add(
                AlarmRow(at=now, kind=alarm.kind, agent_id=agent_id, host_id=alarm.host_id, detail=alarm.detail)
            )
        self.alarmed.set()

    async def alarms(self, *, everything: bool = False, newest: int = SHOWN) -> list[AlarmRecord]:
        """The newest alarms, oldest first.

        Args:
            everything: with those that were acknowledged.
            newest: at most this many.

        *Cancellation:* nothing has happened.
        """
        query = select(AlarmRow).order_by(AlarmRow.id.desc()).limit(newest)
        if not everything:
            query = query.where(AlarmRow.acknowledged_at.is_(None))
        async with self._store.begin() as session:
            return [_record(row) for row in reversed(list(await session.scalars(query)))]

    async def acknowledge(self, number: int, *, who: str, reason: str, at: float) -> AlarmRecord:
        """Records that an operator has seen an alarm, and why it needs nothing more.

        Args:
            number: of the alarm.
            who: the operator.
            reason: in the operator's own words.
            at: seconds since the epoch.

        Raises:
            NotFound: there is no such alarm.
            Conflict: it was acknowledged before.

        *Cancellation:* all is stored or nothing.
        """
        async with self._store.begin() as session:
            row = await session.get(AlarmRow, number)
            if row is None:
                raise NotFound(f"there is no alarm {number}")
            if row.acknowledged_at is not None:
                raise Conflict(f"alarm {number} was acknowledged by {row.acknowledged_by}")
            row.acknowledged_at, row.acknowledged_by, row.reason = at, who, reason
            entry = AuditEntry(at=at, who=who, action="alarm-acknowledge", subject=f"alarm {number}", reason=reason)
            audit_store.record(session, AuditRow, entry)
            return _record(row)


def _record(row: AlarmRow) -> AlarmRecord:
    agent_id = None if row.agent_id is None else parse_agent_id(row.agent_id)
    return AlarmRecord(
        id=row.id,
        at=row.at,
        alarm=Alarm(kind=row.kind, agent_id=agent_id, host_id=row.host_id, detail=row.detail),
        acknowledged_at=row.acknowledged_at,
        acknowledged_by=row.acknowledged_by,
        reason=row.reason,
    )
