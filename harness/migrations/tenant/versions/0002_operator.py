"""Schema 2 of the tenant's tables: what an operator needs to find the way back, and the audit trail."""

from __future__ import annotations

import sqlalchemy as sa
from alembic.operations import Operations

revision = "0002"
down_revision = "0001"


def upgrade(op: Operations) -> None:
    """Adds columns, which are null in the rows that are there, and a table."""
    op.add_column("hosts", sa.Column("ek_chain", sa.Text))
    op.add_column("alarms", sa.Column("acknowledged_at", sa.Float))
    op.add_column("alarms", sa.Column("acknowledged_by", sa.Text))
    op.add_column("alarms", sa.Column("reason", sa.Text))
    op.add_column("alarms", sa.Column("notified_at", sa.Float))
    op.add_column("agents", sa.Column("seen", sa.Text))
    op.create_table(
        "audit",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("at", sa.Float, nullable=False),
        sa.Column("who", sa.Text, nullable=False),
        sa.Column("action", sa.String(64), nullable=False),
        sa.Column("subject", sa.Text, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
    )
