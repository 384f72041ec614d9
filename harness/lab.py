"""The embedded lab: a provider with one host, and tenants that share nothing but the provider. No VM, no root.

::

    async with Lab(plan, folder) as lab:
        outcomes = await lab.attest_all()

Real swtpms, real sockets, mTLS, one process per service (`lab_processes`). Tampering is in the plan: other images,
other vTPMs, another provider in the path; services are the same ones that ``harness serve`` runs.

Invariants:
    1. When a process of the lab ends by itself, whatever waits is ended with an error that quotes its log.
    2. Leaving the context ends every process of the lab, by PID.

Owner: the task that entered the context.

Spec: DESIGN 5, 6.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, TypeVar

from cryptography.hazmat.primitives.serialization import Encoding

from harness.config import SiteSettings
from harness.errors import DeadlineExceeded, EnrolmentError, HarnessError, NotFound, SimulationError
from harness.lab_decoy import Decoy
from harness.lab_outcome import GuestOutcome, batches_in
from harness.lab_plan import GuestPlan, LabPlan
from harness.lab_processes import ServiceProcess
from harness.lab_site import ALLOWLIST, BANK, GOOD_GUEST, GOOD_HOST, HOST, LabSite, ServiceFile, policy_of, write_image
from harness.peer import PeerClient
from harness.provider.operator import ProviderOperator
from harness.sim.control import ask as ask_hardware
from harness.tenant.operator import GuestContact, Order, TenantOperator
from harness.unix_client import ask
from harness.values import HostId, PcrSelection, mask_of, parse_host_id

PAYLOAD = b"the tenant's secret, released after both layers were accepted\n"
T = TypeVar("T")
_READY_S = 60.0
_GUEST_S = 90.0
_ROUND_S = 120.0
_POLL_S = 0.05
_QUOTE_INTERVAL_S = 5.0
_ONBOARDED_S = 15.0
_PENDING = frozenset(
    {"REGISTERED", "START", "SAVED", "GET_QUOTE", "GET_QUOTE_RETRY", "GET_PROVIDER_QUOTE", "GET_PROVIDER_QUOTE_RETRY"}
    | {"PROVIDE_V", "PROVIDE_V_RETRY"}
)


class Lab:
    """One lab, from set-up to tear-down.

    Args:
        plan: what it consists of.
        folder: where it lives; made, and not removed.
    """

    def __init__(self, plan: LabPlan, folder: Path) -> None:
        self.plan = plan
        self.files = LabSite(folder, plan)
        self.timings_s: dict[str, float] = {}
        self.site: SiteSettings | None = None
        self._processes: list[ServiceProcess] = []
        self._clients = AsyncExitStack()
        self._tenants: dict[str, TenantOperator] = {}
        self._host_id: HostId | None = None

    async def __aenter__(self) -> Lab:
        try:
            await self._guarded(self._set_up())
        except BaseException:
            await self._tear_down()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        with self._timed("tear_down"):
            await self._tear_down()

    @property
    def host_id(self) -> str:
        """The host's id."""
        return str(self._host_id)

    async def attest_all(self) -> list[GuestOutcome]:
        """Starts all guests, enrols them, puts them under attestation, and waits for the verdict on each.

        Raises:
            SimulationError: a part of the lab failed; a refusal is an outcome, not an error.
            DeadlineExceeded: there is no verdict in time.

        *Cancellation:* the lab goes on with what was started.
        """
        return await self._guarded(self._attest_all())

    def batches(self) -> list[dict[str, int]]:
        """Requests and TPM quotes of every batch so far, from the host agent's events."""
        return batches_in(self.files.log("host-agent"))

    # --- set-up -------------------------------------------------------------------------------------------

    async def _set_up(self) -> None:
        with self._timed("hardware"):
            self._start(self.files.hardware())
            others = [*self.files.provider(), *self.files.tenants(), *self.files.hostile()]
            agent, manager = self.files.host_services()
            self.site = self.files.site()
            for service in (*others, manager):
                self._start(service)
            await self._until_powered()
            self._start(agent)
        with self._timed("onboarding"):
            await self._onboard(self.site)

    def _start(self, file: ServiceFile) -> None:
        process = ServiceProcess(file.name, file.service, file.config, self.files.log(file.name))
        self._processes.append(process)
        process.start(file.sock)

    async def _until_powered(self) -> None:
        control = self.files.host.hardware_control
        until = time.monotonic() + _READY_S
        while True:
            try:
                await ask_hardware(control, {"op": "status"})
            except SimulationError:
                if time.monotonic() > until:
                    raise
                await asyncio.sleep(_POLL_S)
            else:
                return

    async def _onboard(self, site: SiteSettings) -> None:
        registrar = PeerClient(site.provider.operator, site.provider.registrar)
        self._clients.push_async_callback(registrar.close)
        self._provider = ProviderOperator(registrar)
        for name in self.plan.tenants:
            pem = self.files.authorities[name].certificate.public_bytes(Encoding.PEM).decode()
            await self._provider.add_tenant(name, pem)
        host_id = self._host_id = await self._announced()
        allowlist = PcrSelection.of(BANK, mask_of(ALLOWLIST))
        for name in self.plan.tenants:
            await self._provider.allow(name, host_id, allowlist)
            tenant = site.tenants[name]
            own = [PeerClient(tenant.operator, url, deadline_s=_ROUND_S) for url in (tenant.registrar, tenant.verifier)]
            for client in own:
                self._clients.push_async_callback(client.close)
            self._tenants[name] = TenantOperator(own[0], own[1], tenant.operator)

    async def _announced(self) -> HostId:
        until = time.monotonic() + _READY_S
        while time.monotonic() < until:
            for host in await self._provider.hosts():
                return parse_host_id(str(host["host_id"]))
            await asyncio.sleep(_POLL_S)
        raise SimulationError(f"the host agent has not announced itself within {_READY_S:g} s")

    async def _enrol(self, tenant: str) -> None:
        until = time.monotonic() + _ONBOARDED_S
        while True:
            try:
                await self._tenants[tenant].add_host(self.files.provider_verifier)
                break
            except HarnessError as error:
                # The provider verifier learns of a new tenant and its allowlist within a second of the onboarding.
                if not (error.retryable or isinstance(error, NotFound)) or time.monotonic() > until:
                    raise
                await asyncio.sleep(2 * _POLL_S)
        for guest in self.plan.guests:
            if guest.tenant == tenant and self._host_id is not None:
                await self._tenants[tenant].state_guest(guest.agent_id, self._host_id)

    # --- guests -------------------------------------------------------------------------------------------

    async def _attest_all(self) -> list[GuestOutcome]:
        # The vTPMs are manufactured while the tenants enrol the host: nothing in one needs the other.
        starting = [asyncio.create_task(self._start_guest(guest)) for guest in self.plan.guests]
        try:
            with self._timed("host_enrolment"):
                await asyncio.gather(*(self._enrol(name) for name in self.plan.tenants))
            with self._timed("guests"):
                images = await asyncio.gather(*starting)
                booted = zip(self.plan.guests, images, strict=True)
                started = await asyncio.gather(*(self._registered(guest, image) for guest, image in booted))
        finally:
            for task in starting:
                task.cancel()
            await asyncio.gather(*starting, return_exceptions=True)  # whose errors are second to the one that ended us
        with self._timed("first_round"):
            pairs = zip(self.plan.guests, started, strict=True)
            return list(await asyncio.gather(*(self._attest(guest, contact) for guest, contact in pairs)))

    async def _start_guest(self, guest: GuestPlan) -> Path:
        if self.site is None or self._host_id is None:
            raise SimulationError("the lab is not set up")
        await self._provider.define_guest(guest.agent_id, guest.tenant, self._host_id, guest.name)
        image = await asyncio.to_thread(write_image, self.site, guest, HOST)
        manager = self.files.host.guest_manager
        define: dict[str, object] = {"op": "define", "uuid": str(guest.agent_id), "name": guest.name}
        define |= {"scenario": guest.scenario, "agent_config": str(image)}
        if guest.foreign_vtpm:
            define["create_certs"] = self.files.foreign_tool()
        await ask(manager, define, deadline_s=_READY_S)
        await ask(manager, {"op": "start", "uuid": str(guest.agent_id)}, deadline_s=_GUEST_S)
        return image

    async def _registered(self, guest: GuestPlan, image: Path) -> GuestContact | EnrolmentError:
        operator = self._tenants[guest.tenant]
        try:
            contact = await operator.registered(guest.agent_id, deadline_s=_GUEST_S)
        except EnrolmentError as error:
            return error
        if guest.decoy:
            decoy = await self._clients.enter_async_context(Decoy(self.files, guest, image))
            return await decoy.take_place(operator, contact)
        return contact

    async def _attest(self, guest: GuestPlan, contact: GuestContact | EnrolmentError) -> GuestOutcome:
        if isinstance(contact, EnrolmentError):
            return GuestOutcome.not_enrolled(guest, contact)
        operator = self._tenants[guest.tenant]
        order = Order(
            guest_policy=policy_of(GOOD_GUEST),
            host_policy=policy_of(GOOD_HOST),
            provider_verifier=self.files.provider_verifier,
            payload=PAYLOAD,
            allow_reboots=self.plan.allow_reboots,
            quote_interval_s=_QUOTE_INTERVAL_S,
        )
        await operator.admit(contact, order)
        until = time.monotonic() + _ROUND_S
        while True:
            view = await operator.attestation(guest.agent_id)
            delivered = view["attestation_count"] and view["payload_released"] and view["state"] != "PROVIDE_V"
            if view["state"] not in _PENDING or delivered:
                return GuestOutcome.attested(guest, view, await asyncio.to_thread(self._has_payload, guest))
            if time.monotonic() > until:
                raise DeadlineExceeded(f"no verdict on guest {guest.name} within {_ROUND_S:g} s; it is {view['state']}")
            await asyncio.sleep(_POLL_S)

    def _has_payload(self, guest: GuestPlan) -> bool:
        path = self.files.host.guests / str(guest.agent_id) / "image" / "payload" / "payload"
        return path.is_file() and path.read_bytes() == PAYLOAD

    # --- processes ----------------------------------------------------------------------------------------

    async def _guarded(self, work: Awaitable[T]) -> T:
        """The work's result, or the end of a process that ended by itself."""
        working, watching = asyncio.ensure_future(work), asyncio.create_task(self._watch())
        try:
            await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
            if watching.done() and not working.done():
                watching.result()
            return await working
        finally:
            for task in (working, watching):
                task.cancel()
            await asyncio.gather(working, watching, return_exceptions=True)

    async def _watch(self) -> None:
        while True:
            for process in self._processes:
                process.check()
            await asyncio.sleep(2 * _POLL_S)

    async def _tear_down(self) -> None:
        await self._clients.aclose()
        # Guests first: their agents and vTPMs are the guest manager's; the hardware TPM last.
        for names in (("guest-manager",), None, ("hardware-tpm",)):
            ending = [p for p in self._processes if (p.name in names if names else p.name != "hardware-tpm")]
            await asyncio.gather(*(process.stop() for process in ending))

    def _timed(self, step: str) -> Any:
        return _Timer(self.timings_s, step)


class _Timer:
    def __init__(self, timings_s: dict[str, float], step: str) -> None:
        self._timings_s, self._step = timings_s, step

    def __enter__(self) -> None:
        self._started = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._timings_s[self._step] = round(time.monotonic() - self._started, 3)
