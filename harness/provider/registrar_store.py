"""The provider's records: tenants, allowlists, guests; hosts are in `hosts_store`.

Invariants:
    1. A guest's owner is stated once; another owner needs the guest to be removed first.
    2. EK and AK of a registered guest are not changed, and serve no other guest.
    3. A change by the operator and its audit entry are one transaction; what changes nothing has no entry.

Owner: the provider registrar writes; the provider verifier reads snapshots.

Spec: DESIGN 3.1, 3.6.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncSession

from harness import audit_store
from harness.audit import AuditEntry
from harness.audit_store import Trail
from harness.errors import CloneSuspected, Conflict, KeyChanged, NotFound, NotYourGuest
from harness.provider.admission import GuestRecord, Snapshot
from harness.provider.stream import parse_allowlist
from harness.provider.tables import Allowlist, AuditRow, Guest, Host, Tenant
from harness.store import Store
from harness.values import AgentId, HostId, PcrSelection, parse_agent_id, parse_host_id, pcrs_in


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestContact:
    """What a guest registers at the provider: its keys and where it is reached."""

    ek: bytes
    ak: bytes
    ip: str | None
    port: int | None
    mtls_cert: str | None


async def load_snapshot(store: Store) -> Snapshot:
    """All records at one moment, for `admission`.

    Raises:
        StoreError: the database cannot be read.

    *Cancellation:* nothing has happened.
    """
    async with store.begin() as session:
        tenants = list(await session.scalars(select(Tenant)))
        hosts = list(await session.scalars(select(Host)))
        allowlists = list(await session.scalars(select(Allowlist)))
        guests = list(await session.scalars(select(Guest)))
    return Snapshot(
        tenants={row.name: row.ca_pem for row in tenants},
        hosts={parse_host_id(row.host_id): row.url for row in hosts},
        allowlists={(row.tenant, parse_host_id(row.host_id)): _banks(row.banks) for row in allowlists},
        guests={
            parse_agent_id(row.agent_id): GuestRecord(tenant=row.tenant, host_id=parse_host_id(row.host_id))
            for row in guests
        },
    )


class RegistrarStore(Trail):
    """The provider registrar's tables.

    Args:
        store: the provider's database.
    """

    def __init__(self, store: Store) -> None:
        super().__init__(store, AuditRow)

    # --- tenants ------------------------------------------------------------------------------------------

    async def add_tenant(self, name: str, ca_pem: str, act: AuditEntry) -> None:
        """Onboards a tenant; repeating it with the same CA changes nothing.

        Raises:
            Conflict: the tenant exists with another CA, or this CA's key is another tenant's: a certificate must say
                whose it is.
        """
        key = _ca_key(ca_pem)
        async with self._store.begin() as session:
            known = {row.name: row.ca_pem for row in await session.scalars(select(Tenant))}
            if known.get(name, ca_pem) != ca_pem:
                raise Conflict(
                    f"tenant {name} is onboarded with another CA: to change it, remove the tenant "
                    "(harness provider tenant remove) and add it again"
                )
            if same := [other for other, pem in known.items() if other != name and _ca_key(pem) == key]:
                raise Conflict(f"this CA is that of tenant {same[0]}")
            if name not in known:
                session.add(Tenant(name=name, ca_pem=ca_pem))
                audit_store.record(session, AuditRow, act)

    async def remove_tenant(self, name: str, act: AuditEntry) -> None:
        """Removes a tenant and its allowlists.

        Raises:
            NotFound: no such tenant.
            Conflict: it has guests.
        """
        async with self._store.begin() as session:
            row = await _tenant(session, name)
            if await session.scalar(select(Guest.agent_id).where(Guest.tenant == name).limit(1)):
                raise Conflict(f"tenant {name} has guests: first remove them (harness provider guest remove)")
            await session.execute(delete(Allowlist).where(Allowlist.tenant == name))
            await session.delete(row)
            audit_store.record(session, AuditRow, act)

    async def allow(self, tenant: str, host_id: HostId, allowlist: PcrSelection, act: AuditEntry) -> None:
        """Sets what a tenant may see on a host; an empty list takes it all away.

        Raises:
            NotFound: no such tenant.
        """
        banks = {bank.text: list(pcrs_in(mask)) for bank, mask in allowlist.banks}
        async with self._store.begin() as session:
            await _tenant(session, tenant)
            if banks:
                await session.merge(Allowlist(tenant=tenant, host_id=str(host_id), banks=json.dumps(banks)))
            else:
                await session.execute(
                    delete(Allowlist).where(Allowlist.tenant == tenant, Allowlist.host_id == str(host_id))
                )
            audit_store.record(session, AuditRow, act)

    async def authorities(self) -> dict[str, str]:
        """CA certificate (PEM) by tenant. *Cancellation:* nothing has happened."""
        async with self._store.begin() as session:
            return {row.name: row.ca_pem for row in await session.scalars(select(Tenant))}

    async def tenants(self) -> list[dict[str, Any]]:
        """All tenants with their allowlists."""
        async with self._store.begin() as session:
            rows = list(await session.scalars(select(Tenant).order_by(Tenant.name)))
            allowlists = list(await session.scalars(select(Allowlist)))
        return [
            {
                "name": row.name,
                "allowlists": {
                    entry.host_id: json.loads(entry.banks) for entry in allowlists if entry.tenant == row.name
                },
            }
            for row in rows
        ]

    # --- guests -------------------------------------------------------------------------------------------

    async def define_guest(self, agent_id: AgentId, tenant: str, host_id: HostId, name: str, act: AuditEntry) -> None:
        """Records whose a guest is and where it runs; repeating it changes nothing.

        Raises:
            NotFound: no such tenant or host.
            Conflict: the guest exists with another owner or host.
        """
        async with self._store.begin() as session:
            await _tenant(session, tenant)
            if await session.get(Host, str(host_id)) is None:
                raise NotFound(f"no host {host_id}")
            row = await session.get(Guest, str(agent_id))
            if row is None:
                session.add(Guest(agent_id=str(agent_id), tenant=tenant, host_id=str(host_id), name=name))
                audit_store.record(session, AuditRow, act)
            elif (row.tenant, row.host_id) != (tenant, str(host_id)):
                raise Conflict(
                    f"guest {agent_id} is defined with another owner or host: first remove it "
                    "(harness provider guest remove)"
                )

    async def remove_guest(self, agent_id: AgentId, act: AuditEntry) -> None:
        """Forgets a guest.

        Raises:
            NotFound: no such guest.
        """
        async with self._store.begin() as session:
            await session.delete(await _guest(session, agent_id))
            audit_store.record(session, AuditRow, act)

    async def guests(self) -> list[dict[str, Any]]:
        """All guests."""
        async with self._store.begin() as session:
            rows = await session.scalars(select(Guest).order_by(Guest.tenant, Guest.name))
            return [_shown(row) for row in rows]

    async def check_owner(self, agent_id: AgentId, tenant: str) -> None:
        """Checks whose a guest is.

        Raises:
            NotYourGuest: no such guest, or another tenant's.
        """
        async with self._store.begin() as session:
            await _owned(session, agent_id, tenant)

    async def registered(self, agent_id: AgentId, tenant: str) -> GuestContact | None:
        """What a guest registered; None when it did not, is unknown, or is another tenant's."""
        async with self._store.begin() as session:
            row = await session.get(Guest, str(agent_id))
            if row is None or row.tenant != tenant or row.ek is None or row.ak is None:
                return None
            return GuestContact(ek=row.ek, ak=row.ak, ip=row.ip, port=row.port, mtls_cert=row.mtls_cert)

    async def check_registration(self, agent_id: AgentId, tenant: str, contact: GuestContact) -> None:
        """Checks that these keys may become this guest's.

        Raises:
            NotYourGuest: no such guest, or another tenant's.
            KeyChanged, CloneSuspected: as `register_guest`.
        """
        async with self._store.begin() as session:
            await _registrable(session, agent_id, tenant, contact)

    async def register_guest(self, agent_id: AgentId, tenant: str, contact: GuestContact) -> None:
        """Records a guest's keys and contact after it proved to have them.

        Raises:
            NotYourGuest: no such guest, or another tenant's.
            KeyChanged: it is registered with other keys.
            CloneSuspected: a key belongs to another guest.
        """
        async with self._store.begin() as session:
            row = await _registrable(session, agent_id, tenant, contact)
            row.ek, row.ak = contact.ek, contact.ak
            row.ip, row.port, row.mtls_cert = contact.ip, contact.port, contact.mtls_cert


async def _owned(session: AsyncSession, agent_id: AgentId, tenant: str) -> Guest:
    row = await session.get(Guest, str(agent_id))
    if row is None or row.tenant != tenant:
        raise NotYourGuest("no such guest of this tenant")
    return row


async def _registrable(session: AsyncSession, agent_id: AgentId, tenant: str, contact: GuestContact) -> Guest:
    row = await _owned(session, agent_id, tenant)
    if row.ek is not None and (row.ek, row.ak) != (contact.ek, contact.ak):
        raise KeyChanged(
            f"guest {agent_id} is registered with another EK or AK; the provider's operator has to remove it and to "
            "define it anew"
        )
    keys = (contact.ek, contact.ak)
    other = await session.scalar(
        select(Guest.agent_id).where(Guest.agent_id != str(agent_id), Guest.ek.in_(keys) | Guest.ak.in_(keys)).limit(1)
    )
    if other is not None:
        raise CloneSuspected("the EK or AK belongs to another guest")
    return row


def _ca_key(pem: str) -> bytes:
    try:
        key = x509.load_pem_x509_certificate(pem.encode()).public_key()
    except ValueError:
        return pem.encode()  # no certificate: the registrar lets none in, and nobody could show one of its own
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


async def _tenant(session: AsyncSession, name: str) -> Tenant:
    row = await session.get(Tenant, name)
    if row is None:
        raise NotFound(f"no tenant {name}")
    return row


async def _guest(session: AsyncSession, agent_id: AgentId) -> Guest:
    row = await session.get(Guest, str(agent_id))
    if row is None:
        raise NotFound(f"no guest {agent_id}")
    return row


def _shown(row: Guest) -> dict[str, Any]:
    return {
        "agent_id": row.agent_id,
        "name": row.name,
        "tenant": row.tenant,
        "host_id": row.host_id,
        "registered": row.ak is not None,
        "ip": row.ip,
        "port": row.port,
        "state": row.reported_state,
        "vtpm_ek": row.vtpm_ek,
    }


def _banks(text: str) -> PcrSelection:
    return parse_allowlist(json.loads(text))
