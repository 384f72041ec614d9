"""The connections of the load generator: HTTP/1.1 over mutual TLS, with as little of its own as can be.

A client library would cost more CPU than the services under test, and share their cores. So a request is bytes made
before, and an answer is cut out of the stream by its length.

Invariants:
    1. One request is in work on a connection; it ends once: with an answer, or because the connection is gone.
    2. Nothing is judged here: answers are kept as they came, and verified after the measurement.

Owner: one event loop.

Spec: RFC 9112.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from harness.errors import PeerUnreachable

CONNECT_S = 60.0
_AT_ONCE = 32
GONE = 0
"""Status of a request whose connection ended before the answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where a load goes.

    Args:
        host: address.
        port: of the service.
        contexts: TLS of each tenant; None for plain TCP.
    """

    host: str
    port: int
    contexts: Sequence[ssl.SSLContext | None]


Answered = Callable[["Connection", int, bytes], None]
"""Told the connection, the status and the body."""


class Connection(asyncio.Protocol):
    """One keep-alive connection.

    Args:
        tenant: index of the tenant whose certificate it shows.
        answered: told of every end of a request.
    """

    __slots__ = ("_answered", "_buffer", "_last", "_need", "_start", "_status", "_transport", "busy", "tag", "tenant")

    def __init__(self, tenant: int, answered: Answered) -> None:
        self.tenant = tenant
        self.tag = -1
        """Number of the request in work, for whoever sent it."""
        self.busy = False
        self._answered = answered
        self._buffer = b""
        self._last = False
        self._status = 0
        self._start = 0
        self._need = -1
        self._transport: asyncio.Transport | None = None

    @property
    def open(self) -> bool:
        """Whether a request can be sent."""
        return self._transport is not None

    def send(self, request: bytes, tag: int) -> None:
        """Sends a request; on a connection that is gone it ends at once.

        Args:
            request: whole, as bytes.
            tag: number of the request.
        """
        self.tag, self.busy = tag, True
        if self._transport is None:
            self._end(GONE, b"")
            return
        self._transport.write(request)

    def close(self) -> None:
        """Closes it without a farewell: thousands are closed at once."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._transport = None
        if self.busy:
            self._end(GONE, b"")

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        self._buffer = self._buffer + data if self._buffer else data
        if self._need < 0 and not self._read_head():
            return
        if len(self._buffer) >= self._need:
            body = self._buffer[self._start : self._need]
            self._buffer = self._buffer[self._need :]
            self._need = -1
            self._end(self._status, body)

    def _read_head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return False
        head = self._buffer[:end].lower()
        self._status = int(head[9:12])
        place = head.find(b"\r\ncontent-length:")
        length = int(head[place + 17 :].split(b"\r\n", 1)[0]) if place >= 0 else 0
        self._last = b"\r\nconnection: close" in head
        self._start = end + 4
        self._need = self._start + length
        return True

    def _end(self, status: int, body: bytes) -> None:
        self.busy = False
        if self._last:  # the peer closes it after this answer
            self._transport = None
        self._answered(self, status, body)


async def open_connections(
    target: Target, tenants: Sequence[int], answered: Answered, *, refused_is_fine: bool = False
) -> list[Connection]:
    """Opens one connection for each entry.

    Args:
        target: where to.
        tenants: index of the tenant of each connection.
        answered: told of every answer.
        refused_is_fine: whether fewer may come back: a service bounds its connections.

    Raises:
        PeerUnreachable: one cannot be opened.

    *Cancellation:* some are open; the process is expected to end.
    """
    turn = asyncio.Semaphore(_AT_ONCE)
    loop = asyncio.get_running_loop()

    async def open_one(tenant: int) -> Connection | None:
        connection = Connection(tenant, answered)
        try:
            async with turn, asyncio.timeout(CONNECT_S):
                await loop.create_connection(
                    lambda: connection,
                    target.host,
                    target.port,
                    ssl=target.contexts[tenant],
                    server_hostname=target.host if target.contexts[tenant] is not None else None,
                )
        except (OSError, TimeoutError) as error:
            if refused_is_fine:
                return None
            raise PeerUnreachable(f"{target.host}:{target.port} cannot be reached: {error}") from error
        return connection

    opened = await asyncio.gather(*map(open_one, tenants))
    return [connection for connection in opened if connection is not None]
