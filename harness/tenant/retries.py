"""What a peer's failure means, how often it may happen, and how long to wait: the table of DESIGN 3.8 as code.

Invariants:
    1. Only errors of the transport and "later" answers are retried; a verdict never comes here.
    2. Counts survive a restart of the round: a peer that never answers fails the session in the end.
    3. A wait is at least the peer's Retry-After.

Owner: one session.
"""

from __future__ import annotations

from collections import Counter

from harness.errors import HarnessError, PeerRefusedUs
from harness.messages import retry_after_s, status_of
from harness.tenant.plan import Timing
from harness.tenant.states import Event

GUEST, HOST, PAYLOAD = "guest", "host", "payload"
"""Whose question failed: the layers of a session."""
_ROUND = "round"
_REQUEST_TIMEOUT = 408
_MOST_DOUBLINGS = 30


def classify(error: HarnessError) -> Event:
    """Event for a failure of a peer, by the status that it has, or would have, on the wire.

    Returns:
        TRANSPORT_FAILED (retryable, 408, 5xx), ABSENT (404), REFUSED (403) or CLIENT_ERROR (any other 4xx).
    """
    status = error.status if isinstance(error, PeerRefusedUs) else status_of(error)
    if error.retryable or status == _REQUEST_TIMEOUT or status >= 500:
        return Event.TRANSPORT_FAILED
    return {403: Event.REFUSED, 404: Event.ABSENT}.get(status, Event.CLIENT_ERROR)


class Retries:
    """Counts of one session's failures since its last success.

    Args:
        timing: limits and waits.
    """

    def __init__(self, timing: Timing) -> None:
        self._timing = timing
        self._counts: Counter[tuple[str, Event]] = Counter()
        self._unsafe_since: dict[str, float] = {}
        self._asked_wait_s = 0.0
        self._row = 0

    def after(self, layer: str, error: HarnessError) -> Event:
        """Event to go on with after a failure; RETRIES_EXHAUSTED when it happened too often.

        Args:
            layer: whose question failed; each has its own counts.
            error: what came.
        """
        event = classify(error)
        if event not in (Event.TRANSPORT_FAILED, Event.ABSENT):
            return event
        self._asked_wait_s = retry_after_s(error) or 0.0
        if self._asked_wait_s > self._timing.retry_after_longest_s:
            return Event.RETRIES_EXHAUSTED
        limit = self._timing.absent_retries if event is Event.ABSENT else self._timing.transport_retries
        return self._count(layer, event, limit)

    def restart(self, reason: Event) -> Event:
        """The event itself, or RETRIES_EXHAUSTED when rounds were restarted too often without a success."""
        return self._count(_ROUND, reason, self._timing.transport_retries)

    def unsafe(self, layer: str, now: float) -> Event:
        """Event after a TPM clock that is not safe.

        Args:
            layer: whose clock.
            now: monotonic seconds.
        """
        since = self._unsafe_since.setdefault(layer, now)
        if now - since >= self._timing.clock_unsafe_limit_s:
            return Event.CLOCK_UNSAFE_TOO_LONG
        self._asked_wait_s = 0.0
        self._row += 1
        return Event.CLOCK_NOT_SAFE

    def answered(self, layer: str) -> None:
        """The layer's evidence was accepted: its earlier failures are over."""
        self._unsafe_since.pop(layer, None)
        for key in [key for key in self._counts if key[0] == layer]:
            del self._counts[key]
        self._row = 0

    def succeeded(self) -> None:
        """All evidence of a round was accepted: restarts are over; what delivering V met so far still counts."""
        for layer in (GUEST, HOST, _ROUND):
            self.answered(layer)

    def forget(self) -> None:
        """An operator resumed: nothing is left of earlier failures."""
        self._counts.clear()
        self._unsafe_since.clear()
        self._row = 0

    def wait_s(self, jitter: float) -> float:
        """Seconds to wait now: exponential with jitter, on top of what the peer asked for.

        Args:
            jitter: a random number in [0, 1).
        """
        doublings = min(max(0, self._row - 1), _MOST_DOUBLINGS)
        own: float = min(self._timing.backoff_longest_s, self._timing.backoff_first_s * 2**doublings)
        return self._asked_wait_s + own * (1 + jitter) / 2

    def _count(self, layer: str, event: Event, limit: int) -> Event:
        self._counts[layer, event] += 1
        self._row += 1
        return Event.RETRIES_EXHAUSTED if self._counts[layer, event] > limit else event
