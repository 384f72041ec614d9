"""Rows of a benchmark: figure, ratio and verdict follow from the repetitions."""

from __future__ import annotations

import json

import pytest

from harness.bench import Result, Sample, at_least, at_most, repeat, reported

MEMBERS = {"name", "target", "value", "unit", "baseline", "ratio", "ok"}


def test_the_figure_is_the_median_and_the_spread_is_kept() -> None:
    """One repetition that was disturbed does not move the figure, and is seen in the spread."""
    result = Result(benchmark="b")
    result.add(at_most("n", Sample.of([1.0, 9.0, 2.0, 1.5, 1.2]), unit="s", limit=2.0))
    shown = json.loads(json.dumps(result.as_json()))
    assert [set(row) for row in shown["rows"]] == [MEMBERS]
    assert shown["rows"][0]["value"] == 1.5
    assert shown["spreads"]["n"] == {"n": 5, "low": 1.0, "high": 9.0}
    assert result.ok


@pytest.mark.parametrize(
    ("judge", "limit", "ok"),
    [(at_most, 2.0, True), (at_most, 1.9, False), (at_least, 2.0, True), (at_least, 2.1, False)],
)
def test_the_verdict_is_on_the_ratio_where_there_is_a_baseline(judge: object, limit: float, ok: bool) -> None:
    """Twice the baseline meets a limit of 2 and misses one on its other side."""
    assert callable(judge)
    measured = judge("n", Sample.of([4.0]), unit="s", limit=limit, baseline=Sample.of([2.0]), of="L")
    assert (measured.row.baseline, measured.row.ratio, measured.row.ok) == (2.0, 2.0, ok)
    assert measured.row.target.endswith(f"{limit:g} x L")


def test_a_row_without_a_target_never_fails_a_run() -> None:
    """It has a figure and no verdict."""
    result = Result(benchmark="b")
    result.add(reported("n", Sample.of([5.0]), unit="s"))
    assert (result.measured[0].row.ok, result.ok) == (None, True)


def test_one_missed_target_is_enough() -> None:
    """A run with one target missed is not ok, whatever the others say."""
    result = Result(benchmark="b")
    result.add(
        at_most("met", Sample.of([1.0]), unit="s", limit=1.0), at_least("missed", Sample.of([1.0]), unit="s", limit=2.0)
    )
    assert not result.ok


def test_the_warm_up_is_not_measured() -> None:
    """As many values come back as repetitions were asked for; the act was called once more for each warm-up."""
    calls: list[None] = []
    sample = repeat(lambda: calls.append(None), times=3, warm_up=2)
    assert (len(sample.values), len(calls)) == (3, 5)


def test_an_empty_sample_is_refused() -> None:
    """Nothing measured is no figure."""
    with pytest.raises(ValueError, match="needs a value"):
        Sample.of([])
