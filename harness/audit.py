"""The audit trail: what an operator changed, who it was, when and why.

Every act by which an operator overrules what the harness found (a resume, new reference values, a released key, a
renewed certificate, ...) is one entry, in the database of the service that carried it out and among its events.

Invariants:
    1. An entry is committed together with the act, or before it; an act without an entry does not happen.
    2. Entries are only added.

Spec: docs/operations.md.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from harness.errors import MalformedMessage

REASON_LIMIT = 500
NOT_STATED = "(not stated)"
"""Reason of an act through an interface that has no place for one: Keylime's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    """One act.

    Args:
        at: seconds since the epoch.
        who: ``<authority>/<role>/<name>`` from the certificate, or ``uid <number>`` on a local socket.
        action: short name, for example ``resume`` or ``policy-set``.
        subject: what was acted on: an agent id, a host id, a tenant, an alarm.
        reason: the operator's own words.
    """

    at: float
    who: str
    action: str
    subject: str
    reason: str

    def as_json(self) -> dict[str, object]:
        """Members as the REST APIs show them."""
        return asdict(self)


def parse_reason(value: object, *, required: bool = True) -> str:
    """The operator's reason from a request.

    Args:
        value: as received; None when it was left out.
        required: whether it may be left out.

    Raises:
        MalformedMessage: it is missing, no text, empty, too long or not printable.
    """
    if value is None and not required:
        return NOT_STATED
    if not isinstance(value, str) or not value.strip():
        raise MalformedMessage("reason must say why this is done: it goes into the audit trail")
    reason = value.strip()
    if len(reason) > REASON_LIMIT or not reason.isprintable():
        raise MalformedMessage(f"reason must be at most {REASON_LIMIT} printable characters on one line")
    return reason
