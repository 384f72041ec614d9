"""What a registrar tells its operators of enrolments: of hosts and guests, by outcome and reason.

Invariants:
    1. An enrolment is counted as done after its last step, and each refusal at the step that refused it.

Owner: the event loop of the registrar.

Spec: DESIGN 3.6; docs/metrics.md.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType

from harness.metrics import NONE, Metrics, outcome_of

HOST, GUEST = "host", "guest"
ENROLLED = "enrolled"


class Enrolments:
    """Enrolments at one registrar.

    Args:
        metrics: of the service; takes the new one.
        kinds: what is enrolled there, of `HOST` and `GUEST`.
    """

    def __init__(self, metrics: Metrics, *kinds: str) -> None:
        self._count = metrics.counter(
            "harness_enrolments_total",
            "Enrolments of hosts and guests: enrolled, refused, failed or abandoned, with the error's name.",
            labels=("kind", "outcome", "reason"),
            known=[(kind, ENROLLED, NONE) for kind in kinds],
        )

    def step(self, kind: str, *, last: bool) -> AbstractContextManager[None]:
        """Counts the block: what it fails with, and, where it is the last step, its success.

        Args:
            kind: `HOST` or `GUEST`.
            last: whether the enrolment is complete after it.
        """
        return _Step(self, kind, last=last)

    def ended(self, kind: str, error: BaseException | None) -> None:
        """An enrolment has ended, with success or with this error."""
        outcome, reason = outcome_of(error)
        self._count.add(kind, ENROLLED if error is None else outcome, reason)


class _Step(AbstractContextManager[None]):
    """See `Enrolments.step`."""

    def __init__(self, enrolments: Enrolments, kind: str, *, last: bool) -> None:
        self._enrolments = enrolments
        self._kind = kind
        self._last = last

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None or self._last:
            self._enrolments.ended(self._kind, error)
