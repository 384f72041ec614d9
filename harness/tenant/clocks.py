"""The last believed clock of each AK, in memory: what appraisals are held against, and what is yet to be stored.

Invariants:
    1. A clock is only raised here, and only under equal counters; other counters come by `replace`, once the database
       has them.
    2. What was raised and is not stored stays on the list until a transaction that wrote it, or something later, has
       been committed.

Owner: `verifier_store`, in the verifier's event loop.

Spec: DESIGN 3.5 (10).
"""

from __future__ import annotations

from collections.abc import Mapping

from harness.tenant.round import same_counters
from harness.values import ClockBaseline

Known = tuple[ClockBaseline, float]
"""A baseline, and the time of the enrolment that it descends from."""


class Clocks:
    """Baselines by the Name of their key."""

    def __init__(self) -> None:
        self._known: dict[bytes, Known] = {}
        self._unstored: set[bytes] = set()

    def known(self, ak_name: bytes) -> Known | None:
        """Baseline and time of enrolment; None for a key that was never believed."""
        return self._known.get(ak_name)

    def baseline(self, ak_name: bytes) -> ClockBaseline | None:
        """The baseline alone."""
        known = self._known.get(ak_name)
        return None if known is None else known[0]

    def raise_to(self, ak_name: bytes, seen: ClockBaseline) -> None:
        """Takes an accepted clock: as the first baseline, or when it is higher under equal counters; never lower."""
        known, enrolled_at = self._known.get(ak_name, (None, 0.0))
        if known is None or (same_counters(known, seen) and seen.clock > known.clock):
            self._known[ak_name] = (seen, enrolled_at)
            self._unstored.add(ak_name)

    def replace(self, ak_name: bytes, known: Known) -> None:
        """Takes what the database has now."""
        self._known[ak_name] = known
        self._unstored.discard(ak_name)

    def unstored(self) -> dict[bytes, Known]:
        """What is to be written."""
        return {ak_name: self._known[ak_name] for ak_name in self._unstored}

    def stored(self, written: Mapping[bytes, Known]) -> None:
        """Notes that this was committed; what was raised meanwhile is still to be written."""
        self._unstored -= {ak_name for ak_name, known in written.items() if self._known[ak_name] is known}
