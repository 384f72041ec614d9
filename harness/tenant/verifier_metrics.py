"""What a tenant verifier tells its operators: rounds, findings, peers that do not answer, and who is attested.

No guest has a series of its own: there may be thousands, and their ids are nobody's business but the tenant's. Which
guest it is, `harness tenant status` says.

Invariants:
    1. A round is counted once for each way in which a question of it ended: accepted, rejected with the number of the
       check, without an answer, begun anew, or a fault of this verifier.
    2. What V met on its way is counted as unanswered, not as a round: that round was accepted.

Owner: the event loop of the verifier; told by every session (`Session._fire`).

Spec: DESIGN 3.5, 3.8; docs/metrics.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

from harness.errors import StoreError
from harness.metrics import NONE, SECONDS, Metrics
from harness.tenant.retries import GUEST, HOST, STORE
from harness.tenant.round import Finding, Round
from harness.tenant.states import Effect, Event, State

ACCEPTED, REJECTED, UNANSWERED, RESTARTED, FAULT = "accepted", "rejected", "unanswered", "restarted", "fault"
_ACCEPTED = frozenset({Event.ROUND_ACCEPTED, Event.V_DUE})
_REJECTED = frozenset({Event.APPRAISAL_FAILED, Event.CLOCK_NOT_SAFE, Event.CLOCK_UNSAFE_TOO_LONG, Event.REBOOT_ALLOWED})
_RESTARTED = frozenset({Event.ROUND_EXPIRED, Event.BASELINE_CHANGED})
_FAILED = frozenset({Event.TRANSPORT_FAILED, Event.ABSENT, Event.REFUSED, Event.CLIENT_ERROR, Event.RETRIES_EXHAUSTED})


class Guests(Protocol):
    """The sessions of a verifier, as far as they are counted."""

    def states(self) -> Counter[State]:
        """How many are in which state."""

    def attested(self) -> int:
        """How many are attested now."""


class RoundFigures:
    """Rounds of all sessions.

    Args:
        metrics: of the service; takes the new ones.
        monotonic: seconds, on the clock of the sessions.
    """

    def __init__(self, metrics: Metrics, monotonic: Callable[[], float]) -> None:
        self._metrics = metrics
        self._monotonic = monotonic
        self._rounds = metrics.counter(
            "harness_rounds_total",
            "How rounds went: accepted; rejected, with layer and check; unanswered; restarted; fault of the verifier.",
            labels=("outcome", "layer", "check"),
            known=[(ACCEPTED, NONE, NONE)],
        )
        self._seconds = metrics.distribution(
            "harness_round_seconds", "Seconds from the guest's nonce to the acceptance of a round.", bounds=SECONDS
        )
        self._unanswered = metrics.counter(
            "harness_unanswered_total",
            "Questions that gave nothing to appraise, by whom they went to and the error; store: our own database.",
            labels=("layer", "reason"),
        )
        self._back_offs = metrics.counter(
            "harness_back_offs_total", "Waits before a question is asked again, by their reason.", labels=("reason",)
        )
        self._alarms = metrics.counter("harness_alarms_total", "Alarms raised by sessions, by kind.", labels=("kind",))

    def watch(self, guests: Guests) -> None:
        """Shows from now on how the sessions stand."""
        self._metrics.states(
            "harness_guests",
            "Guests under attestation, by the state of their session.",
            lambda: {(state.name,): float(count) for state, count in guests.states().items()},
            labels=("state",),
        )
        self._metrics.gauge(
            "harness_attested_guests", "Guests that are attested now.", lambda: float(guests.attested())
        )

    def told(
        self,
        event: Event,
        effects: Sequence[Effect],
        finding: Finding | None,
        fault: StoreError | None,
        done: Round | None,
    ) -> None:
        """Counts what a session met. See `ports.Told`."""
        layer, reason = (NONE, NONE) if finding is None else (finding.layer, finding.error)
        if event in _ACCEPTED:
            self._accepted(done)
        elif event is Event.INTERNAL_FAULT:
            self._rounds.add(FAULT, NONE, NONE)
        elif event in _FAILED and fault is not None:
            layer, reason = STORE, type(fault).__name__
            self._unanswered.add(layer, reason)
        elif event in _RESTARTED or (event in _FAILED and reason in Event.__members__):
            self._rounds.add(RESTARTED, layer, NONE)
        elif event in _REJECTED or (event in _FAILED and finding is not None and finding.check is not None):
            self._rounds.add(REJECTED, layer, _check(finding))
        elif event in _FAILED:
            self._unanswered.add(layer, reason)
            if layer in (GUEST, HOST):
                self._rounds.add(UNANSWERED, layer, NONE)
        if Effect.BACK_OFF in effects:
            self._back_offs.add(reason)
        if Effect.RAISE_ALARM in effects and finding is not None:
            self._alarms.add(reason)

    def _accepted(self, done: Round | None) -> None:
        self._rounds.add(ACCEPTED, NONE, NONE)
        if done is not None:
            self._seconds.observe(self._monotonic() - done.started)


def _check(finding: Finding | None) -> str:
    return NONE if finding is None or finding.check is None else str(finding.check)
