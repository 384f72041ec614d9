"""What every benchmark gives: rows with target, figure, ratio and verdict, and how far the repetitions lay apart.

A benchmark is a function from `BenchOptions` to a `Result`::

    def run(options: BenchOptions) -> Result:
        ours = repeat(build_ours, times=options.repetitions)
        theirs = repeat(build_theirs, times=options.repetitions)
        result = Result(benchmark="tree", method=["65,536 leaves, built at once"])
        result.add(at_most("tree and proofs", ours, unit="s", limit=1.0, baseline=theirs))
        return result

Invariants:
    1. A row's figure is the median of its repetitions; the least and the greatest are kept beside it.
    2. Where a row has a baseline it was measured in the same run, and the verdict is on the ratio of the two.
    3. A row without a target has no verdict, and never makes a run fail.

Spec: docs/performance.md is made of these rows (`bench_report`).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Self

REPETITIONS = 5
_DIGITS = 6

Say = Callable[[str], None]
"""Tells a person what is being measured."""


def _nobody_listens(_: str) -> None:
    """Default for `BenchOptions.say`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What a person asks of a benchmark.

    Args:
        quick: tiny counts, to see that it works; its figures mean nothing.
        chip: latency profile of the hardware TPM.
        tenants: number of tenants that ask.
        seed: of arrival times, nonces and chip latencies.
        repetitions: of each figure, after a warm-up.
        seconds: of the longest load.
        say: told what is being measured.
    """

    quick: bool = False
    chip: str = "ifx-slb9670"
    tenants: int = 64
    seed: int = 1
    repetitions: int = REPETITIONS
    seconds: float = 60.0
    say: Say = _nobody_listens


@dataclass(frozen=True, slots=True)
class Sample:
    """Repetitions of one measurement, in the order in which they were made; at least one."""

    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Sample of these values. Raises ValueError when there are none."""
        if not values:
            raise ValueError("a sample needs a value")
        return cls(tuple(values))

    @property
    def median(self) -> float:
        """The figure."""
        return statistics.median(self.values)

    @property
    def low(self) -> float:
        """Least repetition."""
        return min(self.values)

    @property
    def high(self) -> float:
        """Greatest repetition."""
        return max(self.values)

    def scaled(self, factor: float) -> Sample:
        """The same in another unit."""
        return Sample(tuple(value * factor for value in self.values))


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table of targets.

    Args:
        name: what was measured.
        target: for people, such as ``<= 1.6 x L``; empty for a figure that is only reported.
        value: median of the repetitions.
        unit: of value and baseline.
        baseline: what it is compared with, of the same run; None when the target is absolute.
        ratio: value / baseline.
        ok: whether the target is met; None without one.
    """

    name: str
    target: str
    value: float
    unit: str
    baseline: float | None = None
    ratio: float | None = None
    ok: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A row, with the repetitions behind it."""

    row: Row
    sample: Sample
    baseline: Sample | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Points of a plot.

    Args:
        title: over it.
        x: name and unit of the horizontal axis; logarithmic when ``log_x``.
        y: name and unit of the vertical axis, which begins at zero.
        lines: by name, points (x, y) in ascending x.
        log_x: whether the horizontal axis is logarithmic.
    """

    title: str
    x: str
    y: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    log_x: bool = False


@dataclass(slots=True, kw_only=True)
class Result:
    """What one benchmark found.

    Args:
        benchmark: its name.
        method: how it was measured, one sentence each.
        measured: its rows.
        series: its plots, by name of the file.
        profile: where the time goes: by process, share of its CPU time by function.
        failed: parts that could not be measured, and why; the others are.
    """

    benchmark: str
    method: list[str] = field(default_factory=list)
    measured: list[Measured] = field(default_factory=list)
    series: dict[str, Series] = field(default_factory=dict)
    profile: dict[str, list[tuple[str, float]]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def add(self, *measured: Measured) -> None:
        """Appends rows."""
        self.measured.extend(measured)

    @property
    def ok(self) -> bool:
        """Whether no target was missed."""
        return all(each.row.ok is not False for each in self.measured)

    def as_json(self) -> dict[str, object]:
        """Plain data: ``rows`` as documented, and beside them spreads, method, plots and profile."""
        return {
            "benchmark": self.benchmark,
            "rows": [asdict(each.row) for each in self.measured],
            "spreads": {each.row.name: _spread(each) for each in self.measured},
            "method": list(self.method),
            "series": {name: asdict(series) for name, series in self.series.items()},
            "profile": {name: [list(line) for line in lines] for name, lines in self.profile.items()},
            "failed": list(self.failed),
        }


def repeat(act: Callable[[], object], *, times: int = REPETITIONS, warm_up: int = 1) -> Sample:
    """Seconds that ``act`` takes, by the clock on the wall, after it was called ``warm_up`` times unmeasured."""
    return _repeated(act, time.perf_counter, times, warm_up)


def repeat_cpu(act: Callable[[], object], *, times: int = REPETITIONS, warm_up: int = 1) -> Sample:
    """Seconds of CPU that this process spends on ``act``, after it was called ``warm_up`` times unmeasured."""
    return _repeated(act, time.process_time, times, warm_up)


def _repeated(act: Callable[[], object], clock: Callable[[], float], times: int, warm_up: int) -> Sample:
    for _ in range(warm_up):
        act()
    values = []
    for _ in range(times):
        before = clock()
        act()
        values.append(clock() - before)
    return Sample.of(values)


def at_most(
    name: str, sample: Sample, *, unit: str, limit: float, baseline: Sample | None = None, of: str = "baseline"
) -> Measured:
    """Row whose figure, or its ratio to the baseline, must not exceed the limit.

    Args:
        name: what was measured.
        sample: its repetitions.
        unit: of figure and baseline.
        limit: of the ratio when there is a baseline, else of the figure.
        baseline: of the same run.
        of: what the baseline is, for the target's text.
    """
    return _judged(name, sample, unit, limit, baseline, sign="<=", of=of)


def at_least(
    name: str, sample: Sample, *, unit: str, limit: float, baseline: Sample | None = None, of: str = "baseline"
) -> Measured:
    """Row whose figure, or its ratio to the baseline, must reach the limit; arguments as for `at_most`."""
    return _judged(name, sample, unit, limit, baseline, sign=">=", of=of)


def reported(name: str, sample: Sample, *, unit: str, baseline: Sample | None = None, expected: str = "") -> Measured:
    """Row without a verdict; ``expected`` says what a reader may compare it with."""
    ratio = None if baseline is None else _ratio(sample, baseline)
    return _measured(Row(name=name, target=expected, value=sample.median, unit=unit, ratio=ratio), sample, baseline)


def _judged(
    name: str, sample: Sample, unit: str, limit: float, baseline: Sample | None, *, sign: str, of: str
) -> Measured:
    ratio = None if baseline is None else _ratio(sample, baseline)
    judged = sample.median if ratio is None else ratio
    target = f"{sign} {limit:g} {unit}" if baseline is None else f"{sign} {limit:g} x {of}"
    ok = judged <= limit if sign == "<=" else judged >= limit
    row = Row(name=name, target=target, value=sample.median, unit=unit, ratio=ratio, ok=ok)
    return _measured(row, sample, baseline)


def _measured(row: Row, sample: Sample, baseline: Sample | None) -> Measured:
    rounded = Row(
        name=row.name,
        target=row.target,
        value=_rounded(row.value),
        unit=row.unit,
        baseline=None if baseline is None else _rounded(baseline.median),
        ratio=None if row.ratio is None else _rounded(row.ratio),
        ok=row.ok,
    )
    return Measured(row=rounded, sample=sample, baseline=baseline)


def _ratio(sample: Sample, baseline: Sample) -> float:
    return sample.median / baseline.median if baseline.median else float("inf")


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def _spread(each: Measured) -> dict[str, object]:
    own: dict[str, object] = {
        "n": len(each.sample.values),
        "low": _rounded(each.sample.low),
        "high": _rounded(each.sample.high),
    }
    if each.baseline is None:
        return own
    return {**own, "baseline_low": _rounded(each.baseline.low), "baseline_high": _rounded(each.baseline.high)}
