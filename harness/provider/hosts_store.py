"""The provider's hosts: where their agents are, what they report, and how an operator takes one out or renews it.

Invariants:
    1. A name belongs to one host: who announces it for another one is refused until an operator decides.
    2. A host with guests is not removed; a host whose TPM was replaced keeps its guests and allowlists.
    3. A host becomes the one that its own agent announces, and no other.

Owner: the provider registrar.

Spec: DESIGN 3.1, 3.6; docs/protocol.md (provider registrar, hosts).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncSession

from harness import audit_store
from harness.audit import AuditEntry
from harness.errors import AccessDenied, Conflict, NotFound
from harness.provider.tables import Allowlist, AuditRow, Guest, Host
from harness.store import Store
from harness.values import AgentId, HostId, parse_agent_id, parse_host_id


class HostStore:
    """The provider registrar's hosts.

    Args:
        store: the provider's database.
        now: seconds since the epoch.
    """

    def __init__(self, store: Store, *, now: Callable[[], float] = time.time) -> None:
        self._store = store
        self._now = now

    async def announce(self, host_id: HostId, name: str, url: str) -> HostId | None:
        """Records where a host's agent is reached.

        Returns:
            None; or the host that has this name, if that is another one: nothing was recorded then.

        Raises:
            Conflict: the host has another name: a host agent does not take over a host of which it knows the id only.

        *Cancellation:* recorded or not.
        """
        async with self._store.begin() as session:
            row = await session.get(Host, str(host_id))
            if row is not None and row.name != name:
                raise Conflict(
                    f"host {host_id} is known as {row.name}: to give it another name, the provider's operator first "
                    "removes it (harness provider host remove)"
                )
            other = await session.scalar(select(Host.host_id).where(Host.name == name, Host.host_id != str(host_id)))
            if other is not None:
                return parse_host_id(other)
            await session.merge(Host(host_id=str(host_id), name=name, url=url, reported_at=self._now()))
            return None

    async def report(self, host_id: HostId, name: str, reports: Sequence[Mapping[str, str]]) -> None:
        """Records what a host says of its own guests; informative, nothing is decided by it.

        Args:
            host_id: the host.
            name: of the host agent that reports.
            reports: agent_id, state and vtpm_ek of each guest.

        Raises:
            AccessDenied: this host agent has not announced this host.
        """
        by_id = {report["agent_id"]: report for report in reports}
        async with self._store.begin() as session:
            host = await session.get(Host, str(host_id))
            if host is None or host.name != name:
                raise AccessDenied(f"{name} has not announced host {host_id}")
            for row in await session.scalars(select(Guest).where(Guest.host_id == str(host_id))):
                report = by_id.get(row.agent_id)
                row.reported_state = report["state"] if report else None
                row.vtpm_ek = report["vtpm_ek"] if report else None

    async def hosts(self) -> list[dict[str, Any]]:
        """All hosts."""
        async with self._store.begin() as session:
            rows = await session.scalars(select(Host).order_by(Host.name))
            return [{"host_id": row.host_id, "name": row.name, "url": row.url} for row in rows]

    async def remove(self, host_id: HostId, act: AuditEntry) -> None:
        """Forgets a host and all allowlists on it. An agent that still runs there announces itself again.

        Raises:
            NotFound: no such host.
            Conflict: guests are defined on it.

        *Cancellation:* all is forgotten or nothing.
        """
        async with self._store.begin() as session:
            row = await _host(session, host_id)
            if await session.scalar(select(Guest.agent_id).where(Guest.host_id == row.host_id).limit(1)):
                raise Conflict(
                    f"guests are defined on host {host_id}: first move each of them or remove it "
                    "(harness provider guest remove); if only the host's TPM was replaced, replace the host instead "
                    "(harness provider host replace)"
                )
            await session.execute(delete(Allowlist).where(Allowlist.host_id == row.host_id))
            await session.delete(row)
            audit_store.record(session, AuditRow, act)

    async def replace(
        self, old: HostId, new: HostId, act: AuditEntry, *, announced: Callable[[str], HostId | None]
    ) -> list[AgentId]:
        """Gives a host the id that follows from its new TPM's EK; name, guests and allowlists stay with it.

        The guests have to register anew: their vTPMs were certified by a key in the old TPM.

        Args:
            old: as it is known.
            new: as its agent announces it, in vain until then.
            act: audit entry.
            announced: the id that the agent of a name announces in vain, if any.

        Returns:
            Its guests.

        Raises:
            NotFound: the old host is not known.
            Conflict: the new one is known already, as another host; or the host's agent has not announced it.

        *Cancellation:* all is done or nothing.
        """
        async with self._store.begin() as session:
            row = await _host(session, old)
            if await session.get(Host, str(new)) is not None:
                raise Conflict(f"host {new} is known already: it cannot take the place of another one")
            if announced(row.name) != new:
                raise Conflict(
                    f"the agent of {row.name} has not announced host {new}: start it with the new TPM; "
                    "harness provider host list shows the id that it announces"
                )
            name, row.name = row.name, row.host_id  # names are unique: it is made free first
            await session.flush()
            session.add(Host(host_id=str(new), name=name, url=row.url, reported_at=row.reported_at))
            await session.flush()
            guests = list(await session.scalars(select(Guest).where(Guest.host_id == row.host_id)))
            for guest in guests:
                move(guest, new)
            for entry in await session.scalars(select(Allowlist).where(Allowlist.host_id == row.host_id)):
                if await session.get(Allowlist, (entry.tenant, str(new))) is None:
                    session.add(Allowlist(tenant=entry.tenant, host_id=str(new), banks=entry.banks))
                await session.delete(entry)
            await session.flush()
            await session.delete(row)
            audit_store.record(session, AuditRow, act)
            return [parse_agent_id(guest.agent_id) for guest in guests]

    async def move_guest(self, agent_id: AgentId, host_id: HostId, act: AuditEntry) -> None:
        """Puts a guest on another host, where it has to register anew.

        Raises:
            NotFound: no such guest or host.
            Conflict: it is there.

        *Cancellation:* moved or not.
        """
        async with self._store.begin() as session:
            guest = await session.get(Guest, str(agent_id))
            if guest is None:
                raise NotFound(f"no guest {agent_id}")
            await _host(session, host_id)
            if guest.host_id == str(host_id):
                raise Conflict(f"guest {agent_id} is on host {host_id}")
            move(guest, host_id)
            audit_store.record(session, AuditRow, act)


def move(guest: Guest, host_id: HostId) -> None:
    """Puts a guest on a host, and forgets what it registered: there, its vTPM is certified anew."""
    guest.host_id = str(host_id)
    guest.ek = guest.ak = None
    guest.ip = guest.port = guest.mtls_cert = None
    guest.reported_state = guest.vtpm_ek = None


async def _host(session: AsyncSession, host_id: HostId) -> Host:
    row = await session.get(Host, str(host_id))
    if row is None:
        raise NotFound(f"no host {host_id}")
    return row
