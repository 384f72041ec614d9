"""Clients: calls to a service over mutual TLS, with a deadline, a size limit and typed errors.

Invariants:
    1. A call ends within its deadline, with the results or an error of the project.
    2. An answer is read up to its limit and not beyond.
    3. The server is of the role that is expected of it; where its certificate is pinned, it shows that one or a renewal
       on the same key, and a name that holds. Nothing is sent before.
    4. Nothing is sent but over mutual TLS: an address that is not https is refused.

Spec: DESIGN 3.1 (deadline, Retry-After), 3.8 (which answers are tried again).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from types import TracebackType

import aiohttp
from cryptography import x509

from harness.config import TlsSettings
from harness.errors import (
    DeadlineExceeded,
    HarnessError,
    MalformedMessage,
    MessageTooLarge,
    PeerUnreachable,
    ProtocolError,
)
from harness.messages import error_from_response, parse_json
from harness.own_certificate import Clock
from harness.peer_connections import CONNECT_S, Connections, Lease
from harness.pki import Role, now
from harness.web_channel import CLOSE_S, FRAME_LIMIT, HEARTBEAT_S, Channel

ANSWER_LIMIT = 1024 * 1024
DEADLINE_S = 30.0
_Answer = tuple[aiohttp.ClientResponse, bytes]


class PeerClient:
    """One service, as a client reaches it; used as an async context manager, or closed.

    Args:
        tls: our certificate, key, and the authorities that may vouch for the server.
        base_url: ``https://host:port``, with or without a path that all calls share.
        deadline_s: seconds for a whole call.
        limit: largest answer, in bytes.
        roles: what the server may be, from its certificate; None: whatever its authority made it.
        pinned: the server's certificate; the server shows that one, or a renewal on the same key that one of the
            authorities vouches for.
        clock: the time by which certificates expire.

    Raises:
        ConfigError: a file in ``tls`` is missing or unusable.
        MalformedMessage: an address that is not https.
    """

    def __init__(
        self,
        tls: TlsSettings,
        base_url: str,
        *,
        deadline_s: float = DEADLINE_S,
        limit: int = ANSWER_LIMIT,
        roles: Collection[Role] | None = None,
        pinned: x509.Certificate | None = None,
        clock: Clock = now,
    ) -> None:
        if not base_url.startswith("https://"):
            raise MalformedMessage(f"{base_url[:200]!r} is not an https address")
        self.base_url = base_url.rstrip("/")
        self._deadline_s = deadline_s
        self._limit = limit
        self._connections = Connections(tls, roles=roles, pinned=pinned, clock=clock)

    async def __aenter__(self) -> PeerClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections.

        *Cancellation:* they are being closed all the same.
        """
        await self._connections.close()

    async def get(
        self, path: str, params: Sequence[tuple[str, str]] = (), *, headers: Mapping[str, str] | None = None
    ) -> object:
        """Results of a GET; see `call`."""
        return await self.call("GET", path, params=params, headers=headers)

    async def text(self, path: str) -> str:
        """The body of a GET that is answered with text and no envelope. Raises, and is cancelled, like `call`."""
        response, content = await self._in_time(self._call("GET", path, (), None, None), self._deadline_s)
        if response.status != 200:
            self._results(response, content)  # raises: a refusal has its envelope here too
        return content.decode("utf-8", "replace")

    async def post(self, path: str, body: object) -> object:
        """Results of a POST; see `call`."""
        return await self.call("POST", path, body=body)

    async def put(self, path: str, body: object) -> object:
        """Results of a PUT; see `call`."""
        return await self.call("PUT", path, body=body)

    async def delete(self, path: str) -> object:
        """Results of a DELETE; see `call`."""
        return await self.call("DELETE", path)

    async def call(
        self,
        method: str,
        path: str,
        *,
        params: Sequence[tuple[str, str]] = (),
        body: object = None,
        headers: Mapping[str, str] | None = None,
        deadline_s: float | None = None,
    ) -> object:
        """Results of one call, out of their envelope.

        Args:
            method: of HTTP.
            path: below the base URL.
            params: of the query.
            body: plain data, sent as JSON.
            headers: beside those of every call.
            deadline_s: seconds for this call; None: those of the client.

        Raises:
            PeerUnreachable: no connection, a certificate that is not accepted (either way), our own one has expired, or
                "later" (408, 5xx).
            DeadlineExceeded: not done in time.
            MessageTooLarge, MalformedMessage: the answer is too large, or not an envelope.
            HarnessError: what the peer refused the call with (`wire_errors.error_from_response`).

        *Cancellation:* the connection is closed; the peer may or may not have done what was asked.
        """
        limit_s = self._deadline_s if deadline_s is None else deadline_s
        return self._results(*await self._in_time(self._call(method, path, params, body, headers), limit_s))

    async def _in_time(self, exchange: Awaitable[_Answer], limit_s: float) -> _Answer:
        try:
            async with asyncio.timeout(limit_s):
                return await exchange
        except aiohttp.ConnectionTimeoutError as error:
            raise PeerUnreachable(f"{self.base_url} took more than {CONNECT_S:g} s to connect") from error
        except TimeoutError as error:
            raise DeadlineExceeded(f"{self.base_url} gave no answer within {limit_s:g} s") from error
        except aiohttp.ClientError as error:
            raise self._unreachable(error) from error
        except OSError as error:
            raise PeerUnreachable(f"{self.base_url} cannot be reached: {error.strerror or error}") from error

    async def _call(
        self,
        method: str,
        path: str,
        params: Sequence[tuple[str, str]],
        body: object,
        headers: Mapping[str, str] | None,
    ) -> _Answer:
        async with (
            self._connections.use() as lease,
            lease.session.request(
                method,
                self.base_url + path,
                params=list(params),
                json=body,
                headers=headers,
                allow_redirects=False,
            ) as response,
        ):
            if response.content_length is not None and response.content_length <= self._limit:
                return response, await response.read()
            content = bytearray()
            async for chunk in response.content.iter_chunked(64 * 1024):
                content += chunk
                if len(content) > self._limit:
                    response.close()
                    raise MessageTooLarge(f"{self.base_url} answered more than {self._limit} bytes")
            return response, bytes(content)

    def _results(self, response: aiohttp.ClientResponse, content: bytes) -> object:
        body: object = None
        fault: ProtocolError | None = None
        try:
            body = parse_json(content, limit=self._limit)
        except ProtocolError as error:
            fault = error
        if response.status != 200:
            raise error_from_response(response.status, body, response.headers.get("Retry-After"))
        if fault is not None:
            raise fault
        if not isinstance(body, dict) or "results" not in body:
            raise MalformedMessage(f"{self.base_url} answered without results")
        return body["results"]

    @asynccontextmanager
    async def channel(self, path: str) -> AsyncIterator[Channel]:
        """Opens a WebSocket.

        Raises:
            PeerUnreachable: no connection, or the peer does not accept it.
            DeadlineExceeded: it was not opened in time.

        *Cancellation:* the connection is closed.
        """
        async with self._connections.use() as lease:
            socket = await self._opened(lease, path)
            renewing = asyncio.create_task(self._close_when_outlived(lease, socket))
            try:
                yield Channel(socket)
            finally:
                renewing.cancel()
                await asyncio.gather(renewing, return_exceptions=True)
                await socket.close()

    async def _opened(self, lease: Lease, path: str) -> aiohttp.ClientWebSocketResponse:
        try:
            async with asyncio.timeout(CONNECT_S):
                return await lease.session.ws_connect(
                    self.base_url + path,
                    heartbeat=HEARTBEAT_S,
                    max_msg_size=FRAME_LIMIT,
                    timeout=aiohttp.ClientWSTimeout(ws_close=CLOSE_S),
                )
        except TimeoutError as error:
            raise DeadlineExceeded(f"{self.base_url} opened no connection within {CONNECT_S:g} s") from error
        except aiohttp.ClientError as error:
            raise self._unreachable(error) from error
        except OSError as error:
            raise PeerUnreachable(f"{self.base_url} cannot be reached: {error.strerror or error}") from error

    async def _close_when_outlived(self, lease: Lease, socket: aiohttp.ClientWebSocketResponse) -> None:
        await self._connections.outlived(lease)
        await socket.close()

    def _unreachable(self, error: aiohttp.ClientError) -> HarnessError:
        if isinstance(error, aiohttp.ClientConnectorCertificateError):
            reason = error.certificate_error.args[-1]
            return PeerUnreachable(f"{self.base_url} shows a certificate that is not accepted: {reason}")
        if isinstance(error, aiohttp.WSServerHandshakeError):
            return PeerUnreachable(f"{self.base_url} does not open a channel: it answered {error.status}")
        if isinstance(error, aiohttp.ServerDisconnectedError):
            return PeerUnreachable(  # TLS 1.3: it judges our certificate after our handshake has ended
                f"{self.base_url} closed the connection without an answer; it may not accept our certificate"
            )
        text = str(error) or type(error).__name__
        if "alert" in text.lower():
            return PeerUnreachable(f"{self.base_url} may not accept our certificate: {text}")
        return PeerUnreachable(f"{self.base_url} cannot be reached: {text}")
