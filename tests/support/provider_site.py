"""Host agent and provider verifier as services on a simulated device, with a tenant that asks them."""

from __future__ import annotations

import asyncio
import base64
import socket
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from aiohttp import web

from harness.attest import owner_qualified_name, parse_public
from harness.audit import AuditEntry
from harness.config import HostAgentSettings, Listen, ProviderVerifierSettings
from harness.errors import (
    GuestNotHere,
    HarnessError,
    NotReady,
    StoreError,
)
from harness.health import Health
from harness.messages import VerifierQuery, verifier_query
from harness.own_certificate import to_events
from harness.peer import PeerClient
from harness.pki import Role, load_certificate
from harness.provider.admission import Snapshot
from harness.provider.host_agent import HostAgent
from harness.provider.keys import HostKeys
from harness.provider.proxy import ProviderVerifier, Records
from harness.provider.stream import IdentityOrder
from harness.provider.stream_link import HostLink
from harness.sim.boot import Scenario, reference_values
from harness.sim.hardware import HardwareTpm
from harness.tenant.appraisal import Accepted, HostTrust, Rejected, SentRequest, appraise_host
from harness.tenant.policy import Policy
from harness.tls import certificate_requester, identities_of
from harness.values import AgentId, ClockBaseline, HashAlg, parse_host_id
from harness.web import Route, application, peer_of, read_json, serve
from tests.support.pendings import a_request, allow
from tests.support.provider_lab import Pki
from tests.support.tpms import DeviceSettings, short_folder

TIME_S = 120.0
Sockets = tuple[socket.socket, socket.socket]
PCRS = (0, 4, 7)


class NoGuests:
    """A guests' side on which nobody runs."""

    def __init__(self) -> None:
        self.ca_certificate = b"certificate"
        self.stopped = False

    async def check(self, agent_ids: frozenset[AgentId]) -> Mapping[AgentId, bytes | GuestNotHere | NotReady]:
        return {agent_id: GuestNotHere("nobody runs here") for agent_id in agent_ids}

    async def report(self) -> list[dict[str, str]]:
        return [{"agent_id": "a", "state": "running", "vtpm_ek": ""}]

    async def changed(self) -> None:
        await asyncio.Event().wait()

    def add_checks(self, health: Health) -> None:
        health.check("database", self._well)

    async def _well(self) -> None:
        return None

    async def keep_audit(self, entry: AuditEntry) -> None:
        await to_events(entry)

    async def run(self) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            self.stopped = True


@dataclass(slots=True, kw_only=True)
class Site:
    """Settings of one host, its provider and a tenant, with sockets that are bound already."""

    folder: Path
    pki: Pki
    device: HardwareTpm
    guests: NoGuests = field(default_factory=NoGuests)
    records: Snapshot = field(default_factory=Snapshot)
    fault: StoreError | None = None
    reports: int = 0

    def agent_settings(self, **changes: Any) -> HostAgentSettings:
        tls = self.pki.tls("provider", Role.HOST_AGENT, "host-1", trusts=["provider"])
        return HostAgentSettings.model_validate(
            {
                "tls": tls,
                "name": "host-1",
                "tcti": self.device.tcti,
                "state_dir": self.folder / "agent",
                "database": "sqlite+aiosqlite://",
                "local_socket": self.folder / "local",
                "guest_manager": self.folder / "manager",
                "peer_uids": [0],
                "ak": "ecc256",
                **changes,
            }
        )

    @asynccontextmanager
    async def open_guests(self, _settings: HostAgentSettings, _keys: HostKeys) -> AsyncIterator[NoGuests]:
        yield self.guests

    @asynccontextmanager
    async def open_records(self, _url: str) -> AsyncIterator[Records]:
        async def load() -> Snapshot:
            if self.fault is not None:
                raise self.fault
            return self.records

        yield Records(load=load)

    def host_agent(self, **changes: Any) -> HostAgent:
        return HostAgent(self.agent_settings(**changes), self.open_guests)

    def verifier(self) -> ProviderVerifier:
        tls = self.pki.tls("provider", Role.PROVIDER_VERIFIER, "v", trusts=["provider"])
        settings = ProviderVerifierSettings(tls=tls, database="sqlite+aiosqlite://")
        return ProviderVerifier(settings, self.open_records)

    def client(self, url: str, role: Role, authority: str = "alice") -> PeerClient:
        return PeerClient(self.pki.tls(authority, role, "a", trusts=["provider"]), url, deadline_s=60)


@asynccontextmanager
async def new_site() -> AsyncIterator[Site]:
    """A device with a good boot, and nothing else yet."""
    with short_folder() as folder:
        async with HardwareTpm(DeviceSettings(folder=folder)) as device:
            yield Site(folder=folder, pki=Pki.make(folder / "pki", "alice"), device=device)


@contextmanager
def bound() -> Iterator[Sockets]:
    """Listening sockets for host agent and provider verifier."""
    with socket.create_server(("127.0.0.1", 0)) as first, socket.create_server(("127.0.0.1", 0)) as second:
        yield first, second


def url_of(sock: socket.socket) -> str:
    return f"https://127.0.0.1:{sock.getsockname()[1]}"


@asynccontextmanager
async def running(service: HostAgent | ProviderVerifier, sock: socket.socket) -> AsyncIterator[asyncio.Task[None]]:
    """A service; afterwards cancelled, and it must end in time."""
    task = asyncio.create_task(service.run(sock))
    try:
        yield task
    finally:
        task.cancel()
        async with asyncio.timeout(TIME_S):
            await asyncio.gather(task, return_exceptions=True)


async def until_answered(client: PeerClient, path: str, task: asyncio.Task[None]) -> dict[str, Any]:
    """Results of the first call that succeeds while the services start."""
    async with asyncio.timeout(TIME_S):
        while True:
            try:
                return cast(dict[str, Any], await client.get(path))
            except HarnessError:
                if task.done():
                    task.result()
                await asyncio.sleep(0.05)


@asynccontextmanager
async def registrar(site: Site) -> AsyncIterator[str]:
    """Stands for the provider registrar: takes announcements of hosts, and admits alice there. Gives its URL."""

    async def put(request: web.Request) -> object:
        assert peer_of(request).name == "host-1"
        body = cast(dict[str, str], await read_json(request))
        assert body["name"] == "host-1"
        host_id = parse_host_id(request.match_info["host_id"])
        site.records = Snapshot(
            tenants={"alice": site.pki.pem("alice")},
            hosts={host_id: body["url"]},
            allowlists={("alice", host_id): allow(range(16))},
        )
        return {}

    async def put_guests(request: web.Request) -> object:
        body = cast(dict[str, list[dict[str, str]]], await read_json(request))
        assert [guest["state"] for guest in body["guests"]] == ["running"]
        site.reports += 1
        return {}

    tls = site.pki.tls("provider", Role.PROVIDER_REGISTRAR, "r", trusts=["provider"])
    routes = [
        Route("PUT", "/v1/hosts/{host_id}", put, roles={Role.HOST_AGENT}),
        Route("PUT", "/v1/hosts/{host_id}/guests", put_guests, roles={Role.HOST_AGENT}),
    ]
    async with serve(application("registrar", routes, identities_of(tls)), tls, Listen()) as server:
        yield server.url


@dataclass(slots=True, kw_only=True)
class Alice:
    """A tenant that pinned the host, and expects the good boot."""

    client: PeerClient
    identity: dict[str, Any]
    requester: bytes
    baseline: ClockBaseline | None = None

    async def round(self) -> Accepted | Rejected:
        """One host-only request and its appraisal."""
        request = a_request(pcrs=PCRS).request
        host_id = parse_host_id(self.identity["host_id"])
        query = verifier_query(VerifierQuery(request=request, host_id=host_id))
        results = await self.client.get("/v1/verifier", query)
        ak = parse_public(base64.b64decode(self.identity["ak"]))
        values = reference_values(Scenario.load("good"), HashAlg.SHA256)
        trust = HostTrust(
            host_id=host_id,
            ak=ak,
            ak_qualified_name=owner_qualified_name(ak),
            policy=Policy.of(HashAlg.SHA256, {pcr: values[pcr] for pcr in PCRS}),
            baseline=self.baseline,
        )
        sent = SentRequest(request=request, requester=self.requester, vtpm_ek=None)
        verdict = appraise_host(results, sent, trust, guest_binding=None)
        if isinstance(verdict, Accepted):
            self.baseline = verdict.evidence.baseline
        return verdict

    async def until(self, kind: type[Accepted | Rejected]) -> Accepted | Rejected:
        """First verdict of this kind; faults of the transport on the way are tried again, as a session does."""
        async with asyncio.timeout(TIME_S):
            while True:
                try:
                    verdict = await self.round()
                except HarnessError as error:
                    if not error.retryable:
                        raise
                    await asyncio.sleep(0.05)
                    continue
                if isinstance(verdict, kind):
                    return verdict
                assert isinstance(verdict, Rejected)
                assert verdict.error == "ClockNotSafe", verdict
                await asyncio.sleep(0.2)


@asynccontextmanager
async def provider(site: Site, sockets: Sockets, **changes: Any) -> AsyncIterator[tuple[Alice, asyncio.Task[None]]]:
    """Everything running, the host agent with these changes of its settings: the tenant, and the host agent's task."""
    async with (
        registrar(site) as registrar_url,
        running(site.host_agent(registrar=registrar_url, **changes), sockets[0]) as agent,
        running(site.verifier(), sockets[1]) as verifier,
    ):
        enrolling = site.client(url_of(sockets[1]), Role.TENANT_REGISTRAR)
        asking = site.client(url_of(sockets[1]), Role.TENANT_VERIFIER)
        async with enrolling, asking:
            async with asyncio.timeout(TIME_S):
                while not (hosts := (await until_answered(enrolling, "/v1/hosts", verifier))["hosts"]):
                    agent.result() if agent.done() else await asyncio.sleep(0.05)
            identity = await until_answered(enrolling, f"/v1/hosts/{hosts[0]}/identity", verifier)
            certificate = site.pki.folder / "alice" / f"{Role.TENANT_VERIFIER.value}-a.pem"
            requester = certificate_requester(load_certificate(certificate))
            yield Alice(client=asking, identity=identity, requester=requester), agent


@asynccontextmanager
async def linked(site: Site, service: HostAgent) -> AsyncIterator[HostLink]:
    """A host agent, and a link to it as a provider verifier has one."""
    tls = site.pki.tls("provider", Role.PROVIDER_VERIFIER, "direct", trusts=["provider"])
    with bound() as (sock, _):
        async with running(service, sock) as task, PeerClient(tls, url_of(sock)) as client:
            link = HostLink(lambda: client.channel("/v1/stream"))
            runner = asyncio.create_task(link.run())
            try:
                async with asyncio.timeout(TIME_S):
                    while True:
                        try:
                            await link.ask(IdentityOrder())
                            break
                        except HarnessError:
                            if task.done():
                                task.result()
                            await asyncio.sleep(0.05)
                yield link
            finally:
                runner.cancel()
                await asyncio.gather(runner, return_exceptions=True)
