"""Registrar, verifier and guest agent over real mutual TLS, with a real vTPM: from enrolment to the payload.

Size: one tenant, from its first host to its last call.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest

from harness.errors import (
    AccessDenied,
    CapabilityMissing,
    CertificateRefused,
    Conflict,
    HarnessError,
    KeyChanged,
    NotFound,
    NotReady,
    NotYourGuest,
    PeerRefusedUs,
    PeerUnreachable,
)
from harness.peer import PeerClient
from harness.pki import Role
from harness.tenant.operator import TenantOperator
from harness.tpm import Tpm
from harness.values import HashAlg
from tests.support.enrolment_parties import SoftHost, Vendor
from tests.support.tenant_site import STRANGER, TENANT, WAIT_S, TenantSite, new_tenant_site
from tests.support.tenant_wire import AGENT

pytestmark = pytest.mark.needs_swtpm

ALL = ("registrar", "verifier", "guest")
NONCE = "Abcdefghij0123456789"


@pytest.fixture
async def site() -> AsyncIterator[TenantSite]:
    async with new_tenant_site() as made:
        yield made


async def enrol(site: TenantSite, operator: TenantOperator) -> None:
    """Host and guest, as far as registered."""
    await operator.add_host(site.provider_url)
    await operator.state_guest(AGENT, site.provider.host.host_id)
    await operator.registered(AGENT, deadline_s=WAIT_S)


async def until(operator: TenantOperator, **expected: Any) -> Mapping[str, Any]:
    """The guest's attestation, once it shows what is expected."""
    view: Mapping[str, Any] = {}
    try:
        async with asyncio.timeout(WAIT_S):
            while True:
                view = await operator.attestation(AGENT)
                if expected.items() <= view.items():
                    return view
                await asyncio.sleep(0.05)
    except TimeoutError:
        pytest.fail(f"waited for {expected}, saw {view}")


def payload_of(site: TenantSite) -> bytes | None:
    files = list((site.folder / "payload").glob("*"))
    return files[0].read_bytes() if files else None


async def payload_arrives(site: TenantSite) -> bytes:
    async with asyncio.timeout(WAIT_S):
        while True:
            if (payload := payload_of(site)) is not None:
                return payload
            await asyncio.sleep(0.02)


async def test_from_enrolment_to_payload(site: TenantSite) -> None:
    """Host enrolled, guest registered, both layers accepted, payload released; rounds go on."""
    async with site.running(*ALL), site.operator() as operator:
        await enrol(site, operator)
        contact = await operator.registered(AGENT, deadline_s=WAIT_S)
        await operator.admit(contact, await site.order())
        view = await until(operator, attested=True, payload_released=True, state="GET_QUOTE")
        assert view["host_id"] == str(site.provider.host.host_id)
        assert await payload_arrives(site) == b"the secret"
        assert (site.folder / "payload" / "payload").stat().st_mode & 0o777 == 0o600
        await until(operator, attestation_count=view["attestation_count"] + 2)
        assert await operator.alarms() == []


async def test_a_tampered_host_keeps_the_payload_locked_and_resume_starts_anew(site: TenantSite) -> None:
    """The guest's evidence is good, the host's is not: check 9; after resume with the good host V is released."""
    honest = site.provider.tpm.pcrs[4]
    async with site.running(*ALL), site.operator() as operator:
        await enrol(site, operator)
        order = await site.order()
        site.provider.tpm.pcrs[4] = bytes(32)
        await operator.admit(await operator.registered(AGENT, deadline_s=WAIT_S), order)
        view = await until(operator, state="INVALID_QUOTE", operational_state=9, layer="host", failed_check=9)
        assert not view["payload_released"]
        assert payload_of(site) is None
        site.provider.tpm.pcrs[4] = honest
        async with site.client("verifier", Role.TENANT_OPERATOR) as verifier:
            await verifier.put(f"/v2.1/agents/{AGENT}/resume", {})
            await until(operator, attested=True)
            with pytest.raises(Conflict):
                await verifier.put(f"/v2.1/agents/{AGENT}/resume", {})
        assert await payload_arrives(site) == b"the secret"


async def test_a_decoys_ek_and_a_refusing_provider(site: TenantSite) -> None:
    """403 is FAILED with the reason; another vTPM's EK in the leaf is check 5."""
    site.provider.refusal = NotYourGuest("not your guest")
    async with site.running(*ALL), site.operator() as operator:
        await enrol(site, operator)
        await operator.admit(await operator.registered(AGENT, deadline_s=WAIT_S), await site.order())
        await until(operator, state="FAILED", error="NotYourGuest", layer="host")
        site.provider.refusal, site.provider.vtpm_ek = None, bytes(32)
        async with site.client("verifier", Role.TENANT_OPERATOR) as verifier:
            await verifier.put(f"/v2.1/agents/{AGENT}/resume", {})
        await until(operator, state="INVALID_QUOTE", error="QualifyingDataMismatch", failed_check=5)
        assert payload_of(site) is None


async def test_services_go_on_after_a_restart(site: TenantSite) -> None:
    """Verifier and registrar are stopped and started: pinned keys and progress are there, and V is not sent twice."""
    async with site.running("guest"):
        async with site.running("registrar", "verifier"), site.operator() as operator:
            await enrol(site, operator)
            await operator.admit(await operator.registered(AGENT, deadline_s=WAIT_S), await site.order())
            before = await until(operator, attested=True, payload_released=True)
        async with site.running("registrar", "verifier"), site.operator() as operator:
            after = await until(operator, attested=True, payload_released=True)
            assert after["attestation_count"] >= before["attestation_count"]
            assert [host["host_id"] for host in await operator.hosts()] == [str(site.provider.host.host_id)]


async def test_a_guest_agent_that_restarts_registers_again_with_the_same_ak(site: TenantSite) -> None:
    """A new process has a new NK; the AK in the vTPM is the pinned one, and rounds go on."""
    async with site.running("registrar", "verifier"), site.operator() as operator:
        async with site.running("guest"):
            await enrol(site, operator)
            first = await operator.registered(AGENT, deadline_s=WAIT_S)
            await operator.admit(first, await site.order())
            await until(operator, attested=True, payload_released=True)
        async with site.running("guest"):
            async with site.client("registrar", Role.TENANT_OPERATOR) as registrar, asyncio.timeout(WAIT_S):
                while True:
                    record: Any = await registrar.get(f"/v2.1/agents/{AGENT}")
                    if record["regcount"] == 2:
                        break
                    await asyncio.sleep(0.05)
            again = await operator.registered(AGENT, deadline_s=WAIT_S)
            assert again.ak == first.ak


async def test_a_vtpm_of_another_ca_is_refused_and_the_operator_sees_why(site: TenantSite) -> None:
    """CertificateRefused, one alarm however often the agent tries; nothing is pinned."""
    await site.certify_vtpm(signer=SoftHost(Vendor(), b""))
    async with site.running(*ALL), site.operator() as operator:
        with pytest.raises(CertificateRefused):
            await enrol(site, operator)
        assert [alarm["kind"] for alarm in await operator.alarms()] == ["CertificateRefused"]
        async with site.client("registrar", Role.TENANT_OPERATOR) as registrar:
            with pytest.raises(NotFound):
                await registrar.get(f"/v2.1/agents/{AGENT}")


async def test_a_host_that_shows_other_keys_is_an_alarm(site: TenantSite) -> None:
    """The same EK, another AK: KeyChanged, the pinned AK stays."""
    async with site.running("registrar", "verifier"), site.operator() as operator:
        [pinned] = await operator.add_host(site.provider_url)
        other = SoftHost(site.provider.vendor, b"")
        site.provider.host.ak, site.provider.host.ak_key = other.ak, other.ak_key
        with pytest.raises(KeyChanged):
            await operator.add_host(site.provider_url)
        assert [alarm["kind"] for alarm in await operator.alarms()] == ["KeyChanged"]
        assert (await operator.host(site.provider.host.host_id))["ak"] == pinned["ak"]


async def test_an_alarm_is_acknowledged_with_a_reason(site: TenantSite) -> None:
    """It leaves the list, stays among all of them, and who did it and why is in the audit trail; faults are named."""
    stated = {"reason": "the vTPM was set up by hand"}
    await site.certify_vtpm(signer=SoftHost(Vendor(), b""))
    async with (
        site.running("registrar", "guest"),
        site.operator() as operator,
        site.client("registrar", Role.TENANT_OPERATOR, "op") as registrar,
    ):
        with pytest.raises(CertificateRefused):
            await enrol(site, operator)
        [alarm] = (await ask(registrar, "/v1/alarms"))["alarms"]
        path = f"/v1/alarms/{alarm['id']}/acknowledge"
        for wrong, body in (
            (path, {}),
            (path, {"reason": " "}),
            (path, {"reason": "two\nlines"}),
            (path, {"reason": "why", "more": 1}),
            ("/v1/alarms/0/acknowledge", stated),
            ("/v1/alarms/99999999999/acknowledge", stated),
            ("/v1/alarms/x/acknowledge", stated),
        ):
            with pytest.raises(PeerRefusedUs) as refused:
                await registrar.put(wrong, body)
            assert refused.value.status == 400
        with pytest.raises(PeerRefusedUs):
            await registrar.get("/v1/alarms", [("all", "yes")])
        with pytest.raises(NotFound):
            await registrar.put("/v1/alarms/4711/acknowledge", stated)
        await registrar.put(path, stated)
        with pytest.raises(Conflict):
            await registrar.put(path, stated)
        assert await ask(registrar, "/v1/alarms", all="false") == {"alarms": []}
        [shown] = (await ask(registrar, "/v1/alarms", all="true"))["alarms"]
        who = f"{TENANT}/tenant-operator/op"
        assert (shown["acknowledged_by"], shown["reason"]) == (who, stated["reason"])
        [*_, entry] = (await ask(registrar, "/v1/audit"))["entries"]  # after the host's enrolment and the guest
        assert (entry["who"], entry["action"], entry["subject"]) == (who, "alarm-acknowledge", f"alarm {alarm['id']}")


async def test_a_host_can_be_named_removed_and_added_again(site: TenantSite) -> None:
    """The URL may name one host; a host with guests stays."""
    host_id = site.provider.host.host_id
    async with site.running("registrar", "verifier"), site.operator() as operator:
        await operator.add_host(f"{site.provider_url}/v1/hosts/{host_id}")
        await operator.state_guest(AGENT, host_id)
        with pytest.raises(Conflict):
            await operator.remove_host(host_id)
        await operator.remove_guest(AGENT)
        await operator.remove_host(host_id)
        with pytest.raises(NotFound):
            await operator.host(host_id)
        with pytest.raises(NotFound):
            await operator.state_guest(AGENT, host_id)


# --- who may call -------------------------------------------------------------------------------------------------

CALLS = [
    ("registrar", "POST", "/v1/hosts", {Role.TENANT_OPERATOR}),
    ("registrar", "GET", "/v1/alarms", {Role.TENANT_OPERATOR}),
    ("registrar", "PUT", "/v1/alarms/1/acknowledge", {Role.TENANT_OPERATOR}),
    ("registrar", "GET", "/v1/audit", {Role.TENANT_OPERATOR}),
    ("registrar", "PUT", f"/v1/hosts/{AGENT}/re-enrol", {Role.TENANT_OPERATOR}),
    ("registrar", "PUT", f"/v1/guests/{AGENT}/re-enrol", {Role.TENANT_OPERATOR}),
    ("registrar", "DELETE", f"/v1/hosts/{AGENT}", {Role.TENANT_OPERATOR}),
    ("registrar", "DELETE", f"/v1/guests/{AGENT}", {Role.TENANT_OPERATOR}),
    ("registrar", "POST", "/v1/guests", {Role.TENANT_OPERATOR}),
    ("registrar", "GET", f"/v2.1/agents/{AGENT}", {Role.TENANT_OPERATOR, Role.TENANT_VERIFIER}),
    ("registrar", "POST", f"/v2.1/agents/{AGENT}", {Role.GUEST_AGENT}),
    ("registrar", "PUT", f"/v2.1/agents/{AGENT}", {Role.GUEST_AGENT}),
    ("verifier", "POST", f"/v2.1/agents/{AGENT}", {Role.TENANT_OPERATOR}),
    ("verifier", "GET", f"/v2.1/agents/{AGENT}", {Role.TENANT_OPERATOR}),
    ("verifier", "DELETE", f"/v2.1/agents/{AGENT}", {Role.TENANT_OPERATOR}),
    ("verifier", "PUT", f"/v2.1/agents/{AGENT}/resume", {Role.TENANT_OPERATOR}),
]


async def test_every_call_is_for_its_roles_only(site: TenantSite) -> None:
    """A tenant's own certificate of another role is answered 403 on each call."""
    async with site.running("registrar", "verifier"):
        for role in (Role.TENANT_OPERATOR, Role.TENANT_VERIFIER, Role.GUEST_AGENT, Role.HOST_AGENT):
            answers = {call[:3]: await refusal_of(site, role, *call[:3]) for call in CALLS}
            denied = {call for call, error in answers.items() if isinstance(error, AccessDenied)}
            assert denied == {call[:3] for call in CALLS if role not in call[3]}
            assert not any(isinstance(error, PeerUnreachable) for error in answers.values())


async def refusal_of(site: TenantSite, role: Role, service: str, method: str, path: str) -> HarnessError | None:
    async with site.client(service, role, str(AGENT)) as peer:
        try:
            await peer.call(method, path, body={})
        except HarnessError as error:
            return error
        return None


@pytest.mark.parametrize("authority", [STRANGER, "provider"])
async def test_another_authoritys_certificates_are_refused(site: TenantSite, authority: str) -> None:
    """Another tenant's and the provider's certificates, whatever role they claim, get nothing from any service."""
    async with site.running(*ALL):
        for service, role, path in (
            ("registrar", Role.TENANT_OPERATOR, "/v1/hosts"),
            ("verifier", Role.TENANT_OPERATOR, "/v2.1/agents"),
            ("guest", Role.TENANT_VERIFIER, f"/v2.1/quotes/integrity?nonce={NONCE}&mask=0x1"),
        ):
            async with site.client(service, role, authority=authority) as peer:
                with pytest.raises((PeerUnreachable, AccessDenied)):
                    await peer.get(path)


async def test_a_guest_registers_itself_only(site: TenantSite) -> None:
    """Another guest's certificate does not open a challenge for this one."""
    async with site.running("registrar"), site.client("registrar", Role.GUEST_AGENT, "another") as peer:
        with pytest.raises(AccessDenied):
            await peer.post(f"/v2.1/agents/{AGENT}", {})


# --- the guest agent's own API ------------------------------------------------------------------------------------


async def ask(peer: PeerClient, path: str, **params: str) -> Any:
    return await peer.get(path, list(params.items()))


async def test_the_agents_api_is_keylimes(site: TenantSite) -> None:
    """Version, identity and integrity quotes, the transport key."""
    async with site.running("guest"), site.client("guest", Role.TENANT_VERIFIER) as peer:
        version = await ask(peer, "/version")
        assert version["supported_versions"] == ["2.1", "2.2", "2.3", "2.4", "2.5", "2.6"]
        identity = await ask(peer, "/v2.6/quotes/identity", nonce=NONCE)
        partial = await ask(peer, "/v2.1/quotes/integrity", nonce=NONCE, mask="0x11", partial="1")
        whole = await ask(peer, "/v2.2/quotes/integrity", nonce=NONCE, mask="0x11", partial="0", ima_ml_entry="0")
        assert "pubkey" not in partial
        assert whole["pubkey"] == identity["pubkey"] == (await ask(peer, "/v2.1/keys/pubkey"))["pubkey"]
        assert (whole["hash_alg"], whole["enc_alg"], whole["sign_alg"]) == ("sha256", "rsa", "ecdsa")
        with pytest.raises(PeerRefusedUs):
            await ask(peer, "/v3.0/quotes/identity", nonce=NONCE)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"nonce": NONCE},
        {"nonce": "", "mask": "0x1"},
        {"nonce": "a" * 32, "mask": "0x1"},
        {"nonce": "a b", "mask": "0x1"},
        {"nonce": NONCE, "mask": "0x0"},
        {"nonce": NONCE, "mask": "0x10001"},
        {"nonce": NONCE, "mask": "0x1000000"},
        {"nonce": NONCE, "mask": "0x1", "partial": "2"},
        {"nonce": NONCE, "mask": "0x1", "extra_data": "00"},
    ],
)
async def test_a_quote_request_with_one_fault_is_400(site: TenantSite, params: dict[str, str]) -> None:
    """Nonces of 32 bytes and more never reach the TPM; unknown and missing parameters are refused."""
    async with site.running("guest"), site.client("guest", Role.TENANT_VERIFIER) as peer:
        with pytest.raises(PeerRefusedUs) as refused:
            await ask(peer, "/v2.1/quotes/integrity", **params)
        assert refused.value.status == 400


async def test_shares_that_do_not_fit_are_refused(site: TenantSite) -> None:
    """Not base64, not for this NK; and the key is not ready before both halves came."""
    async with (
        site.running("guest"),
        site.client("guest", Role.TENANT_OPERATOR) as operator,
        site.client("guest", Role.TENANT_VERIFIER) as verifier,
    ):
        for body in ({}, {"encrypted_key": "?"}, {"encrypted_key": "AAAA"}, {"encrypted_key": "AAAA", "more": 1}):
            with pytest.raises(PeerRefusedUs):
                await verifier.post("/v2.1/keys/vkey", body)
            with pytest.raises(PeerRefusedUs):
                await operator.post("/v2.1/keys/ukey", body | {"auth_tag": "00"})
        with pytest.raises(NotReady):
            await ask(operator, "/v2.1/keys/verify", challenge="abc")
        with pytest.raises(AccessDenied):
            await operator.post("/v2.1/keys/vkey", {})
        with pytest.raises(AccessDenied):
            await verifier.post("/v2.1/keys/ukey", {})


async def test_somebody_who_resets_pcr_16_does_not_unbind_nk(site: TenantSite) -> None:
    """A process in the guest plays with PCR 16; quotes still vouch for NK, and rounds go on."""
    async with site.running(*ALL), site.operator() as operator:
        await enrol(site, operator)
        await operator.admit(await operator.registered(AGENT, deadline_s=WAIT_S), await site.order())
        view = await until(operator, attested=True)
        async with await Tpm.open(site.tcti) as tpm:
            await tpm.pcr_reset(16)
            await tpm.pcr_extend(16, {HashAlg.SHA256: bytes(32)})
        await until(operator, state="GET_QUOTE", attestation_count=view["attestation_count"] + 3)


async def test_an_ak_without_its_auth_value_is_not_replaced(site: TenantSite) -> None:
    """The file with the authValue is lost: the agent says so and stops; it makes no other AK."""
    async with site.running("guest"), site.client("guest", Role.TENANT_VERIFIER) as peer:
        await until_up(peer)
    (site.folder / "agent" / "ak-auth").unlink()
    with pytest.raises(CapabilityMissing, match="ak-auth"):
        await site.guest_agent().run()


async def test_a_vtpm_without_certificate_is_named(site: TenantSite) -> None:
    """A vTPM that our provider did not make has nothing to register with."""
    await wipe_certificate(site)
    with pytest.raises(CapabilityMissing, match="EK certificate"):
        await site.guest_agent().run()


async def until_up(peer: PeerClient) -> None:
    async with asyncio.timeout(WAIT_S):
        while True:
            try:
                await peer.get("/version")
            except PeerUnreachable:
                await asyncio.sleep(0.05)
            else:
                return


async def wipe_certificate(site: TenantSite) -> None:
    async with await Tpm.open(site.tcti) as tpm:
        await tpm.nv_write(0x01C00002, bytes(64))
