"""Clients over real TLS sockets: whom they talk to, what they bound, and channels."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from cryptography import x509

from harness.config import Listen
from harness.errors import (
    DeadlineExceeded,
    HarnessError,
    MalformedMessage,
    MessageTooLarge,
    PeerRefusedUs,
    PeerUnreachable,
)
from harness.peer import PeerClient
from harness.pki import Role, load_certificate
from harness.tls import client_context, identities_of, server_context
from harness.web import Route, application, serve
from tests.support.web_lab import WAIT_S, Pki, service


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path / "pki")


# --- whom a client talks to ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["foreign", "expired", "other host"])
async def test_a_bad_server_certificate_is_refused(pki: Pki, case: str) -> None:
    """A server of an unknown authority, an expired one and one for another host: PeerUnreachable, nothing is sent."""
    authority = "mallory" if case == "foreign" else "provider"
    hosts = ("10.9.8.7",) if case == "other host" else ("127.0.0.1",)
    tls = pki.tls(authority, Role.PROVIDER_VERIFIER, "x", trusts=("alice",), hosts=hosts, expired=case == "expired")
    app = application("test", [], identities_of(tls))
    async with serve(app, tls, Listen()) as server, PeerClient(pki.tls("alice"), server.url) as client:
        with pytest.raises(PeerUnreachable, match="certificate that is not accepted"):
            await client.get("/version")


async def test_a_pinned_server_is_that_one_only(pki: Pki) -> None:
    """With a pinned certificate, the client still shows its own, and another server's is refused before anything is
    sent, even one that the client's authorities vouch for."""
    async with service(pki) as running:
        pinned = load_certificate(pki.folder / "provider" / "provider-verifier-server.pem")
        tls = pki.tls("alice", trusts=("provider",))
        async with PeerClient(tls, running.url, pinned=pinned) as client:
            assert isinstance(await client.get("/v1/whoami"), dict)
        calls = list(running.calls)
        other = x509.load_pem_x509_certificate(
            pki.tls("provider", Role.PROVIDER_VERIFIER, "other").certificate.read_bytes()
        )
        async with PeerClient(tls, running.url, pinned=other) as client:
            with pytest.raises(PeerUnreachable, match="certificate that is not accepted"):
                await client.put("/v1/echo", {"share": "v"})
        assert running.calls == calls


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "127.0.0.1:1", "ws://127.0.0.1:1", ""])
def test_a_client_speaks_tls_only(pki: Pki, url: str) -> None:
    """An address that is not https is refused when the client is made."""
    with pytest.raises(MalformedMessage, match="https"):
        PeerClient(pki.tls("alice"), url)


# --- what a client bounds ------------------------------------------------------------------------------------


async def test_a_header_goes_with_its_call(pki: Pki) -> None:
    """Over the wire, beside those of every call; the next call has it no more."""
    tls = pki.tls("provider", Role.PROVIDER_VERIFIER, "headers", trusts=("alice",))

    async def show(request: web.Request) -> object:
        return {name: request.headers.get(name) for name in ("Prefer", "Accept")}

    app = application("test", [Route("GET", "/v1/headers", show, roles=set(Role))], identities_of(tls))
    async with (
        serve(app, tls, Listen()) as server,
        PeerClient(pki.tls("alice", trusts=("provider",)), server.url) as client,
    ):
        given = await client.get("/v1/headers", headers={"Prefer": "wait=7"})
        assert given == {"Prefer": "wait=7", "Accept": "application/json"}
        assert await client.get("/v1/headers") == {"Prefer": None, "Accept": "application/json"}


async def test_a_large_answer_is_refused(pki: Pki) -> None:
    """An answer above the client's limit is not read to its end."""
    async with service(pki) as running, PeerClient(pki.tls("alice"), running.url, limit=10_000) as client:
        assert isinstance(await client.get("/v1/big", [("size", "9000")]), dict)
        with pytest.raises(MessageTooLarge):
            await client.get("/v1/big", [("size", "3000000")])
        assert isinstance(await client.get("/v1/big", [("size", "9000")]), dict)


async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            writer.write(b"1000\r\n" + b" " * 0x1000 + b"\r\n")
            await writer.drain()


async def test_an_endless_answer_is_refused(pki: Pki) -> None:
    """A peer that never stops answering is left as soon as it is above the limit."""
    tls = pki.tls("provider", Role.PROVIDER_VERIFIER, "endless", trusts=("alice",))
    async with await asyncio.start_server(endless, "127.0.0.1", 0, ssl=server_context(tls)) as server:
        url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with PeerClient(pki.tls("alice"), url, deadline_s=WAIT_S, limit=100_000) as client:
            with pytest.raises(MessageTooLarge):
                await client.get("/version")


async def test_a_slow_answer_exceeds_the_deadline(pki: Pki) -> None:
    """A client waits for its deadline and no longer."""
    async with service(pki) as running, PeerClient(pki.tls("alice"), running.url, deadline_s=0.3) as client:
        with pytest.raises(DeadlineExceeded, match=r"within 0\.3 s"):
            await client.get("/v1/wait")


async def test_nobody_listens(pki: Pki) -> None:
    """A closed port is PeerUnreachable and names the address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    async with PeerClient(pki.tls("alice"), f"https://127.0.0.1:{port}") as client:
        with pytest.raises(PeerUnreachable, match=str(port)):
            await client.get("/version")
        with pytest.raises(PeerUnreachable, match=str(port)):
            async with client.channel("/v1/stream"):
                raise AssertionError("it was opened")


async def answering(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answer: bytes) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(answer)
    await writer.drain()
    writer.close()


ODD_ANSWERS: list[tuple[bytes, type[HarnessError]]] = [
    (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", MalformedMessage),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n<htm>", MalformedMessage),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", MalformedMessage),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{", PeerUnreachable),
    (b"HTTP/1.1 302 Found\r\nLocation: https://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n", PeerRefusedUs),
    (b"HTTP/1.1 418 Teapot\r\nContent-Length: 0\r\n\r\n", PeerRefusedUs),
    (b"HTTP/1.1 408 Later\r\nContent-Length: 0\r\n\r\n", PeerUnreachable),
    (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n", PeerUnreachable),
    (b"SSH-2.0-x\r\n\r\n", PeerUnreachable),
    (b"", PeerUnreachable),
]


@pytest.mark.parametrize(("answer", "error"), ODD_ANSWERS)
async def test_odd_answers_are_typed_errors(pki: Pki, answer: bytes, error: type[HarnessError]) -> None:
    """Whatever a peer answers, the client raises an error of the project, and follows no redirection."""
    tls = pki.tls("provider", Role.PROVIDER_VERIFIER, "odd", trusts=("alice",))
    pki.authority("alice")
    server = await asyncio.start_server(
        lambda reader, writer: answering(reader, writer, answer), "127.0.0.1", 0, ssl=server_context(tls)
    )
    async with server:
        url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with PeerClient(pki.tls("alice"), url, deadline_s=WAIT_S) as client:
            with pytest.raises(HarnessError) as refused:
                await client.get("/version")
    assert type(refused.value) is error


# --- channels ------------------------------------------------------------------------------------------------


async def test_a_channel_carries_frames_both_ways(pki: Pki) -> None:
    """Text frames arrive in order; when the client closes, the server's handler ends."""
    tls = pki.tls("provider", Role.PROVIDER_VERIFIER)
    async with service(pki) as running, PeerClient(tls, running.url) as client, asyncio.timeout(WAIT_S):
        async with client.channel("/v1/stream") as channel:
            for text in ("one", "zwölf", "x" * 1000):
                await channel.send(text)
            assert [await channel.receive() for _ in range(3)] == ["one", "zwölf", "x" * 1000]
        await running.left.wait()
    assert running.calls == ["stream ended"]


async def test_a_channel_has_roles(pki: Pki) -> None:
    """A channel is opened for its route's roles only."""
    async with service(pki) as running, PeerClient(pki.tls("alice"), running.url) as client:
        with pytest.raises(PeerUnreachable, match="403"):
            async with client.channel("/v1/stream"):
                raise AssertionError("it was opened")


async def test_a_large_frame_ends_the_channel(pki: Pki) -> None:
    """A frame above the server's limit ends that channel, not the server."""
    tls = pki.tls("provider", Role.PROVIDER_VERIFIER)
    async with service(pki) as running, PeerClient(tls, running.url) as client, asyncio.timeout(WAIT_S):
        async with client.channel("/v1/stream") as channel:
            await channel.send("x" * 5000)
            assert await channel.receive() is None
        async with client.channel("/v1/stream") as channel:
            await channel.send("x")
            assert await channel.receive() == "x"


async def test_a_channel_that_broke_says_so(pki: Pki) -> None:
    """After the connection is gone, receiving ends and sending is PeerUnreachable."""
    tls = pki.tls("provider", Role.PROVIDER_VERIFIER)
    async with PeerClient(tls, "https://127.0.0.1:1") as client, AsyncExitStack() as stack, asyncio.timeout(WAIT_S):
        async with service(pki) as running:
            client.base_url = running.url
            channel = await stack.enter_async_context(client.channel("/v1/stream"))
        assert await channel.receive() is None
        with pytest.raises(PeerUnreachable):
            await channel.send("x")


@pytest.mark.parametrize("frame", [b"\x00", "fault"], ids=["not-text", "internal-fault"])
async def test_an_error_of_the_handler_closes_the_channel(pki: Pki, frame: bytes | str) -> None:
    """A binary frame, and a fault of ours, end the channel in order: no HTTP answer is written into it."""
    context = client_context(pki.tls("provider", Role.PROVIDER_VERIFIER))
    async with (
        service(pki) as running,
        aiohttp.ClientSession() as session,
        session.ws_connect(f"{running.url}/v1/stream", ssl=context) as socket,
        asyncio.timeout(WAIT_S),
    ):
        await (socket.send_bytes(frame) if isinstance(frame, bytes) else socket.send_str(frame))
        assert (await socket.receive()).type in {aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED}
        assert running.calls == []
