"""The door of a server: lets connections in, counts them, and shows out those that ask for nothing.

aiohttp bounds idle connections between requests, but not one that sends its headers a byte at a time; asyncio bounds
the time of a TLS handshake, but not how many are under way. So connections are accepted here, and a protocol of ours
stands between TLS and aiohttp.

Invariants:
    1. No more connections than the bound are open, those in their handshake included.
    2. A connection without a request in work is closed `Bounds.idle_s` after its opening or its last request, and
       `Bounds.headers_s` after the first byte of a request whose headers are not complete; and any connection
       `Bounds.write_s` after its buffer of `Bounds.write_buffer` bytes was full and has not been read since. One task
       looks at all of them, a few times within the shortest of these, so that a request costs no timer.
    3. A failed handshake ends that connection only.

Owner: the event loop of the server.

Spec: RFC 8446, 6.2 (alerts); CVE-2023-38200 (one open TLS connection blocked a registrar).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from harness import events
from harness.errors import TooManyConnections

_ACCEPT_AGAIN_S = 0.1
_REPORT_EVERY_S = 1.0
_TLS_CLOSE_S = 1.0
_GOODBYE_S = 0.5
"""Peers of ours answer the end of TLS at once; a server that stops waits no longer for the others."""
_NEVER = float("inf")
_RESET = struct.pack("ii", 1, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Bounds of a server's connections.

    Args:
        connections: open ones; one more is cut off at once.
        handshake_s: for the TLS handshake.
        headers_s: for the headers of a request, from their first byte.
        idle_s: without a request; longer than a client of ours keeps a connection for the next one.
        write_s: for a peer to read what is ready for it.
        write_buffer: bytes that may be ready for a peer that does not read, before the next answer waits; one more
            answer is ready where the last one filled the system's own buffer.
        surplus_s: for the only request of a connection that is one too many.
        per_authority: connections that each authority but the service's own may have (`web_connection`).
    """

    connections: int = 4096
    per_authority: int = 1024
    handshake_s: float = 10.0
    headers_s: float = 20.0
    idle_s: float = 75.0
    write_s: float = 10.0
    write_buffer: int = 64 * 1024
    surplus_s: float = 5.0

    @property
    def sweep_s(self) -> float:
        """Seconds between two looks at all connections."""
        return min(1.0, min(self.headers_s, self.idle_s, self.write_s, self.surplus_s) / 4)


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
        refused: told the name of the error with which a connection is refused.
    """

    def __init__(
        self,
        inner: Callable[[], asyncio.Protocol],
        context: ssl.SSLContext,
        bounds: Bounds,
        refused: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.bounds = bounds
        self._refused = refused
        self._inner = inner
        self._context = context
        self._open = 0
        self._guards: set[_Guard] = set()
        self._empty = asyncio.Event()
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
            handshakes.create_task(self._sweep())
            while True:
                try:
                    connection = await _accepted(listening)
                except OSError as error:  # out of file descriptors, or gone again
                    self._report("not_accepted", str(error))
                    await asyncio.sleep(_ACCEPT_AGAIN_S)
                    continue
                if self._open >= self.bounds.connections:
                    connection.close()
                    self._refused(TooManyConnections.__name__)
                    self._report("too_many_connections", f"{self._open} are open")
                    continue
                self._open += 1
                handshakes.create_task(self._admit(connection))

    async def close(self) -> None:
        """Waits for connections that are being closed, and cuts off what is still open after `_GOODBYE_S`.

        *Cancellation:* nothing more is waited for.
        """
        for last in (False, True):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_GOODBYE_S):
                    while self._guards:
                        self._empty.clear()
                        await self._empty.wait()
            if not last:
                for guard in list(self._guards):
                    guard.abort()

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
                self.leave(None)

    async def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self.bounds.sweep_s)
            now_s = loop.time()
            for guard in [guard for guard in self._guards if guard.due_s <= now_s]:
                guard.abort()

    def enter(self, guard: _Guard) -> None:
        """Looks after a connection whose handshake has ended."""
        self._guards.add(guard)

    def leave(self, guard: _Guard | None) -> None:
        """Counts a closed connection, or one whose handshake failed."""
        self._open -= 1
        if guard is not None:
            self._guards.discard(guard)
            self._empty.set()

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


def hurry(transport: asyncio.BaseTransport, seconds: float) -> None:
    """The first request of this connection is waited for no longer than this."""
    if (guard := _guard_of(transport)) is not None:
        guard.allow(seconds)


def _guard_of(transport: asyncio.BaseTransport | None) -> _Guard | None:
    if transport is None or transport.is_closing():  # a TLS transport that was closed has no protocol to ask for
        return None
    protocol = transport.get_protocol()
    return protocol if isinstance(protocol, _Guard) else None


class _Guard(asyncio.Protocol):
    """One connection: passes everything on, and notes until when its peer has to do something."""

    def __init__(self, door: Door, inner: asyncio.Protocol) -> None:
        self.entered = False
        self._door = door
        self._inner = inner
        self._transport: asyncio.Transport | None = None
        self._time = asyncio.get_running_loop().time
        self._asks_until_s = _NEVER
        self._reads_until_s = _NEVER
        self._working = 0
        self._in_headers = False

    @property
    def due_s(self) -> float:
        """When the connection is closed if nothing changes, by the loop's clock."""
        return min(self._asks_until_s, self._reads_until_s)

    def abort(self) -> None:
        """Closes the connection at once; what a peer has not read is thrown away, by the system too."""
        if self._transport is None:
            return
        if self._reads_until_s < _NEVER:
            self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.entered = True
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(self._door.bounds.write_buffer)
        self._door.enter(self)
        self.allow(self._door.bounds.idle_s)
        self._inner.connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._door.leave(self)
        self._transport = None
        self._inner.connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._working == 0 and not self._in_headers:
            self._in_headers = True
            self.allow(self._door.bounds.headers_s)
        self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        return self._inner.eof_received()

    def pause_writing(self) -> None:
        self._reads_until_s = self._time() + self._door.bounds.write_s
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._reads_until_s = _NEVER
        self._inner.resume_writing()

    def working(self, change: int) -> None:
        """A request began (1) or ended (-1)."""
        self._working += change
        self._in_headers = False
        if self._working:
            self._asks_until_s = _NEVER
        else:
            self.allow(self._door.bounds.idle_s)

    def allow(self, seconds: float) -> None:
        """The peer has so long for what it does next."""
        self._asks_until_s = self._time() + seconds
