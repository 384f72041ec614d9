"""What the parts of ``bench batching`` share: the site, loads on it, and the host agent's account of its batches.

Invariants:
    1. L is taken from the host agent's own events: the TPM's time per batch, PCR values included.
    2. What came before a load has settled is not in its figures.

Spec: DESIGN 4 (L); docs/performance.md, method.
"""

from __future__ import annotations

import asyncio
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from harness.bench import BenchOptions, Sample
from harness.bench_orders import Load, Order, Outcome, Results
from harness.bench_run import run_load
from harness.bench_site import BenchSite
from harness.errors import SimulationError
from harness.events import read_events

MS = 1000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One batch as its event tells it; times in seconds.

    Args:
        at_s: when it was over, by the monotonic clock of this machine.
        requests: members.
        tpm_quotes: TPM2_Quote commands.
        quote_s: the TPM's time.
    """

    at_s: float
    requests: int
    tpm_quotes: int
    quote_s: float


@dataclass(slots=True, kw_only=True)
class Bench:
    """A site, and what is asked of it.

    Args:
        site: running.
        options: as typed.
        folder: for files of loads.
    """

    site: BenchSite
    options: BenchOptions
    folder: Path
    _runs: int = field(default=0)

    @property
    def tenants(self) -> list[int]:
        """Indices of all tenants."""
        return list(range(self.options.tenants))

    def order(self, *loads: Load, drain_s: float = 40.0) -> Order:
        """Order for loads on the site, with a seed and files of its own."""
        self._runs += 1
        seed = self.options.seed * 1000 + self._runs
        return self.site.order(loads, seed=seed, result=self.folder / f"load{self._runs}.json", drain_s=drain_s)

    def bare_order(self, port: int, path: str, *loads: Load, tls: bool = True) -> Order:
        """Order for loads on a bare server: the same clients and connections as on the services.

        Args:
            port: of the server.
            path: what is asked for.
            loads: as on the services.
            tls: False: plain TCP.
        """
        changes: dict[str, object] = {"host": "127.0.0.1", "port": port, "quotes": None, "path": path}
        changes |= {} if tls else {"certificates": [], "authority": None}
        return self.order(*loads).model_copy(update=changes)

    async def load(self, *loads: Load, drain_s: float = 40.0) -> Results:
        """Makes loads, all at the same time.

        Raises:
            SimulationError: they could not be made, or an answer was not acceptable.

        *Cancellation:* the load generator is ended.
        """
        return await run_load(self.order(*loads, drain_s=drain_s))

    async def batches(self, begin_s: float, end_s: float) -> list[Batch]:
        """Batches that were over between two moments of the monotonic clock.

        Raises:
            SimulationError: there was none.
        """
        found = await asyncio.to_thread(lambda: [_batch(event) for event in read_events(self.site.agent_log)])
        inside = [batch for batch in found if batch is not None and begin_s <= batch.at_s < end_s]
        if not inside:
            raise SimulationError("the host agent made no batch under load; its log says why")
        return inside


def _batch(event: dict[str, object]) -> Batch | None:
    if event["event"] != "batch" or not event.get("tpm_quotes"):
        return None
    stamp = datetime.fromisoformat(str(event["timestamp"])).timestamp()
    return Batch(
        at_s=stamp - time.time() + time.monotonic(),
        requests=int(str(event["requests"])),
        tpm_quotes=int(str(event["tpm_quotes"])),
        quote_s=float(str(event["quote_s"])),
    )


def busy_s(batches: Sequence[Batch]) -> float:
    """L: seconds of the TPM per batch."""
    return statistics.fmean(batch.quote_s for batch in batches)


def quantile(values: Sequence[float], share: float) -> float:
    """Smallest value that is not exceeded by this share of the values; ``values`` must not be empty."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def windows(outcome: Outcome, *, settled_s: float, count: int) -> list[tuple[float, float]]:
    """Cuts the time of a load, once it has settled, into equal parts, by the schedule of its requests."""
    begin = outcome.begin_s + settled_s
    width = (max(outcome.scheduled_s) - begin) / count
    return [(begin + place * width, begin + (place + 1) * width) for place in range(count)]


def answered(outcome: Outcome, begin_s: float, end_s: float) -> list[float]:
    """Response times of the requests that were due in a window and were answered."""
    each = zip(outcome.scheduled_s, outcome.latency_s, outcome.status, strict=True)
    return [latency for due, latency, status in each if begin_s <= due < end_s and status == 200]


def ended(outcome: Outcome, begin_s: float, end_s: float) -> int:
    """Number of answers that came in a window."""
    each = zip(outcome.scheduled_s, outcome.latency_s, outcome.status, strict=True)
    return sum(begin_s <= due + latency < end_s for due, latency, status in each if status == 200)


def sample_of(values: Sequence[float], what: str) -> Sample:
    """Sample of measured values. Raises SimulationError, with what is missing, when there are none."""
    if not values:
        raise SimulationError(f"nothing was measured of {what}")
    return Sample.of(values)
