"""Figures of the provider's two services in the path of a quote, as its operator reads them from the real ones."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from harness.errors import AccessDenied, PeerUnreachable
from harness.peer import PeerClient
from harness.pki import Role
from harness.tenant.appraisal import Accepted
from tests.support.figures import Figures, scrape
from tests.support.provider_site import TIME_S, Site, bound, new_site, provider, url_of

pytestmark = pytest.mark.needs_swtpm


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with new_site() as made:
        yield made


async def until(client: PeerClient, name: str, value: float) -> Figures:
    """The first scrape in which a metric has this value."""
    async with asyncio.timeout(TIME_S):
        while True:
            found = await scrape(client)
            if found.sum(name) == value:
                return found
            await asyncio.sleep(0.05)


async def test_a_quote_is_seen_at_both_services(site: Site) -> None:
    """One request: answered at the provider verifier, for its tenant; one batch, one quote, one wait at the host."""
    with bound() as sockets:
        agent_url, verifier_url = (url_of(sock) for sock in sockets)
        async with (
            provider(site, sockets) as (alice, _),
            site.client(agent_url, Role.PROVIDER_OPERATOR, authority="provider") as agent,
            site.client(verifier_url, Role.PROVIDER_OPERATOR, authority="provider") as verifier,
        ):
            assert isinstance(await alice.until(Accepted), Accepted)
            at_verifier = await scrape(verifier)
            answered = at_verifier.sum("harness_requests_total", call="GET /v1/verifier", outcome="answered")
            at_host = await until(agent, "harness_batches_total", answered)
            assert answered >= 1
            assert at_host.sum("harness_requests_total", call="stream quote", outcome="answered") == answered
            assert at_host.value("harness_batches_total", outcome="quoted") == answered
            assert at_host.value("harness_tpm_quotes_total") == answered
            assert at_host.value("harness_batch_size_sum") == answered
            assert at_host.value("harness_batch_wait_seconds_count") == answered
            assert (at_host.value("harness_tpm_quote_seconds_sum") or 0) > 0
            assert at_host.value("harness_streams_open") == 1
            assert at_host.value("harness_waiting_requests") == at_host.value("harness_pools_open") == 0
            assert at_verifier.value("harness_hosts") == at_verifier.value("harness_hosts_connected") == 1
            assert at_verifier.sum("harness_tenant_requests_total", tenant="alice", outcome="answered") >= answered
            assert at_verifier.sum("harness_tenant_requests_total") == at_verifier.sum(
                "harness_tenant_requests_total", tenant="alice"
            )


async def test_a_host_that_is_lost_is_seen(site: Site) -> None:
    """The host agent ends: the provider verifier still has it in its records, and is not connected to it."""
    with bound() as sockets:
        async with (
            provider(site, sockets) as (_, agent),
            site.client(url_of(sockets[1]), Role.PROVIDER_OPERATOR, authority="provider") as verifier,
        ):
            await until(verifier, "harness_hosts_connected", 1)
            agent.cancel()
            found = await until(verifier, "harness_hosts_connected", 0)
            assert found.value("harness_hosts") == 1
            assert found.value("harness_health_ok", check="hosts") == 0


async def test_a_tenant_reads_no_figures_of_its_provider(site: Site) -> None:
    """Neither how busy the others are, nor who they are, whatever role its certificate says."""
    with bound() as sockets:
        async with provider(site, sockets):
            for role in (Role.PROVIDER_OPERATOR, Role.TENANT_OPERATOR, Role.TENANT_VERIFIER):
                async with site.client(url_of(sockets[1]), role) as client:
                    with pytest.raises(AccessDenied):
                        await client.text("/metrics")
                async with site.client(url_of(sockets[0]), role) as client:
                    with pytest.raises(PeerUnreachable):
                        await client.text("/metrics")
