"""The door of a server: lets connections in, counts them, and shows out those that ask for nothing.

aiohttp bounds idle connections between requests, but not one that sends its headers a byte at a time; asyncio bounds
the time of a TLS handshake, but not how many are under way. So connections are accepted here, and a protocol of ours
stands between TLS and aiohttp.

Invariants:
    1. No more connections than the bound are open, those in their handshake included.
    2. A connection without a request in work is closed `Bounds.idle_s` after its opening or its last request, and
       `Bounds.headers_s` after the first byte of a request whose headers are not complete.
    3. A failed handshake ends that connection only.

Owner: the event loop of the server.

Spec: RFC 8446, 6.2 (alerts); CVE-2023-38200 (one open TLS connection blocked a registrar).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from harness import events

_ACCEPT_AGAIN_S = 0.1
_REPORT_EVERY_S = 1.0
_TLS_CLOSE_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Bounds of a server's connections.

    Args:
        connections: open ones; one more is cut off at once.
        handshake_s: for the TLS handshake.
        headers_s: for the headers of a request, from their first byte.
        idle_s: without a request; longer than a client of ours keeps a connection for the next one.
    """

    connections: int = 4096
    handshake_s: float = 10.0
    headers_s: float = 20.0
    idle_s: float = 75.0


async def _accepted(listening: socket.socket) -> socket.socket:
    """The next connection. A loop's own `sock_accept` loses one that comes in the moment in which it is cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        with contextlib.suppress(BlockingIOError, InterruptedError):
            connection, _ = listening.accept()
            connection.setblocking(False)
            return connection
        comes = asyncio.Event()
        loop.add_reader(listening, comes.set)
        try:
            await comes.wait()
        finally:
            loop.remove_reader(listening)


class Door:
    """Accepts connections.

    Args:
        inner: makes the protocol that serves a connection.
        context: TLS of the server.
        bounds: of the connections.
    """

    def __init__(self, inner: Callable[[], asyncio.Protocol], context: ssl.SSLContext, bounds: Bounds) -> None:
        self.bounds = bounds
        self._inner = inner
        self._context = context
        self._open = 0
        self._unreported = 0
        self._reported_at = -_REPORT_EVERY_S

    @property
    def connections(self) -> int:
        """Open connections, those in their handshake included."""
        return self._open

    async def run(self, listening: socket.socket) -> None:
        """Lets connections in until it is cancelled.

        *Cancellation:* handshakes end; connections that are open stay open.
        """
        async with asyncio.TaskGroup() as handshakes:
            while True:
                try:
                    connection = await _accepted(listening)
                except OSError as error:  # out of file descriptors, or gone again
                    self._report("not_accepted", str(error))
                    await asyncio.sleep(_ACCEPT_AGAIN_S)
                    continue
                if self._open >= self.bounds.connections:
                    connection.close()
                    self._report("too_many_connections", f"{self._open} are open")
                    continue
                self._open += 1
                handshakes.create_task(self._admit(connection))

    async def _admit(self, connection: socket.socket) -> None:
        guard = None
        try:
            guard = _Guard(self, self._inner())
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: guard,
                connection,
                ssl=self._context,
                ssl_handshake_timeout=self.bounds.handshake_s,
                ssl_shutdown_timeout=_TLS_CLOSE_S,
            )
        except OSError as error:  # TLS errors and the handshake's deadline among them
            self._report("handshake_failed", str(error))
        except Exception:  # the border of a connection's task: the next one is served all the same
            events.emit("internal_fault", level="error", exc_info=True)
        finally:
            if guard is None or not guard.entered:
                self.leave()

    def leave(self) -> None:
        """Counts a closed connection."""
        self._open -= 1

    def _report(self, event: str, detail: str) -> None:
        """At most one event a second: whoever knocks must not be able to fill the disk."""
        now = asyncio.get_running_loop().time()
        if now - self._reported_at < _REPORT_EVERY_S:
            self._unreported += 1
            return
        events.emit(event, level="warning", detail=detail, not_reported=self._unreported)
        self._unreported = 0
        self._reported_at = now


def request_began(transport: asyncio.BaseTransport | None) -> None:
    """The headers of a request are complete."""
    if (guard := _guard_of(transport)) is not None:
        guard.working(1)


def request_ended(transport: asyncio.BaseTransport | None) -> None:
    """A request is about to be answered."""
    if (guard := _guard_of(transport)) is not None:
        guard.working(-1)


def _guard_of(transport: asyncio.BaseTransport | None) -> _Guard | None:
    if transport is None or transport.is_closing():  # a TLS transport that was closed has no protocol to ask for
        return None
    protocol = transport.get_protocol()
    return protocol if isinstance(protocol, _Guard) else None


class _Guard(asyncio.Protocol):
    """One connection: passes everything on and watches the time between requests."""

    def __init__(self, door: Door, inner: asyncio.Protocol) -> None:
        self.entered = False
        self._door = door
        self._inner = inner
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._working = 0
        self._in_headers = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.entered = True
        self._transport = cast(asyncio.Transport, transport)
        self._inner.connection_made(transport)
        self._allow(self._door.bounds.idle_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._door.leave()
        self._stop_timer()
        self._transport = None
        self._inner.connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._working == 0 and not self._in_headers:
            self._in_headers = True
            self._allow(self._door.bounds.headers_s)
        self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        return self._inner.eof_received()

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()

    def working(self, change: int) -> None:
        """A request began (1) or ended (-1)."""
        self._working += change
        self._in_headers = False
        self._stop_timer()
        if self._working == 0:
            self._allow(self._door.bounds.idle_s)

    def _allow(self, seconds: float) -> None:
        self._stop_timer()
        if self._transport is not None:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._transport.abort)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
