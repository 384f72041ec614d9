"""The connections of a client, and which of our certificates they were made with.

Invariants:
    1. A call is made on a connection whose certificates, ours and the server's, hold at that moment.
    2. When our certificate's file has been renewed, new calls show the new one; connections with the one before are
       closed when nothing is under way on them any more, and before it expires.

Owner: one `PeerClient`, in one event loop.

Spec: DESIGN 7; docs/architecture.md (certificates).
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aiohttp
from cryptography import x509

from harness.config import TlsSettings
from harness.errors import CertificateRefused, PeerUnreachable
from harness.own_certificate import Clock, OwnCertificate
from harness.pki import Role, now
from harness.tls import ServerJudge, client_context

CONNECT_S = 10.0
_CONNECTIONS = 256
_KEEPALIVE_S = 30.0
_LOOK_S = 1.0
_EARLIER = datetime.timedelta(seconds=30)


@dataclass(slots=True, eq=False)
class Lease:
    """The right to use connections that were made with one certificate of ours."""

    session: aiohttp.ClientSession
    own: x509.Certificate
    users: int = 0


class Connections:
    """Connections to one service.

    Args:
        tls: our certificate, key, and the authorities that may vouch for the server.
        roles: what the server may be; None: anything.
        pinned: the server's certificate; see `tls.client_context`.
        clock: the time by which certificates expire.

    Raises:
        ConfigError: a file in ``tls`` is missing or unusable.
    """

    def __init__(
        self,
        tls: TlsSettings,
        *,
        roles: Collection[Role] | None = None,
        pinned: x509.Certificate | None = None,
        clock: Clock = now,
    ) -> None:
        self._clock = clock
        self._own = OwnCertificate(tls, clock=clock)
        self._judge = ServerJudge(roles=roles, pinned=pinned)
        self._context = client_context(tls, pinned=pinned, judge=self._judge)
        self._own.use_in(self._context)
        self._lease: Lease | None = None
        self._closing: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def use(self) -> AsyncIterator[Lease]:
        """Lets one call use the connections.

        Raises:
            PeerUnreachable: our own certificate has expired.

        *Cancellation:* connections that nobody may use any more are being closed all the same.
        """
        lease = self._current()
        lease.users += 1
        try:
            yield lease
        finally:
            lease.users -= 1
            self._end_if_done(lease)

    async def outlived(self, lease: Lease) -> None:
        """Returns when a connection that stays open is to be made anew: a certificate ends, or ours was renewed.

        *Cancellation:* nothing has changed.
        """
        while not self._is_over(lease.own):
            await asyncio.sleep(_LOOK_S)
            self._refresh()

    async def close(self) -> None:
        """Closes the connections.

        *Cancellation:* they are being closed all the same.
        """
        lease, self._lease = self._lease, None
        closing = [asyncio.ensure_future(lease.session.close())] if lease is not None else []
        await asyncio.gather(*closing, *self._closing, return_exceptions=True)

    def _current(self) -> Lease:
        self._refresh()
        try:
            self._own.check_valid()
        except CertificateRefused as error:
            raise PeerUnreachable(error.detail) from error
        lease = self._lease
        server_ended = self._judge.expires is not None and self._clock() > self._judge.expires
        if lease is not None and not lease.session.closed and lease.own is self._own.certificate and not server_ended:
            return lease
        self._judge.expires = None
        self._lease = Lease(session=self._open(), own=self._own.certificate)
        if lease is not None:
            self._end_if_done(lease)
        return self._lease

    def _refresh(self) -> None:
        with contextlib.suppress(CertificateRefused):  # the process's server tells about it; the old one is in use
            self._own.refresh()

    def _is_over(self, own: x509.Certificate) -> bool:
        end = own.not_valid_after_utc
        if own is not self._own.certificate:
            return self._clock() > end - _EARLIER
        return self._clock() > (end if self._judge.expires is None else min(end, self._judge.expires))

    def _end_if_done(self, lease: Lease) -> None:
        if lease is self._lease or lease.users or lease.session.closed:
            return
        task = asyncio.create_task(lease.session.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _open(self) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(ssl=self._context, limit=_CONNECTIONS, keepalive_timeout=_KEEPALIVE_S)
        return aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            headers={"Accept": "application/json", "Accept-Encoding": "identity"},
        )
