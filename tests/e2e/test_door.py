"""The door of a server in the moment in which it is closed."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from typing import Any

import pytest

from harness.door import Bounds, Door, _Guard


async def test_a_connection_that_comes_while_the_door_closes_is_kept_for_the_next_one() -> None:
    """Nothing is raised where nobody catches it, and whoever listens next at the same socket gets the connection."""
    loop, faults = asyncio.get_running_loop(), list[dict[str, Any]]()
    loop.set_exception_handler(lambda _, context: faults.append(context))
    door = Door(asyncio.Protocol, ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), Bounds())
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        running = asyncio.create_task(door.run(listening))
        await asyncio.sleep(0)
        await asyncio.sleep(0)  # it waits for a connection
        with socket.create_connection(listening.getsockname(), timeout=5) as client:
            loop.call_soon(running.cancel)  # in one turn of the loop with the connection, and before it
            with pytest.raises(asyncio.CancelledError):
                await running
            connection, address = listening.accept()
            connection.close()
            assert address == client.getsockname()
    assert faults == []
    assert door.connections == 0


@pytest.mark.parametrize("turns", range(10))
async def test_a_door_that_closes_leaves_no_handshake_behind(turns: int) -> None:
    """Whatever a connection has come to, one turn of the loop after the other: it is closed, not kept till later."""
    loop = asyncio.get_running_loop()
    door = Door(asyncio.Protocol, ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), Bounds(handshake_s=3600.0))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        running = asyncio.create_task(door.run(listening))
        with socket.create_connection(listening.getsockname(), timeout=5) as client:
            client.setblocking(False)
            while door.connections == 0:  # noqa: ASYNC110 - nobody announces it
                await asyncio.sleep(0)
            for _ in range(turns):
                await asyncio.sleep(0)
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            async with asyncio.timeout(60):
                with contextlib.suppress(ConnectionError):
                    assert await loop.sock_recv(client, 1) == b""
    assert door.connections == 0


async def test_a_peer_that_does_not_say_goodbye_is_cut_off() -> None:
    """A server that has stopped has no connection left, whatever its peers do; one that is closed is waited for."""
    door = Door(asyncio.Protocol, ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), Bounds())
    silent, polite = Connection(door), Connection(door)
    asyncio.get_running_loop().call_soon(door.leave, polite)
    await door.close()
    assert (door.connections, silent.aborted, polite.aborted) == (0, True, False)


class Connection(_Guard):
    """An open connection."""

    def __init__(self, door: Door) -> None:
        super().__init__(door, asyncio.Protocol())
        self.aborted = False
        door._open += 1
        door.enter(self)

    def abort(self) -> None:
        self.aborted = True
        asyncio.get_running_loop().call_soon(self._door.leave, self)
