"""A server's figures: what counts its calls, and ``GET /metrics``.

Invariants:
    1. Every call is counted once, under the name of its route, however it ends; what has no route is ``other``.
    2. Who asks for them holds up no other call: they are rendered in a thread.
    3. The figures are given to operators of the service's own authority: they tell how busy all of its users are.

Spec: docs/metrics.md.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from aiohttp import web

from harness.errors import MalformedMessage, MessageTooLarge, NotFound
from harness.health import OK, Health
from harness.metrics import CONTENT_TYPE, OTHER, Metrics
from harness.own_certificate import OwnCertificate
from harness.tls import Peer

METRICS: web.AppKey[Metrics] = web.AppKey("metrics", Metrics)


@web.middleware
async def counted(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Middleware of every application, inside of `web_envelope.envelope`: sees errors before they are answers."""
    loop, metrics = asyncio.get_running_loop(), request.app[METRICS]
    begun_s = loop.time()
    error: BaseException | None = None
    try:
        return await handler(request)
    except BaseException as raised:
        error = _named(raised)
        raise
    finally:
        metrics.ended(_call(request), loop.time() - begun_s, error)


def _call(request: web.Request) -> str:
    resource = request.match_info.route.resource
    return OTHER if resource is None else f"{request.method} {resource.canonical}"


def _named(error: BaseException) -> BaseException:
    """The error that says what aiohttp found: it has no names of ours."""
    match error:
        case web.HTTPRequestEntityTooLarge():
            return MessageTooLarge("the body is too large")
        case web.HTTPNotFound():
            return NotFound("there is no such call")
        case web.HTTPClientError():
            return MalformedMessage("there is no such call")
    return error


async def figures(metrics: Metrics, health: Health, own: OwnCertificate, peer: Peer) -> web.Response:
    """Answer to ``GET /metrics``.

    Raises:
        AccessDenied: the peer is no operator of the service's own authority.

    *Cancellation:* nothing has changed.
    """
    own.check_operator(peer, "the metrics are for an operator of the service's own authority")
    report = await health.report(in_full=False)
    metrics.checked({name: said == OK for name, said in report.checks.items()})
    body = await asyncio.to_thread(metrics.snapshot().text)
    return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE})
