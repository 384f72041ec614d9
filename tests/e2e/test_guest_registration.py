"""A guest agent that keeps itself registered: a real vTPM, a real registrar, and what happens to its record meanwhile.

Size: one agent process-long run for each way in which a registrar may forget it.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from harness.errors import HarnessError, NotFound
from harness.peer import PeerClient
from harness.pki import Role, load_key
from harness.tenant.operator import TenantOperator
from tests.support.tenant_site import TENANT, WAIT_S, TenantSite, new_tenant_site
from tests.support.tenant_wire import AGENT

pytestmark = pytest.mark.needs_swtpm
AGAIN_S = 0.3
REASON = {"reason": "looked at"}


@pytest.fixture
async def site() -> AsyncIterator[TenantSite]:
    async with new_tenant_site() as made:
        made.guest_extra = {"register_again_s": AGAIN_S}
        yield made


async def record(site: TenantSite, *, other_than: object = None) -> dict[str, Any]:
    """The registrar's record, as soon as there is one, with another certificate than this."""
    async with site.client("registrar", Role.TENANT_OPERATOR) as registrar, asyncio.timeout(WAIT_S):
        while True:
            try:
                found: Any = await registrar.get(f"/v2.1/agents/{AGENT}")
                if found["mtls_cert"] != other_than:
                    return dict(found)
            except HarnessError:
                pass
            await asyncio.sleep(0.05)


async def stated(site: TenantSite, operator: TenantOperator) -> dict[str, Any]:
    """Host enrolled, guest stated and registered."""
    await operator.add_host(site.provider_url)
    await operator.state_guest(AGENT, site.provider.host.host_id)
    return await record(site)


async def test_a_guest_that_is_removed_and_stated_again_registers_without_a_restart(site: TenantSite) -> None:
    """With the same keys, within the agent's period."""
    async with site.running("registrar", "guest"), site.operator() as operator:
        before = await stated(site, operator)
        async with site.client("registrar", Role.TENANT_OPERATOR) as registrar:
            await registrar.delete(f"/v1/guests/{AGENT}")
            with pytest.raises(NotFound):
                await registrar.get(f"/v2.1/agents/{AGENT}")
        await operator.state_guest(AGENT, site.provider.host.host_id)
        after = await record(site)
        assert [after[name] for name in ("ek_tpm", "aik_tpm")] == [before[name] for name in ("ek_tpm", "aik_tpm")]


async def test_a_re_enrolled_guest_registers_without_a_restart(site: TenantSite) -> None:
    """The operator made the registrar forget its keys; the agent proves them anew."""
    async with site.running("registrar", "guest"), site.operator() as operator:
        before = await stated(site, operator)
        async with site.client("registrar", Role.TENANT_OPERATOR) as registrar:
            await registrar.put(f"/v1/guests/{AGENT}/re-enrol", REASON)
        assert (await record(site))["aik_tpm"] == before["aik_tpm"]


async def test_a_registrar_from_a_backup_is_told_again(site: TenantSite) -> None:
    """The backup is from before the guest registered; the agent's process is the same one."""
    database = site.folder / "registrar.db"
    async with site.running("guest"):
        async with site.running("registrar"), site.operator() as operator:
            await operator.add_host(site.provider_url)
            async with site.client("registrar", Role.TENANT_OPERATOR) as registrar:
                await registrar.post("/v1/guests", {"agent_id": str(AGENT), "host_id": str(site.provider.host.host_id)})
                await record(site)
                await registrar.put(f"/v1/guests/{AGENT}/re-enrol", REASON)
        shutil.copy(database, site.folder / "backup.db")
        async with site.running("registrar"):
            await record(site)
        for path in site.folder.glob("registrar.db*"):
            path.unlink()
        shutil.copy(site.folder / "backup.db", database)
        async with site.running("registrar"):
            await record(site)


async def test_a_renewed_certificate_is_registered(site: TenantSite) -> None:
    """The registrar learns the certificate that the agent shows from now on; verifiers pin it."""
    async with site.running("registrar", "guest"), site.operator() as operator:
        before = await stated(site, operator)
        key = load_key(site.pki.folder / TENANT / f"{Role.GUEST_AGENT.value}-{AGENT}.key")
        renewed = site.pki.authorities[TENANT].issue(Role.GUEST_AGENT, str(AGENT), key=key, days=60)
        pem = renewed.certificate.public_bytes(Encoding.PEM).decode()
        async with site.client("guest", Role.TENANT_OPERATOR) as guest:
            await guest.put("/v1/certificate", {"certificate": pem, **REASON})
        after = await record(site, other_than=before["mtls_cert"])
        assert after["mtls_cert"] == pem
        assert (after["regcount"], after["aik_tpm"]) == (before["regcount"] + 1, before["aik_tpm"])


async def test_an_agent_that_is_known_registers_once(site: TenantSite) -> None:
    """It looks many times, and the count of registrations stays."""
    async with site.running("registrar", "guest"), site.operator() as operator:
        before = await stated(site, operator)
        await asyncio.sleep(4 * AGAIN_S)
        assert (await record(site))["regcount"] == before["regcount"]


async def test_a_guest_that_was_removed_still_quotes(site: TenantSite) -> None:
    """Its registration is pending; its API answers all the same."""
    async with site.running("registrar", "guest"), site.operator() as operator:
        await stated(site, operator)
        async with site.client("registrar", Role.TENANT_OPERATOR) as registrar:
            await registrar.delete(f"/v1/guests/{AGENT}")
        async with site.client("guest", Role.TENANT_OPERATOR) as guest, asyncio.timeout(WAIT_S):
            while True:
                states = [state for name, state in (await checks(guest)).items() if "registration" in name]
                if states and "ok" not in states:
                    break
                await asyncio.sleep(0.05)
            answer: Any = await guest.get("/v2.1/quotes/identity", [("nonce", "Abcdefghij0123456789")])
            assert answer["quote"].startswith("r")


async def checks(guest: PeerClient) -> dict[str, str]:
    """What the agent's health says; a failing one says it in its error."""
    try:
        answer: Any = await guest.get("/health")
        return dict(answer["checks"])
    except HarnessError as error:
        return {"registration": error.detail}


async def test_only_the_guest_itself_is_told(site: TenantSite) -> None:
    """Another guest's agent of the same tenant is refused."""
    async with site.running("registrar"), site.operator() as operator:
        await operator.add_host(site.provider_url)
        async with site.client("registrar", Role.GUEST_AGENT, "somebody-else") as other:
            with pytest.raises(HarnessError, match="its certificate names"):
                await other.get(f"/v2.1/agents/{AGENT}/registration")
        async with site.client("registrar", Role.GUEST_AGENT, str(AGENT)) as own:
            assert await own.get(f"/v2.1/agents/{AGENT}/registration") == {"registered": False}
