"""Schema 1 of the host agent's tables: certificates that its vTPM CA key signed, and EKs that guests ran with."""

from __future__ import annotations

import sqlalchemy as sa
from alembic.operations import Operations

revision = "0001"
down_revision = None


def upgrade(op: Operations) -> None:
    """Makes the tables."""
    op.create_table(
        "issued",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("agent_id", sa.String(36), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("spki_digest", sa.LargeBinary, nullable=False),
        sa.Column("serial", sa.String(48), nullable=False),
        sa.Column("issued_at", sa.Float, nullable=False),
        sa.Column("released_at", sa.Float),
        sa.Column("reason", sa.Text),
    )
    op.create_index("ix_issued_agent_id", "issued", ["agent_id"])
    op.create_index("ix_issued_spki_digest", "issued", ["spki_digest"])
    op.create_table(
        "seen_vtpms",
        sa.Column("agent_id", sa.String(36), primary_key=True),
        sa.Column("state_dir", sa.Text, nullable=False),
        sa.Column("device", sa.String(20), nullable=False),
        sa.Column("inode", sa.String(20), nullable=False),
        sa.Column("spki_digest", sa.LargeBinary, nullable=False),
        sa.Column("seen_at", sa.Float, nullable=False),
    )
