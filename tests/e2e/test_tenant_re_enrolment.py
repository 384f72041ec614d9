"""The operator's way back at the tenant registrar: re-enrolling hosts and guests, over real mutual TLS, audited."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from harness.errors import ChallengeFailed, KeyChanged, NotFound, PeerRefusedUs
from harness.peer import PeerClient
from harness.pki import Role
from tests.support.enrolment_parties import SoftHost
from tests.support.tenant_site import TENANT, WAIT_S, TenantSite, new_tenant_site
from tests.support.tenant_wire import AGENT

pytestmark = pytest.mark.needs_swtpm

REASON = {"reason": "the mainboard was replaced"}
WHO = f"{TENANT}/tenant-operator/op"


@pytest.fixture
async def site() -> AsyncIterator[TenantSite]:
    async with new_tenant_site() as made:
        yield made


def registrar_of(site: TenantSite) -> PeerClient:
    return site.client("registrar", Role.TENANT_OPERATOR, "op")


async def get(registrar: PeerClient, path: str) -> Any:
    return await registrar.get(path)


async def actions(registrar: PeerClient) -> list[tuple[str, str, str]]:
    entries = (await get(registrar, "/v1/audit"))["entries"]
    assert {entry["who"] for entry in entries} == {WHO}
    return [(entry["action"], entry["subject"], entry["reason"]) for entry in entries]


async def enrolled(site: TenantSite) -> None:
    """The host is pinned, and the guest has registered."""
    async with site.operator() as operator:
        await operator.add_host(site.provider_url)
        await operator.state_guest(AGENT, site.provider.host.host_id)
        await operator.registered(AGENT, deadline_s=WAIT_S)


def new_keys(site: TenantSite, *names: str) -> None:
    """The host's TPM was cleared: the same EK, other keys."""
    host, other = site.provider.host, SoftHost(site.provider.vendor, b"")
    for name in names:
        setattr(host, name, getattr(other, name))
        setattr(host, f"{name}_key", getattr(other, f"{name}_key"))
    host.ca_certificate = other.ca_certificate if "ca" in names else host.ca_certificate
    host.clock, host.resets = 10, 0


async def test_a_changed_ak_is_refused_until_the_operator_re_enrols_the_host(site: TenantSite) -> None:
    """KeyChanged says what to do; the new AK and its clock are pinned then, and the guest stays registered."""
    host_id = site.provider.host.host_id
    async with site.running("registrar", "guest"), registrar_of(site) as registrar:
        await enrolled(site)
        new_keys(site, "ak")
        with pytest.raises(KeyChanged, match="re-enrolled"):
            await registrar.post("/v1/hosts", {"url": site.provider_url})
        before = await get(registrar, f"/v1/hosts/{host_id}")
        answer: Any = await registrar.put(f"/v1/hosts/{host_id}/re-enrol", REASON)
        after = await get(registrar, f"/v1/hosts/{host_id}")
        assert answer == {**after, "stated": []}
        assert (after["ek"], after["ca"]) == (before["ek"], before["ca"])
        assert after["ak"] != before["ak"]
        assert (after["baseline"]["clock"], after["baseline"]["reset_count"]) == (10, 0)
        assert (await get(registrar, f"/v1/guests/{AGENT}"))["state"] == "active"
        await registrar.post("/v1/hosts", {"url": site.provider_url})
        assert ("host-re-enrol", str(host_id), REASON["reason"]) in await actions(registrar)


async def test_a_refused_re_enrolment_changes_nothing(site: TenantSite) -> None:
    """The TPM does not answer the challenge for its new AK: the old keys stay pinned."""
    host_id = site.provider.host.host_id
    async with site.running("registrar", "guest"), registrar_of(site) as registrar:
        await enrolled(site)
        before = await get(registrar, f"/v1/hosts/{host_id}")
        known = await actions(registrar)
        new_keys(site, "ak", "ca")
        site.provider.host.answer_change = bytes(32)
        with pytest.raises(ChallengeFailed):
            await registrar.put(f"/v1/hosts/{host_id}/re-enrol", REASON)
        assert await get(registrar, f"/v1/hosts/{host_id}") == before
        assert (await get(registrar, f"/v1/guests/{AGENT}"))["state"] == "active"
        assert await actions(registrar) == known


async def test_after_a_new_ca_key_the_guest_comes_back_with_a_new_certificate(site: TenantSite) -> None:
    """It is back to "stated"; the old certificate is refused, the one of the new CA key is taken."""
    host_id = site.provider.host.host_id
    async with site.running("registrar"), registrar_of(site) as registrar, site.operator() as operator:
        async with site.running("guest"):
            await enrolled(site)
        new_keys(site, "ca")
        answer: Any = await registrar.put(f"/v1/hosts/{host_id}/re-enrol", REASON)
        assert answer["stated"] == [str(AGENT)]
        guest = await get(registrar, f"/v1/guests/{AGENT}")
        assert (guest["state"], guest["chain"]) == ("stated", [])
        with pytest.raises(NotFound):
            await registrar.get(f"/v2.1/agents/{AGENT}")
        await site.certify_vtpm()
        async with site.running("guest"):
            await operator.registered(AGENT, deadline_s=WAIT_S)


async def test_a_guest_is_re_enrolled_with_its_chain_shown(site: TenantSite) -> None:
    """Stated again with no chain; after its agent has registered anew, the chain from the vendor's root to its AK."""
    async with site.running("registrar"), registrar_of(site) as registrar, site.operator() as operator:
        async with site.running("guest"):
            await enrolled(site)
        before = (await get(registrar, f"/v1/guests/{AGENT}"))["chain"]
        assert [link["what"] for link in before] == [
            "vendor root",
            "vendor issuer",
            "host EK certificate",
            "host EK",
            "host AK",
            "vTPM CA key",
            "guest EK certificate",
            "guest EK",
            "guest AK",
        ]
        answer: Any = await registrar.put(f"/v1/guests/{AGENT}/re-enrol", REASON)
        assert answer["state"] == "stated"
        assert (await get(registrar, f"/v1/guests/{AGENT}"))["chain"] == []
        async with site.running("guest"):
            await operator.registered(AGENT, deadline_s=WAIT_S)
        assert (await get(registrar, f"/v1/guests/{AGENT}"))["chain"] == before
        assert ("guest-re-enrol", str(AGENT), REASON["reason"]) in await actions(registrar)


async def test_removals_take_a_reason_in_the_query(site: TenantSite) -> None:
    """They did without one before, and still do; the audit trail says so."""
    host_id = site.provider.host.host_id
    async with site.running("registrar"), registrar_of(site) as registrar, site.operator() as operator:
        await operator.add_host(site.provider_url)
        await operator.state_guest(AGENT, host_id)
        await registrar.call("DELETE", f"/v2.1/agents/{AGENT}", params=[("reason", "moved away")])
        with pytest.raises(PeerRefusedUs):
            await registrar.call("DELETE", f"/v1/hosts/{host_id}", params=[("why", "x")])
        with pytest.raises(PeerRefusedUs):
            await registrar.call("DELETE", f"/v1/hosts/{host_id}", params=[("reason", "")])
        await registrar.delete(f"/v1/hosts/{host_id}")
        assert await actions(registrar) == [
            ("host-add", str(host_id), "(not stated)"),
            ("guest-state", str(AGENT), "(not stated)"),
            ("guest-remove", str(AGENT), "moved away"),
            ("host-remove", str(host_id), "(not stated)"),
        ]


@pytest.mark.parametrize("what", ["hosts", "guests"])
async def test_a_re_enrolment_needs_a_reason_and_a_record(site: TenantSite, what: str) -> None:
    """400 without a reason, 404 for what nobody enrolled or stated."""
    path = f"/v1/{what}/{AGENT}/re-enrol"
    async with site.running("registrar"), registrar_of(site) as registrar:
        for body in ({}, {"reason": None}, {"reason": "x", "more": 1}):
            with pytest.raises(PeerRefusedUs) as refused:
                await registrar.put(path, body)
            assert refused.value.status == 400
        with pytest.raises(NotFound):
            await registrar.put(path, REASON)
