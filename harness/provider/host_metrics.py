"""What a host agent tells its operators of batches, waiting requests and the TPM's time.

Invariants:
    1. A batch is counted once, whatever came of it, and the wait for each of its answers once.
    2. Names of tenants are labels of what waits now, and of nothing that stays: there are as many series as tenants
       that wait, all of them admitted by the provider verifier, and only the provider's operator reads them.

Owner: `stream_routes.Quoting`.

Spec: DESIGN 4; docs/metrics.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from harness.metrics import SECONDS, Metrics
from harness.provider.batching import BatchReport

SIZES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 65_536)


class Waiting(Protocol):
    """The batcher, as far as it is counted."""

    @property
    def waiting(self) -> int:
        """Requests that have not been answered yet."""

    @property
    def waiting_by_tenant(self) -> Mapping[str, int]:
        """The same, by tenant."""

    @property
    def open_pools(self) -> int:
        """Pools that wait for the TPM."""


class Quotes(Protocol):
    """The keys, as far as they are counted."""

    @property
    def quotes_made(self) -> int:
        """TPM2_Quote commands that were carried out."""

    @property
    def races(self) -> int:
        """Those whose PCR values had changed when they were read."""

    @property
    def asked_again(self) -> int:
        """Commands that were repeated because the TPM was busy."""


class HostFigures:
    """Batches, waits and the TPM.

    Args:
        metrics: of the service; takes the new ones.
        waiting: the batcher.
        quotes: the host's keys.
        streams: how many provider verifiers are connected.
    """

    def __init__(self, metrics: Metrics, waiting: Waiting, quotes: Quotes, streams: Callable[[], int]) -> None:
        self._batches = metrics.counter(
            "harness_batches_total",
            "Batches, by outcome: quoted, nobody_left, or the name of the error that all members were given.",
            labels=("outcome",),
            known=[("quoted",)],
        )
        self._sizes = metrics.distribution(
            "harness_batch_size", "Requests that one batch answered, or failed.", bounds=SIZES
        )
        self._waits = metrics.distribution(
            "harness_batch_wait_seconds", "Seconds from a request's arrival to its answer.", bounds=SECONDS
        )
        self._sealing = metrics.distribution(
            "harness_batch_sealing_seconds",
            "Seconds of a batch before the TPM had it: residency check, leaves, tree.",
            bounds=SECONDS,
        )
        self._times = metrics.distribution(
            "harness_tpm_quote_seconds",
            "The TPM's time for a batch (L), reading of PCR values and a second quote after a race included.",
            bounds=SECONDS,
        )
        metrics.total("harness_tpm_quotes_total", "TPM2_Quote commands carried out.", lambda: float(quotes.quotes_made))
        metrics.total(
            "harness_tpm_races_total",
            "Quotes that were of no use, because a PCR was extended before its value was read.",
            lambda: float(quotes.races),
        )
        metrics.total(
            "harness_tpm_busy_total",
            "TPM commands repeated because the TPM answered RETRY, YIELDED or TESTING.",
            lambda: float(quotes.asked_again),
        )
        metrics.gauge(
            "harness_waiting_requests", "Requests that have not been answered yet.", lambda: float(waiting.waiting)
        )
        metrics.states(
            "harness_tenant_waiting_requests",
            "The same, by tenant; tenants without any are left out.",
            lambda: {(tenant,): float(count) for tenant, count in waiting.waiting_by_tenant.items()},
            labels=("tenant",),
        )
        metrics.gauge("harness_pools_open", "Pools that wait for the TPM.", lambda: float(waiting.open_pools))
        metrics.gauge("harness_streams_open", "Provider verifiers that are connected.", lambda: float(streams()))

    def batch(self, report: BatchReport) -> None:
        """Counts a batch. See `batching.Surroundings.observe`."""
        self._batches.add(report.outcome.replace(" ", "_"))
        self._waits.observe_all(report.waits_s)
        if report.requests:
            self._sizes.observe(report.requests)
            self._sealing.observe(report.sealing_s)
            self._times.observe(report.quote_s)
