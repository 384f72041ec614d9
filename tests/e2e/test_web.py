"""Servers over real TLS sockets: who may come in, what is answered, how they start and stop."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from harness.config import Listen, ProviderVerifierSettings, dump, load
from harness.errors import (
    AccessDenied,
    ConfigError,
    PeerRefusedUs,
    PeerUnreachable,
    PoolFull,
    ShuttingDown,
)
from harness.peer import PeerClient
from harness.pki import Role, load_certificate
from harness.tls import certificate_requester, client_context, identities_of, server_context, trust_also
from harness.web import application, serve
from tests.support.web_lab import WAIT_S, Pki, refusal, service, wire


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path / "pki")


# --- who may come in -----------------------------------------------------------------------------------------


async def test_the_server_knows_its_caller(pki: Pki) -> None:
    """A handler sees authority, role, name and requester, all from the client's certificate."""
    tls = pki.tls("alice", name="v1")
    async with service(pki) as running, PeerClient(tls, running.url) as client:
        assert await client.get("/v1/whoami") == {
            "authority": "alice",
            "role": "tenant-verifier",
            "name": "v1",
            "id": certificate_requester(load_certificate(tls.certificate)).hex(),
        }


async def test_both_ends_ask_for_a_certificate_and_tls_1_3_is_used(pki: Pki) -> None:
    """Contexts require certificates on both sides, refuse less than TLS 1.2, and agree on 1.3."""
    tls = pki.tls("alice")
    server, client = server_context(tls), client_context(tls)
    assert (server.verify_mode, client.verify_mode) == (ssl.CERT_REQUIRED, ssl.CERT_REQUIRED)
    assert client.check_hostname
    assert server.minimum_version == client.minimum_version == ssl.TLSVersion.TLSv1_2
    async with service(pki) as running, wire(tls, running.port) as bare:
        assert bare.writer.get_extra_info("ssl_object").version() == "TLSv1.3"


async def test_two_authorities_with_one_name_are_told_apart(pki: Pki) -> None:
    """Two tenants' authorities with equal subjects: both come in, each as itself."""
    for name in ("alice", "bob"):
        pki.authority(name, subject="Tenant CA")
    seen = []
    async with service(pki, trusts=("provider", "alice", "bob")) as running:
        for name in ("alice", "bob"):
            async with PeerClient(pki.tls(name), running.url) as client:
                answer = await client.get("/v1/whoami")
                assert isinstance(answer, dict)
                seen.append(answer["authority"])
    assert seen == ["alice", "bob"]


async def ask_without_certificate(port: int, context: ssl.SSLContext) -> bytes:
    async with asyncio.timeout(WAIT_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
        try:
            writer.write(b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n")
            await writer.drain()
            return await reader.readexactly(1)
        finally:
            writer.transport.abort()


async def test_without_a_certificate_nobody_comes_in(pki: Pki) -> None:
    """A client that shows no certificate fails in the handshake, by TLS 1.2 and 1.3; no handler runs."""
    async with service(pki) as running:
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            context = ssl.create_default_context(cafile=pki.folder / "provider" / "ca.pem")
            context.minimum_version = context.maximum_version = version
            with pytest.raises((OSError, EOFError)):
                await ask_without_certificate(running.port, context)
        assert running.calls == []


async def test_old_tls_is_refused(pki: Pki) -> None:
    """A client that speaks TLS 1.1 at most does not come in, with its certificate either."""
    async with service(pki) as running:
        context = client_context(pki.tls("alice"))
        with pytest.warns(DeprecationWarning, match="TLSv1 is deprecated"):
            context.minimum_version = ssl.TLSVersion.TLSv1
        with pytest.warns(DeprecationWarning, match="TLSv1_1 is deprecated"):
            context.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises((OSError, EOFError)):
            await ask_without_certificate(running.port, context)


@pytest.mark.parametrize("case", ["expired", "foreign", "same name, other key"])
async def test_a_bad_client_certificate_fails_in_the_handshake(pki: Pki, case: str) -> None:
    """An expired certificate and one of an unknown authority: no handshake, whoever shows it; no handler runs.

    Our own client does not even show the expired one: it says what to do.
    """
    if case == "same name, other key":
        pki.authority("alice", subject="Tenant CA")
        pki.authority("mallory", subject="Tenant CA")
    tls = pki.tls("alice" if case == "expired" else "mallory", expired=case == "expired")
    async with service(pki) as running:
        error = await refusal(running, tls, "/version")
        assert type(error) is PeerUnreachable
        said = "expired at" if case == "expired" else "may not accept our certificate"
        assert said in error.detail
        with pytest.raises((OSError, EOFError)):
            await ask_without_certificate(running.port, client_context(tls))
        assert running.calls == []
        async with PeerClient(pki.tls("alice"), running.url) as honest:
            await honest.get("/version")


@pytest.mark.parametrize("role", [role for role in Role if role not in {Role.TENANT_VERIFIER, Role.TENANT_REGISTRAR}])
async def test_a_wrong_role_is_refused(pki: Pki, role: Role) -> None:
    """Another role than the route's is answered 403; a guest's certificate is no verifier's."""
    async with service(pki) as running:
        assert type(await refusal(running, pki.tls("alice", role))) is AccessDenied
        assert running.calls == []


async def test_a_role_that_a_tenant_gave_itself_is_refused(pki: Pki) -> None:
    """A route of one authority refuses the right role from another: tenants sign what they like."""
    async with service(pki) as running:
        error = await refusal(running, pki.tls("alice", Role.PROVIDER_OPERATOR), "/v1/operator")
        assert type(error) is AccessDenied
        async with PeerClient(pki.tls("provider", Role.PROVIDER_OPERATOR), running.url) as operator:
            assert isinstance(await operator.get("/v1/operator"), dict)


async def test_an_authority_comes_and_goes_while_the_server_runs(pki: Pki) -> None:
    """A new tenant comes in without a restart; a removed one is refused on the connection that it has open."""
    bob = pki.tls("bob")
    async with service(pki) as running:
        assert type(await refusal(running, bob)) is PeerUnreachable
        trust_also(running.server.context, pki.authority("bob").certificate)
        assert type(await refusal(running, bob)) is AccessDenied
        running.identities.add("bob", pki.authority("bob").certificate)
        async with PeerClient(bob, running.url) as client:
            await client.get("/v1/whoami")
            running.identities.remove("bob")
            with pytest.raises(AccessDenied):
                await client.get("/v1/whoami")


# --- what is answered ----------------------------------------------------------------------------------------


async def test_every_answer_is_an_envelope_that_is_not_stored(pki: Pki) -> None:
    """200, 403, 404, 405, 500 and 503 all are envelopes with ``Cache-Control: no-store``."""
    expected = {
        "/version": 200,
        "/v1/operator": 403,
        "/nowhere": 404,
        "/v1/echo": 405,
        "/v1/fault": 500,
        "/v1/late": 500,
        "/v1/full": 503,
    }
    async with service(pki) as running, wire(pki.tls("alice"), running.port) as bare:
        for path, status in expected.items():
            await bare.send(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            found, headers, body = await bare.answer()
            envelope = json.loads(body)
            assert (path, found) == (path, status)
            assert envelope.keys() == {"code", "status", "results"}
            assert envelope["code"] == status
            assert headers["cache-control"] == "no-store"
            assert headers["content-type"].startswith("application/json")


@pytest.mark.parametrize("method", ["HEAD", "TRACE", "OPTIONS", "DELETE", "PATCH"])
async def test_wrong_methods(pki: Pki, method: str) -> None:
    """A method that a path does not have is answered 405 with those that it has; HEAD runs no handler."""
    async with service(pki) as running, wire(pki.tls("alice"), running.port) as bare:
        await bare.send(f"{method} /v1/whoami HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode())
        status, headers, _ = await (bare.answer() if method != "HEAD" else head_answer(bare.reader))
        assert (status, headers["allow"], headers["cache-control"]) == (405, "GET", "no-store")
        assert running.calls == []


async def head_answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    """An answer to HEAD: its headers tell of a body that does not come."""
    async with asyncio.timeout(WAIT_S):
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    return int(head[0].split()[1]), {n.lower(): v for n, v in (line.split(": ", 1) for line in head[1:] if line)}, b""


async def test_an_internal_fault_tells_nothing(pki: Pki, capsys: pytest.CaptureFixture[str]) -> None:
    """The client learns one neutral sentence; the event log has the traceback."""
    async with service(pki) as running:
        error = await refusal(running, pki.tls("alice"), "/v1/fault")
    assert type(error) is PeerUnreachable
    assert "secret" not in error.detail
    assert "ZeroDivisionError: a secret of the inside" in capsys.readouterr().err


async def test_a_named_error_arrives_as_itself(pki: Pki) -> None:
    """An error of ours is rebuilt at the client; Retry-After is whole seconds, rounded up."""
    async with service(pki) as running:
        error = await refusal(running, pki.tls("alice"), "/v1/full")
    assert isinstance(error, PoolFull)
    assert (error.detail, error.retry_after_s) == ("the pools are full", 2.0)


async def test_results_and_query_pass_unchanged(pki: Pki) -> None:
    """Body and repeated query parameters arrive as they were sent."""
    async with service(pki) as running, PeerClient(pki.tls("alice"), running.url) as client:
        results = await client.call("PUT", "/v1/echo", params=[("a", "1"), ("a", "ü&=")], body={"x": [1, "ß"]})
    assert results == {"body": {"x": [1, "ß"]}, "query": [["a", "1"], ["a", "ü&="]]}


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"a": 1}', 200),
        (b"{}", 200),
        (b'{"a": 1, "root": 2}', 400),
        (b'{"a": 1, "a": 2}', 400),
        (b"[1]", 400),
        (b"null", 400),
        (b"", 400),
        (b'{"a": NaN}', 400),
        (b"\xff", 400),
    ],
)
async def test_a_body_is_an_object_with_known_members(pki: Pki, body: bytes, status: int) -> None:
    """An unknown or a repeated member, and what is no JSON object, is answered 400."""
    async with service(pki) as running, wire(pki.tls("alice"), running.port) as bare:
        await bare.send(b"POST /v1/named HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        found, _, answer = await bare.answer()
        assert found == status
        assert status == 200 or json.loads(answer)["results"] == {"error": "MalformedMessage"}


async def test_deleting_what_has_no_such_call(pki: Pki) -> None:
    """A client learns a wrong method and a wrong path as a refusal with the status."""
    async with service(pki) as running, PeerClient(pki.tls("alice"), running.url) as client:
        assert await client.post("/v1/named", {"b": None}) == {"b": None}
        for method, path, status in (("DELETE", "/v1/whoami", 405), ("GET", "/v1/none", 404)):
            with pytest.raises(PeerRefusedUs) as refused:
                await client.call(method, path)
            assert refused.value.status == status
        with pytest.raises(PeerRefusedUs):
            await client.delete("/v1/none")


# --- start and stop ------------------------------------------------------------------------------------------


async def test_a_bound_socket_is_taken_over(pki: Pki) -> None:
    """A socket that somebody else has bound is served on, and closed at the end."""
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    port = bound.getsockname()[1]
    tls = pki.tls("provider", Role.PROVIDER_VERIFIER, "server", trusts=("alice",))
    pki.authority("alice")
    async with serve(application("test", [], identities_of(tls)), tls, bound) as server:
        assert server.url == f"https://127.0.0.1:{port}"
        async with PeerClient(pki.tls("alice"), server.url) as client:
            assert isinstance(await client.get("/version"), dict)
    assert bound.fileno() == -1


async def test_a_port_in_use_is_named_with_file_and_key(pki: Pki, tmp_path: Path) -> None:
    """The error of a port in use names the settings file, the key, the address and the port."""
    tls = pki.tls("provider", Role.PROVIDER_VERIFIER, "server")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        path = tmp_path / "verifier.yml"
        dump(ProviderVerifierSettings(listen=Listen(port=port), tls=tls, database="sqlite+aiosqlite:///x.db"), path)
        settings = load(path, ProviderVerifierSettings)
        with pytest.raises(ConfigError) as refused:
            async with serve(application("test", [], identities_of(tls)), settings.tls, settings.listen):
                raise AssertionError("it serves")
    assert refused.value.detail == f"{path}: listen.port: 127.0.0.1 port {port}: Address already in use"


@pytest.mark.parametrize("broken", ["certificate", "key", "authority", "key of another"])
async def test_unusable_tls_files_are_named(pki: Pki, broken: str) -> None:
    """A missing certificate, key or authority, and a key of another certificate: ConfigError that names the file."""
    tls = pki.tls("alice")
    other = pki.tls("alice", name="other")
    gone = pki.folder / "gone.pem"
    changes: dict[str, dict[str, object]] = {
        "certificate": {"certificate": gone},
        "key": {"key": gone},
        "authority": {"authorities": {"provider": gone}},
        "key of another": {"key": other.key},
    }
    settings = tls.model_copy(update=changes[broken])
    with pytest.raises(ConfigError, match=r"gone\.pem: cannot be read|not a certificate and its key"):
        server_context(settings)
    with pytest.raises(ConfigError, match=r"gone\.pem: cannot be read|not a certificate and its key"):
        client_context(settings)


async def test_a_server_stops_in_time(pki: Pki) -> None:
    """With a call in work that does not end, a channel whose peer does not answer the close, an idle connection and
    a handshake under way, a server stops within five seconds."""
    loop = asyncio.get_running_loop()
    tls = pki.tls("provider", Role.PROVIDER_VERIFIER)
    upgrade = (
        b"GET /v1/stream HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    )
    async with AsyncExitStack() as stack:
        silent = stack.enter_context(socket.socket())
        async with service(pki) as running:
            idle, calling, mute = [await stack.enter_async_context(wire(tls, running.port)) for _ in range(3)]
            silent.connect(("127.0.0.1", running.port))
            await mute.send(upgrade)
            assert (await mute.answer())[0] == 101
            running.entered.clear()
            await calling.send(b"GET /v1/wait HTTP/1.1\r\nHost: x\r\n\r\n")
            async with asyncio.timeout(WAIT_S):
                await running.entered.wait()
            assert not running.left.is_set()
            began = loop.time()
        assert 1 < loop.time() - began < 5, "the call was given time to end, and no more"
        for each in (idle, calling, mute):
            await each.ended()
        async with asyncio.timeout(WAIT_S):
            await running.left.wait()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", running.port)).close()


async def test_a_channel_ends_when_the_server_stops(pki: Pki) -> None:
    """To a client, a server that stops has closed the channel in order; the stop does not wait for it."""
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as stack:
        client = PeerClient(pki.tls("provider", Role.PROVIDER_VERIFIER), "https://127.0.0.1:1")
        await stack.enter_async_context(client)
        async with service(pki) as running:
            client.base_url = running.url
            channel = await stack.enter_async_context(client.channel("/v1/stream"))
            received = asyncio.create_task(channel.receive())
            await channel.send("x")
            assert await received == "x"
            waiting = asyncio.create_task(channel.receive())
            began = loop.time()
        assert loop.time() - began < 1
        async with asyncio.timeout(WAIT_S):
            assert await waiting is None
            await running.left.wait()


async def test_a_running_call_may_end_while_the_server_stops(pki: Pki) -> None:
    """A call that ends soon after the stop began is answered, not cut."""
    async with PeerClient(pki.tls("alice"), "https://127.0.0.1:1", deadline_s=WAIT_S) as client:
        async with service(pki) as running:
            client.base_url = running.url
            call = asyncio.create_task(client.get("/v1/wait"))
            async with asyncio.timeout(WAIT_S):
                await running.entered.wait()
            asyncio.get_running_loop().call_later(0.2, running.release.set)
        async with asyncio.timeout(WAIT_S):
            assert await call == {}


async def test_a_call_that_does_not_end_is_answered_when_the_server_stops(pki: Pki) -> None:
    """Whoever waits learns that the service stops, and may come again."""
    async with PeerClient(pki.tls("alice"), "https://127.0.0.1:1", deadline_s=WAIT_S) as client:
        async with service(pki) as running:
            client.base_url = running.url
            call = asyncio.create_task(client.get("/v1/wait"))
            async with asyncio.timeout(WAIT_S):
                await running.entered.wait()
        async with asyncio.timeout(WAIT_S):
            with pytest.raises(ShuttingDown):
                await call
