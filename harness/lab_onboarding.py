"""Brings a lab whose services run to where its plan wants it, and says how each guest stands.

It does what the parties' operators would do, over their services' own interfaces: the provider onboards tenants and
defines guests, tenants enrol hosts, state their guests and put them under attestation.

Invariants:
    1. What is there already stays as it is: a second run changes nothing, and one that was interrupted is completed.
    2. A refusal is an outcome; it is never repaired here.

Owner: the task that entered the context.

Spec: DESIGN 3.6, 3.8, 6.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, TypeVar

from cryptography.hazmat.primitives.serialization import Encoding

from harness.config import SiteSettings
from harness.errors import AccessDenied, DeadlineExceeded, EnrolmentError, HarnessError, NotFound, SimulationError
from harness.lab_decoy import Decoy
from harness.lab_hosts import domains
from harness.lab_outcome import GuestOutcome
from harness.lab_plan import GuestPlan, LabPlan
from harness.lab_record import LabRecord
from harness.lab_site import LabSite, write_image
from harness.peer import PeerClient
from harness.pki import Role
from harness.provider.operator import ProviderOperator
from harness.tenant.operator import TenantOperator
from harness.tenant.order import GuestContact, Order
from harness.tenant.states import STOPPED_NAMES, State
from harness.unix_client import ask
from harness.values import AgentId, HostId, parse_agent_id, parse_host_id

T = TypeVar("T")
Contact = GuestContact | EnrolmentError | None
"""A guest that registered, one that was refused, or one that is under attestation already."""
READY_S = 60.0
CHANGED = "changed in the lab's topology"
"""Reason, in the audit trails, of what a person changed in ``lab.yml``."""
_ENROLMENT_S = 120.0
_GUEST_S = 90.0
_VERDICT_S = 120.0
_SOON_S = 30.0
_ALLOWED_S = 10.0
_POLL_S = 0.05
_PARALLEL = 8
_DELIVERING = frozenset({State.PROVIDE_V.name, State.PROVIDE_V_RETRY.name})


class Onboarding:
    """The operators of one lab.

    Args:
        files: the lab's folder, with its plan.
        site: where the services are.
        wait_s: how long services and guests may take to come up.
    """

    def __init__(self, files: LabSite, site: SiteSettings, *, wait_s: float = READY_S) -> None:
        self._files = files
        self._site = site
        self._plan = files.plan
        self._wait_s = wait_s
        self._hosts: dict[str, HostId] = {}
        self._stack = AsyncExitStack()
        self._tenants: dict[str, TenantOperator] = {}
        self._starting = asyncio.Semaphore(_PARALLEL)

    async def __aenter__(self) -> Onboarding:
        self.provider = ProviderOperator(
            await self._client(self._site.provider.operator, self._site.provider.registrar, Role.PROVIDER_REGISTRAR)
        )
        for name, tenant in self._site.tenants.items():
            registrar = await self._client(tenant.operator, tenant.registrar, Role.TENANT_REGISTRAR)
            verifier = await self._client(tenant.operator, tenant.verifier, Role.TENANT_VERIFIER)
            self._tenants[name] = TenantOperator(registrar, verifier, tenant.operator)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    @property
    def host_ids(self) -> Mapping[str, HostId]:
        """Ids of the hosts that have announced themselves, by name."""
        return self._hosts

    @property
    def plan(self) -> LabPlan:
        """What the lab consists of."""
        return self._plan

    @property
    def site(self) -> SiteSettings:
        """Where its services are."""
        return self._site

    @property
    def tenants(self) -> Mapping[str, TenantOperator]:
        """The tenants' operators, by name."""
        return self._tenants

    # --- the provider -------------------------------------------------------------------------------------

    async def onboard(self, *, away: Collection[str] = (), other_allowlist: Collection[str] = ()) -> None:
        """Adds the tenants at the provider, waits for the hosts, and lets the tenants see what they may.

        Args:
            away: hosts that are not waited for.
            other_allowlist: tenants that may see something else than before.

        Raises:
            HarnessError: a service refused or did not answer in time.

        *Cancellation:* what was added stays.
        """
        known = {str(tenant["name"]): tenant for tenant in await self.patiently(self.provider.tenants)}
        for tenant in self._plan.tenants:
            if tenant.name not in known:
                pem = self._files.authorities[tenant.name].certificate.public_bytes(Encoding.PEM).decode()
                await self.provider.add_tenant(tenant.name, pem)
        self._hosts = await self._announced(away)
        for tenant in self._plan.tenants:
            shown = known.get(tenant.name, {}).get("allowlists", {})
            for host_id in self._hosts.values():
                if str(host_id) not in shown or tenant.name in other_allowlist:
                    await self.provider.allow(tenant.name, host_id, tenant.allowlist)

    async def _announced(self, away: Collection[str]) -> dict[str, HostId]:
        planned = {host.name for host in self._plan.hosts}
        wanted = planned.difference(away)
        until = time.monotonic() + self._wait_s
        while True:
            found = {str(host["name"]): parse_host_id(str(host["host_id"])) for host in await self.provider.hosts()}
            if wanted <= found.keys():
                return {name: found[name] for name in planned & found.keys()}
            if time.monotonic() > until:
                missing = ", ".join(sorted(wanted - found.keys()))
                raise SimulationError(f"host {missing} has not announced itself within {self._wait_s:g} s")
            await asyncio.sleep(_POLL_S)

    # --- the tenants --------------------------------------------------------------------------------------

    async def enrol(self, tenant: str) -> None:
        """A tenant enrols the hosts that it has not, and states its guests.

        Raises:
            HarnessError: an enrolment check failed, or somebody did not answer in time.

        *Cancellation:* what was pinned stays pinned.
        """
        operator = self._tenants[tenant]
        pinned = {str(host["host_id"]) for host in await self.patiently(operator.hosts)}
        if missing := [host_id for host_id in self._hosts.values() if str(host_id) not in pinned]:
            url = self._site.tenants[tenant].provider_verifier
            for host_id in missing:
                # The provider verifier learns of a new tenant and its allowlist within a second of the onboarding.
                await self.patiently(
                    lambda host_id=host_id: operator.add_host(f"{url}/v1/hosts/{host_id}"),  # type: ignore[misc]
                    refused_s=_ALLOWED_S,
                )
        stated = {str(guest["agent_id"]) for guest in await operator.guests()}
        for guest in self._plan.guests:
            if guest.tenant == tenant and guest.host in self._hosts and str(guest.agent_id) not in stated:
                await operator.state_guest(guest.agent_id, self._hosts[guest.host])

    async def start_guest(self, guest: GuestPlan) -> Path:
        """Defines a guest with its image and starts it; returns the settings of its agent.

        Raises:
            HarnessError: the guest manager or the provider refused, or did not answer in time.

        *Cancellation:* the guest manager carries on.
        """
        host = self._files.host(guest.host)
        async with self._starting:
            await self.patiently(
                lambda: self.provider.define_guest(guest.agent_id, guest.tenant, self._hosts[guest.host], guest.name)
            )
            defined = await self.patiently(lambda: _uuids(host.guest_manager))
            image = host.guests / str(guest.agent_id) / "image" / "agent.yml"
            if str(guest.agent_id) not in defined:
                image = await asyncio.to_thread(write_image, self._site, guest, guest.host)
                define: dict[str, object] = {"op": "define", "uuid": str(guest.agent_id), "name": guest.name}
                define |= {"scenario": guest.scenario, "agent_config": str(image), "autostart": True}
                if guest.foreign_vtpm:
                    define["create_certs"] = self._files.foreign_tool()
                await ask(host.guest_manager, define, deadline_s=READY_S)
            await ask(host.guest_manager, {"op": "start", "uuid": str(guest.agent_id)}, deadline_s=_GUEST_S)
        return image

    async def registered(self, guest: GuestPlan, image: Path, *, admit_anew: bool = False) -> Contact:
        """Waits for a guest's registration; None when it is under attestation already, an error when it was refused.

        Args:
            guest: of the plan.
            image: settings of its agent.
            admit_anew: it is to be attested in another way than before: what is under way is ended.

        Raises:
            HarnessError: it has not registered in time.

        *Cancellation:* nothing has changed.
        """
        operator = self._tenants[guest.tenant]
        try:
            await self.patiently(lambda: operator.attestation(guest.agent_id), until_found=False)
        except NotFound:
            pass
        else:
            if not admit_anew:
                return None
            await operator.end_attestation(guest.agent_id, CHANGED)
        try:
            contact = await operator.registered(guest.agent_id, deadline_s=_GUEST_S)
        except EnrolmentError as error:
            return error
        if guest.decoy:
            decoy = await self._stack.enter_async_context(Decoy(self._files, guest, image))
            return await decoy.take_place(operator, contact)
        return contact

    async def admit(self, guest: GuestPlan, contact: Contact) -> None:
        """Puts a guest that has registered under attestation. Raises HarnessError when its verifier refuses.

        *Cancellation:* it may be under attestation.
        """
        if isinstance(contact, GuestContact):
            operator, order = self._tenants[guest.tenant], self.order(guest)
            await self.patiently(lambda: operator.admit(contact, order), until_found=False)  # its agent may just start

    def order(self, guest: GuestPlan) -> Order:
        """How the plan wants a guest to be attested."""
        tenant = self._plan.tenant(guest.tenant)
        return Order(
            guest_policy=tenant.guest_policy,
            host_policy=tenant.host_policy,
            provider_verifier=self._site.tenants[guest.tenant].provider_verifier,
            payload=tenant.payload,
            allow_reboots=tenant.allow_reboots,
            quote_interval_s=tenant.quote_interval_s,
            provider_quote_interval=tenant.provider_quote_interval,
        )

    async def verdict(self, guest: GuestPlan, contact: Contact, *, anew: bool = False) -> GuestOutcome:
        """How a guest stands, as soon as it is attested or refused.

        Args:
            guest: of the plan.
            contact: what `registered` gave.
            anew: whether a round must have been accepted since now, if one is due soon: what was believed before does
                not count.

        Raises:
            DeadlineExceeded: neither in time.

        *Cancellation:* the attestation goes on.
        """
        if isinstance(contact, EnrolmentError):
            return GuestOutcome.not_enrolled(guest, contact)
        operator, tenant = self._tenants[guest.tenant], self._plan.tenant(guest.tenant)
        payload = tenant.payload
        anew = anew and tenant.quote_interval_s <= _SOON_S
        until, before = time.monotonic() + _VERDICT_S, None
        while True:
            view = await self.patiently(lambda: operator.attestation(guest.agent_id))
            before = view["attestation_count"] if before is None else before
            believed = view["attested"] and not (anew and view["attestation_count"] == before)
            delivered = payload is None or (view["payload_released"] and view["state"] != State.PROVIDE_V.name)
            if contact is None:  # its order was given by an earlier run, perhaps before there was a payload
                delivered = view["state"] not in _DELIVERING
            if view["state"] in STOPPED_NAMES or (believed and delivered):
                has_payload = await asyncio.to_thread(self._has_payload, guest, payload)
                return GuestOutcome.attested(
                    guest, view, has_payload, expected=payload is not None and contact is not None
                )
            if time.monotonic() > until:
                why = f": {view['detail']}" if view["detail"] else ""
                raise DeadlineExceeded(
                    f"no verdict on guest {guest.name} within {_VERDICT_S:g} s; it is {view['state']}{why}"
                )
            await asyncio.sleep(_POLL_S)

    def _has_payload(self, guest: GuestPlan, payload: bytes | None) -> bool:
        path = self._files.host(guest.host).guests / str(guest.agent_id) / "image" / "payload" / "payload"
        return payload is not None and path.is_file() and path.read_bytes() == payload

    # --- leaving ------------------------------------------------------------------------------------------

    async def remove(self, reason: str, *, made_anew: Collection[str] = ()) -> list[str]:
        """Removes the guests, tenants and hosts that were in the lab's topology and are in it no more.

        Args:
            reason: for the audit trails.
            made_anew: guests that are in it with another UUID, or on another host.

        Returns:
            What was removed, for people.

        Raises:
            HarnessError: a service refused or did not answer in time.

        *Cancellation:* some are removed; call it again.
        """
        record = LabRecord(self._files.folder)
        planned = {guest.name for guest in self._plan.guests}.difference(made_anew)
        leaving = {AgentId(agent_id): name for name, agent_id in record.guests().items() if name not in planned}
        removed = []
        for entry in await self.patiently(self.provider.guests):
            name = leaving.get(parse_agent_id(str(entry["agent_id"])))
            if name is not None:
                await self._remove_guest(entry, reason)
                removed.append(f"guest {name}")
        for name in leaving.values():
            record.forget_guest(name)
        planned = {tenant.name for tenant in self._plan.tenants}
        for tenant in await self.provider.tenants():
            name = str(tenant["name"])
            if name not in planned and (self._files.folder / "t" / name).is_dir():
                await self.provider.remove_tenant(name, reason)
                removed.append(f"tenant {name}")
        planned = {host.name for host in self._plan.hosts}
        for host in await self.provider.hosts():
            name = str(host["name"])
            if name not in planned and (self._files.folder / "h" / name).is_dir():
                await self.provider.remove_host(parse_host_id(str(host["host_id"])), reason)
                removed.append(f"host {name}")
        return removed

    async def _remove_guest(self, entry: Mapping[str, Any], reason: str) -> None:
        agent_id = parse_agent_id(str(entry["agent_id"]))
        operator = self._tenants.get(str(entry["tenant"]))
        if operator is not None:
            with contextlib.suppress(NotFound):  # it was never stated
                await operator.remove_guest(agent_id, reason)
        for host in self._site.hosts.values():
            if str(agent_id) in await _uuids(host.guest_manager):
                await ask(host.guest_manager, {"op": "undefine", "uuid": str(agent_id)}, deadline_s=_GUEST_S)
        await self.provider.remove_guest(agent_id, reason)

    # --- helpers ------------------------------------------------------------------------------------------

    async def _client(self, tls: Any, url: str, role: Role) -> PeerClient:
        client = PeerClient(tls, url, deadline_s=_ENROLMENT_S, roles={role})
        self._stack.push_async_callback(client.close)
        return client

    async def patiently(
        self, act: Callable[[], Awaitable[T]], *, until_found: bool = True, refused_s: float = 0.0
    ) -> T:
        """Result of a call to a service that may just be starting, or may learn only now that the call is allowed."""
        began = time.monotonic()
        until = began + self._wait_s
        while True:
            try:
                return await act()
            except HarnessError as error:
                again = error.retryable or (until_found and isinstance(error, NotFound))
                again = again or (isinstance(error, AccessDenied) and time.monotonic() < began + refused_s)
                if not again or time.monotonic() > until:
                    raise
                await asyncio.sleep(2 * _POLL_S)


async def _uuids(manager: Path) -> frozenset[str]:
    """UUIDs of the domains that a guest manager knows."""
    return frozenset(str(domain.get("uuid")) for domain in await domains(manager, deadline_s=READY_S))
