"""Schema 1 of the tenant's tables: pinned hosts and guests, alarms, agents and clock baselines."""

from __future__ import annotations

import sqlalchemy as sa
from alembic.operations import Operations

revision = "0001"
down_revision = None


def upgrade(op: Operations) -> None:
    """Makes the tables."""
    _pinned(op)
    _attested(op)


def _pinned(op: Operations) -> None:
    op.create_table(
        "hosts",
        sa.Column("host_id", sa.String(36), primary_key=True),
        sa.Column("url", sa.Text, nullable=False),
        sa.Column("ek", sa.LargeBinary, nullable=False),
        sa.Column("ek_certificate", sa.LargeBinary, nullable=False),
        sa.Column("ak", sa.LargeBinary, nullable=False),
        sa.Column("ak_qualified_name", sa.LargeBinary, nullable=False),
        sa.Column("ca", sa.LargeBinary, nullable=False),
        sa.Column("ca_certificate", sa.LargeBinary, nullable=False),
        sa.Column("clock", sa.String(20), nullable=False),
        sa.Column("reset_count", sa.BigInteger, nullable=False),
        sa.Column("restart_count", sa.BigInteger, nullable=False),
        sa.Column("firmware_version", sa.String(20), nullable=False),
        sa.Column("enrolled_at", sa.Float, nullable=False),
    )
    op.create_table(
        "guests",
        sa.Column("agent_id", sa.String(36), primary_key=True),
        sa.Column("host_id", sa.String(36), sa.ForeignKey("hosts.host_id"), nullable=False),
        sa.Column("stated_at", sa.Float, nullable=False),
        sa.Column("active", sa.Boolean, nullable=False),
        sa.Column("ek", sa.LargeBinary),
        sa.Column("ek_certificate", sa.LargeBinary),
        sa.Column("ak", sa.LargeBinary),
        sa.Column("mtls_cert", sa.Text),
        sa.Column("ip", sa.String(64)),
        sa.Column("port", sa.Integer),
        sa.Column("registrations", sa.Integer, nullable=False),
    )
    op.create_table(
        "key_names",
        sa.Column("name", sa.LargeBinary, primary_key=True),
        sa.Column("role", sa.String(8), nullable=False),
        sa.Column("owner", sa.String(36), nullable=False),
    )
    op.create_index("ix_key_names_owner", "key_names", ["owner"])


def _attested(op: Operations) -> None:
    op.create_table(
        "alarms",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("at", sa.Float, nullable=False),
        sa.Column("kind", sa.String(64), nullable=False),
        sa.Column("agent_id", sa.String(36)),
        sa.Column("host_id", sa.String(36)),
        sa.Column("detail", sa.Text, nullable=False),
    )
    op.create_table(
        "agents",
        sa.Column("agent_id", sa.String(36), primary_key=True),
        sa.Column("request", sa.Text, nullable=False),
        sa.Column("snapshot", sa.Text, nullable=False),
        sa.Column("v", sa.LargeBinary),
        sa.Column("state", sa.Integer, nullable=False),
        sa.Column("progress", sa.Text, nullable=False),
    )
    op.create_table(
        "baselines",
        sa.Column("ak_name", sa.LargeBinary, primary_key=True),
        sa.Column("clock", sa.String(20), nullable=False),
        sa.Column("reset_count", sa.BigInteger, nullable=False),
        sa.Column("restart_count", sa.BigInteger, nullable=False),
        sa.Column("firmware_version", sa.String(20), nullable=False),
        sa.Column("enrolled_at", sa.Float, nullable=False),
    )
