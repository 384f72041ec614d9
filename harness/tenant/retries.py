"""What a peer's failure means, how long it may last, and how long to wait: the table of DESIGN 3.8 as code.

Invariants:
    1. Only errors of the transport and "later" answers are retried; a verdict never comes here.
    2. Patience survives a restart of the round: a peer that never answers fails the session in the end.
    3. A wait is at least the peer's Retry-After. Beyond it, jitter spreads the tries over an interval as long as
       Retry-After itself, or as our own back-off if that is longer: sessions that were refused together do not come
       back together.
    4. All times are of the monotonic clock: a system clock that jumps neither ends a session nor keeps one alive.

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
STORE = "store"
"""What failed was our own database."""
_ROUND = "round"
_REQUEST_TIMEOUT = 408
_CERTIFICATE_EXPIRED = 401
_MOST_DOUBLINGS = 30


def classify(error: HarnessError) -> Event:
    """Event for a failure of a peer, by the status that it has, or would have, on the wire.

    Returns:
        TRANSPORT_FAILED (retryable, 408, 5xx, and 401: our certificate expired and may be renewed), ABSENT (404),
        REFUSED (403) or CLIENT_ERROR (any other 4xx).
    """
    status = error.status if isinstance(error, PeerRefusedUs) else status_of(error)
    if error.retryable or status in (_REQUEST_TIMEOUT, _CERTIFICATE_EXPIRED) or status >= 500:
        return Event.TRANSPORT_FAILED
    return {403: Event.REFUSED, 404: Event.ABSENT}.get(status, Event.CLIENT_ERROR)


class Retries:
    """Failures of one session since its last success.

    Args:
        timing: limits and waits.
    """

    def __init__(self, timing: Timing) -> None:
        self._timing = timing
        self._counts: Counter[tuple[str, Event]] = Counter()
        self._failing_since: dict[str, float] = {}
        self._unsafe_since: dict[str, float] = {}
        self._asked_wait_s = 0.0
        self._row = 0
        self._absent_row = 0

    def after(self, layer: str, error: HarnessError, now: float) -> Event:
        """Event to go on with after a failure; RETRIES_EXHAUSTED when it happened too often or for too long.

        Args:
            layer: whose question failed; each is judged by itself.
            error: what came.
            now: monotonic seconds.
        """
        event = classify(error)
        if event not in (Event.TRANSPORT_FAILED, Event.ABSENT):
            return event
        self._asked_wait_s = retry_after_s(error) or 0.0
        if self._asked_wait_s > self._timing.retry_after_longest_s:
            return Event.RETRIES_EXHAUSTED
        if event is Event.ABSENT:
            self._absent_row += 1
            return self._count(layer, event, self._timing.absent_retries)
        self._row += 1
        self._absent_row = 0
        return self._wait_for(layer, event, now)

    def restart(self, reason: Event, now: float) -> Event:
        """The event itself, or RETRIES_EXHAUSTED when rounds were restarted too often or too long without a success.

        Args:
            reason: ROUND_EXPIRED is a peer that is slow; any other reason comes at once, and is counted.
            now: monotonic seconds.
        """
        if reason is Event.ROUND_EXPIRED:
            return self._wait_for(_ROUND, reason, now)
        return self._count(_ROUND, reason, self._timing.round_restarts)

    def unsafe(self, layer: str, now: float) -> Event:
        """Event after a TPM clock that is not safe.

        Args:
            layer: whose clock.
            now: monotonic seconds.
        """
        since = self._unsafe_since.setdefault(layer, now)
        if now - since >= self._timing.clock_unsafe_limit_s:
            return Event.CLOCK_UNSAFE_TOO_LONG
        return self._again(Event.CLOCK_NOT_SAFE)

    def not_stored(self) -> Event:
        """Event after a fault of our own database: no peer is to blame, so that nobody's patience ends."""
        return self._again(Event.TRANSPORT_FAILED)

    def answered(self, layer: str) -> None:
        """The layer's evidence was accepted: its earlier failures are over."""
        self._unsafe_since.pop(layer, None)
        self._failing_since.pop(layer, None)
        for key in [key for key in self._counts if key[0] == layer]:
            del self._counts[key]
        self._row = self._absent_row = 0

    def succeeded(self) -> None:
        """All evidence of a round was accepted: restarts are over; what delivering V met so far still counts."""
        for layer in (GUEST, HOST, _ROUND):
            self.answered(layer)

    def forget(self) -> None:
        """An operator resumed: nothing is left of earlier failures."""
        self._counts.clear()
        self._failing_since.clear()
        self._unsafe_since.clear()
        self._row = self._absent_row = 0

    def wait_s(self, jitter: float) -> float:
        """Seconds to wait now: exponential, spread by jitter, on top of what the peer asked for.

        After 404 at least half of the own wait is kept: the guest is being started.

        Args:
            jitter: a random number in [0, 1).
        """
        timing, asked_s = self._timing, self._asked_wait_s
        if self._absent_row:
            own_s = _doubled(timing.absent_first_s, timing.absent_longest_s, self._absent_row)
            return asked_s + own_s * (1 + jitter) / 2
        own_s = _doubled(timing.backoff_first_s, timing.backoff_longest_s, self._row)
        spread_s = max(own_s, min(asked_s, timing.backoff_longest_s))
        shortest_s = max(asked_s, timing.backoff_first_s / 2)
        return shortest_s + jitter * (asked_s + spread_s - shortest_s)

    def _again(self, event: Event) -> Event:
        self._asked_wait_s = 0.0
        self._row += 1
        self._absent_row = 0
        return event

    def _wait_for(self, layer: str, event: Event, now: float) -> Event:
        since = self._failing_since.setdefault(layer, now)
        return Event.RETRIES_EXHAUSTED if now - since >= self._timing.transport_patience_s else event

    def _count(self, layer: str, event: Event, limit: int) -> Event:
        self._counts[layer, event] += 1
        return Event.RETRIES_EXHAUSTED if self._counts[layer, event] > limit else event


def _doubled(first_s: float, longest_s: float, row: int) -> float:
    """Wait before the try after ``row`` failures in a row."""
    doublings = min(max(0, row - 1), _MOST_DOUBLINGS)
    wait_s: float = first_s * 2**doublings
    return min(longest_s, wait_s)
