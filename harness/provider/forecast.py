"""How long a request will wait, from the time that the last batches took.

Invariants:
    1. Before the first batch has been quoted, everything takes no time: nobody is refused for what is not known.
    2. One batch that took long, and a few that failed at once, change nothing: the median of the last nine that were
       quoted counts.
    3. A forecast is never too long by what is not known: a batch that is overdue counts as about to end.

Owner: `batcher.Batcher`.

Spec: DESIGN 4.
"""

from __future__ import annotations

import statistics
from collections import deque

_LAST = 9


class Forecast:
    """Times of one batcher; all in seconds, moments on the monotonic clock.

    Args:
        pause_s: what the batcher sleeps before it takes a pool.
    """

    def __init__(self, pause_s: float) -> None:
        self._pause_s = pause_s
        self._times: deque[float] = deque(maxlen=_LAST)
        self._begun_s: float | None = None
        self._paused_s: float | None = None
        self.batch_s = 0.0  # until one is known

    def pausing(self, now_s: float) -> None:
        """The batcher begins to sleep."""
        self._paused_s = now_s

    def begun(self, now_s: float) -> None:
        """It has taken a pool."""
        self._begun_s, self._paused_s = now_s, None

    def ended(self, now_s: float, *, quoted: bool) -> None:
        """It is done with the pool; ``quoted``: the TPM made a quote."""
        if quoted and self._begun_s is not None:
            self._times.append(now_s - self._begun_s)
            self.batch_s = statistics.median_low(self._times)
        self._begun_s = None

    def working_s(self, now_s: float) -> float:
        """Since the batch in work was taken; 0 between batches."""
        return 0.0 if self._begun_s is None else now_s - self._begun_s

    def answer_in_s(self, quotes: int, now_s: float) -> float:
        """Until the ``quotes``-th quote from now is there, that of the batch in work not counted; 0 if not known."""
        if not self._times:
            return 0.0
        return self._free_in_s(now_s) + quotes * self.batch_s

    def _free_in_s(self, now_s: float) -> float:
        if self._begun_s is not None:
            return max(0.0, self._begun_s + self.batch_s - now_s) + self._pause_s
        return self._pause_s if self._paused_s is None else max(0.0, self._paused_s + self._pause_s - now_s)
