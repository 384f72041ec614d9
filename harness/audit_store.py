"""The audit trail's table, which each database has for itself, and how it is written and read.

Invariants:
    1. `record` writes in the caller's transaction: the act and its entry are committed together.
    2. What changes nothing in a database has its entry there by itself (`Trail.keep`).

Owner: the stores of the services; the table's class lives with the other tables of its database.
"""

from __future__ import annotations

from sqlalchemy import Float, Integer, String, Text, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, mapped_column

from harness import events
from harness.audit import AuditEntry
from harness.store import Store

_SHOWN = 1000


class AuditColumns:
    """Columns of an audit table; a class of a declarative base adds the table's name."""

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    at: Mapped[float] = mapped_column(Float)
    who: Mapped[str] = mapped_column(Text)
    action: Mapped[str] = mapped_column(String(64))
    subject: Mapped[str] = mapped_column(Text)
    reason: Mapped[str] = mapped_column(Text)


def record(session: AsyncSession, table: type[AuditColumns], entry: AuditEntry) -> None:
    """Adds an entry in this transaction, and says it among the events."""
    session.add(table(**entry.as_json()))
    events.emit("audit", who=entry.who, action=entry.action, subject=entry.subject, reason=entry.reason)


async def entries(session: AsyncSession, table: type[AuditColumns]) -> list[AuditEntry]:
    """The newest 1,000 entries, oldest first.

    *Cancellation:* nothing has happened.
    """
    rows = await session.scalars(select(table).order_by(table.id.desc()).limit(_SHOWN))
    return [
        AuditEntry(at=row.at, who=row.who, action=row.action, subject=row.subject, reason=row.reason)
        for row in reversed(list(rows))
    ]


class Trail:
    """The part of a store that keeps and shows its database's audit trail.

    Args:
        store: the database.
        table: its audit table.
    """

    def __init__(self, store: Store, table: type[AuditColumns]) -> None:
        self._store = store
        self._trail = table

    async def keep(self, entry: AuditEntry) -> None:
        """Keeps the audit entry of an act that changes nothing in this database. *Cancellation:* it is kept or not."""
        async with self._store.begin() as session:
            record(session, self._trail, entry)

    async def audit(self) -> list[AuditEntry]:
        """The newest audit entries, oldest first. *Cancellation:* nothing has happened."""
        async with self._store.begin() as session:
            return await entries(session, self._trail)
