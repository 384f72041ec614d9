"""A provider under load: one host, real services in processes of their own, and tenants with their own authorities.

::

    async with BenchSite(folder, chip="ifx-slb9670", tenants=64) as site:
        results = await run_load(site.order([...]))

The parts are those of a lab (`lab_site`, `lab_supervision`); tenants are certificates only: their side is the load
generator.

Invariants:
    1. Nothing is measured before a tenant has accepted an answer from the host.
    2. Leaving the context ends every process.

Owner: the task that entered the context.

Spec: docs/performance.md, method.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cryptography.hazmat.primitives.serialization import Encoding

from harness import config, events
from harness.bench_orders import Load, Order, Quotes
from harness.bench_requests import QuoteRequests, body_of, verified
from harness.errors import HarnessError, SimulationError
from harness.lab_onboarding import Onboarding
from harness.lab_plan import DEMO_HOST, HostPlan, LabPlan
from harness.lab_site import LabSite, ServiceFile
from harness.lab_supervision import Supervision
from harness.lab_topology import BANK
from harness.peer import PeerClient
from harness.pki import Authority, Role
from harness.values import HostId, PcrSelection

_AGENT, _VERIFIER = f"{DEMO_HOST}-agent", "provider-verifier"
_READY_S = 90.0
_POLL_S = 0.1
_CONNECTIONS = 16_384
"""Bound of the provider verifier's connections: ten thousand wait here at once."""
_ALLOWED = PcrSelection.of(BANK, 0xFFFF)


class BenchSite:
    """The site; an async context manager.

    Args:
        folder: where it lives; short, because sockets are in it.
        chip: latency profile of the hardware TPM, by name or path.
        tenants: how many.
        batch: settings of the batcher.
    """

    def __init__(self, folder: Path, *, chip: str, tenants: int, batch: config.BatchSettings | None = None) -> None:
        host = HostPlan(name=DEMO_HOST, chip=chip)
        self._folder = folder
        self._files = LabSite.open(folder, LabPlan(hosts=(host,), tenants=(), guests=()))
        self._batch = batch or config.BatchSettings()
        self._names = [f"tenant{number}" for number in range(1, tenants + 1)]
        self._stack = AsyncExitStack()
        self._certificates: list[tuple[Path, Path]] = []

    async def __aenter__(self) -> BenchSite:
        events.configure("bench", self._files.log("bench"))
        self._supervision = Supervision(self._files.log, restart=False)
        self._stack.push_async_callback(self._supervision.stop)
        try:
            await self._supervision.apply(self._services())
            await self._guarded(self._onboard())
            await self._guarded(self._until_answered())
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    @property
    def agent_log(self) -> Path:
        """Events of the host agent."""
        return self._files.log(_AGENT)

    @property
    def pids(self) -> dict[str, int]:
        """Process ids of the two services under test, by name."""
        found = {str(service["name"]): service["pid"] for service in self._supervision.status()}
        wanted = {"provider verifier": found[_VERIFIER], "host agent": found[_AGENT]}
        if None in wanted.values():
            raise SimulationError("a service of the site has ended; its log says why")
        return {name: int(str(pid)) for name, pid in wanted.items()}

    @property
    def verifier(self) -> tuple[str, int]:
        """Address of the provider verifier."""
        url = urlsplit(self._files.url(_VERIFIER))
        return str(url.hostname), int(url.port or 0)

    @property
    def authority(self) -> Path:
        """Certificate of the provider's authority."""
        return self._folder / "pki" / "provider" / "ca.pem"

    def bare_tls(self) -> config.TlsSettings:
        """What a bare server needs to be reached by the same clients: the verifier's certificate, all authorities."""
        own = self._files.tls("provider", Role.PROVIDER_VERIFIER, "verifier", trusts=())
        trusted = {name: self._folder / "pki" / name / "ca.pem" for name in self._names}
        return own.model_copy(update={"authorities": trusted})

    def order(self, loads: Sequence[Load], *, seed: int, result: Path, drain_s: float = 40.0) -> Order:
        """Order for loads on this site; `tenants` of a load are indices of its tenants."""
        host, port = self.verifier
        return Order(
            host=host,
            port=port,
            certificates=self._certificates,
            authority=self.authority,
            quotes=self._quotes(),
            loads=list(loads),
            seed=seed,
            drain_s=drain_s,
            result=result,
        )

    async def change(self, batch: config.BatchSettings) -> None:
        """Restarts the host agent with other settings of its batcher.

        Raises:
            SimulationError: it did not come up.

        *Cancellation:* leave the context.
        """
        self._batch = batch
        await self._supervision.apply(self._services())
        await self._guarded(self._until_answered())

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        """The work, or the end of a service that ended by itself."""
        working, watching = asyncio.create_task(work), asyncio.create_task(self._supervision.failed())
        try:
            await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
            if watching.done() and not working.done():
                watching.result()
            await working
        finally:
            for task in (working, watching):
                task.cancel()
            await asyncio.gather(working, watching, return_exceptions=True)

    async def _until_answered(self) -> None:
        """Returns when a tenant has accepted an answer from the host."""
        quotes = self._quotes()
        order = self.order([], seed=0, result=self._folder / "probe.json")
        certificate, key = self._certificates[0]
        tls = config.TlsSettings(certificate=certificate, key=key, authorities={"provider": self.authority})
        until, why = time.monotonic() + _READY_S, "nothing was asked"
        async with PeerClient(tls, self._files.url(_VERIFIER), roles={Role.PROVIDER_VERIFIER}) as client:
            while time.monotonic() < until:
                make = QuoteRequests(order, quotes)
                _, number = make.request()
                try:
                    results = await client.get("/v1/verifier", make.query(number))
                    accepted, wrong = verified(order, make, [([200], [body_of(results)], [(0, number)])])
                    if accepted:
                        return
                    why = wrong[0]
                except HarnessError as error:
                    why = error.detail
                await asyncio.sleep(_POLL_S)
        raise SimulationError(f"the host gave no acceptable answer within {_READY_S:g} s: {why}")

    def _quotes(self) -> Quotes:
        return Quotes(host_id=str(self._host_id), ak=self._ak)

    def _services(self) -> list[ServiceFile]:
        return [self._adjusted(service) for service in self._files.services()]

    def _adjusted(self, service: ServiceFile) -> ServiceFile:
        """The lab's own service, with what a load needs."""
        match service.name:
            case name if name == _AGENT:
                agent = config.load(service.config, config.HostAgentSettings)
                config.dump(agent.model_copy(update={"batch": self._batch}), service.config)
            case name if name == _VERIFIER:
                verifier = config.load(service.config, config.ProviderVerifierSettings)
                config.dump(verifier.model_copy(update={"connections": _CONNECTIONS}), service.config)
            case _:
                return service
        return replace(service, text=service.config.read_text(encoding="utf-8"))

    async def _onboard(self) -> None:
        onboarding = await self._stack.enter_async_context(Onboarding(self._files, self._files.site()))
        await onboarding.onboard()
        self._host_id: HostId = onboarding.host_ids[DEMO_HOST]
        for name in self._names:
            authority = Authority.create(f"{name} CA")
            authority.write(self._folder / "pki" / name)
            issued = authority.issue(Role.TENANT_VERIFIER, name)
            self._certificates.append(issued.write(self._folder / "pki" / name, "verifier"))
            pem = authority.certificate.public_bytes(Encoding.PEM).decode()
            await onboarding.provider.add_tenant(name, pem)
            await onboarding.provider.allow(name, self._host_id, _ALLOWED)
        self._ak = str((await self._identity(onboarding))["ak"])

    async def _identity(self, onboarding: Onboarding) -> dict[str, Any]:
        certificate, key = self._certificates[0]
        tls = config.TlsSettings(certificate=certificate, key=key, authorities={"provider": self.authority})
        async with PeerClient(tls, self._files.url(_VERIFIER), roles={Role.PROVIDER_VERIFIER}) as client:
            path = f"/v1/hosts/{self._host_id}/identity"
            found = await onboarding.patiently(lambda: client.get(path), refused_s=_READY_S)
        if not isinstance(found, dict):
            raise SimulationError("the host does not tell its identity")
        return found
