"""The operator's ways back over real mutual TLS, with a real vTPM: resume, reference values, alarms, moved guests."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import sqlite3
import ssl
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from harness.errors import AccessDenied, Conflict, MalformedMessage, NotFound, NotYourGuest, PeerRefusedUs
from harness.peer import PeerClient
from harness.pki import Role
from harness.tenant.operator import TenantOperator
from tests.support.tenant_site import TENANT, WAIT_S, TenantSite, new_tenant_site
from tests.support.tenant_wire import AGENT
from tests.support.webhook_receiver import ReceiverLog, receiving

pytestmark = pytest.mark.needs_swtpm

ALL = ("registrar", "verifier", "guest")
PATH = f"/v2.1/agents/{AGENT}"
WHO = "alice/tenant-operator/somebody"


@pytest.fixture
async def site() -> AsyncIterator[TenantSite]:
    async with new_tenant_site() as made:
        yield made


async def admit(site: TenantSite, operator: TenantOperator, **changes: Any) -> None:
    """Host and guest, enrolled and under attestation."""
    await operator.add_host(site.provider_url)
    await operator.state_guest(AGENT, site.provider.host.host_id)
    await operator.admit(await operator.registered(AGENT, deadline_s=WAIT_S), await site.order(**changes))


async def until(verifier: PeerClient, **expected: Any) -> Mapping[str, Any]:
    """The agent's view, once it shows what is expected."""
    view: Any = {}
    try:
        async with asyncio.timeout(WAIT_S):
            while True:
                view = await verifier.get(PATH)
                if expected.items() <= view.items():
                    return dict(view)
                await asyncio.sleep(0.05)
    except TimeoutError:
        pytest.fail(f"waited for {expected}, saw {view}")


async def rounds_go_on(verifier: PeerClient, since: Mapping[str, Any], *, more: int = 2) -> Mapping[str, Any]:
    """The view, once so many more rounds were accepted than then."""
    async with asyncio.timeout(WAIT_S):
        while True:
            view = await until(verifier, attested=True)
            if view["attestation_count"] >= since["attestation_count"] + more:
                return view
            await asyncio.sleep(0.05)


async def alarms(verifier: PeerClient, *, everything: bool = False) -> list[Any]:
    answer: Any = await verifier.get("/v1/alarms", [("all", "true")] if everything else [])
    return list(answer["alarms"])


async def test_from_a_changed_kernel_back_to_attested(site: TenantSite) -> None:
    """Alarm, capture of what was seen, new values, resume, acknowledgement: each audited with who and why."""
    async with (
        site.running(*ALL),
        site.operator() as operator,
        site.client("verifier", Role.TENANT_OPERATOR) as verifier,
    ):
        await admit(site, operator)
        view = await until(verifier, attested=True, payload_released=True)
        assert view["host_ak_name"] == site.provider.tpm.ak.name.hex()
        assert view["quote_interval_s"] == 0.2
        assert {verdict["layer"] for verdict in view["last_verdicts"]} == {"guest", "host"}
        site.provider.tpm.pcrs[4] = bytes(range(32))
        view = await until(verifier, state="INVALID_QUOTE", failed_check=9, layer="host", next_round_at=None)
        assert view["last_verdicts"][-1]["error"] == "ReferenceValueMismatch"
        [alarm] = await alarms(verifier)
        assert (alarm["kind"], alarm["agent_id"]) == ("ReferenceValueMismatch", str(AGENT))

        policy: Any = await verifier.get(PATH + "/policy")
        seen = policy["seen"]["host"]["pcrs"]
        assert seen == {"sha256": {"4": bytes(range(32)).hex()}}
        captured = {bank: {pcr: [value] for pcr, value in values.items()} for bank, values in seen.items()}
        await verifier.put(PATH + "/policy", {"reason": "kernel 6.12", "host_policy": captured})
        await until(verifier, state="INVALID_QUOTE", attested=False)
        await verifier.put(PATH + "/resume", {"reason": "kernel 6.12 was rolled out"})
        await until(verifier, attested=True, error=None)
        await verifier.put(f"/v1/alarms/{alarm['id']}/acknowledge", {"reason": "expected"})
        assert await alarms(verifier) == []
        [acknowledged] = await alarms(verifier, everything=True)
        assert (acknowledged["acknowledged_by"], acknowledged["reason"]) == (WHO, "expected")

        trail: Any = await verifier.get("/v1/audit")
        assert [(each["action"], each["who"], each["reason"]) for each in trail["entries"]] == [
            ("agent-add", f"{TENANT}/tenant-operator/op", "(not stated)"),
            ("policy-set", WHO, "kernel 6.12"),
            ("resume", WHO, "kernel 6.12 was rolled out"),
            ("alarm-acknowledge", WHO, "expected"),
        ]


async def test_a_refused_reboot_is_accepted_once_by_the_operator(site: TenantSite) -> None:
    """The host's counters changed: resume alone is refused again, accept_reboot goes on, twice is a conflict."""
    async with (
        site.running(*ALL),
        site.operator() as operator,
        site.client("verifier", Role.TENANT_OPERATOR) as verifier,
    ):
        await admit(site, operator)
        await until(verifier, attested=True)
        site.provider.tpm.reboot()
        await until(verifier, state="INVALID_QUOTE", error="HostRebooted", failed_check=10)
        await verifier.put(PATH + "/resume", {})
        await until(verifier, state="INVALID_QUOTE", error="HostRebooted", failed_check=10)
        await verifier.put(PATH + "/resume", {"accept_reboot": True, "reason": "power cut"})
        await until(verifier, attested=True)
        with pytest.raises(Conflict):
            await verifier.put(PATH + "/resume", {"accept_reboot": True})


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/policy", {"host_policy": {"sha256": {"4": ["00" * 32]}}}),
        ("/policy", {"reason": "", "host_policy": {"sha256": {"4": ["00" * 32]}}}),
        ("/policy", {"reason": "x"}),
        ("/policy", {"reason": "x", "host_policy": {"sha256": {"7": ["00" * 32]}}}),
        ("/policy", {"reason": "x", "guest_mask": "0x1"}),
        ("/policy", []),
        ("/resume", {"accept_reboot": "yes"}),
        ("/resume", {"reason": 5}),
        ("/resume", {"force": True}),
    ],
)
async def test_an_act_that_is_not_well_formed_changes_nothing(site: TenantSite, path: str, body: Any) -> None:
    """400: no reason, no values, values wider than the mask, unknown or wrong members; nothing in the trail."""
    async with (
        site.running(*ALL),
        site.operator() as operator,
        site.client("verifier", Role.TENANT_OPERATOR) as verifier,
    ):
        await admit(site, operator)
        await until(verifier, attested=True)
        before = await verifier.get(PATH + "/policy")
        with pytest.raises((MalformedMessage, PeerRefusedUs)) as refused:
            await verifier.put(PATH + path, body)
        assert getattr(refused.value, "status", 400) == 400
        after: Any = await verifier.get(PATH + "/policy")
        assert after["host_policy"] == dict(before)["host_policy"]  # type: ignore[call-overload]
        trail: Any = await verifier.get("/v1/audit")
        assert [entry["action"] for entry in trail["entries"]] == ["agent-add"]


async def test_only_the_operator_may_overrule(site: TenantSite) -> None:
    """Every other role of the tenant is refused; an unknown agent or alarm is 404."""
    async with site.running("registrar", "verifier"):
        async with site.client("verifier", Role.TENANT_REGISTRAR) as other:
            for call in (
                other.put(PATH + "/resume", {}),
                other.put(PATH + "/policy", {"reason": "x"}),
                other.get(PATH + "/policy"),
                other.get("/v1/alarms"),
                other.put("/v1/alarms/1/acknowledge", {"reason": "x"}),
                other.get("/v1/audit"),
            ):
                with pytest.raises(AccessDenied):
                    await call
        async with site.client("verifier", Role.TENANT_OPERATOR) as operator:
            for call in (
                operator.put(PATH + "/resume", {}),
                operator.get(PATH + "/policy"),
                operator.put("/v1/alarms/1/acknowledge", {"reason": "x"}),
                operator.delete(PATH + "?reason=gone"),
            ):
                with pytest.raises(NotFound):
                    await call


async def test_a_guest_agent_that_moves_is_attested_where_it_is_now(site: TenantSite) -> None:
    """Stopped, and started on another port with a new certificate: rounds go on, with the same keys, by themselves."""
    async with (
        site.running("registrar", "verifier"),
        site.operator() as operator,
        site.client("verifier", Role.TENANT_OPERATOR) as verifier,
    ):
        async with site.running("guest"):
            await admit(site, operator)
            before = await until(verifier, attested=True, payload_released=True)
        site.sockets.pop("guest").close()
        site.sockets["guest"] = moved = socket.create_server(("127.0.0.1", 0))
        async with site.running("guest"):
            view = await until(verifier, attested=True, port=moved.getsockname()[1])
            await rounds_go_on(verifier, view)
            assert view["ak_name"] == before["ak_name"]
            assert view["port"] != before["port"]
            assert await alarms(verifier) == []


async def test_a_verifier_that_restarts_goes_on_at_once_and_by_itself(site: TenantSite) -> None:
    """Killed while the guest is away, and started again: SAVED sessions start anew, no enrolment, no operator."""
    async with site.running("registrar"), site.operator() as operator:
        async with (
            site.running("verifier", "guest"),
            site.client("verifier", Role.TENANT_OPERATOR) as verifier,
        ):
            await admit(site, operator)
            before = await until(verifier, attested=True)
        async with site.running("verifier"), site.client("verifier", Role.TENANT_OPERATOR) as verifier:
            await until(verifier, attested=False, state="GET_QUOTE_RETRY")
            async with site.running("guest"):
                after = await until(verifier, attested=True)
                assert after["attestation_count"] > before["attestation_count"]
                assert after["ak_name"] == before["ak_name"]


async def test_a_locked_database_is_waited_for(site: TenantSite) -> None:
    """Somebody holds the database's write lock: StoreError is shown, nobody is attested, and then rounds go on."""
    async with (
        site.running(*ALL),
        site.operator() as operator,
        site.client("verifier", Role.TENANT_OPERATOR) as verifier,
    ):
        await admit(site, operator)
        before = await until(verifier, attested=True)
        holder = sqlite3.connect(site.folder / "verifier.db", isolation_level=None, check_same_thread=False)
        try:
            await asyncio.to_thread(holder.execute, "BEGIN IMMEDIATE")  # who holds it now needs this loop to let go
            await until(verifier, attested=False, error="StoreError", layer="verifier")
            holder.execute("ROLLBACK")
        finally:
            holder.close()
        view = await until(verifier, attested=True, error=None)
        await rounds_go_on(verifier, before)
        assert view["state"] != "TENANT_FAILED"
        assert await alarms(verifier) == []


# --- notifications ------------------------------------------------------------------------------------------------


def told(body: Mapping[str, Any]) -> tuple[str, str | None, int | None]:
    return body["kind"], body["layer"], body["failed_check"]


async def test_a_failed_attestation_is_told_to_every_receiver(site: TenantSite) -> None:
    """Over HTTP in our own form, over HTTPS in Keylime's, whose signature verifies with the published certificate."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority_file = site.folder / "receiver-ca.pem"
    authority.cert_pem.write_to_path(authority_file)
    native, keylime = ReceiverLog(), ReceiverLog()
    async with receiving(native) as plain_port, receiving(keylime, context=context) as tls_port:
        site.verifier_extra["notify"] = [
            {"url": f"http://127.0.0.1:{plain_port}/hook?token=t"},
            {"url": f"https://127.0.0.1:{tls_port}/revoke", "format": "keylime", "authority": authority_file},
        ]
        async with site.running(*ALL), site.operator() as operator:
            site.provider.tpm.pcrs[4], honest = bytes(32), site.provider.tpm.pcrs[4]
            order = await site.order()
            site.provider.tpm.pcrs[4] = honest
            await operator.add_host(site.provider_url)
            await operator.state_guest(AGENT, site.provider.host.host_id)
            await operator.admit(await operator.registered(AGENT, deadline_s=WAIT_S), order)
            [ours] = await native.wait_for(1)
            assert told(ours) == ("ReferenceValueMismatch", "host", 9)
            assert ours["agent_id"] == str(AGENT)
            [theirs] = await keylime.wait_for(1)
            message = verified(site.folder, theirs)
            assert (message["type"], message["agent_id"]) == ("revocation", str(AGENT))
            assert message["ip"] == "127.0.0.1"


def verified(folder: Path, body: Mapping[str, str]) -> dict[str, Any]:
    """The message, if it is signed as Keylime's clients expect."""
    assert (folder / "revocation.key").stat().st_mode & 0o777 == 0o600
    public = x509.load_pem_x509_certificate((folder / "revocation.crt").read_bytes()).public_key()
    assert isinstance(public, rsa.RSAPublicKey)
    pss = padding.PSS(mgf=padding.MGF1(hashes.SHA256()), salt_length=padding.PSS.MAX_LENGTH)
    public.verify(base64.b64decode(body["signature"]), body["msg"].encode(), pss, hashes.SHA256())
    return dict(json.loads(body["msg"]))


async def test_a_receiver_that_is_away_is_told_after_a_restart_of_the_verifier(site: TenantSite) -> None:
    """Nobody listens, then 500 and a redirect are answered, the verifier restarts in between: it comes in the end."""
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    site.verifier_extra["notify"] = [{"url": f"http://127.0.0.1:{port}/hook"}]
    site.provider.refusal = NotYourGuest("not your guest")
    log = ReceiverLog()
    log.statuses = [500, 302]
    async with site.running("registrar", "guest"):
        async with (
            site.running("verifier"),
            site.operator() as operator,
            site.client("verifier", Role.TENANT_OPERATOR) as verifier,
        ):
            await admit(site, operator)
            await until(verifier, state="FAILED", error="NotYourGuest")
        assert notified(site.folder) == [None]
        async with site.running("verifier"), receiving(log, port=port):
            bodies = await log.wait_for(3)
            assert {told(body) for body in bodies} == {("NotYourGuest", "host", None)}
            await marked(site.folder)
        async with site.running("verifier"), receiving(log, port=port):
            async with site.client("verifier", Role.TENANT_OPERATOR) as verifier:
                await until(verifier, state="FAILED")
            assert len(log.bodies) == 3


async def marked(folder: Path) -> None:
    """Waits until every alarm is marked as told."""
    async with asyncio.timeout(WAIT_S):
        while True:
            if None not in notified(folder):
                return
            await asyncio.sleep(0.05)


def notified(folder: Path) -> list[float | None]:
    connection = sqlite3.connect(folder / "verifier.db")
    try:
        return [row[0] for row in connection.execute("SELECT notified_at FROM alarms")]
    finally:
        connection.close()
