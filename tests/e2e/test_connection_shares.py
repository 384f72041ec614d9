"""How many connections one party may have, and what becomes of a peer that does not read."""

from __future__ import annotations

import asyncio
import json
import select
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from harness.config import TlsSettings
from harness.door import Bounds
from harness.errors import TooManyConnections
from harness.peer import PeerClient
from harness.pki import Role
from harness.tls import client_context
from harness.web_connection import SURPLUS
from tests.support.web_lab import WAIT_S, Pki, Service, Wire, service, wire

ASK = b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path)


@asynccontextmanager
async def shared(pki: Pki, **bounds: float) -> AsyncIterator[Service]:
    """A service of the provider that knows two tenants."""
    made = Bounds(**bounds)  # type: ignore[arg-type]
    async with service(pki, trusts=("provider", "alice", "bob"), bounds=made) as running:
        yield running


async def answer_of(bare: Wire) -> tuple[int, dict[str, str], dict[str, object]]:
    await bare.send(ASK)
    status, headers, body = await bare.answer()
    return status, headers, json.loads(body)


async def connected(stack: AsyncExitStack, tls: TlsSettings, running: Service) -> Wire:
    """A connection that the server has counted: it has answered on it."""
    bare = await stack.enter_async_context(wire(tls, running.port))
    assert (await answer_of(bare))[0] == 200
    return bare


async def test_a_tenant_with_too_many_connections_is_told_and_the_others_are_served(pki: Pki) -> None:
    """One more is answered 503 with Retry-After, and closed; when one has ended there is room again."""
    async with shared(pki, per_authority=2) as running, AsyncExitStack() as stack:
        alice = pki.tls("alice")
        first = await connected(stack, alice, running)
        await connected(stack, pki.tls("alice", Role.TENANT_REGISTRAR, "another"), running)
        async with wire(alice, running.port) as third:
            status, headers, body = await answer_of(third)
            assert (status, body["results"]) == (503, {"error": "TooManyConnections"})
            assert headers["connection"] == "close"
            assert int(headers["retry-after"]) >= 1
            await third.ended()
        async with PeerClient(alice, running.url) as client:
            with pytest.raises(TooManyConnections):
                await client.get("/version")
        await connected(stack, pki.tls("bob"), running)
        first.writer.transport.abort()
        async with PeerClient(alice, running.url) as client, asyncio.timeout(WAIT_S):
            while True:
                try:
                    await client.get("/version")
                    break
                except TooManyConnections:
                    continue


async def test_every_call_on_a_surplus_connection_is_its_last(pki: Pki) -> None:
    """Also one that does not exist: no kind of request keeps it open."""
    async with shared(pki, per_authority=1) as running, AsyncExitStack() as stack:
        await connected(stack, pki.tls("alice"), running)
        for path in (b"/nowhere", b"/v1/whoami"):
            async with wire(pki.tls("alice"), running.port) as more:
                await more.send(b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % path)
                _, headers, _ = await more.answer()
                assert headers["connection"] == "close"
                await more.ended()
        assert running.calls == []


async def test_the_services_own_authority_has_no_share(pki: Pki) -> None:
    """The provider's services and operators are its own business."""
    async with shared(pki, per_authority=1) as running, AsyncExitStack() as stack:
        for _ in range(4):
            await connected(stack, pki.tls("provider", Role.PROVIDER_OPERATOR, "op"), running)


async def test_a_surplus_connection_that_asks_nothing_is_closed_soon(pki: Pki) -> None:
    """Long before one that the tenant may have."""
    async with shared(pki, per_authority=1, surplus_s=0.4) as running, AsyncExitStack() as stack:
        kept = await connected(stack, pki.tls("alice"), running)
        async with wire(pki.tls("alice"), running.port) as more:
            await more.ended()
        assert (await answer_of(kept))[0] == 200


async def test_surplus_connections_are_bounded_themselves(pki: Pki) -> None:
    """Beyond them a connection is cut off without an answer; others are still served."""
    async with shared(pki, per_authority=1, surplus_s=60) as running, AsyncExitStack() as stack:
        await connected(stack, pki.tls("alice"), running)
        crowd = [await stack.enter_async_context(wire(pki.tls("alice"), running.port)) for _ in range(SURPLUS)]
        async with wire(pki.tls("alice"), running.port) as last:
            await last.ended()
        await connected(stack, pki.tls("bob"), running)
        assert (await answer_of(crowd[-1]))[0] == 503


# --- peers that do not read -------------------------------------------------------------------------------------------


def deaf(tls: TlsSettings, port: int, requests: bytes) -> socket.socket:
    """A connection that has sent requests, and whose peer never reads; with little room for what comes."""
    bare = socket.socket()
    bare.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    bare.settimeout(WAIT_S)
    bare.connect(("127.0.0.1", port))
    wrapped = client_context(tls).wrap_socket(bare, server_hostname="127.0.0.1")
    wrapped.sendall(requests)
    return wrapped


def big(size: int) -> bytes:
    return b"GET /v1/big?size=%d HTTP/1.1\r\nHost: x\r\n\r\n" % size


def dropped(connection: socket.socket) -> bool:
    """Whether the server has closed it within the deadline; nothing is read."""
    waiting = select.poll()
    waiting.register(connection, select.POLLRDHUP | select.POLLHUP | select.POLLERR)
    return bool(waiting.poll(WAIT_S * 1000))


async def test_a_peer_that_does_not_read_is_dropped_and_holds_nobody(pki: Pki) -> None:
    """However much it asks, no more than two answers are made for it; others are served meanwhile."""
    async with shared(pki, write_s=1.0) as running:
        ask = asyncio.to_thread(deaf, pki.tls("alice"), running.port, big(8_000_000) * 20)
        connection = await ask
        try:
            async with PeerClient(pki.tls("bob"), running.url) as client:
                await client.get("/version")
            assert await asyncio.to_thread(dropped, connection)
            assert 1 <= len(running.calls) <= 2
        finally:
            connection.close()


async def test_a_peer_that_reads_late_but_in_time_gets_everything(pki: Pki) -> None:
    """The bound is on time without reading, not on the size of an answer."""
    async with shared(pki, write_s=60.0) as running:
        connection = await asyncio.to_thread(deaf, pki.tls("alice"), running.port, big(3_000_000))
        async with asyncio.timeout(WAIT_S):
            while running.calls != ["big"]:  # noqa: ASYNC110 - the call comes through a real socket
                await asyncio.sleep(0.01)

        def read() -> bytes:
            content = b""
            while len(content) < 3_000_000:
                content += connection.recv(1 << 20)
            return content

        content = await asyncio.to_thread(read)
        connection.close()
        assert content.startswith(b"HTTP/1.1 200")
