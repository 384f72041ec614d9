"""Metrics as they are shown: every sample for programs, one line a series for people."""

from __future__ import annotations

import pytest

from harness.errors import MalformedMessage
from harness.metrics import Metrics
from harness.metrics_view import Row, families_of, rows, samples


def exposed() -> str:
    """A counter, a state and two distributions."""
    metrics = Metrics("test")
    metrics.refused("PoolFull")
    metrics.checked({"database": False})
    waits = metrics.distribution("harness_wait_seconds", "W.", bounds=(0.1, 0.2, 0.4))
    waits.observe_all([0.05] * 60 + [0.15] * 38 + [0.3, 9.0])
    metrics.distribution("harness_none_seconds", "N.", bounds=(1,))
    return metrics.text().decode()


def row(name: str, labels: str = "") -> Row:
    """The line of one series."""
    [found] = [each for each in rows(families_of(exposed())) if (each.name, each.labels) == (name, labels)]
    return found


def test_a_distribution_is_one_line() -> None:
    """How many, their mean, and within what bound half of them and nearly all are."""
    shown = row("harness_wait_seconds")
    assert shown.value == "100, mean 0.18, 50% within 0.1, 99% within 0.4"
    assert not shown.nothing
    assert row("harness_none_seconds").value == "nothing yet"
    assert row("harness_none_seconds").nothing


def test_what_lies_beyond_the_last_bound_is_said_so() -> None:
    """A quantile that no bucket bounds is not given a number."""
    metrics = Metrics("test")
    metrics.distribution("harness_x_seconds", "X.", bounds=(1,)).observe(5.0)
    [shown] = [each for each in rows(families_of(metrics.text().decode())) if each.name == "harness_x_seconds"]
    assert shown.value == "1, mean 5, 50% within more than the last bound, 99% within more than the last bound"


def test_counters_that_are_zero_are_nothing_and_states_are_not() -> None:
    """A count of 0 may be left out; a check that fails may not."""
    assert row("harness_refusals_total", "reason=PoolFull").value == "1"
    assert not row("harness_refusals_total", "reason=PoolFull").nothing
    assert row("harness_refusals_total", "reason=ShareExhausted").nothing
    assert row("harness_health_ok", "check=database") == Row(
        name="harness_health_ok", labels="check=database", value="0", nothing=False
    )


def test_programs_get_every_sample() -> None:
    """Name, labels and value, buckets included."""
    found = list(samples(families_of(exposed())))
    assert {"name": "harness_wait_seconds_bucket", "labels": {"le": "0.2"}, "value": 98.0} in found
    assert {"name": "harness_wait_seconds_bucket", "labels": {"le": "+Inf"}, "value": 100.0} in found
    assert {"name": "harness_refusals_total", "labels": {"reason": "PoolFull"}, "value": 1.0} in found


def test_a_value_that_json_does_not_know_is_text() -> None:
    """Infinity and the like do not make the answer unreadable."""
    assert [each["value"] for each in samples(families_of("x +Inf\ny NaN\n"))] == ["inf", "nan"]


@pytest.mark.parametrize("text", ['{"code": 200}', "harness_x one\n"])
def test_what_is_not_the_text_format_is_malformed(text: str) -> None:
    """An answer of something else is one clear error."""
    with pytest.raises(MalformedMessage):
        families_of(text)
