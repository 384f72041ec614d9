"""A tenant's registrar and verifier on one PostgreSQL database, through a restart of the server and of themselves."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator

import pytest

from harness.store_backup import back_up, restore
from tests.e2e.test_tenant_services import enrol, payload_arrives, until
from tests.support.postgres import PostgresServer
from tests.support.schemas import TENANT
from tests.support.tenant_site import WAIT_S, TenantSite, new_tenant_site
from tests.support.tenant_wire import AGENT

pytestmark = [pytest.mark.needs_swtpm, pytest.mark.needs_postgres]

SERVICES = ("registrar", "verifier", "guest")


@pytest.fixture
async def site(postgres: PostgresServer) -> AsyncIterator[TenantSite]:
    async with new_tenant_site() as made:
        made.database = postgres.new_database()
        yield made


async def test_a_tenants_services_share_a_database_on_a_server(
    site: TenantSite, postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Enrolment to payload; the server crashes and rounds go on; started again on a restored copy, they go on too."""
    backup = tmp_path_factory.mktemp("backup") / "t.backup"
    assert site.database is not None
    async with site.running(*SERVICES), site.operator() as operator:
        await enrol(site, operator)
        await operator.admit(await operator.registered(AGENT, deadline_s=WAIT_S), await site.order())
        view = await until(operator, attested=True, payload_released=True)
        assert await payload_arrives(site) == b"the secret"
        await back_up(site.database, backup)
        postgres.stop(signal.SIGQUIT)
        postgres.start()
        await until_more(site, view["attestation_count"] + 2)
    await restore(site.database, backup, {"tenant": TENANT.schema})
    async with site.running(*SERVICES):
        await until_more(site, view["attestation_count"] + 1)


async def until_more(site: TenantSite, rounds: int) -> None:
    """Waits until the guest is attested and had more rounds."""
    seen: object = None
    try:
        async with asyncio.timeout(WAIT_S), site.operator() as operator:
            while True:
                seen = await operator.attestation(AGENT)
                if seen["attested"] and seen["attestation_count"] >= rounds:
                    return
                await asyncio.sleep(0.05)
    except TimeoutError:
        pytest.fail(f"waited for {rounds} rounds, saw {seen}")
