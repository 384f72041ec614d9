"""Clients: calls to a service over mutual TLS, with a deadline, a size limit and typed errors.

Invariants:
    1. A call ends within its deadline, with the results or an error of the project.
    2. An answer is read up to its limit and not beyond.
    3. Where a certificate is pinned, the server shows that one, and a name that holds; nothing is sent before.
    4. Nothing is sent but over mutual TLS: an address that is not https is refused.

Spec: DESIGN 3.1 (deadline, Retry-After), 3.8 (which answers are tried again).
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Sequence
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
from harness.tls import client_context
from harness.web_channel import CLOSE_S, FRAME_LIMIT, HEARTBEAT_S, Channel

ANSWER_LIMIT = 1024 * 1024
DEADLINE_S = 30.0
_CONNECT_S = 10.0
_CONNECTIONS = 256
_KEEPALIVE_S = 30.0


class PeerClient:
    """One service, as a client reaches it; used as an async context manager, or closed.

    Args:
        tls: our certificate, key, and the authorities that may vouch for the server.
        base_url: ``https://host:port``, with or without a path that all calls share.
        deadline_s: seconds for a whole call.
        limit: largest answer, in bytes.
        pinned: the server's certificate, in place of all authorities; no other one is accepted.

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
        pinned: x509.Certificate | None = None,
    ) -> None:
        if not base_url.startswith("https://"):
            raise MalformedMessage(f"{base_url[:200]!r} is not an https address")
        self.base_url = base_url.rstrip("/")
        self._deadline_s = deadline_s
        self._limit = limit
        self._context: ssl.SSLContext = client_context(tls, pinned=pinned)
        self._session: aiohttp.ClientSession | None = None

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
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def get(self, path: str, params: Sequence[tuple[str, str]] = ()) -> object:
        """Results of a GET; see `call`."""
        return await self.call("GET", path, params=params)

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
        self, method: str, path: str, *, params: Sequence[tuple[str, str]] = (), body: object = None
    ) -> object:
        """Results of one call, out of their envelope.

        Raises:
            PeerUnreachable: no connection, a certificate that is not accepted (either way), or "later" (408, 5xx).
            DeadlineExceeded: not done in time.
            MessageTooLarge, MalformedMessage: the answer is too large, or not an envelope.
            HarnessError: what the peer refused the call with (`wire_errors.error_from_response`).

        *Cancellation:* the connection is closed; the peer may or may not have done what was asked.
        """
        try:
            async with asyncio.timeout(self._deadline_s):
                return await self._call(method, path, params, body)
        except aiohttp.ConnectionTimeoutError as error:
            raise PeerUnreachable(f"{self.base_url} took more than {_CONNECT_S:g} s to connect") from error
        except TimeoutError as error:
            raise DeadlineExceeded(f"{self.base_url} gave no answer within {self._deadline_s:g} s") from error
        except aiohttp.ClientError as error:
            raise self._unreachable(error) from error
        except OSError as error:
            raise PeerUnreachable(f"{self.base_url} cannot be reached: {error.strerror or error}") from error

    async def _call(self, method: str, path: str, params: Sequence[tuple[str, str]], body: object) -> object:
        session = self._open()
        async with session.request(
            method,
            self.base_url + path,
            params=list(params),
            json=body,
            allow_redirects=False,
        ) as response:
            content = bytearray()
            async for chunk in response.content.iter_chunked(64 * 1024):
                content += chunk
                if len(content) > self._limit:
                    response.close()
                    raise MessageTooLarge(f"{self.base_url} answered more than {self._limit} bytes")
            return self._results(response, bytes(content))

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
        try:
            async with asyncio.timeout(_CONNECT_S):
                socket = await self._open().ws_connect(
                    self.base_url + path,
                    heartbeat=HEARTBEAT_S,
                    max_msg_size=FRAME_LIMIT,
                    timeout=aiohttp.ClientWSTimeout(ws_close=CLOSE_S),
                )
        except TimeoutError as error:
            raise DeadlineExceeded(f"{self.base_url} opened no connection within {_CONNECT_S:g} s") from error
        except aiohttp.ClientError as error:
            raise self._unreachable(error) from error
        except OSError as error:
            raise PeerUnreachable(f"{self.base_url} cannot be reached: {error.strerror or error}") from error
        try:
            yield Channel(socket)
        finally:
            await socket.close()

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None or self._session.closed:
            connector = aiohttp.TCPConnector(ssl=self._context, limit=_CONNECTIONS, keepalive_timeout=_KEEPALIVE_S)
            self._session = aiohttp.ClientSession(
                connector=connector,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                headers={"Accept": "application/json", "Accept-Encoding": "identity"},
            )
        return self._session

    def _unreachable(self, error: aiohttp.ClientError) -> HarnessError:
        if isinstance(error, aiohttp.ClientConnectorCertificateError):
            return PeerUnreachable(f"{self.base_url} shows a certificate that is not accepted: {error}")
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
