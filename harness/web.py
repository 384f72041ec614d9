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
    3. A request that is larger or slower than its bound is cut off; so is a connection that asks for nothing.

Spec: DESIGN 3.1, 3.3, 7; RFC 9110.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from harness import __version__, events
from harness.channel import FRAME_LIMIT, HEARTBEAT_S, Channel
from harness.config import Listen, TlsSettings
from harness.door import Door
from harness.errors import AccessDenied, ConfigError, DeadlineExceeded, HarnessError, MalformedMessage, MessageTooLarge
from harness.messages import failure, parse_json, retry_after_s, status_of, success
from harness.pki import Role
from harness.tls import Identities, Peer, server_context

BODY_LIMIT = 64 * 1024
DEADLINE_S = 35.0
HANDSHAKE_S = 10.0
STOP_S = 3.0
_LINE_LIMIT = 8190
_BACKLOG = 512
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
        deadline_s: seconds for the whole call; None for a WebSocket.
    """

    method: str
    path: str
    handler: Handler
    roles: Collection[Role] = field(kw_only=True)
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
    """Application of one service; ``GET /version`` is open to everybody with a known certificate."""
    app = web.Application(middlewares=[_envelope], client_max_size=BODY_LIMIT)

    async def version(_: web.Request) -> object:
        return {"service": service, "version": __version__}

    for route in (Route("GET", "/version", version, roles=tuple(Role)), *routes):
        # allow_head would let HEAD run a GET handler
        app.router.add_route(route.method, route.path, _guarded(route, identities))
    return app


def _guarded(route: Route, identities: Identities) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    roles = frozenset(route.roles)

    async def call(request: web.Request) -> web.StreamResponse:
        peer = request[_PEER] = identities.peer(_certificate(request))
        if peer.role not in roles:
            raise AccessDenied(f"a {peer.role.value} may not call {request.method} {route.path}")
        try:
            async with asyncio.timeout(route.deadline_s):
                results = await route.handler(request)
        except TimeoutError as error:
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
    Door.begin(request.transport)
    try:
        return await handler(request)
    except HarnessError as error:
        return _refusal(error)
    except web.HTTPRequestEntityTooLarge:
        return _refusal(MessageTooLarge(f"the body has more than {BODY_LIMIT} bytes"))
    except web.HTTPException as error:
        sentence = f"{request.method} {request.path}: {error.reason}".encode("ascii", "replace").decode()
        return _answer(error.status, {"code": error.status, "status": sentence, "results": {}}, error.headers)
    except Exception:  # the border of a request: the client learns that it failed, the log learns why
        events.emit("internal_fault", level="error", method=request.method, path=request.path, exc_info=True)
        return _answer(500, {"code": 500, "status": "internal fault; see the service's log", "results": {}})
    finally:
        Door.end(request.transport)


def _refusal(error: HarnessError) -> web.Response:
    wait_s = retry_after_s(error)
    headers = {} if wait_s is None else {"Retry-After": f"{wait_s:.3f}".rstrip("0").rstrip(".")}
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


async def accept_channel(request: web.Request) -> tuple[Channel, web.WebSocketResponse]:
    """Opens a WebSocket on a route without deadline; the handler returns the response when it is done.

    *Cancellation:* the connection is closed.
    """
    response = web.WebSocketResponse(heartbeat=HEARTBEAT_S, max_msg_size=FRAME_LIMIT, compress=False)
    await response.prepare(request)
    return Channel(response), response


@dataclass(frozen=True, slots=True)
class Server:
    """A running server.

    Args:
        url: where it is reached.
        context: its TLS context, for `tls.trust_also`.
    """

    url: str
    context: Any


@asynccontextmanager
async def serve(
    app: web.Application, tls: TlsSettings, where: Listen | socket.socket, *, max_connections: int = 4096
) -> AsyncIterator[Server]:
    """Serves an application until the context is left.

    Args:
        app: from `application`.
        tls: certificate, key and authorities.
        where: address, or a listening socket that is taken over.
        max_connections: open connections; one more is cut off at once.

    Raises:
        ConfigError: port in use, or a TLS file that cannot be used.

    *Cancellation:* stops as at the end: no new connections, running calls end within three seconds.
    """
    context = server_context(tls)
    listening = where if isinstance(where, socket.socket) else _listen(where)
    runner = web.AppRunner(
        app,
        handler_cancellation=True,
        access_log=None,
        shutdown_timeout=STOP_S,
        max_line_size=_LINE_LIMIT,
        max_field_size=_LINE_LIMIT,
    )
    await runner.setup()
    try:
        if runner.server is None:
            raise ConfigError("the application has no server")
        loop = asyncio.get_running_loop()
        door = Door(runner.server, max_connections=max_connections)
        server = await loop.create_server(
            door,
            sock=listening,
            ssl=context,
            backlog=_BACKLOG,
            ssl_handshake_timeout=HANDSHAKE_S,
            ssl_shutdown_timeout=STOP_S,
        )
        try:
            host, port = listening.getsockname()[:2]
            yield Server(f"https://{host}:{port}", context)
        finally:
            server.close()
    finally:
        await runner.cleanup()
        listening.close()


def _listen(where: Listen) -> socket.socket:
    try:
        return socket.create_server((where.host, where.port), backlog=_BACKLOG)
    except OSError as error:
        raise ConfigError(f"listen: {where.host} port {where.port}: {error.strerror}") from error
