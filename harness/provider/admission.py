"""Who may ask what of which host: a snapshot of the provider's database, and the checks of the provider verifier.

Invariants:
    1. A request is judged by one snapshot; tenant, guest and allowlist are never read at different times.
    2. An unknown guest and one of another tenant get the same refusal: nobody can find out which guests exist.
    3. A snapshot that could not be refreshed for `STALE_S` admits nobody.
    4. The database is read at most once in `REFRESH_S`, and once in `MISS_S` when something was not found.

Owner: `Admission.run` and callers share one refresh at a time; the snapshot itself never changes.

Spec: DESIGN 3.1 (403 and 404), 3.4 (allowlists).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from harness.errors import AccessDenied, NotYourGuest, SelectionNotAllowed, StoreError
from harness.provider.clock import Clock, SystemClock
from harness.values import AgentId, HostId, PcrSelection

REFRESH_S = 1.0
MISS_S = 0.1
STALE_S = 5.0
_LOAD_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestRecord:
    """Whose a guest is, and on which host it is defined."""

    tenant: str
    host_id: HostId


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The provider's records at one moment.

    Args:
        tenants: CA certificate (PEM) by tenant.
        hosts: URL of the host agent, by host.
        allowlists: PCRs that a tenant may see on a host.
        guests: owner and host of each guest.
    """

    tenants: Mapping[str, str] = field(default_factory=dict)
    hosts: Mapping[HostId, str] = field(default_factory=dict)
    allowlists: Mapping[tuple[str, HostId], PcrSelection] = field(default_factory=dict)
    guests: Mapping[AgentId, GuestRecord] = field(default_factory=dict)

    def hosts_of(self, tenant: str) -> list[HostId]:
        """Hosts on which this tenant has an allowlist."""
        return sorted(host_id for of, host_id in self.allowlists if of == tenant and host_id in self.hosts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """A request that passed: where it goes, and what its tenant may see there."""

    host_id: HostId
    url: str
    allowlist: PcrSelection


Load = Callable[[], Awaitable[Snapshot]]


class Admission:
    """The checks, on a snapshot that is kept fresh.

    Args:
        load: reads a snapshot; raises StoreError when the database cannot be read.
        changed: told about each new snapshot before anybody is judged by it.
        clock: for ages.
    """

    def __init__(
        self, load: Load, *, changed: Callable[[Snapshot], None] = lambda _: None, clock: Clock | None = None
    ) -> None:
        self._load = load
        self._changed = changed
        self._clock = clock or SystemClock()
        self._snapshot = Snapshot()
        self._loaded_s = float("-inf")
        self._tried_s = float("-inf")
        self._loading = asyncio.Lock()

    async def run(self) -> None:
        """Refreshes once in `REFRESH_S`: a new tenant's CA must be known before its first connection.

        *Cancellation:* the snapshot stays as it is, and grows stale.
        """
        while True:
            with contextlib.suppress(StoreError):  # `current` refuses once the snapshot is stale; the next try may work
                await self.refresh(REFRESH_S)
            await self._clock.sleep(REFRESH_S)

    async def refresh(self, at_least_s: float) -> bool:
        """Reads the database, unless that was tried within ``at_least_s``.

        Returns:
            Whether it was read.

        Raises:
            StoreError: it cannot be read, or not in time.

        *Cancellation:* the snapshot is the old or the new one.
        """
        async with self._loading:
            if self._clock.monotonic() - self._tried_s < at_least_s:
                return False
            self._tried_s = self._clock.monotonic()
            try:
                async with asyncio.timeout(_LOAD_S):
                    snapshot = await self._load()
            except TimeoutError as error:
                raise StoreError("the provider's database did not answer in time") from error
            self._changed(snapshot)
            self._snapshot, self._loaded_s = snapshot, self._clock.monotonic()
            return True

    def current(self) -> Snapshot:
        """The snapshot to judge by.

        Raises:
            StoreError: it could not be refreshed for too long.
        """
        if self._clock.monotonic() - self._loaded_s > STALE_S:
            raise StoreError("the provider's database cannot be read")
        return self._snapshot

    async def admit_guest(self, tenant: str, agent_id: AgentId, selection: PcrSelection) -> Admitted:
        """Admits a guest round.

        Raises:
            NotYourGuest: no such guest, or not this tenant's.
            SelectionNotAllowed: a PCR outside the tenant's allowlist on the guest's host.
            StoreError: there is no fresh snapshot.

        *Cancellation:* nothing has happened.
        """

        def judge(snapshot: Snapshot) -> Admitted:
            guest = snapshot.guests.get(agent_id)
            if guest is None or guest.tenant != tenant:
                raise NotYourGuest("no such guest of this tenant")
            return _admitted(snapshot, tenant, guest.host_id, selection)

        return await self._judge(judge)

    async def admit_host(self, tenant: str, host_id: HostId, selection: PcrSelection | None = None) -> Admitted:
        """Admits a host-only request, or one of enrolment (without a selection).

        Raises:
            AccessDenied: no such host, or this tenant has no allowlist there.
            SelectionNotAllowed: a PCR outside the tenant's allowlist.
            StoreError: there is no fresh snapshot.

        *Cancellation:* nothing has happened.
        """

        def judge(snapshot: Snapshot) -> Admitted:
            if (tenant, host_id) not in snapshot.allowlists:
                raise AccessDenied("no such host, or this tenant may not ask it")
            return _admitted(snapshot, tenant, host_id, selection or PcrSelection())

        return await self._judge(judge)

    async def hosts_of(self, tenant: str) -> list[HostId]:
        """Hosts that this tenant may ask, as of now.

        Raises:
            StoreError: the database cannot be read.

        *Cancellation:* nothing has happened.
        """
        await self.refresh(MISS_S)
        return self.current().hosts_of(tenant)

    async def _judge(self, judge: Callable[[Snapshot], Admitted]) -> Admitted:
        try:
            return judge(self.current())
        except (AccessDenied, NotYourGuest, SelectionNotAllowed, StoreError):
            # What was not there may have been added just now; not found again is the answer.
            await self.refresh(MISS_S)
            return judge(self.current())


def _admitted(snapshot: Snapshot, tenant: str, host_id: HostId, selection: PcrSelection) -> Admitted:
    allowlist = snapshot.allowlists.get((tenant, host_id), PcrSelection())
    if not selection.within(allowlist):
        raise SelectionNotAllowed("the mask names a PCR that this tenant may not see on this host")
    url = snapshot.hosts.get(host_id)
    if url is None:
        raise AccessDenied("no such host, or this tenant may not ask it")
    return Admitted(host_id=host_id, url=url, allowlist=allowlist)
