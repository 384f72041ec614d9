"""Pauses between tries of something that ends or fails: each twice as long as the one before, up to a bound.

Invariants:
    1. A try that lasted as long as the longest pause was a good one: the next pause is the shortest again.

Owner: the task that tries.
"""

from __future__ import annotations

FIRST_S, LONGEST_S = 0.5, 10.0


class BackOff:
    """The pauses of one task."""

    def __init__(self) -> None:
        self._next_s = FIRST_S

    def after(self, lasted_s: float = 0.0) -> float:
        """Seconds to pause.

        Args:
            lasted_s: how long what has just ended had worked.
        """
        pause_s = FIRST_S if lasted_s >= LONGEST_S else self._next_s
        self._next_s = min(2 * pause_s, LONGEST_S)
        return pause_s
