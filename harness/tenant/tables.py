"""Tables of the tenant: what its registrar pinned and what its verifier reached.

Invariants:
    1. `KeyName` holds every pinned Name once: one key, one role, one owner, over all hosts and guests (DESIGN 3.6).
    2. Keys of a pinned row change by an audited act of the operator only: a complete new enrolment.
    3. TPM values of 64 bits are decimal text: SQLite's integers have a sign.

Owner: `registrar_store` (hosts, guests, key names, alarms) and `verifier_store` (agents, baselines, alarms). Both may
use one database or two.

Spec: DESIGN 3.5 (10), 3.6.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Float, ForeignKey, Integer, LargeBinary, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from harness.audit_store import AuditColumns

SCHEMA = 2
_UUID = 36


class Base(DeclarativeBase):
    """Metadata of the tenant's database."""


class Host(Base):
    """A host that this tenant enrolled: its keys, and the clock of the TPM2_Certify that proved the CA key."""

    __tablename__ = "hosts"

    host_id: Mapped[str] = mapped_column(String(_UUID), primary_key=True)
    url: Mapped[str] = mapped_column(Text)
    ek: Mapped[bytes] = mapped_column(LargeBinary)
    ek_certificate: Mapped[bytes] = mapped_column(LargeBinary)
    ek_chain: Mapped[str | None] = mapped_column(Text, default=None)  # PEM: the issuers up to the vendor's root
    ak: Mapped[bytes] = mapped_column(LargeBinary)
    ak_qualified_name: Mapped[bytes] = mapped_column(LargeBinary)
    ca: Mapped[bytes] = mapped_column(LargeBinary)
    ca_certificate: Mapped[bytes] = mapped_column(LargeBinary)
    clock: Mapped[str] = mapped_column(String(20))
    reset_count: Mapped[int] = mapped_column(BigInteger)
    restart_count: Mapped[int] = mapped_column(BigInteger)
    firmware_version: Mapped[str] = mapped_column(String(20))
    enrolled_at: Mapped[float] = mapped_column(Float)


class Guest(Base):
    """A guest that the operator stated, and what it registered; keys are None until it did."""

    __tablename__ = "guests"

    agent_id: Mapped[str] = mapped_column(String(_UUID), primary_key=True)
    host_id: Mapped[str] = mapped_column(ForeignKey("hosts.host_id"))
    stated_at: Mapped[float] = mapped_column(Float)
    active: Mapped[bool] = mapped_column(Boolean, default=False)
    ek: Mapped[bytes | None] = mapped_column(LargeBinary, default=None)
    ek_certificate: Mapped[bytes | None] = mapped_column(LargeBinary, default=None)
    ak: Mapped[bytes | None] = mapped_column(LargeBinary, default=None)
    mtls_cert: Mapped[str | None] = mapped_column(Text, default=None)
    ip: Mapped[str | None] = mapped_column(String(64), default=None)
    port: Mapped[int | None] = mapped_column(Integer, default=None)
    registrations: Mapped[int] = mapped_column(Integer, default=0)


class KeyName(Base):
    """A pinned key's Name, its role and whose it is."""

    __tablename__ = "key_names"

    name: Mapped[bytes] = mapped_column(LargeBinary, primary_key=True)
    role: Mapped[str] = mapped_column(String(8))
    owner: Mapped[str] = mapped_column(String(_UUID), index=True)


class AlarmRow(Base):
    """A finding for the operator; rows are only added, acknowledged and marked as told (webhook)."""

    __tablename__ = "alarms"

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    at: Mapped[float] = mapped_column(Float)
    kind: Mapped[str] = mapped_column(String(64))
    agent_id: Mapped[str | None] = mapped_column(String(_UUID), default=None)
    host_id: Mapped[str | None] = mapped_column(String(_UUID), default=None)
    detail: Mapped[str] = mapped_column(Text)
    acknowledged_at: Mapped[float | None] = mapped_column(Float, default=None)
    acknowledged_by: Mapped[str | None] = mapped_column(Text, default=None)
    reason: Mapped[str | None] = mapped_column(Text, default=None)
    notified_at: Mapped[float | None] = mapped_column(Float, default=None)


class AuditRow(AuditColumns, Base):
    """An operator's act (`harness.audit`)."""

    __tablename__ = "audit"


class Agent(Base):
    """An agent under attestation: as added, with the snapshot of its keys, and what was reached."""

    __tablename__ = "agents"

    agent_id: Mapped[str] = mapped_column(String(_UUID), primary_key=True)
    request: Mapped[str] = mapped_column(Text)  # the POST body, without v
    snapshot: Mapped[str] = mapped_column(Text)  # the registrar's answers when it was added
    v: Mapped[bytes | None] = mapped_column(LargeBinary, default=None)
    state: Mapped[int] = mapped_column(Integer)
    progress: Mapped[str] = mapped_column(Text)
    seen: Mapped[str | None] = mapped_column(Text, default=None)  # the PCR values last proven, by layer: for capture


class Baseline(Base):
    """The last believed clock of one AK, shared by all agents that depend on it."""

    __tablename__ = "baselines"

    ak_name: Mapped[bytes] = mapped_column(LargeBinary, primary_key=True)
    clock: Mapped[str] = mapped_column(String(20))
    reset_count: Mapped[int] = mapped_column(BigInteger)
    restart_count: Mapped[int] = mapped_column(BigInteger)
    firmware_version: Mapped[str] = mapped_column(String(20))
    enrolled_at: Mapped[float] = mapped_column(Float)
