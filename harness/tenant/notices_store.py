"""Alarms that nobody was told of yet.

Invariants:
    1. An alarm is told until it is marked; one that an operator acknowledged needs no telling.

Owner: the notifier's task.

Spec: docs/protocol.md (notifications).
"""

from __future__ import annotations

from sqlalchemy import select

from harness.store import Store
from harness.tenant.notices import Notice
from harness.tenant.tables import Agent, AlarmRow

AT_ONCE = 100


class NoticeStore:
    """The alarms of one database, for the notifier.

    Args:
        store: the tenant's database.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    async def untold(self, *, after: int = 0) -> list[Notice]:
        """Alarms to tell, oldest first, at most `AT_ONCE`.

        Args:
            after: only those with a greater number.

        *Cancellation:* nothing has happened.
        """
        query = (
            select(AlarmRow)
            .where(AlarmRow.notified_at.is_(None), AlarmRow.acknowledged_at.is_(None), AlarmRow.id > after)
            .order_by(AlarmRow.id)
            .limit(AT_ONCE)
        )
        async with self._store.begin() as session:
            rows = list(await session.scalars(query))
            return [_notice(row, await session.get(Agent, row.agent_id) if row.agent_id else None) for row in rows]

    async def told(self, number: int, at: float) -> None:
        """Marks an alarm as told. *Cancellation:* it is told again."""
        async with self._store.begin() as session:
            row = await session.get(AlarmRow, number)
            if row is not None:
                row.notified_at = at


def _notice(row: AlarmRow, agent: Agent | None) -> Notice:
    return Notice(
        id=row.id,
        at=row.at,
        kind=row.kind,
        agent_id=row.agent_id,
        host_id=row.host_id,
        detail=row.detail,
        request=None if agent is None else agent.request,
    )
