"""A WebSocket as a channel of text frames; the same for both ends.

Invariants:
    1. `send` ends: a peer that does not read for `SEND_S` is taken for gone.
    2. Frames above the limit given at the opening end the connection.

Spec: RFC 6455.
"""

from __future__ import annotations

import asyncio

import aiohttp
from aiohttp import web

from harness.errors import PeerUnreachable

SEND_S = 10.0
FRAME_LIMIT = 8 * 1024 * 1024
HEARTBEAT_S = 10.0
CLOSE_S = 1.0


class Channel:
    """One open connection.

    Args:
        socket: an opened WebSocket of aiohttp, of either end.
    """

    def __init__(self, socket: web.WebSocketResponse | aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket

    async def send(self, text: str) -> None:
        """Sends one frame.

        Raises:
            PeerUnreachable: the connection is gone, or the peer does not read.

        *Cancellation:* the frame may have been sent.
        """
        try:
            async with asyncio.timeout(SEND_S):
                await self._socket.send_str(text)
        except (ConnectionError, RuntimeError, aiohttp.ClientError) as error:
            raise PeerUnreachable("the connection is gone") from error
        except TimeoutError as error:
            raise PeerUnreachable(f"the peer did not read for {SEND_S:g} s") from error

    async def receive(self) -> str | None:
        """Next frame; None when the peer has closed. Waits without a deadline: the heartbeat ends a dead connection.

        Raises:
            PeerUnreachable: the connection is gone, or the peer sent something that is not a text frame.

        *Cancellation:* no frame is lost.
        """
        message = await self._socket.receive()
        if message.type is aiohttp.WSMsgType.TEXT:
            return str(message.data)
        if message.type in {aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSING, aiohttp.WSMsgType.CLOSED}:
            return None
        raise PeerUnreachable("the connection broke, or carried something that is not text")
