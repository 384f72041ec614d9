"""Calls of the provider's operator at the provider registrar: tenants, allowlists, guests, hosts, the audit trail.

Invariants:
    1. The operator is the provider's own: a tenant issues certificates with any role in them.
    2. Every change is in the audit trail, in its own transaction.
    3. The running server follows a change of the tenants at once.

Owner: `registrar.Registrar`.

Spec: DESIGN 3.1; docs/protocol.md (provider registrar).
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from typing import Any

from aiohttp import web
from cryptography import x509

from harness.audit import AuditEntry, parse_reason
from harness.audit_routes import act, query_reason
from harness.errors import Conflict, MalformedMessage
from harness.pki import Role
from harness.provider.hosts_store import HostStore
from harness.provider.registrar_store import RegistrarStore
from harness.provider.replacements import Replacements
from harness.provider.stream import parse_allowlist
from harness.values import AgentId, HostId, parse_agent_id, parse_host_id
from harness.web import Handler, Route, read_json, read_object

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_OPERATOR = frozenset({Role.PROVIDER_OPERATOR})
OWN_AUTHORITY = "provider"


class OperatorCalls:
    """The calls.

    Args:
        store: tenants and guests.
        hosts: hosts.
        replacements: hosts whose agents announce another TPM.
        changed: set after a change of the tenants, which the server must follow at once.
        forget: burns the open challenge of a guest.
        now: seconds since the epoch.
    """

    def __init__(
        self,
        store: RegistrarStore,
        hosts: HostStore,
        replacements: Replacements,
        *,
        changed: asyncio.Event,
        forget: Callable[[AgentId], None],
        now: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._hosts = hosts
        self._replacements = replacements
        self._changed = changed
        self._forget = forget
        self._now = now

    @property
    def routes(self) -> list[Route]:
        """Calls of operators."""
        calls: list[tuple[str, str, Handler]] = [
            ("GET", "/v1/tenants", self._show_tenants),
            ("POST", "/v1/tenants", self._add_tenant),
            ("DELETE", "/v1/tenants/{name}", self._remove_tenant),
            ("PUT", "/v1/tenants/{name}/allowlists/{host_id}", self._allow),
            ("GET", "/v1/guests", self._show_guests),
            ("POST", "/v1/guests", self._define_guest),
            ("PUT", "/v1/guests/{agent_id}/host", self._move_guest),
            ("DELETE", "/v1/guests/{agent_id}", self._remove_guest),
            ("GET", "/v1/hosts", self._show_hosts),
            ("PUT", "/v1/hosts/{host_id}/replace", self._replace_host),
            ("DELETE", "/v1/hosts/{host_id}", self._remove_host),
            ("GET", "/v1/audit", self._show_audit),
        ]
        return [
            Route(method, path, handler, roles=_OPERATOR, authority=OWN_AUTHORITY) for method, path, handler in calls
        ]

    def _act(self, request: web.Request, action: str, subject: object, reason: str) -> AuditEntry:
        return act(request, action, subject, reason=reason, at=self._now())

    # --- tenants ------------------------------------------------------------------------------------------

    async def _show_tenants(self, _request: web.Request) -> object:
        return {"tenants": await self._store.tenants()}

    async def _add_tenant(self, request: web.Request) -> object:
        body = await read_object(request, members={"name", "ca", "reason"})
        name, ca = named(body), text(body, "ca")
        if name == OWN_AUTHORITY:
            raise Conflict(f"{OWN_AUTHORITY} is the provider's own authority")
        try:
            x509.load_pem_x509_certificate(ca.encode())
        except ValueError:
            raise MalformedMessage("ca must be a PEM certificate") from None
        reason = parse_reason(body.get("reason"), required=False)
        await self._store.add_tenant(name, ca, self._act(request, "tenant-add", name, reason))
        self._changed.set()
        return {"name": name}

    async def _remove_tenant(self, request: web.Request) -> object:
        name, reason = request.match_info["name"], query_reason(request)
        await self._store.remove_tenant(name, self._act(request, "tenant-remove", name, reason))
        self._changed.set()
        return {}

    async def _allow(self, request: web.Request) -> object:
        name, host_id, reason = request.match_info["name"], _host_id(request), query_reason(request)
        allowlist = parse_allowlist(await read_json(request))
        entry = self._act(request, "allowlist-set", f"{name} on {host_id}", reason)
        await self._store.allow(name, host_id, allowlist, entry)
        return {}

    # --- guests -------------------------------------------------------------------------------------------

    async def _show_guests(self, _request: web.Request) -> object:
        return {"guests": await self._store.guests()}

    async def _define_guest(self, request: web.Request) -> object:
        body = await read_object(request, members={"agent_id", "tenant", "host_id", "name", "reason"})
        agent_id, tenant = parse_agent_id(text(body, "agent_id")), text(body, "tenant")
        host_id, reason = parse_host_id(text(body, "host_id")), parse_reason(body.get("reason"), required=False)
        entry = self._act(request, "guest-define", agent_id, reason)
        await self._store.define_guest(agent_id, tenant, host_id, named(body), entry)
        return {"agent_id": str(agent_id)}

    async def _move_guest(self, request: web.Request) -> object:
        agent_id = _agent_id(request)
        body = await read_object(request, members={"host_id", "reason"})
        host_id, reason = parse_host_id(text(body, "host_id")), parse_reason(body.get("reason"))
        await self._hosts.move_guest(agent_id, host_id, self._act(request, "guest-move", agent_id, reason))
        self._forget(agent_id)
        return {}

    async def _remove_guest(self, request: web.Request) -> object:
        agent_id, reason = _agent_id(request), query_reason(request)
        await self._store.remove_guest(agent_id, self._act(request, "guest-remove", agent_id, reason))
        self._forget(agent_id)
        return {}

    # --- hosts --------------------------------------------------------------------------------------------

    async def _show_hosts(self, _request: web.Request) -> object:
        hosts = await self._hosts.hosts()
        return {"hosts": [{**host, "replacement": self._replacement(host["name"])} for host in hosts]}

    def _replacement(self, name: str) -> str | None:
        announced = self._replacements.of(name)
        return None if announced is None else str(announced)

    async def _replace_host(self, request: web.Request) -> object:
        old = _host_id(request)
        body = await read_object(request, members={"host_id", "reason"})
        new, reason = parse_host_id(text(body, "host_id")), parse_reason(body.get("reason"))
        entry = self._act(request, "host-replace", f"{old} by {new}", reason)
        guests = await self._hosts.replace(old, new, entry, announced=self._replacements.of)
        for agent_id in guests:
            self._forget(agent_id)
        return {"host_id": str(new), "guests": [str(agent_id) for agent_id in guests]}

    async def _remove_host(self, request: web.Request) -> object:
        host_id, reason = _host_id(request), query_reason(request, required=True)
        await self._hosts.remove(host_id, self._act(request, "host-remove", host_id, reason))
        return {}

    # --- audit --------------------------------------------------------------------------------------------

    async def _show_audit(self, _request: web.Request) -> object:
        return {"entries": [entry.as_json() for entry in await self._store.audit()]}


def text(body: dict[str, Any], name: str) -> str:
    """Member of a body that must be text.

    Raises:
        MalformedMessage: it is missing or something else.
    """
    value = body.get(name)
    if not isinstance(value, str):
        raise MalformedMessage(f"{name} must be text")
    return value


def named(body: dict[str, Any]) -> str:
    """The ``name`` in a body. Raises MalformedMessage unless it may be a name."""
    name = text(body, "name")
    if not _NAME.fullmatch(name):
        raise MalformedMessage("name must be lower-case letters, digits and dashes, at most 63")
    return name


def _agent_id(request: web.Request) -> AgentId:
    return parse_agent_id(request.match_info["agent_id"])


def _host_id(request: web.Request) -> HostId:
    return parse_host_id(request.match_info["host_id"])
