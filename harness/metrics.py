"""Figures of a service for its operators, in the text format of Prometheus: counts, distributions and states.

::

    metrics = Metrics("host-agent")
    sizes = metrics.distribution("harness_batch_size", "Requests that one quote answered.", bounds=(1, 10, 100))
    sizes.observe(42)
    print(metrics.text().decode())

The values are kept here, and handed to `prometheus_client` when they are asked for: its own counters take a lock and
stamp the time of each series, and its histograms take one value at a time, where a batch has thousands.

Invariants:
    1. A service has a registry of its own: nothing is shared with another service in the same process.
    2. The values of a label come from the source (calls, error classes, states) or from the operator (tenants), never
       from a request; whatever happens, a metric has at most `SERIES` series, and what is more counts as ``other``.
    3. No id of a guest, nonce, key or address is a name or a label.
    4. A counter never goes down while the process lives, except that a series is forgotten with its tenant.

Owner: the event loop of the service; a number that is read (`gauge`, `total`) may be written elsewhere.

Spec: Prometheus exposition format 0.0.4, and its conventions for names (base units, ``_total``).
"""

from __future__ import annotations

import itertools
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from harness import __version__
from harness.errors import HarnessError, Overloaded
from harness.wire_errors import reasons, status_of

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
SERIES = 8192
OTHER = "other"
NONE = "none"
ANSWERED, REFUSED, FAILED, ABANDONED = "answered", "refused", "failed", "abandoned"
"""Outcomes of a call: what was asked; a "no" of ours, also "not now"; a fault; its client has gone."""
INTERNAL_FAULT = "InternalFault"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 30)
"""Bounds for times: close to each other where the time of a chip lies, and up to what a tenant waits."""

Labels = tuple[str, ...]
Read = Callable[[], float]
ReadAll = Callable[[], Mapping[Labels, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """A metric, for the documentation.

    Args:
        name: as exposed.
        kind: ``counter``, ``gauge`` or ``histogram``.
        labels: their names.
        text: what it says.
    """

    name: str
    kind: str
    labels: Labels
    text: str


class _Series(Collector):
    """Base of the metrics: a family that is made anew for each reader."""

    def __init__(self, about: Described) -> None:
        self._about = about

    def describe(self) -> Iterable[Metric]:
        """The names that this metric takes, for the registry."""
        yield self._family()

    def _family(self) -> Metric:
        about = self._about
        kind = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}
        family: Metric = kind[about.kind](about.name, about.text, labels=about.labels)
        return family


class Count(_Series):
    """A counter. Made by `Metrics.counter`."""

    def __init__(self, about: Described, known: Iterable[Labels]) -> None:
        super().__init__(about)
        self._values: dict[Labels, float] = dict.fromkeys(known, 0.0)

    def add(self, *labels: str, by: float = 1.0) -> None:
        """Counts.

        Args:
            *labels: in the order of their names.
            by: how many.
        """
        try:
            self._values[labels] += by
        except KeyError:
            labels = _bounded(labels, len(self._values))
            self._values[labels] = self._values.get(labels, 0.0) + by

    def value(self, *labels: str) -> float:
        """How many were counted under these labels."""
        return self._values.get(labels, 0.0)

    def forget(self, kept: Callable[[Labels], bool]) -> None:
        """Drops the series that are not to be kept."""
        self._values = {labels: value for labels, value in self._values.items() if kept(labels)}

    def collect(self) -> Iterator[Metric]:
        """See `prometheus_client`."""
        family = self._family()
        for labels, value in sorted(self._values.items()):
            family.add_metric(labels, value)  # type: ignore[attr-defined]
        yield family


class _Buckets:
    """How many values lie below each bound and above the one before; and their sum."""

    __slots__ = ("counts", "sum")

    def __init__(self, size: int) -> None:
        self.counts = [0] * size
        self.sum = 0.0


class Distribution(_Series):
    """A histogram. Made by `Metrics.distribution`."""

    def __init__(self, about: Described, bounds: Sequence[float]) -> None:
        super().__init__(about)
        self._bounds = tuple(bounds)
        self._series: dict[Labels, _Buckets] = {}
        if not about.labels:
            self._of(())

    def observe(self, value: float, *labels: str) -> None:
        """Counts one value."""
        found = self._series.get(labels) or self._of(labels)
        found.counts[bisect_left(self._bounds, value)] += 1
        found.sum += value

    def observe_all(self, values: Sequence[float], *labels: str) -> None:
        """Counts many values, at a tenth of a microsecond each."""
        found, bounds = self._of(labels), self._bounds
        counts = found.counts
        for value in values:
            counts[bisect_left(bounds, value)] += 1
        found.sum += sum(values)

    def _of(self, labels: Labels) -> _Buckets:
        if labels not in self._series:
            labels = _bounded(labels, len(self._series))
            self._series.setdefault(labels, _Buckets(len(self._bounds) + 1))
        return self._series[labels]

    def collect(self) -> Iterator[Metric]:
        """See `prometheus_client`."""
        family = self._family()
        names = [*(f"{bound:g}" for bound in self._bounds), "+Inf"]
        for labels, found in sorted(self._series.items(), key=lambda item: item[0]):
            reached = itertools.accumulate(map(float, found.counts))
            family.add_metric(labels, list(zip(names, reached, strict=True)), found.sum)  # type: ignore[attr-defined]
        yield family


class _Reading(_Series):
    """A number that others keep: a state, or a count."""

    def __init__(self, about: Described, read: ReadAll) -> None:
        super().__init__(about)
        self._read = read

    def collect(self) -> Iterator[Metric]:
        """See `prometheus_client`."""
        family = self._family()
        for labels, value in sorted(self._read().items())[:SERIES]:
            family.add_metric(labels, value)  # type: ignore[attr-defined]
        yield family


class Snapshot(Collector):
    """Metrics of one moment. Made by `Metrics.snapshot`."""

    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        """See `prometheus_client`."""
        return self._families

    def text(self) -> bytes:
        """The text format: some microseconds a line, which are tens of milliseconds where there are many tenants."""
        return generate_latest(self)


def _bounded(labels: Labels, series: int) -> Labels:
    return labels if series < SERIES else (OTHER,) * len(labels)


class _Call(AbstractContextManager[None]):
    """See `Metrics.call`; a class, because a generator costs twice as much in every call."""

    __slots__ = ("_begun_s", "_metrics", "_name")

    def __init__(self, metrics: Metrics, name: str) -> None:
        self._metrics = metrics
        self._name = name
        self._begun_s = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._metrics.ended(self._name, time.perf_counter() - self._begun_s, error)


class Metrics:
    """The figures of one service. Those that every service has are made here; it adds its own.

    Args:
        service: its name.
        monotonic: seconds, for the uptime.
    """

    def __init__(self, service: str, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._registry = CollectorRegistry()
        self._described: list[Described] = []
        self._checks: Mapping[Labels, float] = {}
        self._expires: Read | None = None
        begun_s = monotonic()
        self.states(
            "harness_build_info",
            "Always 1; which program this is.",
            lambda: {(service, __version__): 1.0},
            labels=("service", "version"),
        )
        self.gauge("harness_uptime_seconds", "Seconds since the start.", lambda: monotonic() - begun_s)
        self.states(
            "harness_certificate_expiry_timestamp_seconds",
            "When the service's own certificate expires, in seconds since the epoch.",
            lambda: {} if self._expires is None else {(): self._expires()},
        )
        self.states(
            "harness_health_ok",
            "Whether a check of GET /health says ok (1) or not (0).",
            lambda: self._checks,
            labels=("check",),
        )
        self._requests = self.counter(
            "harness_requests_total",
            "Calls that have ended, by how: answered, refused (a no of ours, also not now), failed, or abandoned by "
            "their client; with the error's name, or none.",
            labels=("call", "outcome", "reason"),
        )
        self._seconds = self.distribution(
            "harness_request_seconds", "Seconds that a call took, however it ended.", bounds=SECONDS, labels=("call",)
        )
        self._refusals = self.counter(
            "harness_refusals_total",
            "Everything that was not answered with what was asked, by the error's name; connections that were cut off "
            "before they asked included.",
            labels=("reason",),
            known=[(name,) for name in (*reasons(), INTERNAL_FAULT)],
        )
        ProcessCollector(registry=self._registry)

    # --- what a service adds ------------------------------------------------------------------------------------

    def counter(self, name: str, text: str, *, labels: Labels = (), known: Iterable[Labels] = ((),)) -> Count:
        """A new counter.

        Args:
            name: ends in ``_total``.
            text: what it says.
            labels: their names.
            known: the series that exist from the start, with 0; without labels it is the only one.
        """
        about = self._describe(name, "counter", labels, text)
        count = Count(about, [each for each in known if len(each) == len(labels)])
        self._registry.register(count)
        return count

    def distribution(self, name: str, text: str, *, bounds: Sequence[float], labels: Labels = ()) -> Distribution:
        """A new histogram, with the upper bounds of its buckets in ascending order."""
        distribution = Distribution(self._describe(name, "histogram", labels, text), bounds)
        self._registry.register(distribution)
        return distribution

    def gauge(self, name: str, text: str, read: Read) -> None:
        """A number that is read when somebody asks."""
        self.states(name, text, lambda: {(): read()})

    def states(self, name: str, text: str, read: ReadAll, *, labels: Labels = ()) -> None:
        """Numbers that are read when somebody asks, by the values of their labels."""
        self._registry.register(_Reading(self._describe(name, "gauge", labels, text), read))

    def total(self, name: str, text: str, read: Read) -> None:
        """A counter that is kept elsewhere."""
        self._registry.register(_Reading(self._describe(name, "counter", (), text), lambda: {(): read()}))

    def _describe(self, name: str, kind: str, labels: Labels, text: str) -> Described:
        about = Described(name=name, kind=kind, labels=labels, text=text)
        self._described.append(about)
        return about

    # --- what every service is told -------------------------------------------------------------------------------

    def ended(self, call: str, seconds: float, error: BaseException | None = None) -> None:
        """A call has ended.

        Args:
            call: its name, from the source.
            seconds: that it took.
            error: what it ended with; None: its answer. What is neither a `HarnessError` nor a cancellation is a fault.
        """
        outcome, reason = outcome_of(error)
        self._requests.add(call, outcome, reason)
        self._seconds.observe(seconds, call)
        if outcome in (REFUSED, FAILED):
            self._refusals.add(reason)

    def call(self, name: str) -> AbstractContextManager[None]:
        """Counts the block as a call of this name, by how it ends and how long it takes."""
        return _Call(self, name)

    def refused(self, reason: str) -> None:
        """Something was refused before it became a call, for example a connection.

        Args:
            reason: name of an error class.
        """
        self._refusals.add(reason)

    def watch_certificate(self, expires: Read) -> None:
        """Tells from now on when the service's certificate expires, in seconds since the epoch."""
        self._expires = expires

    def checked(self, checks: Mapping[str, bool]) -> None:
        """What the checks of the service's health say now."""
        self._checks = {(name,): float(ok) for name, ok in checks.items()}

    # --- what is read ---------------------------------------------------------------------------------------------

    @property
    def described(self) -> Sequence[Described]:
        """All metrics, in the order in which they were made, without those of the process."""
        return tuple(self._described)

    def snapshot(self) -> Snapshot:
        """All metrics as they are now; taken in the event loop, it may be rendered beside it."""
        return Snapshot(list(self._registry.collect()))

    def text(self) -> bytes:
        """All metrics, in the format `CONTENT_TYPE`."""
        return self.snapshot().text()


def outcome_of(error: BaseException | None) -> tuple[str, str]:
    """Outcome and reason of a call that ended with this error, or with an answer."""
    if error is None:
        return ANSWERED, NONE
    if isinstance(error, HarnessError):
        ours = status_of(error) < 500 or isinstance(error, Overloaded)
        return REFUSED if ours else FAILED, type(error).__name__
    if isinstance(error, Exception):
        return FAILED, INTERNAL_FAULT
    return ABANDONED, NONE
