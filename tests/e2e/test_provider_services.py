"""Host agent and provider verifier as services on a simulated device: start, power cycle, fault, orderly stop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest

from harness.errors import (
    CapabilityMissing,
    PeerUnreachable,
    StoreError,
)
from harness.tenant.appraisal import Accepted, Rejected
from tests.support.batching import WAIT_S
from tests.support.provider_site import TIME_S, Site, Sockets, bound, new_site, provider

pytestmark = pytest.mark.needs_swtpm


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with new_site() as made:
        yield made


@pytest.fixture
def sockets() -> Iterator[Sockets]:
    with bound() as pair:
        yield pair


async def test_a_host_announces_itself_and_is_attested(site: Site, sockets: Sockets) -> None:
    """From a blank state directory to an accepted round; the EK chain of the vendor is handed out."""
    async with provider(site, sockets) as (alice, _):
        assert isinstance(await alice.until(Accepted), Accepted)
        assert len(alice.identity["ek_certificates"]) >= 2
        assert site.reports == 1


async def test_a_restarted_host_agent_has_the_same_keys(site: Site, sockets: Sockets) -> None:
    """What the tenant pinned before the restart still holds."""
    async with provider(site, sockets) as (alice, _):
        pinned = dict(alice.identity)
    with bound() as fresh:
        async with provider(site, fresh) as (alice, _):
            assert alice.identity == pinned
            assert isinstance(await alice.until(Accepted), Accepted)


async def test_a_power_cycle_is_a_reboot_and_nothing_else(site: Site, sockets: Sockets) -> None:
    """The agent goes on with the same keys; the tenant's baseline shows the reset, whoever hides it (check 10)."""
    async with provider(site, sockets) as (alice, agent):
        await alice.until(Accepted)
        await site.device.power_cycle(orderly=True)
        verdict = await alice.until(Rejected)
        assert isinstance(verdict, Rejected)
        assert (verdict.check, verdict.error) == (10, "HostRebooted")
        alice.baseline = verdict.new_baseline
        await alice.until(Accepted)
        assert not agent.done()


async def test_another_boot_is_seen_in_the_pcrs(site: Site, sockets: Sockets) -> None:
    """A host that booted another kernel is refused by its reference values (check 9)."""
    async with provider(site, sockets) as (alice, _):
        await alice.until(Accepted)
        await site.device.power_cycle(scenario="tampered-kernel", orderly=True)
        alice.baseline = None
        verdict = await alice.until(Rejected)
        assert isinstance(verdict, Rejected)
        assert (verdict.check, verdict.error) == (9, "ReferenceValueMismatch")


async def test_cancelling_the_host_agent_stops_it_in_order(site: Site, sockets: Sockets) -> None:
    """The guests' side is stopped, and a tenant learns at once that the host is away."""
    async with provider(site, sockets) as (alice, agent):
        await alice.until(Accepted)
        agent.cancel()
        async with asyncio.timeout(WAIT_S):
            await asyncio.wait([agent])
        assert agent.cancelled()
        assert site.guests.stopped
        async with asyncio.timeout(WAIT_S):
            with pytest.raises(PeerUnreachable):
                await alice.round()


async def test_a_host_agent_whose_keys_lost_their_auth_values_does_not_start(site: Site, sockets: Sockets) -> None:
    """The service ends with the sentence that says what to do."""
    async with provider(site, sockets):
        pass
    (site.folder / "agent" / "auth.json").unlink()
    async with asyncio.timeout(TIME_S):
        with pytest.raises(CapabilityMissing, match="restore"):
            await site.host_agent().run()


async def test_a_provider_verifier_without_its_database_does_not_start(site: Site, sockets: Sockets) -> None:
    """It cannot know whom to admit."""
    site.fault = StoreError("disk full")
    async with asyncio.timeout(TIME_S):
        with pytest.raises(StoreError, match="disk full"):
            await site.verifier().run(sockets[1])
