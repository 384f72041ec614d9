"""Both provider services on one database: a tenant that is removed while they run, and one that comes back."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from harness.config import ProviderRegistrarSettings, ProviderVerifierSettings
from harness.errors import AccessDenied, HarnessError, PeerUnreachable
from harness.peer import PeerClient
from harness.pki import Authority, Role
from harness.provider.operator import ProviderOperator
from harness.provider.proxy import ProviderVerifier
from harness.provider.registrar import ProviderRegistrar
from harness.values import HostId
from tests.support.pendings import agent, allow
from tests.support.provider_lab import Pki

WAIT_S = 120.0
HOST = HostId(agent(0xA01))


class Site:
    """Registrar and verifier of a provider, as running services."""

    def __init__(self, pki: Pki, registrar: str, verifier: str, stack: AsyncExitStack) -> None:
        self.pki = pki
        self.urls = {"registrar": registrar, "verifier": verifier}
        self._stack = stack
        self._made = 0
        self.operator = ProviderOperator(self.client("registrar", "provider", Role.PROVIDER_OPERATOR))

    def client(self, service: str, authority: str, role: Role, name: str | None = None) -> PeerClient:
        self._made += 1
        tls = self.pki.tls(authority, role, name or f"x{self._made}", trusts=["provider"])
        made = PeerClient(tls, self.urls[service])
        self._stack.push_async_callback(made.close)
        return made

    def alice(self) -> list[Callable[[], Awaitable[Any]]]:
        """What alice asks of each service, on a connection of its own that stays open."""
        registrar = self.client("registrar", "alice", Role.GUEST_AGENT)
        verifier = self.client("verifier", "alice", Role.TENANT_REGISTRAR)
        return [lambda: registrar.get("/version"), lambda: verifier.get("/v1/hosts")]


@asynccontextmanager
async def running(folder: Path) -> AsyncIterator[Site]:
    pki = Pki.make(folder / "pki", "alice", "bob")
    database = f"sqlite+aiosqlite:///{folder / 'provider.db'}"
    async with AsyncExitStack() as stack:
        tasks: list[asyncio.Task[None]] = []
        urls = []
        registrar = ProviderRegistrar(
            ProviderRegistrarSettings(
                tls=pki.tls("provider", Role.PROVIDER_REGISTRAR, "r", trusts=["provider"]), database=database
            )
        )
        verifier = ProviderVerifier(
            ProviderVerifierSettings(
                tls=pki.tls("provider", Role.PROVIDER_VERIFIER, "v", trusts=["provider"]), database=database
            )
        )
        try:
            for service in (registrar, verifier):
                sock = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
                urls.append(f"https://127.0.0.1:{sock.getsockname()[1]}")
                tasks.append(asyncio.create_task(service.run(sock)))
            async with AsyncExitStack() as clients:
                yield Site(pki, urls[0], urls[1], clients)
                assert not any(task.done() for task in tasks), "a service ended by itself"
        finally:
            for task in tasks:
                task.cancel()
            async with asyncio.timeout(WAIT_S):
                await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with running(tmp_path) as made:
        await until_served(made.operator.tenants)
        yield made


async def until_served(ask: Callable[[], Awaitable[Any]]) -> Any:
    async with asyncio.timeout(WAIT_S):
        while True:
            try:
                return await ask()
            except HarnessError:
                await asyncio.sleep(0.05)


async def until_answered(ask: Callable[[], Awaitable[Any]], expected: object) -> None:
    async with asyncio.timeout(WAIT_S):
        while True:
            if await until_served(ask) == expected:
                return
            await asyncio.sleep(0.05)


async def until_refused(ask: Callable[[], Awaitable[Any]]) -> HarnessError:
    async with asyncio.timeout(WAIT_S):
        while True:
            try:
                await ask()
            except (AccessDenied, PeerUnreachable) as error:
                return error
            await asyncio.sleep(0.05)


async def test_a_removed_tenant_is_refused_on_its_open_connections_until_it_is_added_again(site: Site) -> None:
    """By both services: the registrar at once, the verifier with its next reading. The others are served all along."""
    await site.operator.add_tenant("alice", site.pki.pem("alice"))
    await site.operator.add_tenant("bob", site.pki.pem("bob"))
    bob = site.client("verifier", "bob", Role.TENANT_REGISTRAR)
    await until_served(lambda: bob.get("/v1/hosts"))
    asked = site.alice()
    for ask in asked:
        await until_served(ask)
    await site.operator.remove_tenant("alice")
    for ask in asked:
        assert isinstance(await until_refused(ask), AccessDenied)  # the connection is open still: no handshake failed
    await bob.get("/v1/hosts")
    await site.operator.add_tenant("alice", site.pki.pem("alice"))
    for ask in asked:
        await until_served(ask)


async def test_a_tenant_that_comes_back_with_another_authority(site: Site) -> None:
    """Its new certificates are taken, though the authority's name is the same; the old ones are not."""
    await site.operator.add_tenant("alice", site.pki.pem("alice"))
    old = site.alice()
    for ask in old:
        await until_served(ask)
    await site.operator.remove_tenant("alice")
    renewed = Authority.create("alice")
    renewed.write(site.pki.folder / "alice")
    site.pki.authorities["alice"] = renewed  # type: ignore[index]
    await site.operator.add_tenant("alice", site.pki.pem("alice"))
    for ask in site.alice():
        await until_served(ask)
    for ask in old:
        await until_refused(ask)


async def test_an_allowlist_of_a_removed_host_admits_nobody(site: Site) -> None:
    """The host is removed with its allowlists: the tenant sees it no more, and the verifier closes its link."""
    await site.operator.add_tenant("alice", site.pki.pem("alice"))
    host_agent = site.client("registrar", "provider", Role.HOST_AGENT, "host-1")
    await host_agent.put(f"/v1/hosts/{HOST}", {"name": "host-1", "url": "https://127.0.0.1:9"})
    await site.operator.allow("alice", HOST, allow([0]))
    [_, hosts] = site.alice()
    await until_answered(hosts, {"hosts": [str(HOST)]})
    await site.operator.remove_host(HOST, "sold")
    await until_answered(hosts, {"hosts": []})
