"""The provider registrar as a process: killed, and with a database that fails; its records stay, and it goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from harness.config import Listen, ProviderRegistrarSettings
from harness.errors import HarnessError, NotReady, StoreError
from harness.peer import PeerClient
from harness.pki import Role
from harness.provider.authorities import TenantAuthorities
from harness.provider.operator import ProviderOperator
from harness.provider.registrar import follow_tenants
from harness.provider.registrar_store import RegistrarStore
from harness.store import Store
from harness.tls import Identities, server_context
from tests.support.database_faults import Fault, full, locked
from tests.support.databases import sqlite_url
from tests.support.provider_lab import Pki
from tests.support.schemas import PROVIDER
from tests.support.service_process import ServiceProcess, free_port, serving
from tests.support.tpms import short_folder
from tests.unit.test_guest_enrolment import ACT

WAIT_S = 120.0


class Site:
    """The registrar, its operator, and tenants with certificates."""

    def __init__(self, folder: Path, stack: AsyncExitStack) -> None:
        self.database = folder / "provider.db"
        self.pki = Pki.make(folder / "pki", "alice", "bob")
        self._port, self._stack = free_port(), stack
        settings = ProviderRegistrarSettings(
            listen=Listen(host="127.0.0.1", port=self._port),
            tls=self.pki.tls("provider", Role.PROVIDER_REGISTRAR, "r", trusts=["provider"]),
            database=sqlite_url(self.database),
        )
        probe = self.client("provider", Role.PROVIDER_OPERATOR, "probe")
        self.process = ServiceProcess("provider-registrar", settings, probe, folder)
        stack.push_async_callback(self.process.close)
        self.operator = ProviderOperator(self.client("provider", Role.PROVIDER_OPERATOR, "op"))

    def client(self, authority: str, role: Role, name: str) -> PeerClient:
        tls = self.pki.tls(authority, role, name, trusts=["provider"])
        made = PeerClient(tls, f"https://127.0.0.1:{self._port}", deadline_s=60)
        self._stack.push_async_callback(made.close)
        return made

    async def add(self, tenant: str) -> None:
        await self.operator.add_tenant(tenant, self.pki.pem(tenant))

    async def names(self) -> list[str]:
        return [str(tenant["name"]) for tenant in await self.operator.tenants()]

    async def served(self, tenant: str) -> None:
        """Waits until the tenant's certificates are taken."""
        client = self.client(tenant, Role.GUEST_AGENT, "ping")
        async with asyncio.timeout(WAIT_S):
            while True:
                try:
                    await client.get("/version")
                except HarnessError:
                    await asyncio.sleep(0.05)
                else:
                    return


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    with short_folder() as folder:
        async with AsyncExitStack() as stack:
            yield Site(folder, stack)


@pytest.mark.parametrize("fault", [locked, full])
async def test_a_database_that_fails_is_503_until_it_is_back(site: Site, fault: Fault) -> None:
    """The process lives; alice stays onboarded, bob is not half onboarded, and the next call works."""
    async with serving(site.process):
        await site.add("alice")
        await site.served("alice")
        with fault(site):
            with pytest.raises(NotReady, match=r"provider\.db"):
                await site.add("bob")
            await site.served("alice")
        assert await site.names() == ["alice"]
        await site.add("bob")
        await site.served("bob")
        acts = [entry["subject"] for entry in await site.operator.audit()]
        assert acts == ["alice", "bob"]


@pytest.mark.parametrize("end", ["kill", "stop"])
async def test_records_are_there_after_a_restart(site: Site, end: str) -> None:
    """Tenants with their authorities, and the audit trail."""
    async with serving(site.process):
        await site.add("alice")
        before = (await site.names(), await site.operator.audit())
        for _ in range(2):
            await (site.process.kill() if end == "kill" else site.process.stop())
            await site.process.start()
            await site.served("alice")
            assert (await site.names(), await site.operator.audit()) == before


class FailingStore:
    """A database that cannot be read for some time."""

    def __init__(self, store: Store, faults: int) -> None:
        self._store = store
        self.faults = faults

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[Any]:
        if self.faults:
            self.faults -= 1
            raise StoreError("database x: disk I/O error")
        async with self._store.begin() as session:
            yield session


async def test_authorities_follow_as_soon_as_the_database_can_be_read_again(tmp_path: Path) -> None:
    """The operator's change was committed, and the reading after it fails: it is repeated, the service lives."""
    pki = Pki.make(tmp_path / "pki", "alice")
    tls = pki.tls("provider", Role.PROVIDER_REGISTRAR, "r", trusts=["provider"])
    store = await PROVIDER.open(sqlite_url(tmp_path / "p.db"))
    try:
        await RegistrarStore(store).add_tenant("alice", pki.pem("alice"), ACT)
        identities = Identities({})
        failing, waits = FailingStore(store, 3), list[float]()

        async def sleep(seconds: float) -> None:
            waits.append(seconds)

        records = RegistrarStore(failing)  # type: ignore[arg-type]
        await follow_tenants(TenantAuthorities(identities, server_context(tls)), records, sleep=sleep)
        assert identities.names == {"alice"}
        assert len(waits) == 3
    finally:
        await store.close()
