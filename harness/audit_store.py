"""The audit trail's table, which each database has for itself, and how it is written and read.

Invariants:
    1. `record` writes in the caller's transaction: the act and its entry are committed together.

Owner: the stores of the services; the table's class lives with the other tables of its database.
"""

from __future__ import annotations

from sqlalchemy import Float, Integer, String, Text, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, mapped_column

from harness import events
from harness.audit import AuditEntry

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
