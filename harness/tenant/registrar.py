"""The tenant registrar: hosts that the tenant enrolled, guests that it stated, and the guests' own registration.

Invariants:
    1. Only certificates of the tenant's own authority are listened to; the provider is only asked.
    2. Keys are pinned after every check of `enrolment` and `guest_enrolment`; a change is an alarm, never an update.
    3. Refusals of a guest are kept for the operator until it registers.

Owner: the service `TenantRegistrar`.

Spec: DESIGN 3.6; docs/protocol.md (tenant registrar); Keylime registrar API.
"""

from __future__ import annotations

import asyncio
import base64
import socket
import time
from collections.abc import Callable

from aiohttp import web

from harness import events
from harness.config import TenantRegistrarSettings, TlsSettings
from harness.errors import (
    AccessDenied,
    CertificateRefused,
    CloneSuspected,
    EnrolmentError,
    HarnessError,
    KeyChanged,
    MalformedMessage,
    NotFound,
    UnacceptableKey,
)
from harness.peer import PeerClient
from harness.pki import Role, load_certificate
from harness.registration import parse_auth_tag, parse_registration
from harness.store import open_store
from harness.tenant.alarm_routes import alarm_routes
from harness.tenant.alarms_store import AlarmStore
from harness.tenant.challenges import Challenges
from harness.tenant.client import ProviderClient, encode_baseline, only_authority, without_authority
from harness.tenant.enrolment import HostEnroller
from harness.tenant.guest_enrolment import GuestEnroller
from harness.tenant.ports import Alarm
from harness.tenant.registrar_store import GuestKeys, GuestRecord, PinnedHost, RegistrarStore
from harness.tenant.tables import SCHEMA, Base
from harness.tls import certificate_requester, identities_of
from harness.values import AgentId, HostId, parse_agent_id, parse_host_id
from harness.web import Route, application, peer_of, read_json, read_object, serve

_ALARMS = (KeyChanged, CloneSuspected, CertificateRefused, UnacceptableKey)
_ENROL_S = 120.0
_HOSTS_PATH = "/v1/hosts/"
_REFUSALS = 4096
_OPERATOR = frozenset({Role.TENANT_OPERATOR})
_READERS = frozenset({Role.TENANT_OPERATOR, Role.TENANT_VERIFIER})
_GUEST_AGENT = frozenset({Role.GUEST_AGENT})


class Registrar:
    """The calls.

    Args:
        store: what is pinned.
        alarms: for the operator.
        hosts: takes hosts through enrolment.
        provider_tls: our certificate, and who may vouch for a provider.
        now: seconds since the epoch.
    """

    def __init__(
        self,
        store: RegistrarStore,
        alarms: AlarmStore,
        hosts: HostEnroller,
        provider_tls: TlsSettings,
        *,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._alarms = alarms
        self._hosts = hosts
        self._guests = GuestEnroller(store)
        self._provider_tls = provider_tls
        self._now = now
        self._refused: dict[AgentId, dict[str, str]] = {}

    @property
    def routes(self) -> list[Route]:
        """Calls of operators, the verifier and guest agents."""
        agents = r"/{version:v2\.[1-6]}/agents"
        return [
            Route("POST", "/v1/hosts", self._add_host, roles=_OPERATOR, deadline_s=_ENROL_S),
            Route("GET", "/v1/hosts", self._list_hosts, roles=_READERS),
            Route("GET", "/v1/hosts/{host_id}", self._show_host, roles=_READERS),
            Route("DELETE", "/v1/hosts/{host_id}", self._remove_host, roles=_OPERATOR),
            Route("POST", "/v1/guests", self._state_guest, roles=_OPERATOR),
            Route("GET", "/v1/guests", self._list_guests, roles=_READERS),
            Route("GET", "/v1/guests/{agent_id}", self._show_guest, roles=_READERS),
            Route("DELETE", "/v1/guests/{agent_id}", self._remove_guest, roles=_OPERATOR),
            *alarm_routes(self._alarms, now=self._now),
            Route("GET", agents, self._list_agents, roles=_READERS),
            Route("GET", agents + "/{agent_id}", self._show_agent, roles=_READERS),
            Route("DELETE", agents + "/{agent_id}", self._remove_guest, roles=_OPERATOR),
            Route("POST", agents + "/{agent_id}", self._register, roles=_GUEST_AGENT),
            Route("PUT", agents + "/{agent_id}", self._activate, roles=_GUEST_AGENT),
            Route("PUT", agents + "/{agent_id}/activate", self._activate, roles=_GUEST_AGENT),
        ]

    # --- hosts --------------------------------------------------------------------------------------------

    async def _add_host(self, request: web.Request) -> object:
        body = await read_object(request, members={"url"})
        url = body.get("url")
        if not isinstance(url, str) or not url.startswith("https://"):
            raise MalformedMessage("url must be the https address of a provider verifier")
        base, _, named = url.partition(_HOSTS_PATH)
        async with PeerClient(self._provider_tls, base) as peer:
            access = ProviderClient(peer)
            ids = [parse_host_id(named.rstrip("/"))] if named else await access.hosts()
            if not ids:
                raise NotFound("the provider lists no host on which this tenant has an allowlist")
            return {"hosts": [await self._enrol(base, host_id, access) for host_id in ids]}

    async def _enrol(self, url: str, host_id: HostId, access: ProviderClient) -> dict[str, object]:
        try:
            pinned = await self._store.pin_host(await self._hosts.enrol(url, host_id, access))
        except EnrolmentError as error:
            if isinstance(error, _ALARMS):
                await self._raise_alarm(error, host_id=str(host_id))
            raise
        events.emit("host_enrolled", host_id=str(host_id), url=url)
        return _host(pinned)

    async def _list_hosts(self, _request: web.Request) -> object:
        return {"hosts": [_host(host) for host in await self._store.hosts()]}

    async def _show_host(self, request: web.Request) -> object:
        return _host(await self._store.host(parse_host_id(request.match_info["host_id"])))

    async def _remove_host(self, request: web.Request) -> object:
        await self._store.remove_host(parse_host_id(request.match_info["host_id"]))
        return {}

    # --- guests -------------------------------------------------------------------------------------------

    async def _state_guest(self, request: web.Request) -> object:
        body = await read_object(request, members={"agent_id", "host_id"})
        agent_id, host_id = body.get("agent_id"), body.get("host_id")
        if not isinstance(agent_id, str) or not isinstance(host_id, str):
            raise MalformedMessage("agent_id and host_id must be text")
        record = await self._store.state_guest(parse_agent_id(agent_id), parse_host_id(host_id), self._now())
        return self._guest(record)

    async def _list_guests(self, _request: web.Request) -> object:
        return {"guests": [self._guest(record) for record in await self._store.guests()]}

    async def _show_guest(self, request: web.Request) -> object:
        return self._guest(await self._store.guest(_agent_id(request)))

    async def _remove_guest(self, request: web.Request) -> object:
        agent_id = _agent_id(request)
        await self._store.remove_guest(agent_id)
        self._guests.forget(agent_id)
        self._refused.pop(agent_id, None)
        return {}

    def _guest(self, record: GuestRecord) -> dict[str, object]:
        return {
            "agent_id": str(record.agent_id),
            "host_id": str(record.host_id),
            "state": "stated" if record.keys is None else "active",
            "registrations": record.registrations,
            "refused": self._refused.get(record.agent_id),
        }

    # --- Keylime's registrar ------------------------------------------------------------------------------

    async def _list_agents(self, _request: web.Request) -> object:
        return {"uuids": [str(record.agent_id) for record in await self._store.guests() if record.keys is not None]}

    async def _show_agent(self, request: web.Request) -> object:
        record = await self._store.guest(_agent_id(request))
        if record.keys is None:
            raise NotFound(f"guest {record.agent_id} has not registered yet")
        keys = record.keys
        return {
            "aik_tpm": _base64(keys.ak),
            "ek_tpm": _base64(keys.ek),
            "ekcert": _base64(keys.ek_certificate),
            "mtls_cert": keys.mtls_cert,
            "ip": keys.ip,
            "port": keys.port,
            "regcount": record.registrations,
            "host_id": str(record.host_id),
        }

    async def _register(self, request: web.Request) -> object:
        agent_id = _own_agent_id(request)
        try:
            asked = parse_registration(await read_json(request))
            keys = GuestKeys(
                ek=asked.ek.marshal(),
                ek_certificate=asked.ek_certificate,
                ak=asked.ak.marshal(),
                mtls_cert=asked.mtls_cert,
                ip=asked.ip,
                port=asked.port,
            )
            blob = await self._guests.register(agent_id, keys)
        except EnrolmentError as error:
            await self._keep_refusal(agent_id, error)
            raise
        return {"blob": _base64(blob)}

    async def _activate(self, request: web.Request) -> object:
        agent_id = _own_agent_id(request)
        await self._guests.activate(agent_id, parse_auth_tag(await read_json(request)))
        self._refused.pop(agent_id, None)
        events.emit("guest_registered", agent_id=str(agent_id))
        return {}

    async def _keep_refusal(self, agent_id: AgentId, error: EnrolmentError) -> None:
        refusal = {"error": type(error).__name__, "detail": error.detail}
        if self._refused.get(agent_id) == refusal:
            return  # an agent that tries again does not fill the operator's list
        if len(self._refused) < _REFUSALS:
            self._refused[agent_id] = refusal
        if isinstance(error, _ALARMS):
            await self._raise_alarm(error, agent_id=agent_id)

    async def _raise_alarm(
        self, error: HarnessError, *, agent_id: AgentId | None = None, host_id: str | None = None
    ) -> None:
        kind = type(error).__name__
        events.emit("alarm", level="warning", kind=kind, agent_id=str(agent_id), host_id=host_id, detail=error.detail)
        alarm = Alarm(kind=kind, agent_id=agent_id, host_id=host_id, detail=error.detail)
        await self._alarms.add(alarm, self._now())


def _agent_id(request: web.Request) -> AgentId:
    return parse_agent_id(request.match_info["agent_id"])


def _own_agent_id(request: web.Request) -> AgentId:
    agent_id = _agent_id(request)
    if peer_of(request).name != str(agent_id):
        raise AccessDenied("a guest agent registers the guest that its certificate names")
    return agent_id


def _host(host: PinnedHost) -> dict[str, object]:
    return {
        "host_id": str(host.host_id),
        "url": host.url,
        "ek": _base64(host.ek),
        "ek_certificate": _base64(host.ek_certificate),
        "ak": _base64(host.ak),
        "ak_qualified_name": host.ak_qualified_name.hex(),
        "ca": _base64(host.ca),
        "ca_certificate": _base64(host.ca_certificate),
        "baseline": encode_baseline(host.baseline),
        "enrolled_at": host.enrolled_at,
    }


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


class TenantRegistrar:
    """The service.

    Args:
        settings: from its file.
    """

    def __init__(self, settings: TenantRegistrarSettings) -> None:
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
        own_tls = only_authority(settings.tls, settings.tenant)
        roots = [load_certificate(path) for path in settings.vendor_roots]
        requester = certificate_requester(load_certificate(settings.tls.certificate))
        store = await open_store(settings.database, Base.metadata, component="tenant", version=SCHEMA)
        try:
            registrar = Registrar(
                RegistrarStore(store),
                AlarmStore(store),
                HostEnroller(roots, requester, Challenges()),
                without_authority(settings.tls, settings.tenant),
            )
            app = application("tenant-registrar", registrar.routes, identities_of(own_tls))
            async with serve(app, own_tls, sock or settings.listen) as server:
                events.emit("ready", url=server.url, tenant=settings.tenant)
                await asyncio.Event().wait()
        finally:
            await store.close()
