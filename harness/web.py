"""Servers: an aiohttp application with mutual TLS, roles, deadlines and size limits.

::

    routes = [Route("GET", "/v1/hosts", hosts, roles={Role.TENANT_REGISTRAR})]
    app = application("provider-verifier", routes, identities)
    async with serve(app, tls, Listen()) as server:
        print(server.url)
        await asyncio.Event().wait()

A handler takes the request and returns the results (plain data, or a `messages.ResultsText`), which go into Keylime's
envelope, or a response of its own.

Invariants:
    1. Every route names the roles that may call it; everybody else is answered 403.
    2. Every answer is an envelope with ``Cache-Control: no-store``; an unknown exception is one neutral sentence.
    3. A request that is larger or slower than its bound is cut off; so is a connection that asks for nothing, or whose
       peer does not read (`door`). No authority can take the others' connections (`web_connection`).
    4. A server stops within five seconds, whatever its handlers and peers do.
    5. The tasks that accept connections and watch the certificate live as long as the server: the end of one is the
       server's, and its caller's.
    6. A renewed certificate is shown in the next handshake; a peer whose certificate expires is refused at once, and
       its channels are closed.

Spec: DESIGN 3.1, 3.3, 7; RFC 9110.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import random
import socket
import ssl
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import WSCloseCode, web

from harness import __version__
from harness.audit import AuditEntry, parse_reason
from harness.certificate_watch import CertificateWatch
from harness.config import Listen, TlsSettings
from harness.door import Bounds, Door
from harness.errors import AccessDenied, DeadlineExceeded, MalformedMessage, ShuttingDown
from harness.health import FAILING, Health
from harness.messages import parse_json
from harness.metrics import Metrics
from harness.own_certificate import RENEWAL, Audit, OwnCertificate, to_events
from harness.pki import Role, now
from harness.tls import Identities, Peer, server_context
from harness.web_answer import BODY_LIMIT, LINE_LIMIT, answer, answer_success
from harness.web_call import CALL, Call
from harness.web_channel import CLOSE_S, FRAME_LIMIT, HEARTBEAT_S, Channel
from harness.web_connection import Connection, Shares, certificate_of
from harness.web_envelope import JITTER, OPENED, envelope
from harness.web_metrics import METRICS, counted, figures

DEADLINE_S = 35.0
STOP_S = 1.5
"""aiohttp waits this long for running calls, and once more for what they have yet to read."""
_BACKLOG = 512
_BOUNDS = Bounds()
ANSWERED_S = 1.2
"""A call that has not ended by then is answered 503 when the server stops: before aiohttp cuts it off."""
_CALLS: web.AppKey[set[Call]] = web.AppKey("calls")
_IDENTITIES: web.AppKey[Identities] = web.AppKey("identities", Identities)
_CHANNELS: web.AppKey[weakref.WeakKeyDictionary[web.WebSocketResponse, Peer]] = web.AppKey("channels")
_AUDIT: web.AppKey[Audit] = web.AppKey("audit")
_OWN: web.AppKey[OwnCertificate] = web.AppKey("own certificate", OwnCertificate)
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


def application(
    service: str,
    routes: Iterable[Route],
    identities: Identities,
    *,
    health: Health | None = None,
    audit: Audit = to_events,
    metrics: Metrics | None = None,
    jitter: random.Random | None = None,
) -> web.Application:
    """Application of one service.

    ``GET /version`` and ``GET /health`` are open to everybody with a known certificate, ``GET /metrics`` and
    ``PUT /v1/certificate`` to the operator of the service's own authority. A route of the service's own takes their
    place.

    Args:
        service: its name.
        routes: its own calls.
        identities: who may have a certificate.
        health: its checks; none by default.
        audit: keeps the entry of a renewed certificate, also of one that came through its file.
        metrics: what it counts; those that every service has by default.
        jitter: of Retry-After.
    """
    app = web.Application(middlewares=[envelope, counted], client_max_size=BODY_LIMIT)
    app[_CALLS], app[_IDENTITIES], app[_AUDIT] = set(), identities, audit
    app[_CHANNELS] = weakref.WeakKeyDictionary()
    app[JITTER] = jitter or random.SystemRandom()
    app[METRICS] = metrics or Metrics(service)
    app.on_shutdown.extend((_bound_calls, _close_channels))
    own = list(routes)
    taken = {(route.method, route.path) for route in own}
    common = _common_routes(service, health or Health(), audit)
    for route in [*own, *(route for route in common if (route.method, route.path) not in taken)]:
        # add_get would let HEAD run a handler too
        app.router.add_route(route.method, route.path, _guarded(route, identities))
    return app


def _common_routes(service: str, health: Health, audit: Audit) -> list[Route]:
    about = {"service": service, "version": __version__}

    async def version(_: web.Request) -> object:
        return about

    async def state(request: web.Request) -> object:
        own = request.app[_OWN]
        report = await health.report(in_full=peer_of(request).authority == own.authority)
        results = {**about, "certificate_expires": own.expires.timestamp(), **report.as_json()}
        if report.status != FAILING:
            return results
        return answer(503, {"code": 503, "status": report.sentence, "results": results})

    async def metrics(request: web.Request) -> object:
        return await figures(request.app[METRICS], health, request.app[_OWN], peer_of(request))

    async def renew(request: web.Request) -> object:
        own, peer = request.app[_OWN], peer_of(request)
        own.check_operator(peer, "a certificate is renewed by an operator of the service's own authority")
        body = await read_object(request, members={"certificate", "reason"})
        if not isinstance(body.get("certificate"), str):
            raise MalformedMessage("certificate must be PEM text")
        reason = parse_reason(body.get("reason"))
        entry = AuditEntry(at=now().timestamp(), who=peer.who, action=RENEWAL, subject=own.name, reason=reason)
        await own.replace(body["certificate"], entry, audit)
        return {"certificate_expires": own.expires.timestamp()}

    everybody = tuple(Role)
    operators = {Role.PROVIDER_OPERATOR, Role.TENANT_OPERATOR}
    return [
        Route("GET", "/version", version, roles=everybody),
        Route("GET", "/health", state, roles=everybody),
        Route("GET", "/metrics", metrics, roles=operators),
        Route("PUT", "/v1/certificate", renew, roles=operators),
    ]


def _guarded(route: Route, identities: Identities) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    roles = frozenset(route.roles)

    async def call(request: web.Request) -> web.StreamResponse:
        peer = request[_PEER] = identities.peer(certificate_of(request))
        if peer.role not in roles or route.authority not in {None, peer.authority}:
            raise AccessDenied(f"a {peer.role.value} of {peer.authority} may not call {route.method} {route.path}")
        calls = request.app[_CALLS] if route.deadline_s is not None else set()  # a channel is closed at a stop
        try:
            async with asyncio.timeout(route.deadline_s) as deadline:
                made = request[CALL] = Call(deadline)
                calls.add(made)
                try:
                    results = await route.handler(request)
                finally:
                    calls.discard(made)
        except TimeoutError as error:
            if not deadline.expired():
                raise
            late = DeadlineExceeded(f"the call took more than {route.deadline_s} s")
            raise (made.refusal or late) from error
        return results if isinstance(results, web.StreamResponse) else answer_success(results)

    return call


async def _bound_calls(app: web.Application) -> None:
    for call in app[_CALLS]:
        call.end(ShuttingDown("the service is stopping"), within_s=ANSWERED_S)


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
    request[OPENED] = response
    request.app[_CHANNELS][response] = peer_of(request)
    return Channel(response), response


async def _close_channels(app: web.Application) -> None:
    channels = app[_CHANNELS]
    await _close(list(channels), WSCloseCode.GOING_AWAY)


async def _close_expired(app: web.Application) -> None:
    """A channel is one long request: it ends with the certificate that opened it."""
    at = now()
    await _close(
        [channel for channel, peer in app[_CHANNELS].items() if at > peer.expires], WSCloseCode.POLICY_VIOLATION
    )


async def _close(channels: Iterable[web.WebSocketResponse], code: WSCloseCode) -> None:
    closings = [channel.close(code=code) for channel in channels]
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(CLOSE_S):
            await asyncio.gather(*closings, return_exceptions=True)


@dataclass(frozen=True, slots=True)
class Server:
    """A running server.

    Args:
        url: where it is reached.
        own: its certificate.
        context: its TLS context, for `tls.trust_also`.
    """

    url: str
    own: OwnCertificate
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
        Exception: what ended one of the server's own tasks; the block is cancelled.

    *Cancellation:* stops as at the end: no new connections, and running calls end within five seconds.
    """
    own = app[_OWN] = OwnCertificate(tls)
    app[METRICS].watch_certificate(lambda: own.expires.timestamp())
    context = server_context(tls)
    own.use_in(context)
    listening = where if isinstance(where, socket.socket) else _listen(where)
    try:
        listening.setblocking(False)
        listening.listen(_BACKLOG)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=STOP_S)
        await runner.setup()
        if runner.server is None:
            raise RuntimeError("a runner that was set up has a server")
        refused = app[METRICS].refused
        connection = functools.partial(
            Connection,
            runner.server,
            Shares(app[_IDENTITIES], lambda: own.authority, bounds, refused),
            loop=asyncio.get_running_loop(),
            max_line_size=LINE_LIMIT,
            max_field_size=LINE_LIMIT,
        )
        door = Door(connection, context, bounds, refused)
        watching = CertificateWatch(own, app[_AUDIT], lambda: _close_expired(app)).run()
        try:
            async with _beside(door.run(listening), watching):
                yield Server(_url(listening), own, context)
        finally:
            listening.close()
            await runner.cleanup()
            await door.close()
    finally:
        listening.close()


@asynccontextmanager
async def _beside(*works: Coroutine[None, None, None]) -> AsyncIterator[None]:
    """Lets works that have no end of their own go on until the block is left; one that fails ends the block.

    Raises:
        Exception: what a work failed with, or the block; never a group.
    """
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in works]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()
    except ExceptionGroup as failures:
        failure: Exception = failures
        while isinstance(failure, ExceptionGroup):
            failure = failure.exceptions[0]
        raise failure from failure.__cause__


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
