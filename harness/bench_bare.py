"""The yardstick: a bare aiohttp server whose handler returns a fixed body, or waits and then returns it.

A process of its own: ``python -m harness.bench_bare FILE``. It says its port when it listens. ``/fixed`` answers at
once; what waits at ``/wait`` is answered when the process gets SIGUSR1.

Invariants:
    1. TLS is that of the services: the same context, client certificates asked for and checked. Nothing else of them
       is here: no roles, no deadlines, no envelope.

Spec: docs/performance.md, method.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

from aiohttp import web
from pydantic import BaseModel, ConfigDict

from harness.config import TlsSettings
from harness.tls import server_context

_BACKLOG = 512


class BareSettings(BaseModel):
    """What the yardstick needs: size of the body in bytes, and TLS unless it is to do without."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    body_bytes: int
    tls: TlsSettings | None


async def _serve(settings: BareSettings) -> None:
    body = b"x" * settings.body_bytes
    released = asyncio.Event()
    ended = asyncio.Event()

    async def fixed(_: web.Request) -> web.Response:
        return web.Response(body=body, content_type="application/json")

    async def wait(_: web.Request) -> web.Response:
        await released.wait()
        return web.Response(body=body, content_type="application/json")

    app = web.Application()
    app.router.add_get("/fixed", fixed)
    app.router.add_get("/wait", wait)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR1, released.set)
    loop.add_signal_handler(signal.SIGTERM, ended.set)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    context = None if settings.tls is None else server_context(settings.tls)
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context, backlog=_BACKLOG)
    await site.start()
    print(runner.addresses[0][1], flush=True)
    await ended.wait()
    await runner.cleanup()


def main() -> None:
    """Entry point of the process."""
    settings = BareSettings.model_validate_json(Path(sys.argv[1]).read_bytes())
    asyncio.run(_serve(settings))


if __name__ == "__main__":
    main()
