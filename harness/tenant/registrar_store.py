"""What the tenant's registrar pinned: hosts, guests, key names.

Invariants:
    1. A pinned key is written once, in the transaction that takes its Name in `tables.KeyName`; a Name that is taken
       refuses the whole transaction (`CloneSuspected`).
    2. A host with guests is not removed.

Owner: the registrar's event loop; transactions serialise in the database.

Spec: DESIGN 3.6.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import delete, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from harness.attest import Public, parse_public
from harness.errors import CloneSuspected, Conflict, KeyChanged, NotFound
from harness.store import Store
from harness.tenant.enrolment import EnrolledHost
from harness.tenant.tables import Guest, Host, KeyName
from harness.values import AgentId, ClockBaseline, HostId, parse_agent_id, parse_host_id


@dataclass(frozen=True, slots=True, kw_only=True)
class PinnedHost:
    """A host as it is pinned."""

    host_id: HostId
    url: str
    ek: bytes
    ek_certificate: bytes
    ak: bytes
    ak_qualified_name: bytes
    ca: bytes
    ca_certificate: bytes
    baseline: ClockBaseline
    enrolled_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestKeys:
    """What a guest registers; the certificate and the contact may change only together with a new proof."""

    ek: bytes
    ek_certificate: bytes
    ak: bytes
    mtls_cert: str | None
    ip: str | None
    port: int | None

    def same_identity(self, other: GuestKeys) -> bool:
        """Whether EK and AK are the same; these are immutable."""
        return (self.ek, self.ak) == (other.ek, other.ak)


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestRecord:
    """A guest that the operator stated; ``keys`` is None until it proved to have them."""

    agent_id: AgentId
    host_id: HostId
    keys: GuestKeys | None
    registrations: int


class RegistrarStore:
    """The registrar's tables.

    Args:
        store: the tenant's database.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    # --- hosts --------------------------------------------------------------------------------------------

    async def pin_host(self, host: EnrolledHost) -> PinnedHost:
        """Pins a host, or renews the baseline of one that is pinned with the same keys (an act of the operator).

        Raises:
            KeyChanged: pinned with another EK, AK or CA key.
            CloneSuspected: one of its keys is pinned in another role or for another owner.

        *Cancellation:* all is stored or nothing.
        """
        async with self._store.begin() as session:
            row = await session.get(Host, str(host.host_id))
            if row is None:
                await _take_names(session, str(host.host_id), {"ek": host.ek, "ak": host.ak, "ca": host.ca})
                row = Host(host_id=str(host.host_id), ek=host.ek.marshal(), ak=host.ak.marshal(), ca=host.ca.marshal())
                row.ek_certificate, row.ca_certificate = host.ek_certificate, host.ca_certificate
                row.ak_qualified_name = host.ak_qualified_name
                session.add(row)
            elif (row.ek, row.ak, row.ca) != (host.ek.marshal(), host.ak.marshal(), host.ca.marshal()):
                raise KeyChanged(f"host {host.host_id} shows other keys than those pinned; remove it to enrol it anew")
            row.url, row.enrolled_at = host.url, host.enrolled_at
            row.clock = str(host.baseline.clock)
            row.reset_count, row.restart_count = host.baseline.reset_count, host.baseline.restart_count
            row.firmware_version = str(host.baseline.firmware_version)
            return _host(row)

    async def host(self, host_id: HostId) -> PinnedHost:
        """Pinned host.

        Raises:
            NotFound: it is not enrolled.
        """
        async with self._store.begin() as session:
            return _host(await _host_row(session, host_id))

    async def hosts(self) -> list[PinnedHost]:
        """All pinned hosts, by id."""
        async with self._store.begin() as session:
            return [_host(row) for row in await session.scalars(select(Host).order_by(Host.host_id))]

    async def remove_host(self, host_id: HostId) -> None:
        """Forgets a host.

        Raises:
            NotFound: it is not enrolled.
            Conflict: guests are stated to run on it.
        """
        async with self._store.begin() as session:
            row = await _host_row(session, host_id)
            if await session.scalar(select(Guest.agent_id).where(Guest.host_id == row.host_id).limit(1)):
                raise Conflict(f"guests are enrolled under host {host_id}; remove them first")
            await session.execute(delete(KeyName).where(KeyName.owner == row.host_id))
            await session.delete(row)

    # --- guests -------------------------------------------------------------------------------------------

    async def state_guest(self, agent_id: AgentId, host_id: HostId, now: float) -> GuestRecord:
        """Records the operator's word: this guest belongs on this host. Repeating it changes nothing.

        Raises:
            NotFound: the host is not enrolled.
            Conflict: the guest is stated on another host; remove it first.
        """
        async with self._store.begin() as session:
            await _host_row(session, host_id)
            row = await session.get(Guest, str(agent_id))
            if row is None:
                row = Guest(agent_id=str(agent_id), host_id=str(host_id), stated_at=now, active=False, registrations=0)
                session.add(row)
            elif row.host_id != str(host_id):
                raise Conflict(f"guest {agent_id} is stated on host {row.host_id}; remove it first")
            return _guest(row)

    async def guest(self, agent_id: AgentId) -> GuestRecord:
        """Stated guest.

        Raises:
            NotFound: the operator did not state it.
        """
        async with self._store.begin() as session:
            return _guest(await _guest_row(session, agent_id))

    async def guests(self) -> list[GuestRecord]:
        """All stated guests, by id."""
        async with self._store.begin() as session:
            return [_guest(row) for row in await session.scalars(select(Guest).order_by(Guest.agent_id))]

    async def remove_guest(self, agent_id: AgentId) -> None:
        """Forgets a guest and its keys. Raises as `guest`."""
        async with self._store.begin() as session:
            row = await _guest_row(session, agent_id)
            await session.execute(delete(KeyName).where(KeyName.owner == row.agent_id))
            await session.delete(row)

    async def check_names_free(self, agent_id: AgentId, ek: Public, ak: Public) -> None:
        """Checks that these keys may become this guest's.

        Raises:
            CloneSuspected: one of them is pinned in another role or for another owner.
        """
        async with self._store.begin() as session:
            for role, name in (("ek", ek.name), ("ak", ak.name)):
                _check_free(await session.get(KeyName, name), role, str(agent_id))

    async def activate_guest(self, agent_id: AgentId, keys: GuestKeys) -> GuestRecord:
        """Pins a guest's keys after it proved to have them; a repeated proof renews certificate and contact only.

        Raises:
            NotFound: the guest was removed meanwhile.
            KeyChanged: it is active with other keys.
            CloneSuspected: one of its keys is pinned in another role or for another owner.

        *Cancellation:* all is stored or nothing.
        """
        async with self._store.begin() as session:
            row = await _guest_row(session, agent_id)
            pinned = _guest(row).keys
            if pinned is None:
                roles = {"ek": parse_public(keys.ek), "ak": parse_public(keys.ak)}
                await _take_names(session, row.agent_id, roles)
                row.ek, row.ak = keys.ek, keys.ak
            elif not pinned.same_identity(keys):
                raise KeyChanged(f"guest {agent_id} is active with another EK or AK; remove it to enrol it anew")
            row.ek_certificate, row.mtls_cert, row.ip, row.port = (
                keys.ek_certificate,
                keys.mtls_cert,
                keys.ip,
                keys.port,
            )
            row.active = True
            row.registrations += 1
            return _guest(row)


async def _take_names(session: AsyncSession, owner: str, roles: Mapping[str, Public]) -> None:
    for role, public in roles.items():
        _check_free(await session.get(KeyName, public.name), role, owner)
        session.add(KeyName(name=public.name, role=role, owner=owner))
    try:
        await session.flush()
    except IntegrityError as error:
        raise CloneSuspected("one of the keys was pinned by another enrolment at the same time") from error


def _check_free(taken: KeyName | None, role: str, owner: str) -> None:
    if taken is not None and (taken.role, taken.owner) != (role, owner):
        raise CloneSuspected(f"the {role.upper()} of {owner} is pinned as the {taken.role.upper()} of {taken.owner}")


async def _host_row(session: AsyncSession, host_id: HostId) -> Host:
    row = await session.get(Host, str(host_id))
    if row is None:
        raise NotFound(f"host {host_id} is not enrolled here")
    return row


async def _guest_row(session: AsyncSession, agent_id: AgentId) -> Guest:
    row = await session.get(Guest, str(agent_id))
    if row is None:
        raise NotFound(f"guest {agent_id} is not known here")
    return row


def _host(row: Host) -> PinnedHost:
    baseline = ClockBaseline(
        clock=int(row.clock),
        reset_count=row.reset_count,
        restart_count=row.restart_count,
        firmware_version=int(row.firmware_version),
    )
    return PinnedHost(
        host_id=parse_host_id(row.host_id),
        url=row.url,
        ek=row.ek,
        ek_certificate=row.ek_certificate,
        ak=row.ak,
        ak_qualified_name=row.ak_qualified_name,
        ca=row.ca,
        ca_certificate=row.ca_certificate,
        baseline=baseline,
        enrolled_at=row.enrolled_at,
    )


def _guest(row: Guest) -> GuestRecord:
    keys = None
    if row.active and row.ek is not None and row.ak is not None and row.ek_certificate is not None:
        keys = GuestKeys(
            ek=row.ek,
            ek_certificate=row.ek_certificate,
            ak=row.ak,
            mtls_cert=row.mtls_cert,
            ip=row.ip,
            port=row.port,
        )
    return GuestRecord(
        agent_id=parse_agent_id(row.agent_id),
        host_id=parse_host_id(row.host_id),
        keys=keys,
        registrations=row.registrations,
    )
