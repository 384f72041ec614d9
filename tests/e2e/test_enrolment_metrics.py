"""Figures of the tenant's services and of the provider registrar, as their operators read them from the real ones."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from harness.errors import AccessDenied, ChallengeFailed, KeyChanged, NotYourGuest, PeerUnreachable
from harness.pki import Role
from tests.e2e.test_provider_registrar import GUEST, STRANGERS, Site, answer, challenge, register, registrar
from tests.support.enrolment_parties import SoftHost
from tests.support.figures import Figures, scrape
from tests.support.provider_lab import Pki
from tests.support.tenant_site import STRANGER, WAIT_S, TenantSite, new_tenant_site
from tests.support.tenant_wire import AGENT

NAME = "harness_enrolments_total"
ENROLLED = {"outcome": "enrolled", "reason": "none"}


@pytest.fixture
async def site() -> AsyncIterator[TenantSite]:
    async with new_tenant_site() as made:
        yield made


async def figures_of(site: TenantSite, service: str, *, at_least: dict[str, float] | None = None) -> Figures:
    """What a service of the tenant tells its operator, as soon as these metrics have come that far."""
    async with site.client(service, Role.TENANT_OPERATOR) as client, asyncio.timeout(WAIT_S):
        while True:
            found = await scrape(client)
            if all(found.sum(name) >= value for name, value in (at_least or {}).items()):
                return found
            await asyncio.sleep(0.05)


@pytest.mark.needs_swtpm
async def test_a_tenants_operator_sees_enrolments_rounds_and_who_is_attested(site: TenantSite) -> None:
    """Host and guest enrolled once each; rounds are accepted, and the guest counts as attested."""
    async with site.running("registrar", "verifier", "guest"), site.operator() as operator:
        await operator.add_host(site.provider_url)
        await operator.state_guest(AGENT, site.provider.host.host_id)
        contact = await operator.registered(AGENT, deadline_s=WAIT_S)
        found = await figures_of(site, "registrar")
        assert found.value(NAME, kind="host", **ENROLLED) == 1
        assert found.value(NAME, kind="guest", **ENROLLED) == 1
        assert found.value("harness_health_ok", check="database") == 1
        await operator.admit(contact, await site.order())
        found = await figures_of(site, "verifier", at_least={"harness_rounds_total": 2, "harness_attested_guests": 1})
        assert found.sum("harness_rounds_total", outcome="rejected") == 0
        assert found.value("harness_attested_guests") == 1
        assert found.sum("harness_guests") == 1
        found = await figures_of(site, "guest")
        assert found.value("harness_build_info", service="guest-agent", version="0.1.0") == 1
        assert found.sum("harness_requests_total", call="GET /{version}/quotes/integrity") >= 2


@pytest.mark.needs_swtpm
async def test_a_host_with_other_keys_is_a_refused_enrolment(site: TenantSite) -> None:
    """KeyChanged, once for each time that the host was offered."""
    async with site.running("registrar"), site.operator() as operator:
        await operator.add_host(site.provider_url)
        other = SoftHost(site.provider.vendor, b"")
        site.provider.host.ak, site.provider.host.ak_key = other.ak, other.ak_key
        with pytest.raises(KeyChanged):
            await operator.add_host(site.provider_url)
        found = await figures_of(site, "registrar")
    assert found.value(NAME, kind="host", **ENROLLED) == 1
    assert found.value(NAME, kind="host", outcome="refused", reason="KeyChanged") == 1


@pytest.mark.needs_swtpm
async def test_only_the_tenants_operator_reads_them(site: TenantSite) -> None:
    """Another service of the same tenant is refused, and somebody of another authority does not get so far."""
    async with site.running("registrar"):
        async with site.client("registrar", Role.TENANT_VERIFIER) as client:
            with pytest.raises(AccessDenied):
                await client.text("/metrics")
        async with site.client("registrar", Role.TENANT_OPERATOR, authority=STRANGER) as client:
            with pytest.raises(PeerUnreachable):
                await client.text("/metrics")


async def test_registrations_at_the_provider_are_counted(tmp_path: Path) -> None:
    """A registration is one enrolment, at its last step; refusals have their reason."""
    async with registrar(tmp_path, Pki.make(tmp_path / "pki", "alice", "bob")) as running:
        await running.fill()
        vtpm = await register(running)
        tag = await challenge(running, vtpm)
        with pytest.raises(ChallengeFailed):
            await answer(running, "0" * len(tag))
        with pytest.raises(NotYourGuest):
            await challenge(running, vtpm, agent_id=STRANGERS)
        found = await _figures(running)
    assert found.value(NAME, kind="guest", **ENROLLED) == 1
    assert found.value(NAME, kind="guest", outcome="refused", reason="ChallengeFailed") == 1
    assert found.value(NAME, kind="guest", outcome="refused", reason="NotYourGuest") == 1
    assert str(GUEST) not in str(found.samples)


async def _figures(running: Site) -> Figures:
    return await scrape(running.client("provider", Role.PROVIDER_OPERATOR))
