"""The door of a server in the moment in which it is closed."""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import Any

import pytest

from harness.door import Bounds, Door


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
