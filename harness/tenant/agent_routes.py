"""Calls of the tenant verifier's operator: Keylime's about agents, and the ways back.

Invariants:
    1. Whoever adds, changes or removes an agent is named, with a reason: "(not stated)" where Keylime's call has no
       place for one.

Spec: docs/protocol.md (tenant verifier); Keylime verifier API.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from aiohttp import web

from harness.audit import parse_reason
from harness.audit_routes import query_reason
from harness.errors import MalformedMessage
from harness.pki import Role
from harness.tenant.agents import Act, Agents
from harness.values import AgentId, parse_agent_id
from harness.web import Route, peer_of, read_json, read_object

_OPERATOR = frozenset({Role.TENANT_OPERATOR})
_AGENTS = r"/{version:v2\.[1-6]}/agents"
_POLICIES = frozenset({"guest_policy", "host_policy"})


def agent_routes(agents: Agents) -> list[Route]:
    """Routes of the operator."""

    async def add(request: web.Request) -> object:
        body = await read_json(request)
        reason = body.pop("reason", None) if isinstance(body, dict) else None
        await agents.add(_agent_id(request), body, _act(request, reason, required=False))
        return {}

    async def show_all(_request: web.Request) -> object:
        return {"uuids": [str(agent_id) for agent_id in agents.ids()]}

    async def show(request: web.Request) -> object:
        return agents.view(_agent_id(request))

    async def resume(request: web.Request) -> object:
        body = await _optional_object(request, {"reason", "accept_reboot"})
        accept = body.get("accept_reboot", False)
        if not isinstance(accept, bool):
            raise MalformedMessage("accept_reboot must be true or false")
        act = _act(request, body.get("reason"), required=False)
        await agents.resume(_agent_id(request), act, accept_reboot=accept)
        return {}

    async def show_policy(request: web.Request) -> object:
        return agents.policy(_agent_id(request))

    async def set_policy(request: web.Request) -> object:
        body = await read_object(request, members={"reason", *_POLICIES})
        policies = {name: value for name, value in body.items() if name in _POLICIES}
        if not policies:
            raise MalformedMessage("the body must have guest_policy, host_policy or both")
        await agents.set_policy(_agent_id(request), policies, _act(request, body.get("reason"), required=True))
        return agents.policy(_agent_id(request))

    async def delete(request: web.Request) -> object:
        await agents.delete(_agent_id(request), Act(who=peer_of(request).who, reason=query_reason(request)))
        return {}

    return [
        Route("GET", _AGENTS, show_all, roles=_OPERATOR),
        Route("POST", _AGENTS + "/{agent_id}", add, roles=_OPERATOR),
        Route("GET", _AGENTS + "/{agent_id}", show, roles=_OPERATOR),
        Route("DELETE", _AGENTS + "/{agent_id}", delete, roles=_OPERATOR),
        Route("PUT", _AGENTS + "/{agent_id}/resume", resume, roles=_OPERATOR),
        Route("PUT", _AGENTS + "/{agent_id}/reactivate", resume, roles=_OPERATOR),
        Route("GET", _AGENTS + "/{agent_id}/policy", show_policy, roles=_OPERATOR),
        Route("PUT", _AGENTS + "/{agent_id}/policy", set_policy, roles=_OPERATOR),
    ]


def _agent_id(request: web.Request) -> AgentId:
    return parse_agent_id(request.match_info["agent_id"])


def _act(request: web.Request, reason: object, *, required: bool) -> Act:
    return Act(who=peer_of(request).who, reason=parse_reason(reason, required=required))


async def _optional_object(request: web.Request, members: Collection[str]) -> dict[str, Any]:
    return await read_object(request, members=members) if request.can_read_body else {}
