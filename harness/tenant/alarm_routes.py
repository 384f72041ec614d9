"""Calls by which the tenant's operator sees alarms, acknowledges them and reads the audit trail.

Registrar and verifier both have them, each for its own database.

Spec: docs/protocol.md (alarms).
"""

from __future__ import annotations

import time
from collections.abc import Callable

from aiohttp import web

from harness.audit import parse_reason
from harness.errors import MalformedMessage
from harness.pki import Role
from harness.tenant.alarms_store import AlarmStore
from harness.web import Route, peer_of, read_object

_OPERATOR = frozenset({Role.TENANT_OPERATOR})
_LARGEST = 2**31 - 1


def alarm_routes(store: AlarmStore, *, now: Callable[[], float] = time.time) -> list[Route]:
    """Routes of alarms and audit entries.

    Args:
        store: where they are.
        now: seconds since the epoch.
    """

    async def alarms(request: web.Request) -> object:
        return {"alarms": [record.as_json() for record in await store.alarms(everything=_everything(request))]}

    async def acknowledge(request: web.Request) -> object:
        number = _number(request.match_info["id"])
        body = await read_object(request, members={"reason"})
        reason = parse_reason(body.get("reason"))
        return (await store.acknowledge(number, who=peer_of(request).who, reason=reason, at=now())).as_json()

    async def audit(_request: web.Request) -> object:
        return {"entries": [entry.as_json() for entry in await store.audit()]}

    return [
        Route("GET", "/v1/alarms", alarms, roles=_OPERATOR),
        Route("PUT", "/v1/alarms/{id}/acknowledge", acknowledge, roles=_OPERATOR),
        Route("GET", "/v1/audit", audit, roles=_OPERATOR),
    ]


def _everything(request: web.Request) -> bool:
    match list(request.query.items()):
        case [] | [("all", "false")]:
            return False
        case [("all", "true")]:
            return True
    raise MalformedMessage("the query may be all=true or all=false")


def _number(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 10 and 0 < int(text) <= _LARGEST):
        raise MalformedMessage("an alarm is named by its number")
    return int(text)
