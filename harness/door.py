"""The door of a server: counts its connections and shows out those that ask for nothing.

aiohttp bounds idle connections between requests, but not one that sends its headers a byte at a time; and asyncio
bounds the TLS handshake only. This protocol stands between the two.

Invariants:
    1. No more connections than the bound are open.
    2. A connection without a request in work is closed `IDLE_S` after its opening, or after its last request ended.

Owner: the event loop of the server.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

IDLE_S = 75.0
"""Longer than a client of ours keeps a connection for the next request."""


class Door:
    """Protocol factory for `loop.create_server`.

    Args:
        inner: makes the protocol that serves a connection.
        max_connections: open connections; one more is cut off at once.
        idle_s: seconds without a request.
    """

    def __init__(self, inner: Callable[[], asyncio.Protocol], *, max_connections: int, idle_s: float = IDLE_S) -> None:
        self._inner = inner
        self._max = max_connections
        self._idle_s = idle_s
        self._open = 0

    def __call__(self) -> asyncio.Protocol:
        """Protocol for one connection."""
        return _Guard(self, self._inner())

    @property
    def connections(self) -> int:
        """Open connections."""
        return self._open

    @staticmethod
    def begin(transport: asyncio.BaseTransport | None) -> None:
        """A request has arrived whole on this connection."""
        guard = _guard_of(transport)
        if guard is not None:
            guard.working(1)

    @staticmethod
    def end(transport: asyncio.BaseTransport | None) -> None:
        """A request has been answered."""
        guard = _guard_of(transport)
        if guard is not None:
            guard.working(-1)

    def enter(self) -> bool:
        """Counts a new connection; False when it is one too many."""
        self._open += 1
        return self._open <= self._max

    def leave(self) -> None:
        """Counts a closed connection."""
        self._open -= 1

    @property
    def idle_s(self) -> float:
        """Seconds that a connection may stay without a request."""
        return self._idle_s


def _guard_of(transport: asyncio.BaseTransport | None) -> _Guard | None:
    protocol = transport.get_protocol() if transport is not None else None
    return protocol if isinstance(protocol, _Guard) else None


class _Guard(asyncio.Protocol):
    """One connection: passes everything on and watches the time between requests."""

    def __init__(self, door: Door, inner: asyncio.Protocol) -> None:
        self._door = door
        self._inner = inner
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._working = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._inner.connection_made(transport)
        if not self._door.enter():
            self._transport.abort()
            return
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._door.leave()
        self._stop_waiting()
        self._inner.connection_lost(exc)

    def data_received(self, data: bytes) -> None:
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
        self._stop_waiting()
        if self._working == 0 and self._transport is not None and not self._transport.is_closing():
            self._wait()

    def _wait(self) -> None:
        if self._transport is not None:
            self._timer = asyncio.get_running_loop().call_later(self._door.idle_s, self._transport.abort)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
