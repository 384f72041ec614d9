"""The provider registrar: hosts, whose guests run where, what tenants may see, and the guests' own registration.

Invariants:
    1. Only the operator says whose a guest is; only a host agent says where it is reached, and what runs on it.
    2. Operators and host agents are the provider's own: a tenant issues certificates with any role in them.
    3. A guest registers with a certificate of its owner's authority, and only keys that it proved to have.

Owner: the service `ProviderRegistrar`.

Spec: DESIGN 3.1, 3.6; docs/protocol.md (provider registrar); Keylime registrar API.
"""

from __future__ import annotations

import asyncio
import base64
import re
import socket
from collections.abc import Awaitable, Callable

from aiohttp import web

from harness import events
from harness.config import ProviderRegistrarSettings
from harness.enrolment_metrics import GUEST, Enrolments
from harness.errors import AccessDenied, EnrolmentError, MalformedMessage, StoreError
from harness.health import Health, check_database
from harness.metrics import Metrics
from harness.pki import Role
from harness.provider.authorities import TenantAuthorities
from harness.provider.hosts_store import HostStore
from harness.provider.operator_routes import OWN_AUTHORITY, OperatorCalls, named, text
from harness.provider.registrar_store import GuestContact, RegistrarStore
from harness.provider.replacements import Replacements
from harness.provider.tables import SCHEMA, Base
from harness.registration import NOT_REGISTERED, OpenChallenges, parse_auth_tag, parse_registration, registration_view
from harness.store import open_store
from harness.tls import identities_of
from harness.values import AgentId, parse_agent_id, parse_host_id
from harness.web import Route, application, peer_of, read_json, read_object, serve

_DOMAIN_STATE = re.compile(r"[a-z]{1,16}")
_HOST_AGENT = frozenset({Role.HOST_AGENT})
_GUEST_AGENT = frozenset({Role.GUEST_AGENT})
_RETRY_S = 1.0


class Registrar:
    """The calls.

    Args:
        store: tenants and guests.
        hosts: hosts.
        changed: set after a change of the tenants, which the server must follow at once.
        metrics: of the service.
    """

    def __init__(self, store: RegistrarStore, hosts: HostStore, changed: asyncio.Event, metrics: Metrics) -> None:
        self._store = store
        self._hosts = hosts
        self._challenges: OpenChallenges[GuestContact] = OpenChallenges()
        self._replacements = Replacements()
        self._counted = Enrolments(metrics, GUEST)
        self._operator = OperatorCalls(
            store, hosts, self._replacements, changed=changed, forget=self._challenges.forget
        )

    @property
    def routes(self) -> list[Route]:
        """Calls of operators, host agents and guest agents."""
        agent = r"/{version:v2\.[1-6]}/agents/{agent_id}"
        return [
            *self._operator.routes,
            Route("PUT", "/v1/hosts/{host_id}", self._announce, roles=_HOST_AGENT, authority=OWN_AUTHORITY),
            Route("PUT", "/v1/hosts/{host_id}/guests", self._report, roles=_HOST_AGENT, authority=OWN_AUTHORITY),
            Route("GET", agent + "/registration", self._view, roles=_GUEST_AGENT),
            Route("POST", agent, self._register, roles=_GUEST_AGENT),
            Route("PUT", agent, self._activate, roles=_GUEST_AGENT),
            Route("PUT", agent + "/activate", self._activate, roles=_GUEST_AGENT),
        ]

    # --- host agents --------------------------------------------------------------------------------------

    async def _announce(self, request: web.Request) -> object:
        body = await read_object(request, members={"name", "url"})
        name, url = named(body), text(body, "url")
        if not url.startswith("https://"):
            raise MalformedMessage("url must start with https://")
        if name != peer_of(request).name:
            raise AccessDenied("a host agent announces the host that its certificate names")
        host_id = parse_host_id(request.match_info["host_id"])
        self._replacements.announced(name, host_id, await self._hosts.announce(host_id, name, url))
        return {}

    async def _report(self, request: web.Request) -> object:
        body = await read_object(request, members={"guests"})
        reports = body.get("guests")
        if not isinstance(reports, list) or not all(map(_is_report, reports)):
            raise MalformedMessage("guests must be a list of {agent_id, state, vtpm_ek}")
        host_id = parse_host_id(request.match_info["host_id"])
        await self._hosts.report(host_id, peer_of(request).name, reports)
        return {}

    # --- guest agents (Keylime's protocol) ----------------------------------------------------------------

    async def _view(self, request: web.Request) -> object:
        contact = await self._store.registered(_agent_id(request), peer_of(request).authority)
        if contact is None:
            return NOT_REGISTERED
        return registration_view(
            ek=contact.ek, ak=contact.ak, mtls_cert=contact.mtls_cert, ip=contact.ip, port=contact.port
        )

    async def _register(self, request: web.Request) -> object:
        with self._counted.step(GUEST, last=False):
            return await self._challenge(request)

    async def _challenge(self, request: web.Request) -> object:
        agent_id, tenant = _agent_id(request), peer_of(request).authority
        asked = parse_registration(await read_json(request))
        contact = GuestContact(
            ek=asked.ek.marshal(),
            ak=asked.ak.marshal(),
            ip=asked.ip,
            port=asked.port,
            mtls_cert=asked.mtls_cert,
        )
        try:
            await self._store.check_registration(agent_id, tenant, contact)
        except EnrolmentError as error:
            events.emit(
                "guest_refused",
                level="warning",
                agent_id=str(agent_id),
                tenant=tenant,
                error=type(error).__name__,
                detail=error.detail,
            )
            raise
        blob = self._challenges.open(agent_id, contact, asked.ek, asked.ak)
        return {"blob": base64.b64encode(blob).decode()}

    async def _activate(self, request: web.Request) -> object:
        with self._counted.step(GUEST, last=True):
            return await self._answered(request)

    async def _answered(self, request: web.Request) -> object:
        agent_id, tenant = _agent_id(request), peer_of(request).authority
        auth_tag = parse_auth_tag(await read_json(request))
        await self._store.check_owner(agent_id, tenant)  # first: nobody burns another tenant's challenge
        contact = self._challenges.answered(agent_id, auth_tag)
        await self._store.register_guest(agent_id, tenant, contact)
        events.emit("guest_registered", agent_id=str(agent_id), tenant=tenant)
        return {}


def _agent_id(request: web.Request) -> AgentId:
    return parse_agent_id(request.match_info["agent_id"])


def _is_report(report: object) -> bool:
    match report:
        case {"agent_id": str(), "state": str(state), "vtpm_ek": str(ek)}:
            return _DOMAIN_STATE.fullmatch(state) is not None and len(ek) <= 64
    return False


class ProviderRegistrar:
    """The service.

    Args:
        settings: from its file.
    """

    def __init__(self, settings: ProviderRegistrarSettings) -> None:
        self._settings = settings

    async def run(self, sock: socket.socket | None = None) -> None:
        """Serves until it is cancelled.

        Args:
            sock: bound and listening; else the settings say where.

        Raises:
            ConfigError, StoreError: unusable settings, files, address or database.

        *Cancellation:* calls in work are ended, the database is closed.
        """
        settings = self._settings
        store = await open_store(settings.database, Base.metadata, component="provider", version=SCHEMA)
        try:
            changed = asyncio.Event()
            changed.set()
            records = RegistrarStore(store)
            metrics = Metrics("provider-registrar")
            registrar = Registrar(records, HostStore(store), changed, metrics)
            identities = identities_of(settings.tls)
            health = Health()
            health.check("database", lambda: check_database(store))
            app = application(
                "provider-registrar",
                registrar.routes,
                identities,
                health=health,
                audit=records.keep,
                metrics=metrics,
            )
            async with serve(app, settings.tls, sock or settings.listen) as server:
                authorities = TenantAuthorities(identities, server.context)
                authorities.follow(await records.authorities())
                events.emit("ready", url=server.url)
                while True:
                    await changed.wait()
                    changed.clear()
                    await follow_tenants(authorities, records)
        finally:
            await store.close()


async def follow_tenants(
    authorities: TenantAuthorities,
    records: RegistrarStore,
    *,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Brings the server's authorities up to date, as soon as the database can be read.

    Args:
        authorities: of the server.
        records: the provider's.
        sleep: waits; tests give their own.

    *Cancellation:* the authorities are the old or the new ones.
    """
    while True:
        try:
            authorities.follow(await records.authorities())
        except StoreError as error:
            events.emit("tenants_not_read", level="error", detail=error.detail)
            await sleep(_RETRY_S)
        else:
            return
