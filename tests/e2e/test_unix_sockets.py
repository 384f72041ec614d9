"""Local sockets: one line asked, one line answered, and everything that can go wrong on either side."""

from __future__ import annotations

import asyncio
import stat
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from harness.errors import DeadlineExceeded, LocalRefusal, MalformedMessage, PeerUnreachable, SimulationError
from harness.unix_client import ask
from harness.unix_server import UnixServer
from tests.support.batching import WAIT_S
from tests.support.tpms import short_folder
from tests.support.vtpm_host import exchange, until


@pytest.fixture
def path() -> Iterator[Path]:
    with short_folder() as folder:
        yield folder / "socket"


@asynccontextmanager
async def answering(path: Path, answer: bytes | None) -> AsyncIterator[list[bytes]]:
    """A service that gives every line this answer; None: it never answers. Gives the lines that it got."""
    lines: list[bytes] = []

    async def serve(reader: StreamReader, writer: StreamWriter) -> None:
        while line := await reader.readline():
            lines.append(line)
            if answer is None:
                await asyncio.Event().wait()
            elif not answer:
                return
            else:
                writer.write(answer + b"\n")
                await writer.drain()

    server = UnixServer(path, serve)
    await server.start()
    try:
        yield lines
    finally:
        await server.stop()


async def test_an_answer_is_given_as_it_came(path: Path) -> None:
    """The request is one line of JSON."""
    async with answering(path, b'{"a": [1]}') as lines:
        assert await ask(path, {"op": "x\ny"}, deadline_s=WAIT_S) == {"a": [1]}
    assert lines == [b'{"op": "x\\ny"}\n']


async def test_a_refusal_is_the_services_own_words(path: Path) -> None:
    """Its error by name, and its sentence; a missing one is said to be missing."""
    async with answering(path, b'{"error": "Conflict", "detail": "it exists"}'):
        with pytest.raises(LocalRefusal, match="it exists") as refused:
            await ask(path, {}, deadline_s=WAIT_S)
    assert refused.value.error == "Conflict"
    async with answering(path, b'{"error": "Conflict"}'):
        with pytest.raises(LocalRefusal, match="no reason given"):
            await ask(path, {}, deadline_s=WAIT_S)


@pytest.mark.parametrize("answer", [b"[]", b"5", b"no JSON", b"\xff", b'{"a": 1, "a": 2}', b"[" * 100_000])
async def test_an_answer_that_is_no_object_is_malformed(path: Path, answer: bytes) -> None:
    """Nothing is guessed from it."""
    async with answering(path, answer):
        with pytest.raises(MalformedMessage):
            await ask(path, {}, deadline_s=WAIT_S)


async def test_an_answer_above_the_limit_is_cut_off(path: Path) -> None:
    """1 MiB."""
    async with answering(path, b" " * (1 << 21)):
        with pytest.raises(PeerUnreachable, match=str(path)):
            await ask(path, {}, deadline_s=WAIT_S)


async def test_a_closed_connection_is_unreachable(path: Path) -> None:
    """The service took the request and said nothing."""
    async with answering(path, b""):
        with pytest.raises(PeerUnreachable, match="without an answer"):
            await ask(path, {}, deadline_s=WAIT_S)


@pytest.fixture
def left_over(path: Path) -> Path:
    path.write_bytes(b"left over")
    return path


@pytest.mark.parametrize("place", ["path", "left_over"])
async def test_a_service_that_is_not_there_is_unreachable(request: pytest.FixtureRequest, place: str) -> None:
    """No socket, or something else in its place; the path is named."""
    path: Path = request.getfixturevalue(place)
    with pytest.raises(PeerUnreachable, match=str(path)):
        await ask(path, {}, deadline_s=WAIT_S)


async def test_a_silent_service_is_given_up_in_time(path: Path) -> None:
    """The deadline is that of the caller."""
    async with answering(path, None):
        with pytest.raises(DeadlineExceeded, match=r"0\.05 s"):
            await ask(path, {}, deadline_s=0.05)


async def test_a_socket_is_its_owners_alone(left_over: Path) -> None:
    """Mode 0600; what was there before is replaced, and at the end nothing is left."""
    async with answering(left_over, b"{}"):
        assert _mode(left_over) == 0o600
        assert await ask(left_over, {}, deadline_s=WAIT_S) == {}
    assert _mode(left_over) is None


def _mode(path: Path) -> int | None:
    return stat.S_IMODE(path.stat().st_mode) if path.exists() else None


async def test_a_client_that_breaks_off_harms_nobody_else(path: Path) -> None:
    """Another connection is served as before, and so is the next one."""
    async with answering(path, b"{}"):
        reader, writer = await asyncio.open_unix_connection(path)
        _, other = await asyncio.open_unix_connection(path)
        other.write(b'{"half')
        other.transport.abort()
        assert await exchange(path, b" " * 70_000) == []
        writer.write(b"{}\n")
        async with asyncio.timeout(WAIT_S):
            assert await reader.readline() == b"{}\n"
        writer.close()


async def test_a_fault_of_the_service_ends_one_connection_and_is_in_the_log(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever asked sees a closed connection, the log has the traceback, and the next one is served."""

    async def serve(reader: StreamReader, writer: StreamWriter) -> None:
        writer.write(b"%d\n" % (1 / int(await reader.readline())))

    server = UnixServer(path, serve)
    await server.start()
    try:
        assert await exchange(path, b"0") == []
        assert "ZeroDivisionError" in capsys.readouterr().err
        assert await exchange(path, b"1") == [1]
    finally:
        await server.stop()


async def test_a_stop_cuts_clients_off(path: Path) -> None:
    """One that waits for its answer and one that has asked nothing; a second stop does nothing."""
    served: list[StreamReader] = []

    async def never(reader: StreamReader, _: StreamWriter) -> None:
        served.append(reader)
        await asyncio.Event().wait()

    server = UnixServer(path, never)
    await server.start()
    waiting = asyncio.create_task(ask(path, {}, deadline_s=WAIT_S))
    reader, writer = await asyncio.open_unix_connection(path)
    await until(lambda: len(served) == 2)
    await server.stop()
    await server.stop()
    with pytest.raises(PeerUnreachable):
        await waiting
    async with asyncio.timeout(WAIT_S):
        assert await reader.read() == b""
    writer.close()


async def _nothing(_: StreamReader, __: StreamWriter) -> None:
    return


@pytest.mark.parametrize("place", ["missing/socket", "x" * 120, ""])
async def test_a_socket_that_cannot_be_made_is_named(path: Path, place: str) -> None:
    """No such folder, a path that is too long, or a folder in the way."""
    wrong = path.parent / place
    with pytest.raises(SimulationError, match=str(wrong)):
        await UnixServer(wrong, _nothing).start()
