"""The tenant registrar: hosts that the tenant enrolled, guests that it stated, and the guests' own registration.

Invariants:
    1. Only certificates of the tenant's own authority are listened to; the provider is only asked.
    2. Keys are pinned after every check of `enrolment` and `guest_enrolment`; a change is an alarm, and only an
       operator's act replaces what is pinned.
    3. Each act of an operator is in the audit trail, with who and why.

Owner: the service `TenantRegistrar`.

Spec: DESIGN 3.6; docs/protocol.md (tenant registrar).
"""

from __future__ import annotations

import asyncio
import base64
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from aiohttp import web

from harness import events
from harness.audit import parse_reason
from harness.audit_routes import act, query_reason
from harness.config import TenantRegistrarSettings, TlsSettings
from harness.enrolment_metrics import GUEST, HOST, Enrolments
from harness.errors import MalformedMessage
from harness.health import Health, check_database
from harness.metrics import Metrics
from harness.peer import PeerClient
from harness.pki import Role, load_certificate
from harness.store import Store, open_store
from harness.tenant.alarm_routes import alarm_routes
from harness.tenant.alarms_store import AlarmStore
from harness.tenant.chain import chain_of
from harness.tenant.challenges import Challenges
from harness.tenant.client import ProviderClient, encode_baseline, only_authority, without_authority
from harness.tenant.enrolment import HostEnroller
from harness.tenant.enrolment_alarms import EnrolmentAlarms
from harness.tenant.guest_routes import AGENTS, GuestRegistration
from harness.tenant.host_intake import Connect, HostIntake
from harness.tenant.notices_store import NoticeStore
from harness.tenant.notifier import Notifier
from harness.tenant.ports import Chance, SystemClock
from harness.tenant.receivers import receivers_of
from harness.tenant.registrar_store import GuestRecord, PinnedHost, RegistrarStore
from harness.tenant.tables import SCHEMA, Base
from harness.tls import certificate_requester, identities_of
from harness.values import AgentId, HostId, parse_agent_id, parse_host_id
from harness.web import Route, application, read_object, serve

_ENROL_S = 600.0
"""For all hosts of a provider: six per minute."""
_REPLACE_S = 120.0
_HOSTS_PATH = "/v1/hosts/"
_OPERATOR = frozenset({Role.TENANT_OPERATOR})
_READERS = frozenset({Role.TENANT_OPERATOR, Role.TENANT_VERIFIER})


class Registrar:
    """The calls.

    Args:
        store: what is pinned.
        alarms: for the operator.
        hosts: takes hosts through enrolment.
        connect: to provider verifiers.
        metrics: of the service.
        now: seconds since the epoch.
    """

    def __init__(
        self,
        store: RegistrarStore,
        alarms: AlarmStore,
        hosts: HostEnroller,
        connect: Connect,
        metrics: Metrics,
        *,
        now: Callable[[], float] = time.time,
    ) -> None:
        told = EnrolmentAlarms(alarms, now=now)
        self._store = store
        self._alarms = alarms
        counted = Enrolments(metrics, HOST, GUEST)
        self._hosts = HostIntake(store, hosts, told, connect, counted=counted)
        self._guests = GuestRegistration(store, told, counted)
        self._now = now

    @property
    def routes(self) -> list[Route]:
        """Calls of operators, the verifier and guest agents."""
        return [
            Route("POST", "/v1/hosts", self._add_host, roles=_OPERATOR, deadline_s=_ENROL_S),
            Route("GET", "/v1/hosts", self._list_hosts, roles=_READERS),
            Route("GET", "/v1/hosts/{host_id}", self._show_host, roles=_READERS),
            Route("PUT", "/v1/hosts/{host_id}/re-enrol", self._replace_host, roles=_OPERATOR, deadline_s=_REPLACE_S),
            Route("DELETE", "/v1/hosts/{host_id}", self._remove_host, roles=_OPERATOR),
            Route("POST", "/v1/guests", self._state_guest, roles=_OPERATOR),
            Route("GET", "/v1/guests", self._list_guests, roles=_READERS),
            Route("GET", "/v1/guests/{agent_id}", self._show_guest, roles=_READERS),
            Route("PUT", "/v1/guests/{agent_id}/re-enrol", self._restate_guest, roles=_OPERATOR),
            Route("DELETE", "/v1/guests/{agent_id}", self._remove_guest, roles=_OPERATOR),
            Route("DELETE", AGENTS + "/{agent_id}", self._remove_guest, roles=_OPERATOR),
            *alarm_routes(self._alarms, now=self._now),
            *self._guests.routes,
        ]

    # --- hosts --------------------------------------------------------------------------------------------

    async def _add_host(self, request: web.Request) -> object:
        body = await read_object(request, members={"url", "reason"})
        url = body.get("url")
        if not isinstance(url, str) or not url.startswith("https://"):
            raise MalformedMessage("url must be the https address of a provider verifier")
        reason = parse_reason(body.get("reason"), required=False)
        base, _, named = url.partition(_HOSTS_PATH)
        only = parse_host_id(named.rstrip("/")) if named else None
        hosts = await self._hosts.add(
            base, only, lambda host_id: act(request, "host-add", host_id, reason=reason, at=self._now())
        )
        return {"hosts": [_host(host) for host in hosts]}

    async def _list_hosts(self, _request: web.Request) -> object:
        return {"hosts": [_host(host) for host in await self._store.hosts()]}

    async def _show_host(self, request: web.Request) -> object:
        return _host(await self._store.host(_host_id(request)))

    async def _replace_host(self, request: web.Request) -> object:
        host_id = _host_id(request)
        body = await read_object(request, members={"reason"})
        reason = parse_reason(body.get("reason"))
        entry = act(request, "host-re-enrol", host_id, reason=reason, at=self._now())
        host, stated = await self._hosts.replace(host_id, entry)
        for agent_id in stated:
            self._guests.forget(agent_id)
        return {**_host(host), "stated": [str(agent_id) for agent_id in stated]}

    async def _remove_host(self, request: web.Request) -> object:
        host_id, reason = _host_id(request), query_reason(request)
        await self._store.remove_host(host_id, act(request, "host-remove", host_id, reason=reason, at=self._now()))
        return {}

    # --- guests -------------------------------------------------------------------------------------------

    async def _state_guest(self, request: web.Request) -> object:
        body = await read_object(request, members={"agent_id", "host_id", "reason"})
        agent_id, host_id = body.get("agent_id"), body.get("host_id")
        if not isinstance(agent_id, str) or not isinstance(host_id, str):
            raise MalformedMessage("agent_id and host_id must be text")
        guest, host = parse_agent_id(agent_id), parse_host_id(host_id)
        reason = parse_reason(body.get("reason"), required=False)
        entry = act(request, "guest-state", guest, reason=reason, at=self._now())
        return self._guest(await self._store.state_guest(guest, host, entry))

    async def _list_guests(self, _request: web.Request) -> object:
        return {"guests": [self._guest(record) for record in await self._store.guests()]}

    async def _show_guest(self, request: web.Request) -> object:
        record = await self._store.guest(_agent_id(request))
        keys, host = record.keys, await self._store.host(record.host_id)
        return {**self._guest(record), "chain": [] if keys is None else chain_of(record.agent_id, keys, host)}

    async def _restate_guest(self, request: web.Request) -> object:
        agent_id = _agent_id(request)
        body = await read_object(request, members={"reason", "host_id"})
        reason, to = parse_reason(body.get("reason")), body.get("host_id")
        if to is not None and not isinstance(to, str):
            raise MalformedMessage("host_id must be text")
        entry = act(request, "guest-re-enrol", agent_id, reason=reason, at=self._now())
        record = await self._store.restate_guest(agent_id, None if to is None else parse_host_id(to), entry)
        self._guests.forget(agent_id)
        return self._guest(record)

    async def _remove_guest(self, request: web.Request) -> object:
        agent_id, reason = _agent_id(request), query_reason(request)
        await self._store.remove_guest(agent_id, act(request, "guest-remove", agent_id, reason=reason, at=self._now()))
        self._guests.forget(agent_id)
        return {}

    def _guest(self, record: GuestRecord) -> dict[str, object]:
        return {
            "agent_id": str(record.agent_id),
            "host_id": str(record.host_id),
            "state": "stated" if record.keys is None else "active",
            "registrations": record.registrations,
            "refused": self._guests.refusal(record.agent_id),
        }


def _agent_id(request: web.Request) -> AgentId:
    return parse_agent_id(request.match_info["agent_id"])


def _host_id(request: web.Request) -> HostId:
    return parse_host_id(request.match_info["host_id"])


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


def over_tls(tls: TlsSettings) -> Connect:
    """Connects to provider verifiers.

    Args:
        tls: our certificate, and who may vouch for a provider.
    """

    @asynccontextmanager
    async def connect(url: str) -> AsyncIterator[ProviderClient]:
        async with PeerClient(tls, url, roles={Role.PROVIDER_VERIFIER}) as peer:
            yield ProviderClient(peer)

    return connect


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
        receivers = receivers_of(settings, "tenant-registrar")
        store = await open_store(settings.database, Base.metadata, component="tenant", version=SCHEMA)
        try:
            async with asyncio.TaskGroup() as group:
                alarms = AlarmStore(store)
                metrics = Metrics("tenant-registrar")
                routes = self._registrar(store, alarms, metrics).routes
                if receivers:
                    notifier = Notifier(NoticeStore(store), receivers, SystemClock(), Chance(), alarms.alarmed)
                    group.create_task(notifier.run(), name="notifier")
                health = Health()
                health.check("database", lambda: check_database(store))
                app = application(
                    "tenant-registrar",
                    routes,
                    identities_of(own_tls),
                    health=health,
                    audit=alarms.keep,
                    metrics=metrics,
                )
                async with serve(app, own_tls, sock or settings.listen) as server:
                    events.emit("ready", url=server.url, tenant=settings.tenant)
                    await asyncio.Event().wait()
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from failures
        finally:
            await store.close()

    def _registrar(self, store: Store, alarms: AlarmStore, metrics: Metrics) -> Registrar:
        settings = self._settings
        roots = [load_certificate(path) for path in settings.vendor_roots]
        requester = certificate_requester(load_certificate(settings.tls.certificate))
        return Registrar(
            RegistrarStore(store),
            alarms,
            HostEnroller(roots, requester, Challenges()),
            over_tls(without_authority(settings.tls, settings.tenant)),
            metrics,
        )
