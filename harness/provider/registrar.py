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
from typing import Any

from aiohttp import web
from cryptography import x509

from harness import events
from harness.config import ProviderRegistrarSettings
from harness.errors import AccessDenied, Conflict, MalformedMessage
from harness.pki import Role
from harness.provider.authorities import TenantAuthorities
from harness.provider.registrar_store import GuestContact, RegistrarStore, load_snapshot
from harness.provider.stream import parse_allowlist
from harness.provider.tables import SCHEMA, Base
from harness.registration import OpenChallenges, parse_auth_tag, parse_registration
from harness.store import open_store
from harness.tls import identities_of
from harness.values import AgentId, parse_agent_id, parse_host_id
from harness.web import Route, application, peer_of, read_json, read_object, serve

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_DOMAIN_STATE = re.compile(r"[a-z]{1,16}")
_OPERATOR = frozenset({Role.PROVIDER_OPERATOR})
_HOST_AGENT = frozenset({Role.HOST_AGENT})
_GUEST_AGENT = frozenset({Role.GUEST_AGENT})
OWN_AUTHORITY = "provider"


class Registrar:
    """The calls.

    Args:
        store: the provider's records.
        changed: called after a change that other parts must see at once.
    """

    def __init__(self, store: RegistrarStore, changed: asyncio.Event) -> None:
        self._store = store
        self._changed = changed
        self._challenges: OpenChallenges[GuestContact] = OpenChallenges()

    @property
    def routes(self) -> list[Route]:
        """Calls of operators, host agents and guest agents."""
        agent = r"/{version:v2\.[1-6]}/agents/{agent_id}"
        return [
            Route("GET", "/v1/tenants", self._tenants, roles=_OPERATOR, authority=OWN_AUTHORITY),
            Route("POST", "/v1/tenants", self._add_tenant, roles=_OPERATOR, authority=OWN_AUTHORITY),
            Route("DELETE", "/v1/tenants/{name}", self._remove_tenant, roles=_OPERATOR, authority=OWN_AUTHORITY),
            Route(
                "PUT", "/v1/tenants/{name}/allowlists/{host_id}", self._allow, roles=_OPERATOR, authority=OWN_AUTHORITY
            ),
            Route("GET", "/v1/guests", self._guests, roles=_OPERATOR, authority=OWN_AUTHORITY),
            Route("POST", "/v1/guests", self._define_guest, roles=_OPERATOR, authority=OWN_AUTHORITY),
            Route("DELETE", "/v1/guests/{agent_id}", self._remove_guest, roles=_OPERATOR, authority=OWN_AUTHORITY),
            Route("GET", "/v1/hosts", self._hosts, roles=_OPERATOR, authority=OWN_AUTHORITY),
            Route("PUT", "/v1/hosts/{host_id}", self._announce, roles=_HOST_AGENT, authority=OWN_AUTHORITY),
            Route("PUT", "/v1/hosts/{host_id}/guests", self._report, roles=_HOST_AGENT, authority=OWN_AUTHORITY),
            Route("POST", agent, self._register, roles=_GUEST_AGENT),
            Route("PUT", agent, self._activate, roles=_GUEST_AGENT),
            Route("PUT", agent + "/activate", self._activate, roles=_GUEST_AGENT),
        ]

    # --- operator -----------------------------------------------------------------------------------------

    async def _tenants(self, _request: web.Request) -> object:
        return {"tenants": await self._store.tenants()}

    async def _add_tenant(self, request: web.Request) -> object:
        body = await read_object(request, members={"name", "ca"})
        name, ca = _name(body), _text(body, "ca")
        if name == OWN_AUTHORITY:
            raise Conflict(f"{OWN_AUTHORITY} is the provider's own authority")
        try:
            x509.load_pem_x509_certificate(ca.encode())
        except ValueError:
            raise MalformedMessage("ca must be a PEM certificate") from None
        await self._store.add_tenant(name, ca)
        self._changed.set()
        return {"name": name}

    async def _remove_tenant(self, request: web.Request) -> object:
        await self._store.remove_tenant(request.match_info["name"])
        self._changed.set()
        return {}

    async def _allow(self, request: web.Request) -> object:
        allowlist = parse_allowlist(await read_json(request))
        await self._store.allow(request.match_info["name"], parse_host_id(request.match_info["host_id"]), allowlist)
        return {}

    async def _guests(self, _request: web.Request) -> object:
        return {"guests": await self._store.guests()}

    async def _define_guest(self, request: web.Request) -> object:
        body = await read_object(request, members={"agent_id", "tenant", "host_id", "name"})
        agent_id = parse_agent_id(_text(body, "agent_id"))
        host_id = parse_host_id(_text(body, "host_id"))
        await self._store.define_guest(agent_id, _text(body, "tenant"), host_id, _name(body))
        return {"agent_id": str(agent_id)}

    async def _remove_guest(self, request: web.Request) -> object:
        agent_id = _agent_id(request)
        await self._store.remove_guest(agent_id)
        self._challenges.forget(agent_id)
        return {}

    async def _hosts(self, _request: web.Request) -> object:
        return {"hosts": await self._store.hosts()}

    # --- host agents --------------------------------------------------------------------------------------

    async def _announce(self, request: web.Request) -> object:
        body = await read_object(request, members={"name", "url"})
        name, url = _name(body), _text(body, "url")
        if not url.startswith("https://"):
            raise MalformedMessage("url must start with https://")
        if name != peer_of(request).name:
            raise AccessDenied("a host agent announces the host that its certificate names")
        await self._store.announce_host(parse_host_id(request.match_info["host_id"]), name, url)
        return {}

    async def _report(self, request: web.Request) -> object:
        body = await read_object(request, members={"guests"})
        reports = body.get("guests")
        if not isinstance(reports, list) or not all(map(_is_report, reports)):
            raise MalformedMessage("guests must be a list of {agent_id, state, vtpm_ek}")
        host_id = parse_host_id(request.match_info["host_id"])
        await self._store.report_guests(host_id, peer_of(request).name, reports)
        return {}

    # --- guest agents (Keylime's protocol) ----------------------------------------------------------------

    async def _register(self, request: web.Request) -> object:
        agent_id, tenant = _agent_id(request), peer_of(request).authority
        asked = parse_registration(await read_json(request))
        contact = GuestContact(
            ek=asked.ek.marshal(),
            ak=asked.ak.marshal(),
            ip=asked.ip,
            port=asked.port,
            mtls_cert=asked.mtls_cert,
        )
        await self._store.check_registration(agent_id, tenant, contact)
        blob = self._challenges.open(agent_id, contact, asked.ek, asked.ak)
        return {"blob": base64.b64encode(blob).decode()}

    async def _activate(self, request: web.Request) -> object:
        agent_id, tenant = _agent_id(request), peer_of(request).authority
        auth_tag = parse_auth_tag(await read_json(request))
        await self._store.check_owner(agent_id, tenant)  # first: nobody burns another tenant's challenge
        contact = self._challenges.answered(agent_id, auth_tag)
        await self._store.register_guest(agent_id, tenant, contact)
        events.emit("guest_registered", agent_id=str(agent_id), tenant=tenant)
        return {}


def _agent_id(request: web.Request) -> AgentId:
    return parse_agent_id(request.match_info["agent_id"])


def _text(body: dict[str, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str):
        raise MalformedMessage(f"{name} must be text")
    return value


def _name(body: dict[str, Any]) -> str:
    name = _text(body, "name")
    if not _NAME.fullmatch(name):
        raise MalformedMessage("name must be lower-case letters, digits and dashes, at most 63")
    return name


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
            registrar = Registrar(RegistrarStore(store), changed)
            identities = identities_of(settings.tls)
            app = application("provider-registrar", registrar.routes, identities)
            async with serve(app, settings.tls, sock or settings.listen) as server:
                authorities = TenantAuthorities(identities, server.context)
                authorities.follow((await load_snapshot(store)).tenants)
                events.emit("ready", url=server.url)
                while True:
                    await changed.wait()
                    changed.clear()
                    authorities.follow((await load_snapshot(store)).tenants)
        finally:
            await store.close()
