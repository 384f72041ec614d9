"""One connection of a server: whose it is, and how many the same party may have.

Invariants:
    1. An authority that is not the service's own has at most `Bounds.per_authority` connections that are served. One
       more is answered `TooManyConnections` once, and closed; up to `SURPLUS` of those are open, the next is cut off at
       once. So no tenant can take the others' connections.
    2. A connection counts for the authority whose key signed its certificate, whatever else the certificate says.
    3. What never gets as far as the application is answered with an envelope as well.

Owner: the event loop of the server.

Spec: RFC 9110, 9.3 (Connection: close); DESIGN 3.1.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

from aiohttp import web

from harness import events
from harness.door import Bounds, hurry
from harness.errors import AccessDenied, MalformedMessage, TooManyConnections
from harness.messages import failure, status_of
from harness.tls import Identities
from harness.web_answer import INTERNAL_FAULT, LINE_LIMIT, answer

SURPLUS = 64


class Shares:
    """Connections by authority.

    Args:
        identities: the known authorities.
        own: name of the service's own authority, whose connections only the door counts.
        bounds: of the server's connections.
        refused: told the name of the error with which a connection is refused.
    """

    def __init__(
        self, identities: Identities, own: Callable[[], str | None], bounds: Bounds, refused: Callable[[str], None]
    ) -> None:
        self._identities = identities
        self._own = own
        self._bounds = bounds
        self._refused = refused
        self._open: Counter[str | None] = Counter()

    @property
    def surplus_s(self) -> float:
        """Seconds for the only request of a connection that is one too many."""
        return self._bounds.surplus_s

    def enter(self, certificate: bytes) -> tuple[str | None, int]:
        """Counts a connection: under which name, and how many are more than its authority may have."""
        authority = self._identities.authority(certificate)
        self._open[authority] += 1
        if authority is not None and authority == self._own():
            return authority, 0
        return authority, max(0, self._open[authority] - self._bounds.per_authority)

    def leave(self, authority: str | None) -> None:
        """Counts a closed one."""
        self._open[authority] -= 1
        if not self._open[authority]:
            del self._open[authority]

    def cut_off(self) -> None:
        """One was closed without an answer."""
        self._refused(TooManyConnections.__name__)


class Connection(web.RequestHandler):
    """aiohttp's connection, and what is known of its peer.

    Args:
        manager: aiohttp's server.
        shares: where it is counted.
        settings: of aiohttp.
    """

    def __init__(self, manager: web.Server, shares: Shares, **settings: Any) -> None:
        super().__init__(manager, **settings)
        self.certificate: bytes | None = None
        """The client's, DER; read once, which costs as much as a small request."""
        self.surplus = False
        """Whether it is one more than its authority may have."""
        self._shares = shares
        self._authority: str | None = None
        self._counted = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The handshake has ended."""
        connection = transport.get_extra_info("ssl_object")
        self.certificate = connection.getpeercert(binary_form=True) if connection else None
        super().connection_made(transport)
        self._authority, over = self._shares.enter(self.certificate or b"")
        self._counted = True
        self.surplus = over > 0
        if over > SURPLUS:
            self._shares.cut_off()
            if isinstance(transport, asyncio.Transport):
                transport.abort()
        elif over:
            hurry(transport, self._shares.surplus_s)

    def connection_lost(self, exc: BaseException | None) -> None:
        """The connection is closed."""
        if self._counted:
            self._counted = False
            self._shares.leave(self._authority)
        super().connection_lost(exc)

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """Answers what could not be read, or failed outside of `web_envelope.envelope`."""
        if request.writer.output_size > 0:
            raise ConnectionError("a part of the answer has been sent: there is no place for an error")
        if status == 500:
            events.emit("internal_fault", level="error", exc_info=exc)
            response = answer(500, {"code": 500, "status": INTERNAL_FAULT, "results": {}})
        else:
            refusal = MalformedMessage(f"not HTTP/1.1, or a line or header field of more than {LINE_LIMIT} bytes")
            response = answer(status_of(refusal), failure(refusal))
        response.force_close()
        return response


def certificate_of(request: web.Request) -> bytes:
    """The certificate of the connection on which this came, DER.

    Raises:
        AccessDenied: there is none.
        TooManyConnections: the connection is one more than its authority may have.
    """
    connection = request.protocol
    if not isinstance(connection, Connection) or not connection.certificate:
        raise AccessDenied("a client certificate is required")
    if connection.surplus:
        raise TooManyConnections("your authority has as many connections open here as it may")
    return connection.certificate


def is_surplus(request: web.Request) -> bool:
    """Whether the connection is closed after this answer."""
    return isinstance(request.protocol, Connection) and request.protocol.surplus
