"""A receiver of webhooks: a real HTTP or HTTPS server that keeps what it was sent."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web


class ReceiverLog:
    """Bodies that came, in order; ``statuses`` are answered first, then 200."""

    def __init__(self) -> None:
        self.bodies: list[Any] = []
        self.statuses: list[int] = []
        self._came = asyncio.Condition()

    async def handle(self, request: web.Request) -> web.Response:
        body = json.loads(await request.read())
        status = self.statuses.pop(0) if self.statuses else 200
        async with self._came:
            self.bodies.append(body)
            self._came.notify_all()
        return web.Response(status=status, headers={"Location": "/elsewhere"} if 300 <= status < 400 else {})

    async def wait_for(self, count: int, *, deadline_s: float = 30.0) -> list[Any]:
        """All bodies, once there are as many."""
        async with asyncio.timeout(deadline_s), self._came:
            await self._came.wait_for(lambda: len(self.bodies) >= count)
            return list(self.bodies)


@asynccontextmanager
async def receiving(log: ReceiverLog, *, port: int = 0, context: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """The receiver serves during the block; gives its port."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", log.handle)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", port, ssl_context=context)
        await site.start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()
