"""What an HTTP call says for the audit trail: who makes it, and why.

Spec: docs/protocol.md (reasons).
"""

from __future__ import annotations

from aiohttp import web

from harness.audit import AuditEntry, parse_reason
from harness.errors import MalformedMessage
from harness.web import peer_of


def act(request: web.Request, action: str, subject: object, *, reason: str, at: float) -> AuditEntry:
    """Audit entry of an act that a call asks for.

    Args:
        request: whose certificate says who it is.
        action: short name.
        subject: what is acted on.
        reason: from `query_reason` or `parse_reason`.
        at: seconds since the epoch.
    """
    return AuditEntry(at=at, who=peer_of(request).who, action=action, subject=str(subject), reason=reason)


def query_reason(request: web.Request, *, required: bool = False) -> str:
    """Reason from the query ``?reason=`` of a call that has no place for it in its body.

    Raises:
        MalformedMessage: it is missing though required, or no reason; or the query holds something else.
    """
    pairs = list(request.query.items())
    if len(pairs) > 1 or any(name != "reason" for name, _ in pairs):
        raise MalformedMessage("the query may hold one reason and nothing else")
    return parse_reason(pairs[0][1] if pairs else None, required=required)
