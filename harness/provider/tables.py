"""Tables of the provider: whose guests run on which host, and what each host has issued.

Invariants:
    1. `Provider` tables belong to the registrar and are read by the provider verifier; `HostBase` tables belong to one
       host agent: two metadata, two databases.
    2. An issued EK is written once; releasing it is a time in the same row, never a deletion.

Owner: `registrar_store` (provider), `journal` (host).

Spec: DESIGN 3.1 (allowlists, runs here), 3.6 (vTPM manufacture).
"""

from __future__ import annotations

from sqlalchemy import Float, ForeignKey, Integer, LargeBinary, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from harness.audit_store import AuditColumns

SCHEMA = 2
HOST_SCHEMA = 2
_UUID = 36
_NAME = 63


class Base(DeclarativeBase):
    """Metadata of the provider's database."""


class Tenant(Base):
    """A tenant and the authority whose certificates are its own."""

    __tablename__ = "tenants"

    name: Mapped[str] = mapped_column(String(_NAME), primary_key=True)
    ca_pem: Mapped[str] = mapped_column(Text)


class Host(Base):
    """A host and where its agent is reached."""

    __tablename__ = "hosts"

    host_id: Mapped[str] = mapped_column(String(_UUID), primary_key=True)
    name: Mapped[str] = mapped_column(String(_NAME), unique=True)
    url: Mapped[str] = mapped_column(Text)
    reported_at: Mapped[float] = mapped_column(Float)


class Allowlist(Base):
    """PCRs that a tenant may see on a host, as JSON ``{bank: [pcr]}``."""

    __tablename__ = "allowlists"

    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.name", ondelete="CASCADE"), primary_key=True)
    host_id: Mapped[str] = mapped_column(String(_UUID), primary_key=True)
    banks: Mapped[str] = mapped_column(Text)


class Guest(Base):
    """A guest: its owner and its host; what it registered, and what its host last reported of it."""

    __tablename__ = "guests"

    agent_id: Mapped[str] = mapped_column(String(_UUID), primary_key=True)
    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.name"))
    host_id: Mapped[str] = mapped_column(ForeignKey("hosts.host_id"))
    name: Mapped[str] = mapped_column(String(_NAME))
    ek: Mapped[bytes | None] = mapped_column(LargeBinary, default=None, unique=True)
    ak: Mapped[bytes | None] = mapped_column(LargeBinary, default=None, unique=True)
    ip: Mapped[str | None] = mapped_column(String(64), default=None)
    port: Mapped[int | None] = mapped_column(Integer, default=None)
    mtls_cert: Mapped[str | None] = mapped_column(Text, default=None)
    reported_state: Mapped[str | None] = mapped_column(String(16), default=None)
    vtpm_ek: Mapped[str | None] = mapped_column(String(64), default=None)


class AuditRow(AuditColumns, Base):
    """An operator's act (`harness.audit`)."""

    __tablename__ = "audit"


class HostBase(DeclarativeBase):
    """Metadata of a host agent's own database."""


class IssuedCertificate(HostBase):
    """A certificate that the vTPM CA key signed; kept for ever."""

    __tablename__ = "issued"

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    agent_id: Mapped[str] = mapped_column(String(_UUID), index=True)
    kind: Mapped[str] = mapped_column(String(16))
    spki_digest: Mapped[bytes] = mapped_column(LargeBinary, index=True)
    serial: Mapped[str] = mapped_column(String(48))
    issued_at: Mapped[float] = mapped_column(Float)
    released_at: Mapped[float | None] = mapped_column(Float, default=None)
    reason: Mapped[str | None] = mapped_column(Text, default=None)


class SeenVtpm(HostBase):
    """The EK that was read from a copy of a guest's vTPM state at its last start: of which file, for which run."""

    __tablename__ = "seen_vtpms"

    agent_id: Mapped[str] = mapped_column(String(_UUID), primary_key=True)
    state_dir: Mapped[str] = mapped_column(Text)
    device: Mapped[str] = mapped_column(String(20))
    inode: Mapped[str] = mapped_column(String(20))
    spki_digest: Mapped[bytes] = mapped_column(LargeBinary)
    seen_at: Mapped[float] = mapped_column(Float)
    run: Mapped[str | None] = mapped_column(String(64), default=None)


class HostAuditRow(AuditColumns, HostBase):
    """An operator's act on this host (`harness.audit`)."""

    __tablename__ = "audit"
