"""Servers over real TLS sockets: what is too large, too slow or too much is cut off, and nobody else is hurt."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from pathlib import Path

import pytest

from harness.door import Bounds
from harness.errors import (
    PeerRefusedUs,
    PeerUnreachable,
)
from harness.peer import PeerClient
from harness.web_answer import BODY_LIMIT
from tests.support.web_lab import WAIT_S, Pki, refusal, service, wire


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path / "pki")


async def test_a_body_above_the_limit_is_413(pki: Pki) -> None:
    """A body of exactly 64 KiB passes, one byte more does not; also when its length is not announced."""
    async with service(pki) as running, PeerClient(pki.tls("alice"), running.url) as client:
        await client.put("/v1/echo", "x" * (BODY_LIMIT - 2))
        with pytest.raises(PeerRefusedUs) as refused:
            await client.put("/v1/echo", "x" * (BODY_LIMIT - 1))
        assert (refused.value.status, refused.value.error) == (413, "MessageTooLarge")
        async with wire(pki.tls("alice"), running.port) as bare:
            await bare.send(b"PUT /v1/echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
            await bare.send(b"8000\r\n" + b"x" * 0x8000 + b"\r\n8001\r\n" + b"x" * 0x8001 + b"\r\n")
            status, _, body = await bare.answer()
        assert (status, json.loads(body)["results"]) == (413, {"error": "MessageTooLarge"})


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /version HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 9000 + b"\r\n\r\n",
        b"GET /version HTTP/1.1\r\nHost: x\r\n" + b"".join(b"X%d: x\r\n" % at for at in range(500)) + b"\r\n",
        b"GET /version HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"GET /version HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"\x16\x03\x01 not http\r\n\r\n",
        b"BREW /version HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
    ids=["line", "field", "fields", "negative-length", "smuggled", "no-http", "method"],
)
async def test_what_is_no_reasonable_http_is_400(pki: Pki, request_bytes: bytes) -> None:
    """Too long lines, too many fields and broken HTTP are an envelope with 400, and the end of that connection."""
    async with service(pki) as running, wire(pki.tls("alice"), running.port) as bare:
        await bare.send(request_bytes)
        status, headers, body = await bare.answer()
        envelope = json.loads(body)
        assert (status, envelope["code"], envelope["results"]) == (400, 400, {"error": "MalformedMessage"})
        assert headers["cache-control"] == "no-store"
        assert "xxxx" not in envelope["status"]
        await bare.ended()


async def test_a_slow_call_is_504(pki: Pki) -> None:
    """A handler that is not done in its time is cancelled, and its caller answered 504."""
    async with service(pki) as running:
        error = await refusal(running, pki.tls("alice"), "/v1/slow")
    assert type(error) is PeerUnreachable
    assert "504" in error.detail
    assert "more than 0.3 s" in error.detail


async def test_a_slow_body_is_504(pki: Pki) -> None:
    """A body that trickles in is no longer waited for after the call's deadline."""
    async with service(pki) as running, wire(pki.tls("alice"), running.port) as bare:
        await bare.send(b"POST /v1/echo HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n1")
        status, _, body = await bare.answer()
        assert (status, json.loads(body)["results"]) == (504, {"error": "DeadlineExceeded"})


@pytest.mark.parametrize(
    "sent", [b"", b"GET /version HTT", b"GET /version HTTP/1.1\r\nHost: x\r\nX: "], ids=["nothing", "line", "fields"]
)
async def test_a_connection_that_asks_for_nothing_is_cut(pki: Pki, sent: bytes) -> None:
    """An idle connection and slow headers are cut after their bounds, while others are served."""
    bounds = Bounds(idle_s=0.5, headers_s=0.5)
    async with service(pki, bounds=bounds) as running, wire(pki.tls("alice"), running.port) as bare:
        if sent:
            await bare.send(sent)
        async with PeerClient(pki.tls("alice"), running.url) as honest:
            await honest.get("/version")
        await bare.ended()


async def test_headers_are_bounded_as_a_whole(pki: Pki) -> None:
    """A byte now and then does not prolong the time for headers."""
    loop = asyncio.get_running_loop()
    bounds = Bounds(idle_s=60, headers_s=0.6)
    async with service(pki, bounds=bounds) as running, wire(pki.tls("alice"), running.port) as bare:
        began = loop.time()
        await bare.send(b"GET /")
        ended = asyncio.create_task(bare.ended())
        while not ended.done():
            bare.writer.write(b"x")
            await asyncio.wait({ended}, timeout=0.1)
        assert 0.3 < loop.time() - began < 10


async def test_a_call_in_work_is_not_idle(pki: Pki) -> None:
    """The idle bound does not cut a connection whose request is in work, and applies again after it."""
    bounds = Bounds(idle_s=0.4, headers_s=0.4)
    async with service(pki, bounds=bounds) as running, wire(pki.tls("alice"), running.port) as bare:
        await bare.send(b"GET /v1/wait HTTP/1.1\r\nHost: x\r\n\r\n")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.0):
                await bare.reader.read(1)
        running.release.set()
        assert (await bare.answer())[0] == 200
        await bare.ended()


async def test_handshakes_are_bounded_and_counted(pki: Pki) -> None:
    """Connections that never finish a handshake count, are cut after its bound, and do not block anybody for good."""
    async with service(pki, bounds=Bounds(connections=3, handshake_s=1.0)) as running:
        silent = [socket.create_connection(("127.0.0.1", running.port)) for _ in range(3)]
        try:
            tls = pki.tls("alice")
            async with PeerClient(tls, running.url) as client:
                with pytest.raises(PeerUnreachable):
                    await client.get("/version")
            async with asyncio.timeout(WAIT_S):
                for each in silent:
                    each.setblocking(False)
                    while await asyncio.get_running_loop().sock_recv(each, 1024):
                        pass
            async with PeerClient(tls, running.url) as client:
                await client.get("/version")
        finally:
            for each in silent:
                each.close()


async def test_silent_connections_do_not_block_a_server(pki: Pki) -> None:
    """A hundred open sockets that say nothing delay nobody (CVE-2023-38200)."""
    async with service(pki) as running:
        silent = [socket.create_connection(("127.0.0.1", running.port)) for _ in range(100)]
        try:
            async with PeerClient(pki.tls("alice"), running.url, deadline_s=5) as client:
                await client.get("/version")
        finally:
            for each in silent:
                each.close()


async def test_connections_are_bounded(pki: Pki) -> None:
    """One connection more than the bound is cut off; when one has ended there is room again."""
    tls = pki.tls("alice")
    async with (
        service(pki, bounds=Bounds(connections=2)) as running,
        wire(tls, running.port),
        wire(tls, running.port) as second,
        PeerClient(tls, running.url) as client,
    ):
        with pytest.raises(PeerUnreachable):
            await client.get("/version")
        second.writer.transport.abort()
        async with asyncio.timeout(WAIT_S):
            while True:
                with contextlib.suppress(PeerUnreachable):
                    await client.get("/version")
                    return


async def test_a_client_that_leaves_cancels_its_call(pki: Pki) -> None:
    """A handler whose client is gone is cancelled: a waiter leaves its batch."""
    async with service(pki) as running:
        async with wire(pki.tls("alice"), running.port) as bare:
            await bare.send(b"GET /v1/wait HTTP/1.1\r\nHost: x\r\n\r\n")
            async with asyncio.timeout(WAIT_S):
                await running.entered.wait()
        async with asyncio.timeout(WAIT_S):
            await running.left.wait()
