"""Keylime's registrar API at the tenant's registrar: guests register themselves, verifier and operator read.

Invariants:
    1. A guest agent registers the guest that its certificate names, and no other.
    2. Refusals of a guest are kept for the operator until it registers; of a guest that is not stated none is kept.

Owner: `registrar.Registrar`.

Spec: DESIGN 3.6; Keylime registrar API; docs/protocol.md (tenant registrar).
"""

from __future__ import annotations

import base64
from collections.abc import Mapping

from aiohttp import web

from harness import events
from harness.enrolment_metrics import GUEST, Enrolments
from harness.errors import AccessDenied, EnrolmentError, NotFound
from harness.metrics import Metrics
from harness.pki import Role
from harness.registration import NOT_REGISTERED, parse_auth_tag, parse_registration, registration_view
from harness.tenant.enrolment_alarms import EnrolmentAlarms
from harness.tenant.guest_enrolment import GuestEnroller
from harness.tenant.refusals import Refusals
from harness.tenant.registrar_store import GuestKeys, RegistrarStore
from harness.values import AgentId, parse_agent_id
from harness.web import Route, peer_of, read_json

AGENTS = r"/{version:v2\.[1-6]}/agents"
_READERS = frozenset({Role.TENANT_OPERATOR, Role.TENANT_VERIFIER})
_GUEST_AGENT = frozenset({Role.GUEST_AGENT})


class GuestRegistration:
    """The calls.

    Args:
        store: what is pinned.
        alarms: told about refusals.
        counted: by outcome.
    """

    def __init__(self, store: RegistrarStore, alarms: EnrolmentAlarms, counted: Enrolments | None = None) -> None:
        self._store = store
        self._guests = GuestEnroller(store)
        self._refused = Refusals(alarms)
        self._counted = counted or Enrolments(Metrics("tenant-registrar"), GUEST)

    @property
    def routes(self) -> list[Route]:
        """Calls of the verifier, operators and guest agents."""
        return [
            Route("GET", AGENTS, self._list, roles=_READERS),
            Route("GET", AGENTS + "/{agent_id}", self._show, roles=_READERS),
            Route("GET", AGENTS + "/{agent_id}/registration", self._view, roles=_GUEST_AGENT),
            Route("POST", AGENTS + "/{agent_id}", self._register, roles=_GUEST_AGENT),
            Route("PUT", AGENTS + "/{agent_id}", self._activate, roles=_GUEST_AGENT),
            Route("PUT", AGENTS + "/{agent_id}/activate", self._activate, roles=_GUEST_AGENT),
        ]

    def refusal(self, agent_id: AgentId) -> Mapping[str, str] | None:
        """Why a guest was last refused, unless it has registered since."""
        return self._refused.of(agent_id)

    def forget(self, agent_id: AgentId) -> None:
        """Burns a guest's open challenge, and forgets why it was refused."""
        self._guests.forget(agent_id)
        self._refused.forget(agent_id)

    async def _list(self, _request: web.Request) -> object:
        return {"uuids": [str(record.agent_id) for record in await self._store.guests() if record.keys is not None]}

    async def _show(self, request: web.Request) -> object:
        record = await self._store.guest(parse_agent_id(request.match_info["agent_id"]))
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

    async def _view(self, request: web.Request) -> object:
        agent_id = _own_agent_id(request)
        try:
            keys = (await self._store.guest(agent_id)).keys
        except NotFound:
            return NOT_REGISTERED
        if keys is None:
            return NOT_REGISTERED
        return registration_view(ek=keys.ek, ak=keys.ak, mtls_cert=keys.mtls_cert, ip=keys.ip, port=keys.port)

    async def _register(self, request: web.Request) -> object:
        with self._counted.step(GUEST, last=False):
            return await self._challenge(request)

    async def _challenge(self, request: web.Request) -> object:
        agent_id = _own_agent_id(request)
        await self._store.guest(agent_id)
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
            await self._refused.note(agent_id, error)
            raise
        return {"blob": _base64(blob)}

    async def _activate(self, request: web.Request) -> object:
        with self._counted.step(GUEST, last=True):
            return await self._answered(request)

    async def _answered(self, request: web.Request) -> object:
        agent_id = _own_agent_id(request)
        auth_tag = parse_auth_tag(await read_json(request))
        await self._store.guest(agent_id)
        try:
            await self._guests.activate(agent_id, auth_tag)
        except EnrolmentError as error:
            await self._refused.note(agent_id, error)
            raise
        self._refused.forget(agent_id)
        events.emit("guest_registered", agent_id=str(agent_id))
        return {}


def _own_agent_id(request: web.Request) -> AgentId:
    agent_id = parse_agent_id(request.match_info["agent_id"])
    if peer_of(request).name != str(agent_id):
        raise AccessDenied("a guest agent registers the guest that its certificate names")
    return agent_id


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
