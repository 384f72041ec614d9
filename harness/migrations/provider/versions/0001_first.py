"""Schema 1 of the provider's tables: tenants, hosts, allowlists, guests."""

from __future__ import annotations

import sqlalchemy as sa
from alembic.operations import Operations

revision = "0001"
down_revision = None


def upgrade(op: Operations) -> None:
    """Makes the tables."""
    op.create_table(
        "tenants",
        sa.Column("name", sa.String(63), primary_key=True),
        sa.Column("ca_pem", sa.Text, nullable=False),
    )
    op.create_table(
        "hosts",
        sa.Column("host_id", sa.String(36), primary_key=True),
        sa.Column("name", sa.String(63), nullable=False, unique=True),
        sa.Column("url", sa.Text, nullable=False),
        sa.Column("reported_at", sa.Float, nullable=False),
    )
    op.create_table(
        "allowlists",
        sa.Column("tenant", sa.String(63), sa.ForeignKey("tenants.name", ondelete="CASCADE"), primary_key=True),
        sa.Column("host_id", sa.String(36), primary_key=True),
        sa.Column("banks", sa.Text, nullable=False),
    )
    op.create_table(
        "guests",
        sa.Column("agent_id", sa.String(36), primary_key=True),
        sa.Column("tenant", sa.String(63), sa.ForeignKey("tenants.name"), nullable=False),
        sa.Column("host_id", sa.String(36), sa.ForeignKey("hosts.host_id"), nullable=False),
        sa.Column("name", sa.String(63), nullable=False),
        sa.Column("ek", sa.LargeBinary, unique=True),
        sa.Column("ak", sa.LargeBinary, unique=True),
        sa.Column("ip", sa.String(64)),
        sa.Column("port", sa.Integer),
        sa.Column("mtls_cert", sa.Text),
        sa.Column("reported_state", sa.String(16)),
        sa.Column("vtpm_ek", sa.String(64)),
    )
