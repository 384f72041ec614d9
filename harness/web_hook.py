"""Webhooks: JSON that is sent to a receiver of the operator's choice, which is no service of ours.

Invariants:
    1. A call ends within its deadline; the answer's status counts, its body is not read.
    2. No redirect is followed, and no certificate of ours is shown.
    3. No path or query of the URL gets into an error: receivers' tokens are kept there.
    4. An https receiver is checked against the authority that was named, or the system's; nothing turns that off.

Owner: whoever made it.

Spec: RFC 9110.
"""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp

from harness import __version__
from harness.errors import ConfigError, DeadlineExceeded, PeerRefusedUs, PeerUnreachable

DEADLINE_S = 10.0
_LATER = frozenset({408, 425, 429})


class Webhook:
    """One receiver.

    Args:
        url: http or https.
        authority: file with the certificates that may vouch for an https receiver; None: the system's.
        deadline_s: for one call.

    Raises:
        ConfigError: the file cannot be used.
    """

    def __init__(self, url: str, authority: Path | None = None, *, deadline_s: float = DEADLINE_S) -> None:
        self._url = url
        self._deadline_s = deadline_s
        parts = urlsplit(url)
        self.name = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
        try:
            self._context = ssl.create_default_context(cafile=None if authority is None else str(authority))
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"{authority}: cannot be used as an authority: {error}") from error

    async def post(self, body: object) -> None:
        """Sends a body.

        Raises:
            PeerUnreachable, DeadlineExceeded: no connection, no answer, 5xx or another "later".
            PeerRefusedUs: any other status than 2xx.

        *Cancellation:* the receiver may have it.
        """
        try:
            async with asyncio.timeout(self._deadline_s):
                status = await self._post(body)
        except TimeoutError as error:
            raise DeadlineExceeded(f"{self.name} gave no answer within {self._deadline_s:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise PeerUnreachable(f"{self.name} cannot be reached: {_reason(error)}") from error
        if status >= 500 or status in _LATER:
            raise PeerUnreachable(f"{self.name} answered {status}")
        if not 200 <= status < 300:
            raise PeerRefusedUs(f"{self.name} answered {status}", status=status)

    async def _post(self, body: object) -> int:
        connector = aiohttp.TCPConnector(ssl=self._context, force_close=True)
        headers = {"User-Agent": f"kvm-deep-attestation/{__version__}"}
        async with (
            aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar(), headers=headers) as session,
            session.post(self._url, json=body, allow_redirects=False) as response,
        ):
            return response.status


def _reason(error: Exception) -> str:
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return "its certificate is not accepted"
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    return (cause.strerror if isinstance(cause, OSError) else None) or type(error).__name__
