"""What the provider verifier refuses: counted, and told in the event stream.

Invariants:
    1. Every refusal is counted under its error's name.
    2. Of one tenant and one kind of error there is at most one event in `TELL_EVERY_S`, the first at once; it says how
       many were not told since the last: a tenant that floods cannot push the others out of the log, and being refused
       is cheap.

Owner: `proxy_routes.Proxy`.

Spec: DESIGN 3.1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

from harness import events
from harness.errors import HarnessError
from harness.provider.clock import Clock

TELL_EVERY_S = 1.0


class RefusalLog:
    """Refusals by name, and their events.

    Args:
        clock: for the time between two events.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._counts: Counter[str] = Counter()
        self._told_s: dict[tuple[str, str], float] = {}
        self._untold: Counter[tuple[str, str]] = Counter()

    @property
    def counts(self) -> Mapping[str, int]:
        """How many there were, by the error's name."""
        return self._counts

    def note(self, tenant: str, error: HarnessError) -> None:
        """Counts a refusal of this tenant's call."""
        name = type(error).__name__
        self._counts[name] += 1
        kind, now_s = (tenant, name), self._clock.monotonic()
        if now_s - self._told_s.get(kind, float("-inf")) < TELL_EVERY_S:
            self._untold[kind] += 1
            return
        self._told_s[kind] = now_s
        events.emit(
            "refused",
            tenant=tenant,
            error=name,
            detail=error.detail,
            count=self._counts[name],
            not_told=self._untold.pop(kind, 0),
        )

    def follow(self, tenants: Collection[str]) -> None:
        """Forgets when it told what of tenants that are none any more."""
        self._told_s = {kind: told_s for kind, told_s in self._told_s.items() if kind[0] in tenants}
        self._untold = Counter({kind: count for kind, count in self._untold.items() if kind[0] in tenants})
