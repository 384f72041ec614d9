"""Servers: an aiohttp application with mutual TLS, roles, deadlines and size limits.

::

    routes = [Route("GET", "/v1/hosts", hosts, roles={Role.TENANT_REGISTRAR})]
    app = application("provider-verifier", routes, identities)
    async with serve(app, tls, Listen()) as server:
        print(server.url)
        await asyncio.Event().wait()

A handler takes the request and returns the results, which go into Keylime's envelope, or a response of its own.

Invariants:
    1. Every route names the roles that may call it; everybody else is answered 403.
    2. Every answer is an envelope with ``Cache-Control: no-store``; an unknown exception is one neutral sentence.
    3. A request that is larger or slower than its bound is cut off; so is a connection that asks for nothing (`door`).
    4. A server stops within five seconds, whatever its handlers and peers do.

Spec: DESIGN 3.1, 3.3, 7; RFC 9110.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import math
import socket
import ssl
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import WSCloseCode, web

from harness import __version__, events
from harness.config import Listen, TlsSettings
from harness.door import Bounds, Door, request_began, request_ended
from harness.errors import AccessDenied, DeadlineExceeded, HarnessError, MalformedMessage, MessageTooLarge
from harness.messages import failure, parse_json, retry_after_s, status_of, success
from harness.pki import Role
from harness.tls import Identities, Peer, server_context
from harness.web_channel import CLOSE_S, FRAME_LIMIT, HEARTBEAT_S, Channel

BODY_LIMIT = 64 * 1024
DEADLINE_S = 35.0
STOP_S = 1.5
"""aiohttp waits this long for running calls, and once more for what they have yet to read."""
_LINE_LIMIT = 8190
_BACKLOG = 512
_BOUNDS = Bounds()
_INTERNAL_FAULT = "internal fault; see the service's log"
_CHANNELS: web.AppKey[weakref.WeakSet[web.WebSocketResponse]] = web.AppKey("channels")
_OPENED: web.RequestKey[web.WebSocketResponse] = web.RequestKey("opened", web.WebSocketResponse)
_PEER: web.RequestKey[Peer] = web.RequestKey("peer", Peer)

Handler = Callable[[web.Request], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class Route:
    """One call of a service.

    Args:
        method: of HTTP.
        path: aiohttp's pattern, for example ``/v1/hosts/{host_id}``.
        handler: returns the results, or a `web.StreamResponse` of its own.
        roles: who may call.
        authority: name of the only authority whose peers may call; None where each known one is as good. A tenant
            issues its own certificates, with any role in them: what only the provider's own people may do needs this.
        deadline_s: seconds for the whole call; None for a WebSocket.
    """

    method: str
    path: str
    handler: Handler
    roles: Collection[Role] = field(kw_only=True)
    authority: str | None = field(default=None, kw_only=True)
    deadline_s: float | None = field(default=DEADLINE_S, kw_only=True)


def peer_of(request: web.Request) -> Peer:
    """Who sent this request."""
    return request[_PEER]


async def read_json(request: web.Request) -> object:
    """Body of a request.

    Raises:
        MessageTooLarge: more than 64 KiB.
        MalformedMessage: not JSON (`parse_json`).

    *Cancellation:* the body is not read to its end.
    """
    return parse_json(await request.read(), limit=BODY_LIMIT)


async def read_object(request: web.Request, *, members: Collection[str]) -> dict[str, Any]:
    """Body of a request that must be an object with no other than the given members.

    Raises:
        MessageTooLarge: more than 64 KiB.
        MalformedMessage: not such an object.
    """
    body = await read_json(request)
    if not isinstance(body, dict):
        raise MalformedMessage("the body must be a JSON object")
    if unknown := body.keys() - set(members):
        raise MalformedMessage(f"unknown member {ascii(min(unknown))[:40]}")
    return body


def application(service: str, routes: Iterable[Route], identities: Identities) -> web.Application:
    """Application of one service.

    ``GET /version`` is open to everybody with a known certificate; a route of the service's own takes its place.
    """
    app = web.Application(middlewares=[_envelope], client_max_size=BODY_LIMIT)
    app[_CHANNELS] = weakref.WeakSet()
    app.on_shutdown.append(_close_channels)

    async def version(_: web.Request) -> object:
        return {"service": service, "version": __version__}

    own = list(routes)
    if not any((route.method, route.path) == ("GET", "/version") for route in own):
        own.append(Route("GET", "/version", version, roles=tuple(Role)))
    for route in own:
        # add_get would let HEAD run a handler too
        app.router.add_route(route.method, route.path, _guarded(route, identities))
    return app


def _guarded(route: Route, identities: Identities) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    roles = frozenset(route.roles)

    async def call(request: web.Request) -> web.StreamResponse:
        peer = request[_PEER] = identities.peer(_certificate(request))
        if peer.role not in roles or route.authority not in {None, peer.authority}:
            raise AccessDenied(f"a {peer.role.value} of {peer.authority} may not call {route.method} {route.path}")
        try:
            async with asyncio.timeout(route.deadline_s) as deadline:
                results = await route.handler(request)
        except TimeoutError as error:
            if not deadline.expired():
                raise
            raise DeadlineExceeded(f"the call took more than {route.deadline_s} s") from error
        return results if isinstance(results, web.StreamResponse) else _answer(200, success(results))

    return call


def _certificate(request: web.Request) -> bytes:
    connection = request.transport.get_extra_info("ssl_object") if request.transport else None
    certificate = connection.getpeercert(binary_form=True) if connection else None
    if not certificate:
        raise AccessDenied("a client certificate is required")
    return bytes(certificate)


@web.middleware
async def _envelope(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    transport = request.transport
    request_began(transport)
    try:
        return _not_stored(await handler(request))
    except HarnessError as error:
        answer = _refusal(error)
    except web.HTTPRequestEntityTooLarge:
        answer = _refusal(MessageTooLarge(f"the body has more than {BODY_LIMIT} bytes"))
    except web.HTTPException as error:
        sentence = ascii(f"{request.method} {request.path[:100]}: {error.reason}")[1:-1]
        answer = _answer(error.status, {"code": error.status, "status": sentence, "results": {}}, error.headers)
    except Exception:  # the border of a request: the client learns that it failed, the log learns why
        events.emit("internal_fault", level="error", method=request.method, path=request.path, exc_info=True)
        answer = _answer(500, {"code": 500, "status": _INTERNAL_FAULT, "results": {}})
    finally:
        request_ended(transport)
    opened = request.get(_OPENED)  # an open channel has no place for an answer: it is closed
    return answer if opened is None else opened


def _not_stored(response: web.StreamResponse) -> web.StreamResponse:
    if not response.prepared:  # a WebSocket is
        response.headers["Cache-Control"] = "no-store"
    return response


def _refusal(error: HarnessError) -> web.Response:
    wait_s = retry_after_s(error)
    headers = {} if wait_s is None else {"Retry-After": str(max(1, math.ceil(wait_s)))}  # whole seconds: RFC 9110
    return _answer(status_of(error), failure(error), headers)


def _answer(status: int, envelope: object, headers: Any = None) -> web.Response:
    allowed = {name: value for name, value in (headers or {}).items() if name in {"Allow", "Retry-After"}}
    text = json.dumps(envelope, separators=(",", ":"))
    return web.Response(
        status=status,
        text=text,
        content_type="application/json",
        headers=allowed | {"Cache-Control": "no-store"},
    )


class _Connection(web.RequestHandler):
    """aiohttp's connection; answers what never gets as far as the application with an envelope as well."""

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        if request.writer.output_size > 0:
            raise ConnectionError("a part of the answer has been sent: there is no place for an error")
        if status == 500:
            events.emit("internal_fault", level="error", exc_info=exc)
            response = _answer(500, {"code": 500, "status": _INTERNAL_FAULT, "results": {}})
        else:
            response = _refusal(
                MalformedMessage(f"not HTTP/1.1, or a line or header field of more than {_LINE_LIMIT} bytes")
            )
        response.force_close()
        return response


async def accept_channel(request: web.Request, *, limit: int = FRAME_LIMIT) -> tuple[Channel, web.WebSocketResponse]:
    """Opens a WebSocket on a route without deadline; the handler returns the response when it is done.

    When the server stops, the channel ends as if the peer had closed it. An exception of the handler closes it.

    Args:
        request: of the handler.
        limit: largest frame that is received, in bytes.

    *Cancellation:* the connection is closed.
    """
    response = web.WebSocketResponse(heartbeat=HEARTBEAT_S, max_msg_size=limit, timeout=CLOSE_S, compress=False)
    await response.prepare(request)
    request[_OPENED] = response
    request.app[_CHANNELS].add(response)
    return Channel(response), response


async def _close_channels(app: web.Application) -> None:
    channels = app[_CHANNELS]
    closings = [channel.close(code=WSCloseCode.GOING_AWAY) for channel in channels]
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(CLOSE_S):
            await asyncio.gather(*closings, return_exceptions=True)


@dataclass(frozen=True, slots=True)
class Server:
    """A running server.

    Args:
        url: where it is reached.
        context: its TLS context, for `tls.trust_also`.
    """

    url: str
    context: ssl.SSLContext


@asynccontextmanager
async def serve(
    app: web.Application, tls: TlsSettings, where: Listen | socket.socket, *, bounds: Bounds = _BOUNDS
) -> AsyncIterator[Server]:
    """Serves an application until the context is left.

    Args:
        app: from `application`.
        tls: certificate, key and authorities.
        where: address, or a bound socket that is taken over.
        bounds: of the connections.

    Raises:
        ConfigError: port in use, or a TLS file that cannot be used.

    *Cancellation:* stops as at the end: no new connections, and running calls end within five seconds.
    """
    context = server_context(tls)
    listening = where if isinstance(where, socket.socket) else _listen(where)
    try:
        listening.setblocking(False)
        listening.listen(_BACKLOG)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=STOP_S)
        await runner.setup()
        if runner.server is None:
            raise RuntimeError("a runner that was set up has a server")
        connection = functools.partial(
            _Connection,
            runner.server,
            loop=asyncio.get_running_loop(),
            max_line_size=_LINE_LIMIT,
            max_field_size=_LINE_LIMIT,
        )
        accepting = asyncio.create_task(Door(connection, context, bounds).run(listening))
        try:
            yield Server(_url(listening), context)
        finally:
            accepting.cancel()
            await asyncio.wait({accepting})
            listening.close()
            await runner.cleanup()
    finally:
        listening.close()


def _listen(where: Listen) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in where.host else socket.AF_INET
        return socket.create_server((where.host, where.port), family=family, backlog=_BACKLOG)
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (while")[0]  # the address follows, which we name ourselves
        raise where.refused(reason) from error


def _url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"
