"""Errors on the wire: one table from error classes to HTTP statuses, used in both directions.

Invariants:
    1. A status never depends on where an error was raised.
    2. A peer can make us raise only the errors in `_FROM_PEER`, and only with the status that belongs to them; it
       cannot make a finding (AppraisalError) or an internal fault of ours.

Spec: DESIGN 3.1, 3.7 and 3.8; RFC 9110, 15 and 10.2.3 (Retry-After).
"""

from __future__ import annotations

from collections.abc import Callable

from harness import errors
from harness.errors import HarnessError, Overloaded, PeerRefusedUs, PeerUnreachable

_STATUS: tuple[tuple[type[HarnessError], int], ...] = (
    (errors.MessageTooLarge, 413),
    (errors.ProtocolError, 400),
    (errors.GuestNotHere, 404),
    (errors.NotFound, 404),
    (errors.Conflict, 409),
    (errors.Refused, 403),
    (errors.Overloaded, 503),
    (errors.BatchFailed, 503),
    (errors.TpmError, 503),
    (errors.StoreError, 503),
    (errors.DeadlineExceeded, 504),
    (errors.CertificateExpired, 401),
    (errors.TransportError, 502),
    (errors.ChallengeFailed, 400),
    (errors.EnrolmentError, 403),
)
"""First match wins."""

_FROM_PEER: dict[str, Callable[[str, float], HarnessError]] = {
    "PoolFull": lambda detail, wait_s: errors.PoolFull(detail, retry_after_s=wait_s),
    "ShareExhausted": lambda detail, wait_s: errors.ShareExhausted(detail, retry_after_s=wait_s),
    "WouldBeLate": lambda detail, wait_s: errors.WouldBeLate(detail, retry_after_s=wait_s),
    "TooManyConnections": lambda detail, wait_s: errors.TooManyConnections(detail, retry_after_s=wait_s),
    "ShuttingDown": lambda detail, wait_s: errors.ShuttingDown(detail, retry_after_s=wait_s),
    "NotReady": lambda detail, wait_s: errors.NotReady(detail, retry_after_s=wait_s),
    "BatchFailed": lambda detail, _: errors.BatchFailed(detail, batch_id=""),
    "NotYourGuest": lambda detail, _: errors.NotYourGuest(detail),
    "GuestNotHere": lambda detail, _: errors.GuestNotHere(detail),
    "SelectionNotAllowed": lambda detail, _: errors.SelectionNotAllowed(detail),
    "CertificateExpired": lambda detail, _: errors.CertificateExpired(detail),
    "AccessDenied": lambda detail, _: errors.AccessDenied(detail),
    "NotFound": lambda detail, _: errors.NotFound(detail),
    "Conflict": lambda detail, _: errors.Conflict(detail),
    "UnacceptableKey": lambda detail, _: errors.UnacceptableKey(detail),
    "CertificateRefused": lambda detail, _: errors.CertificateRefused(detail),
    "ChallengeFailed": lambda _detail, _: errors.ChallengeFailed(),
    "KeyChanged": lambda detail, _: errors.KeyChanged(detail),
    "CloneSuspected": lambda detail, _: errors.CloneSuspected(detail),
}
_LATER = 408
_DEFAULT_WAIT_S = 1.0
_LONGEST_WAIT_S = 3600.0
_LONGEST_DETAIL = 500


def status_of(error: HarnessError) -> int:
    """HTTP status that an error is answered with; 500 for what has no place on the wire."""
    if isinstance(error, PeerRefusedUs):
        return 502
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 500)


def reasons() -> tuple[str, ...]:
    """Names of all errors that a call can be refused with, or fail with: those that have a status, and no kinds."""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, HarnessError)]
    placed = [kind for kind in kinds if any(issubclass(kind, known) for known, _ in _STATUS)]
    return tuple(kind.__name__ for kind in placed if not any(other.__base__ is kind for other in kinds))


def retry_after_s(error: HarnessError) -> float | None:
    """Seconds for Retry-After; None where a new try is not suggested."""
    if isinstance(error, Overloaded):
        return error.retry_after_s
    return _DEFAULT_WAIT_S if status_of(error) == 503 else None


def failure(error: HarnessError) -> dict[str, object]:
    """Envelope of a refusal (Keylime's, with the error's name among the results)."""
    return {"code": status_of(error), "status": error.detail, "results": {"error": type(error).__name__}}


def error_from_response(status: int, body: object, retry_after: str | None) -> HarnessError:
    """Error that a peer's answer stands for.

    Args:
        status: HTTP status, not 2xx.
        body: parsed body, or None when it could not be parsed.
        retry_after: value of the Retry-After header; only seconds are understood.

    Returns:
        The named error when name and status belong together; else `PeerUnreachable` for "later" (408, 5xx), `NotReady`
        when such an answer says how much later, and `PeerRefusedUs` for any other status.
    """
    name, detail = _name_and_detail(body)
    wait_s = _seconds(retry_after)
    if name in _FROM_PEER:
        error = _FROM_PEER[name](detail or name, _DEFAULT_WAIT_S if wait_s is None else wait_s)
        if status_of(error) == status:
            return error
    sentence = f"the peer answered {status}" + (f": {detail}" if detail else "")
    if status == _LATER or status >= 500:
        return PeerUnreachable(sentence) if wait_s is None else errors.NotReady(sentence, retry_after_s=wait_s)
    return PeerRefusedUs(sentence, status=status, error=name)


def _name_and_detail(body: object) -> tuple[str | None, str]:
    if not isinstance(body, dict):
        return None, ""
    results, detail = body.get("results"), body.get("status")
    name = results.get("error") if isinstance(results, dict) else None
    text = detail[:_LONGEST_DETAIL] if isinstance(detail, str) else ""
    return (name if isinstance(name, str) else None), text.encode("ascii", "replace").decode()


def _seconds(retry_after: str | None) -> float | None:
    if retry_after is None:
        return None
    try:
        seconds = float(retry_after)
    except ValueError:
        return None
    return min(seconds, _LONGEST_WAIT_S) if seconds >= 0 else None
