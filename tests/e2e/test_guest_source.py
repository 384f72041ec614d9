"""The guest manager's socket as the host agent reads it: reports of every shape, and connections that break."""

from __future__ import annotations

import asyncio
import json
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from harness.errors import PeerUnreachable
from harness.provider.guests import GuestCache, SocketGuestSource
from harness.unix_server import UnixServer
from tests.support.batching import WAIT_S
from tests.support.pendings import agent
from tests.support.tpms import short_folder
from tests.support.vtpm_host import domain, until

GUEST = agent(0xABC)
SHOWN = {"uuid": str(GUEST), "name": "vm", "state": "running", "persistent": True, "state_dir": "/x"}


@pytest.fixture
def socket() -> Iterator[Path]:
    with short_folder() as folder:
        yield folder / "manager"


@asynccontextmanager
async def says(socket: Path, *lines: bytes) -> AsyncIterator[list[bytes]]:
    """A guest manager that answers a watch with these lines and closes. Gives the requests that it got."""
    requests: list[bytes] = []

    async def serve(reader: StreamReader, writer: StreamWriter) -> None:
        requests.append(await reader.readline())
        for line in lines:
            writer.write(line + b"\n")
        await writer.drain()

    server = UnixServer(socket, serve)
    await server.start()
    try:
        yield requests
    finally:
        await server.stop()


async def reports(socket: Path) -> tuple[list[object], str]:
    """All reports until the connection ends, and why it did."""
    taken: list[object] = []
    async with asyncio.timeout(WAIT_S):
        try:
            async for report in SocketGuestSource(socket).watch():
                taken.append(report)
        except PeerUnreachable as error:
            return taken, error.detail
    raise AssertionError("the end of the connection was not told")


async def test_the_list_comes_first_and_then_every_change(socket: Path) -> None:
    """Members that we do not use are ignored."""
    lines = [
        {"domains": [SHOWN]},
        {"domain": SHOWN | {"state": "paused", "run": "r-1"}, "event": "suspended"},
        {"domain": SHOWN | {"state": "shutoff"}, "event": "undefined"},
    ]
    async with says(socket, *(json.dumps(line).encode() for line in lines)) as requests:
        taken, reason = await reports(socket)
    assert taken == [{GUEST: domain(GUEST, "running")}, (GUEST, domain(GUEST, "paused", run="r-1")), (GUEST, None)]
    assert "closed" in reason
    assert [json.loads(request) for request in requests] == [{"op": "watch"}]


WRONG_MEMBERS: dict[str, list[object]] = {
    "uuid": [None, 5, "", "X", str(GUEST).upper()],
    "state": [None, 5, []],
    "persistent": [None, 1, "true"],
    "run": [5, "", "a b", "x" * 65, []],
}
BAD = [
    b"",
    b"no JSON",
    b"\xff",
    b"[]",
    b"{}",
    b"5",
    b'{"domains": {}}',
    b'{"domains": [5]}',
    b'{"domains": [{}]}',
    b'{"domains": [], "domains": []}',
    *(
        json.dumps({"domains": [SHOWN | {name: value}]}).encode()
        for name, values in WRONG_MEMBERS.items()
        for value in values
    ),
    json.dumps({"domain": SHOWN}).encode(),
    json.dumps({"domain": SHOWN, "event": 5}).encode(),
    json.dumps({"domain": None, "event": "defined"}).encode(),
    json.dumps({"error": "AccessDenied", "detail": "no"}).encode(),
    b"[" * 100_000,
    b"x" * (1 << 20) + b"x",
]


@pytest.mark.parametrize("line", BAD, ids=lambda line: ascii(line[:40]))
async def test_a_report_that_is_not_understood_ends_the_connection(socket: Path, line: bytes) -> None:
    """What was said before stands in the caller's hands; the rest is not guessed."""
    good = json.dumps({"domains": [SHOWN]}).encode()
    async with says(socket, good, line, good):
        taken, reason = await reports(socket)
    assert taken == [{GUEST: domain(GUEST, "running")}]
    assert "guest manager" in reason


async def test_a_guest_manager_that_is_not_there_is_unreachable(socket: Path) -> None:
    """Its socket is named."""
    taken, reason = await reports(socket)
    assert taken == []
    assert str(socket) in reason


async def test_the_cache_finds_a_guest_manager_that_comes_back(socket: Path) -> None:
    """It was not there at the start, then it was, then it was gone, then it knew another state."""
    cache = GuestCache(SocketGuestSource(socket))
    task = asyncio.create_task(cache.follow())
    try:
        for state in ("running", "shutoff"):
            line = json.dumps({"domains": [SHOWN | {"state": state}]}).encode()
            async with says(socket, line):
                async with asyncio.timeout(WAIT_S):
                    await cache.changed()
                assert not task.done()
        await until(lambda: not socket.exists())
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
