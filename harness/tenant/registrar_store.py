"""What the tenant's registrar pinned: hosts, guests, key names.

Invariants:
    1. A pinned key is written once, in the transaction that takes its Name in `tables.KeyName`; a Name that is taken
       refuses the whole transaction (`CloneSuspected`).
    2. A host with guests is not removed.
    3. Pinned keys change by an operator's act only; the act's audit entry is in the same transaction.
    4. A guest is active only with keys that were certified by the CA key that its host has pinned now.

Owner: the registrar's event loop; transactions serialise in the database.

Spec: DESIGN 3.6.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import delete, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from harness import audit_store
from harness.attest import Public, parse_public
from harness.audit import AuditEntry
from harness.errors import CloneSuspected, Conflict, KeyChanged, NotFound
from harness.store import Store
from harness.tenant.enrolment import EnrolledHost
from harness.tenant.tables import AuditRow, Guest, Host, KeyName
from harness.values import AgentId, ClockBaseline, HostId, parse_agent_id, parse_host_id


@dataclass(frozen=True, slots=True, kw_only=True)
class PinnedHost:
    """A host as it is pinned."""

    host_id: HostId
    url: str
    ek: bytes
    ek_certificate: bytes
    ek_chain: tuple[bytes, ...] | None
    """Its issuers up to the vendor's root, DER; None where an older program enrolled the host."""
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

    async def pin_host(self, host: EnrolledHost, act: AuditEntry) -> PinnedHost:
        """Pins a host, or renews the baseline of one that is pinned with the same keys.

        Raises:
            KeyChanged: pinned with another EK, AK or CA key.
            CloneSuspected: one of its keys is pinned in another role or for another owner.

        *Cancellation:* all is stored or nothing.
        """
        async with self._store.begin() as session:
            row = await session.get(Host, str(host.host_id))
            if row is None:
                await _take_names(session, str(host.host_id), _roles(host))
                row = Host(host_id=str(host.host_id))
                session.add(row)
            elif (row.ek, row.ak, row.ca) != (host.ek.marshal(), host.ak.marshal(), host.ca.marshal()):
                raise KeyChanged(f"host {host.host_id} shows other keys than those pinned; it has to be re-enrolled")
            _fill(row, host)
            audit_store.record(session, AuditRow, act)
            return _host(row)

    async def replace_host(self, host: EnrolledHost, act: AuditEntry) -> tuple[PinnedHost, list[AgentId]]:
        """Replaces the pinned keys of a host. With another CA key its guests go back to "stated".

        Returns:
            The host, and the guests that have to register again.

        Raises:
            NotFound: it is not enrolled.
            CloneSuspected: one of its keys is pinned in another role or for another owner.

        *Cancellation:* all is stored or nothing.
        """
        async with self._store.begin() as session:
            row = await _host_row(session, host.host_id)
            same_ca = row.ca == host.ca.marshal()
            await session.execute(delete(KeyName).where(KeyName.owner == row.host_id))
            await _take_names(session, row.host_id, _roles(host))
            _fill(row, host)
            guests = await session.scalars(select(Guest).where(Guest.host_id == row.host_id, Guest.ek.is_not(None)))
            stated = [] if same_ca else list(guests)
            for guest in stated:
                await _forget_keys(session, guest)
            audit_store.record(session, AuditRow, act)
            return _host(row), [parse_agent_id(guest.agent_id) for guest in stated]

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

    async def remove_host(self, host_id: HostId, act: AuditEntry) -> None:
        """Forgets a host.

        Raises:
            NotFound: it is not enrolled.
            Conflict: guests are stated to run on it.
        """
        async with self._store.begin() as session:
            row = await _host_row(session, host_id)
            if await session.scalar(select(Guest.agent_id).where(Guest.host_id == row.host_id).limit(1)):
                raise Conflict(
                    f"guests are enrolled under host {host_id}: first move each of them to another host "
                    "(harness tenant guest re-enrol --host) or remove it (harness tenant guest remove)"
                )
            await session.execute(delete(KeyName).where(KeyName.owner == row.host_id))
            await session.delete(row)
            audit_store.record(session, AuditRow, act)

    # --- guests -------------------------------------------------------------------------------------------

    async def state_guest(self, agent_id: AgentId, host_id: HostId, act: AuditEntry) -> GuestRecord:
        """Records the operator's word: this guest belongs on this host. Repeating it changes nothing, and is no act.

        Raises:
            NotFound: the host is not enrolled.
            Conflict: the guest is stated on another host; `restate_guest` moves it.
        """
        async with self._store.begin() as session:
            await _host_row(session, host_id)
            row = await session.get(Guest, str(agent_id))
            if row is None:
                row = Guest(
                    agent_id=str(agent_id), host_id=str(host_id), stated_at=act.at, active=False, registrations=0
                )
                session.add(row)
                audit_store.record(session, AuditRow, act)
            elif row.host_id != str(host_id):
                raise Conflict(
                    f"guest {agent_id} is stated on host {row.host_id}: to move it, re-enrol it "
                    "(harness tenant guest re-enrol --host)"
                )
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

    async def restate_guest(self, agent_id: AgentId, host_id: HostId | None, act: AuditEntry) -> GuestRecord:
        """Forgets a guest's keys, which become free, and puts it back to "stated", on this host if one is given.

        Raises:
            NotFound: the guest is not stated, or the host is not enrolled.

        *Cancellation:* all is stored or nothing.
        """
        async with self._store.begin() as session:
            row = await _guest_row(session, agent_id)
            if host_id is not None:
                row.host_id = (await _host_row(session, host_id)).host_id
            await _forget_keys(session, row)
            audit_store.record(session, AuditRow, act)
            return _guest(row)

    async def remove_guest(self, agent_id: AgentId, act: AuditEntry) -> None:
        """Forgets a guest and its keys. Raises as `guest`."""
        async with self._store.begin() as session:
            row = await _guest_row(session, agent_id)
            await _forget_keys(session, row)
            await session.delete(row)
            audit_store.record(session, AuditRow, act)

    async def check_names_free(self, agent_id: AgentId, ek: Public, ak: Public) -> None:
        """Checks that these keys may become this guest's.

        Raises:
            CloneSuspected: one of them is pinned in another role or for another owner.
        """
        async with self._store.begin() as session:
            for role, name in (("ek", ek.name), ("ak", ak.name)):
                _check_free(await session.get(KeyName, name), role, str(agent_id))

    async def activate_guest(self, agent_id: AgentId, keys: GuestKeys, ca: bytes) -> GuestRecord:
        """Pins a guest's keys after it proved to have them; a repeated proof renews certificate and contact only.

        Args:
            agent_id: the guest.
            keys: what it registers.
            ca: public area of the CA key that its EK certificate was checked with.

        Raises:
            NotFound: the guest was removed meanwhile.
            Conflict: its host has another CA key meanwhile, or it was moved.
            KeyChanged: it is active with other keys.
            CloneSuspected: one of its keys is pinned in another role or for another owner.

        *Cancellation:* all is stored or nothing.
        """
        async with self._store.begin() as session:
            row = await _guest_row(session, agent_id)
            if (await _host_row(session, parse_host_id(row.host_id))).ca != ca:
                raise Conflict(f"the host of guest {agent_id} was enrolled anew or is another one; register again")
            pinned = _guest(row).keys
            if pinned is None:
                roles = {"ek": parse_public(keys.ek), "ak": parse_public(keys.ak)}
                await _take_names(session, row.agent_id, roles)
                row.ek, row.ak = keys.ek, keys.ak
            elif not pinned.same_identity(keys):
                raise KeyChanged(changed_keys(agent_id))
            row.ek_certificate, row.mtls_cert, row.ip, row.port = (
                keys.ek_certificate,
                keys.mtls_cert,
                keys.ip,
                keys.port,
            )
            row.active = True
            row.registrations += 1
            return _guest(row)


def changed_keys(agent_id: AgentId) -> str:
    """The sentence that guest and operator get when a guest shows other keys."""
    return f"guest {agent_id} shows another EK or AK than those pinned; its operator has to re-enrol it"


def _roles(host: EnrolledHost) -> Mapping[str, Public]:
    return {"ek": host.ek, "ak": host.ak, "ca": host.ca}


def _fill(row: Host, host: EnrolledHost) -> None:
    row.url, row.enrolled_at = host.url, host.enrolled_at
    row.ek, row.ak, row.ca = host.ek.marshal(), host.ak.marshal(), host.ca.marshal()
    row.ek_certificate, row.ca_certificate = host.ek_certificate, host.ca_certificate
    row.ek_chain = "".join(ssl.DER_cert_to_PEM_cert(issuer) for issuer in host.ek_chain)
    row.ak_qualified_name = host.ak_qualified_name
    row.clock = str(host.baseline.clock)
    row.reset_count, row.restart_count = host.baseline.reset_count, host.baseline.restart_count
    row.firmware_version = str(host.baseline.firmware_version)


async def _forget_keys(session: AsyncSession, guest: Guest) -> None:
    await session.execute(delete(KeyName).where(KeyName.owner == guest.agent_id))
    guest.active = False
    guest.ek = guest.ek_certificate = guest.ak = None
    guest.mtls_cert = guest.ip = guest.port = None


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
        ek_chain=None if row.ek_chain is None else _issuers(row.ek_chain),
        ak=row.ak,
        ak_qualified_name=row.ak_qualified_name,
        ca=row.ca,
        ca_certificate=row.ca_certificate,
        baseline=baseline,
        enrolled_at=row.enrolled_at,
    )


def _issuers(pem: str) -> tuple[bytes, ...]:
    begin = "-----BEGIN CERTIFICATE-----"
    return tuple(ssl.PEM_cert_to_DER_cert(begin + one) for one in pem.split(begin)[1:])


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
