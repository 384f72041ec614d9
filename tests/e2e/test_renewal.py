"""Certificates that are renewed, and that expire, while a service runs: over real TLS.

Size: one service, and every way in which a certificate of it, or of a client, is replaced or ends.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import datetime
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from harness.audit import AuditEntry
from harness.certificate_watch import LOOK_S, CertificateWatch
from harness.config import Listen, TlsSettings
from harness.door import Door
from harness.errors import (
    AccessDenied,
    CertificateRefused,
    ConfigError,
    HarnessError,
    NotReady,
    PeerRefusedUs,
    PeerUnreachable,
    StoreError,
)
from harness.own_certificate import Audit, Clock, OwnCertificate
from harness.peer import PeerClient
from harness.pki import Issued, Role, load_certificate, now
from harness.tls import Identities, ServerJudge, certificate_requester, identities_of
from harness.web import Route, accept_channel, application, peer_of, serve
from tests.support.certificates import LONG_S, odd, pem, put_in_place, reissue, until_expired
from tests.support.web_lab import ANYBODY, WAIT_S, Pki, wire

ODD = ("curve", "key algorithm", "signature algorithm")
SHORT_S = 10.0
"""Between the making of a certificate and the end of the first handshake with it."""
BODY = {"reason": "it would have expired"}


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path / "pki")


@dataclass(slots=True)
class Served:
    """A service, its settings and its audit trail."""

    url: str
    tls: TlsSettings
    entries: list[AuditEntry]
    channel_ended: asyncio.Event

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])


@asynccontextmanager
async def served(
    pki: Pki, tls: TlsSettings | None = None, *, fault: StoreError | None = None, clock: Clock = now
) -> AsyncIterator[Served]:
    tls = tls or pki.tls("provider", Role.PROVIDER_VERIFIER, "server", trusts=("provider", "alice"))
    entries: list[AuditEntry] = []
    ended = asyncio.Event()

    async def audit(entry: AuditEntry) -> None:
        if fault is not None:
            raise fault
        entries.append(entry)

    async def whoami(request: Any) -> object:
        return {"requester": peer_of(request).requester.hex()}

    async def stream(request: Any) -> object:
        channel, response = await accept_channel(request)
        while (text := await channel.receive()) is not None:
            await channel.send(text)
        ended.set()
        return response

    routes = [
        Route("GET", "/v1/whoami", whoami, roles=ANYBODY),
        Route("GET", "/v1/stream", stream, roles=ANYBODY, deadline_s=None),
    ]
    authorities = {name: load_certificate(path) for name, path in tls.authorities.items()}
    app = application("test", routes, Identities(authorities, clock=clock), audit=audit)
    async with serve(app, tls, Listen()) as server:
        yield Served(server.url, tls, entries, ended)


def odd_pem(issued: Issued, what: str) -> str:
    return odd(issued, what).public_bytes(Encoding.PEM).decode()


async def shown_by(port: int, tls: TlsSettings) -> x509.Certificate:
    """The certificate that the server shows in a new handshake."""
    async with wire(tls, port) as bare:
        der = bare.writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        return x509.load_der_x509_certificate(der)


async def eventually(ask: Any, expected: object) -> None:
    async with asyncio.timeout(WAIT_S):
        while True:
            if await ask() == expected:
                return
            await asyncio.sleep(0.05)


# --- PUT /v1/certificate -------------------------------------------------------------------------------------


async def test_a_renewed_certificate_is_shown_at_once_and_audited(pki: Pki) -> None:
    """After PUT the next handshake shows the new certificate, the file holds it, and who did it why is kept."""
    operator = pki.tls("provider", Role.PROVIDER_OPERATOR, "op")
    async with served(pki) as running, PeerClient(operator, running.url) as client:
        new = reissue(pki, running.tls)
        answer = await client.put("/v1/certificate", {"certificate": pem(new), **BODY})
        assert answer == {"certificate_expires": new.certificate.not_valid_after_utc.timestamp()}
        assert await shown_by(running.port, operator) == new.certificate
        assert load_certificate(running.tls.certificate) == new.certificate
        assert running.tls.certificate.stat().st_mode & 0o777 == 0o600
        [entry] = running.entries
        assert (entry.who, entry.action) == ("provider/provider-operator/op", "certificate-renew")
        assert (entry.subject, entry.reason) == ("provider-verifier/server", BODY["reason"])
        health = await client.get("/health")
        assert isinstance(health, dict)
        assert health["certificate_expires"] == new.certificate.not_valid_after_utc.timestamp()


@pytest.mark.parametrize(
    ("case", "error"),
    [
        ("another key", CertificateRefused),
        ("another role", CertificateRefused),
        ("another address", CertificateRefused),
        ("another authority", CertificateRefused),
        ("expired", CertificateRefused),
        ("not valid yet", CertificateRefused),
        ("odd curve", CertificateRefused),
        ("odd key algorithm", CertificateRefused),
        ("odd signature algorithm", CertificateRefused),
        ("two certificates", PeerRefusedUs),
        ("no certificate", PeerRefusedUs),
        ("no reason", PeerRefusedUs),
        ("unknown member", PeerRefusedUs),
    ],
)
async def test_what_is_no_renewal_is_refused(pki: Pki, case: str, error: type[HarnessError]) -> None:
    """An honest renewal passes; with one thing changed it is refused, nothing is audited and nothing changes."""
    operator = pki.tls("provider", Role.PROVIDER_OPERATOR, "op")
    async with served(pki) as running, PeerClient(operator, running.url) as client:
        before = load_certificate(running.tls.certificate)
        good = reissue(pki, running.tls)
        body: dict[str, object] = {"certificate": pem(good), **BODY}
        changed = {
            "another key": {"certificate": pem(reissue(pki, running.tls, key=ec.generate_private_key(ec.SECP256R1())))},
            "another role": {"certificate": pem(reissue(pki, running.tls, role=Role.HOST_AGENT))},
            "another address": {"certificate": pem(reissue(pki, running.tls, hosts=("127.0.0.2",)))},
            "another authority": {"certificate": pem(reissue(pki, running.tls, authority="alice"))},
            "expired": {"certificate": pem(reissue(pki, running.tls, seconds=-60))},
            "not valid yet": {"certificate": pem(reissue(pki, running.tls, at=now().replace(year=now().year + 1)))},
            **{f"odd {what}": {"certificate": odd_pem(good, what)} for what in ODD},
            "two certificates": {"certificate": pem(good) + pem(good)},
            "no certificate": {"certificate": "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"},
            "no reason": {"reason": " "},
            "unknown member": {"key": "mine"},
        }[case]
        with pytest.raises(error):
            await client.put("/v1/certificate", body | changed)
        assert (load_certificate(running.tls.certificate), running.entries) == (before, [])
        assert await shown_by(running.port, operator) == before
        await client.put("/v1/certificate", body)
        assert load_certificate(running.tls.certificate) == good.certificate


@pytest.mark.parametrize(
    ("authority", "role"),
    [
        ("alice", Role.PROVIDER_OPERATOR),
        ("alice", Role.TENANT_OPERATOR),
        ("provider", Role.TENANT_OPERATOR),
        ("provider", Role.HOST_AGENT),
    ],
)
async def test_only_the_services_own_operator_renews(pki: Pki, authority: str, role: Role) -> None:
    """Another party's operator, whatever role its authority wrote into its certificate, and other roles get 403."""
    async with served(pki) as running, PeerClient(pki.tls(authority, role, "x"), running.url) as client:
        with pytest.raises(AccessDenied):
            await client.put("/v1/certificate", {"certificate": pem(reissue(pki, running.tls)), **BODY})
        assert running.entries == []


async def test_a_tenants_service_is_renewed_by_the_tenants_operator(pki: Pki) -> None:
    """The same call on a service of a tenant."""
    tls = pki.tls("alice", Role.GUEST_AGENT, "g", trusts=("alice", "provider"))
    operator = pki.tls("alice", Role.TENANT_OPERATOR, "op", trusts=("alice",))
    async with served(pki, tls) as running, PeerClient(operator, running.url) as client:
        await client.put("/v1/certificate", {"certificate": pem(reissue(pki, tls)), **BODY})
        assert [entry.who for entry in running.entries] == ["alice/tenant-operator/op"]


async def test_without_an_audit_entry_nothing_is_renewed(pki: Pki) -> None:
    """The database does not take the entry: the call fails, and the old certificate stays everywhere."""
    operator = pki.tls("provider", Role.PROVIDER_OPERATOR, "op")
    async with served(pki, fault=StoreError("disk full")) as running, PeerClient(operator, running.url) as client:
        before = load_certificate(running.tls.certificate)
        with pytest.raises(NotReady):
            await client.put("/v1/certificate", {"certificate": pem(reissue(pki, running.tls)), **BODY})
        assert load_certificate(running.tls.certificate) == before
        assert await shown_by(running.port, operator) == before


# --- a file that changes -------------------------------------------------------------------------------------


async def test_a_file_that_another_tool_renewed_is_noticed(pki: Pki) -> None:
    """The server shows the new certificate without a call and without a restart."""
    operator = pki.tls("provider", Role.PROVIDER_OPERATOR, "op")
    assert LOOK_S <= 10
    async with served(pki) as running:
        new = reissue(pki, running.tls)
        put_in_place(new, running.tls)
        await eventually(lambda: shown_by(running.port, operator), new.certificate)
        [entry] = running.entries
        assert (entry.who, entry.action, entry.reason) == ("file", "certificate-renew", "(taken from its file)")
        assert entry.subject == "provider-verifier/server"


async def test_a_file_that_cannot_be_audited_waits(pki: Pki, capfd: pytest.CaptureFixture[str]) -> None:
    """Told once; it is taken into use as soon as the audit trail takes the entry."""
    tls, entries, fault = pki.tls("alice"), [], [StoreError("disk full")]
    own = OwnCertificate(tls)
    before, new = own.certificate, reissue(pki, tls)

    async def audit(entry: AuditEntry) -> None:
        for each in fault:
            raise each
        entries.append(entry)

    async def nothing() -> None:
        pass

    watch = CertificateWatch(own, audit, nothing)
    put_in_place(new, tls)
    for _ in range(3):
        await watch.look()
        assert own.certificate == before
    assert capfd.readouterr().err.count('"certificate_not_audited"') == 1
    fault.clear()
    for _ in range(3):
        await watch.look()
    assert (own.certificate, len(entries)) == (new.certificate, 1)


async def test_a_renewal_by_a_call_is_not_audited_again_as_one_by_file(pki: Pki) -> None:
    """Also when the watch looks between the file's appearance and the end of the call."""
    tls, entries = pki.tls("alice", trusts=("alice",)), []
    own = OwnCertificate(tls)
    entry = AuditEntry(at=1.0, who="op", action="certificate-renew", subject="x", reason="why")

    async def audit(entry: AuditEntry) -> None:
        entries.append(entry.who)
        await asyncio.sleep(0)

    looking = asyncio.Event()

    async def look() -> None:
        while not looking.is_set():
            await own.take_file(audit)
            await asyncio.sleep(0)

    task = asyncio.create_task(look())
    for _ in range(20):
        await own.replace(pem(reissue(pki, tls)), entry, audit)
    looking.set()
    await task
    assert entries == ["op"] * 20


@pytest.mark.parametrize("content", ["", "half a certificate", "foreign", *ODD])
async def test_a_bad_file_is_an_error_event_and_the_old_certificate_stays(
    pki: Pki, content: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Empty, half written, on another key, or on one that nobody can use: told once; a good one is taken."""
    operator = pki.tls("provider", Role.PROVIDER_OPERATOR, "op")
    async with served(pki) as running:
        before = load_certificate(running.tls.certificate)
        good = reissue(pki, running.tls)
        foreign = reissue(pki, running.tls, key=ec.generate_private_key(ec.SECP256R1()))
        made = {"half a certificate": pem(good)[:300], "foreign": pem(foreign)}
        text = odd_pem(good, content) if content in ODD else made.get(content, content)
        running.tls.certificate.write_text(text)
        said = ""
        async with asyncio.timeout(WAIT_S):
            while "certificate_refused" not in said:
                await asyncio.sleep(0.05)
                said += capfd.readouterr().err
        assert await shown_by(running.port, operator) == before
        put_in_place(good, running.tls)
        await eventually(lambda: shown_by(running.port, operator), good.certificate)
        assert (said + capfd.readouterr().err).count("certificate_refused") == 1


@pytest.mark.parametrize("what", ODD)
async def test_a_client_goes_on_under_an_odd_file(pki: Pki, what: str) -> None:
    """A certificate that parses and cannot be used is no error of a call: the one before is shown."""
    tls = pki.tls("alice")
    async with served(pki) as running, PeerClient(tls, running.url) as client:
        before = await client.get("/v1/whoami")
        good = reissue(pki, tls)
        tls.certificate.write_text(odd_pem(good, what))
        for _ in range(2):
            assert await client.get("/v1/whoami") == before
        put_in_place(good, tls)
        assert await client.get("/v1/whoami") == before


@pytest.mark.parametrize("what", ODD[:2])
def test_a_service_does_not_start_with_an_odd_certificate(pki: Pki, what: str) -> None:
    """One sentence that names the file."""
    tls = pki.tls("alice")
    tls.certificate.write_text(odd_pem(reissue(pki, tls), what))
    with pytest.raises(ConfigError, match=f"{tls.certificate}: its key cannot be used"):
        OwnCertificate(tls)


@pytest.mark.parametrize("what", ODD)
def test_a_peer_with_an_odd_certificate_is_denied(pki: Pki, what: str) -> None:
    """Whatever the TLS layer lets through: a refusal, by the server and by a client that pinned the key."""
    tls = pki.tls("alice", trusts=("alice",))
    der = odd(reissue(pki, tls), what).public_bytes(Encoding.DER)
    with pytest.raises(AccessDenied, match="no authority that is known here"):
        identities_of(tls).peer(der)
    if what in ODD[:2]:
        with pytest.raises(CertificateRefused, match="its key cannot be used"):
            ServerJudge(pinned=load_certificate(tls.certificate))(der)


# --- the server's own tasks ----------------------------------------------------------------------------------


async def test_a_look_that_fails_is_not_the_last(
    pki: Pki, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """An unforeseen exception of one look is told, and the next look finds the renewed file."""
    operator = pki.tls("provider", Role.PROVIDER_OPERATOR, "op")
    take_file, faults = OwnCertificate.take_file, iter([ZeroDivisionError("unforeseen")])

    async def fail_once(own: OwnCertificate, audit: Audit) -> bool:
        for fault in faults:
            raise fault
        return await take_file(own, audit)

    monkeypatch.setattr(OwnCertificate, "take_file", fail_once)
    async with served(pki) as running:
        new = reissue(pki, running.tls)
        put_in_place(new, running.tls)
        await eventually(lambda: shown_by(running.port, operator), new.certificate)
    assert "internal_fault" in capfd.readouterr().err


@pytest.mark.parametrize("task", [CertificateWatch, Door])
async def test_a_server_ends_with_each_of_its_tasks(pki: Pki, task: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that accepts nobody, or does not watch its certificate, is not kept: its caller gets the fault."""

    async def fail(*_: object) -> None:
        raise ZeroDivisionError("unforeseen")

    monkeypatch.setattr(task, "run", fail)
    with pytest.raises(ZeroDivisionError):
        async with asyncio.timeout(WAIT_S), served(pki):
            await asyncio.Event().wait()


async def test_a_fault_of_the_caller_comes_out_as_it_is(pki: Pki) -> None:
    """Not as a group, and with its own cause."""
    with pytest.raises(StoreError) as caught:
        async with served(pki):
            raise StoreError("disk full") from OSError("no space")
    assert isinstance(caught.value.__cause__, OSError)


# --- a client's file -----------------------------------------------------------------------------------------


async def test_a_client_shows_its_renewed_certificate_in_the_next_call(pki: Pki) -> None:
    """Same key, same requester; a call that is under way on the old connection ends well; nothing stays open."""
    tls = pki.tls("alice")
    async with served(pki) as running, PeerClient(tls, running.url) as client:
        before = await client.get("/v1/whoami")
        async with client.channel("/v1/stream") as channel:
            put_in_place(reissue(pki, tls), tls)
            assert await client.get("/v1/whoami") == before
            await channel.send("still here")
            assert await channel.receive() == "still here"
        requester = certificate_requester(load_certificate(tls.certificate)).hex()
        assert before == {"requester": requester}


# --- expiry --------------------------------------------------------------------------------------------------


async def test_an_open_connection_is_refused_when_its_certificate_expires(pki: Pki) -> None:
    """A request on a connection that was made in time is answered 401 after the end, in one sentence."""
    tls = pki.tls("alice")
    at = [now()]
    async with served(pki, clock=lambda: at[0]) as running, wire(tls, running.port) as bare:
        request = b"GET /v1/whoami HTTP/1.1\r\nHost: x\r\n\r\n"
        await bare.send(request)
        assert (await bare.answer())[0] == 200
        at[0] += datetime.timedelta(days=2)
        await bare.send(request)
        status, _, body = await bare.answer()
        envelope = json.loads(body)
        assert (status, envelope["results"]) == (401, {"error": "CertificateExpired"})
        assert "harness lab renew" in envelope["status"]


async def test_a_client_says_that_its_own_certificate_expired_and_works_again_when_renewed(pki: Pki) -> None:
    """No bare TLS alert: file, time and what to type; the renewed file is used without a restart."""
    tls = pki.tls("alice")
    at = [now()]
    async with served(pki) as running, PeerClient(tls, running.url, clock=lambda: at[0]) as client:
        await client.get("/v1/whoami")
        at[0] += datetime.timedelta(days=2)
        with pytest.raises(PeerUnreachable) as caught:
            await client.get("/v1/whoami")
        assert f"our own certificate {tls.certificate} expired at " in caught.value.detail
        assert "harness lab renew" in caught.value.detail
        put_in_place(reissue(pki, tls, seconds=4 * LONG_S), tls)
        await client.get("/v1/whoami")


async def test_a_channel_ends_with_the_certificate_that_opened_it(pki: Pki) -> None:
    """A WebSocket is one long request: both ends give it up when the certificate has expired."""
    tls = pki.tls("alice")
    put_in_place(reissue(pki, tls, seconds=SHORT_S), tls)
    async with served(pki) as running, PeerClient(tls, running.url) as client, asyncio.timeout(WAIT_S):
        async with client.channel("/v1/stream") as channel:
            with contextlib.suppress(PeerUnreachable):
                assert await channel.receive() is None
        await running.channel_ended.wait()
        assert now() > load_certificate(tls.certificate).not_valid_after_utc


async def test_a_channel_is_made_anew_before_the_old_certificate_expires(pki: Pki) -> None:
    """With a renewed file the client closes a channel of the old certificate in time; the next one shows the new."""
    tls = pki.tls("alice")
    put_in_place(reissue(pki, tls, seconds=30), tls)
    old = load_certificate(tls.certificate)
    async with served(pki) as running, PeerClient(tls, running.url) as client, asyncio.timeout(WAIT_S):
        async with client.channel("/v1/stream") as channel:
            put_in_place(reissue(pki, tls), tls)
            assert await channel.receive() is None
        assert now() < old.not_valid_after_utc
        async with client.channel("/v1/stream") as channel:
            await channel.send("again")
            assert await channel.receive() == "again"


async def test_a_server_whose_certificate_expired_is_not_believed_until_it_is_renewed(pki: Pki) -> None:
    """An open connection does not outlive the server's certificate; the renewed file brings the server back."""
    server_tls = pki.tls("provider", Role.PROVIDER_VERIFIER, "server", trusts=("provider", "alice"))
    put_in_place(reissue(pki, server_tls, seconds=SHORT_S), server_tls)
    async with served(pki, server_tls) as running, PeerClient(pki.tls("alice"), running.url) as client:
        await client.get("/v1/whoami")
        await until_expired(server_tls)
        with pytest.raises(PeerUnreachable, match="certificate has expired"):
            await client.get("/v1/whoami")
        put_in_place(reissue(pki, server_tls), server_tls)

        async def answered() -> bool:
            try:
                await client.get("/v1/whoami")
            except PeerUnreachable:
                return False
            return True

        await eventually(answered, True)


async def test_what_is_about_to_expire_is_told(pki: Pki, capfd: pytest.CaptureFixture[str]) -> None:
    """A certificate with less than 14 days left is a warning at the start; one of a year is none."""
    tls = pki.tls("provider", Role.PROVIDER_VERIFIER, "server", trusts=("provider", "alice"))
    for seconds, told in ((86400.0 * 365, 0), (86400.0 * 13, 1)):
        put_in_place(reissue(pki, tls, seconds=seconds), tls)
        async with served(pki, tls) as running, PeerClient(pki.tls("alice"), running.url) as client:
            await client.get("/version")
        assert capfd.readouterr().err.count('"certificate_expires"') == told


# --- the server's role and key -------------------------------------------------------------------------------


async def test_a_client_talks_to_a_server_of_the_right_role_only(pki: Pki) -> None:
    """Same authority, another role: refused in the handshake, before anything was sent."""
    async with served(pki) as running:
        async with PeerClient(pki.tls("alice"), running.url, roles={Role.PROVIDER_VERIFIER}) as client:
            await client.get("/v1/whoami")
        async with PeerClient(pki.tls("alice"), running.url, roles={Role.HOST_AGENT}) as client:
            with pytest.raises(PeerUnreachable, match="its owner is a provider-verifier, not a host-agent"):
                await client.get("/v1/whoami")


async def test_a_pinned_server_may_show_a_renewal_and_nothing_else(pki: Pki) -> None:
    """Pinned is the key: a renewal that our authority signed is accepted, the same name on another key is not."""
    tls = pki.tls("provider", Role.PROVIDER_VERIFIER, "server", trusts=("provider", "alice"))
    pinned = load_certificate(tls.certificate)
    async with served(pki, tls) as running, PeerClient(pki.tls("alice"), running.url, pinned=pinned) as client:
        await client.get("/v1/whoami")
        put_in_place(reissue(pki, tls), tls)
        await eventually(lambda: shown_by(running.port, pki.tls("alice")), load_certificate(tls.certificate))
        async with PeerClient(pki.tls("alice"), running.url, pinned=pinned) as anew:
            await anew.get("/v1/whoami")
    other = pki.tls("provider", Role.PROVIDER_VERIFIER, "server", trusts=("provider", "alice"))
    async with served(pki, other) as running, PeerClient(pki.tls("alice"), running.url, pinned=pinned) as client:
        with pytest.raises(PeerUnreachable, match="not the pinned one"):
            await client.get("/v1/whoami")


def test_no_client_of_ours_forgets_the_role() -> None:
    """Every `PeerClient` that the package makes says which role it expects."""
    package = Path(__file__).parents[2] / "harness"
    forgetful = [
        f"{path.relative_to(package)}:{call.lineno}"
        for path in package.rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call)
        and getattr(call.func, "id", None) == "PeerClient"
        and "roles" not in {keyword.arg for keyword in call.keywords}
    ]
    assert forgetful == []


def test_the_private_files_are_private(pki: Pki) -> None:
    """Certificates and keys that are written are readable by their owner only."""
    tls = pki.tls("alice")
    assert [os.stat(path).st_mode & 0o777 for path in (tls.certificate, tls.key)] == [0o600, 0o600]
