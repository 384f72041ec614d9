"""Figures of a service: what is counted, how it is exposed, and that nothing of a request becomes a label."""

from __future__ import annotations

import asyncio

import pytest

from harness import __version__, errors
from harness.errors import BatchFailed, GuestNotHere, HarnessError, PoolFull, StoreError
from harness.metrics import SERIES, Metrics, outcome_of
from harness.wire_errors import reasons, status_of
from tests.support.figures import figures


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    """One number; None where it is not exposed."""
    return figures(metrics).value(name, **labels)


def test_every_service_says_what_it_is_and_since_when() -> None:
    """Program, version and uptime are exposed from the start; the certificate's end once there is one."""
    now = [100.0]
    metrics = Metrics("test", monotonic=lambda: now[0])
    now[0] = 142.5
    assert value(metrics, "harness_build_info", service="test", version=__version__) == 1
    assert value(metrics, "harness_uptime_seconds") == 42.5
    assert value(metrics, "harness_certificate_expiry_timestamp_seconds") is None
    metrics.watch_certificate(lambda: 1_800_000_000.0)
    assert value(metrics, "harness_certificate_expiry_timestamp_seconds") == 1_800_000_000.0
    assert (value(metrics, "process_resident_memory_bytes") or 0) > 0


def test_checks_are_numbers() -> None:
    """A check that says ok is 1, any other 0; one that is gone is exposed no more."""
    metrics = Metrics("test")
    metrics.checked({"database": True, "hosts": False})
    assert value(metrics, "harness_health_ok", check="database") == 1
    assert value(metrics, "harness_health_ok", check="hosts") == 0
    metrics.checked({"database": True})
    assert value(metrics, "harness_health_ok", check="hosts") is None


@pytest.mark.parametrize(
    ("error", "outcome", "reason"),
    [
        (None, "answered", "none"),
        (GuestNotHere("x"), "refused", "GuestNotHere"),
        (PoolFull("x"), "refused", "PoolFull"),
        (BatchFailed("x", batch_id="1"), "failed", "BatchFailed"),
        (StoreError("x"), "failed", "StoreError"),
        (ZeroDivisionError("x"), "failed", "InternalFault"),
        (asyncio.CancelledError(), "abandoned", "none"),
    ],
    ids=lambda each: type(each).__name__ if isinstance(each, BaseException) else str(each),
)
def test_a_call_is_counted_by_how_it_ended(error: BaseException | None, outcome: str, reason: str) -> None:
    """Outcome and reason of a call, its time, and a refusal exactly where it was refused or failed."""
    metrics = Metrics("test")
    metrics.ended("GET /x", 0.3, error)
    assert value(metrics, "harness_requests_total", call="GET /x", outcome=outcome, reason=reason) == 1
    assert value(metrics, "harness_request_seconds_count", call="GET /x") == 1
    assert value(metrics, "harness_request_seconds_sum", call="GET /x") == 0.3
    assert figures(metrics).sum("harness_refusals_total") == (1 if outcome in {"refused", "failed"} else 0)
    assert outcome_of(error) == (outcome, reason)


def test_every_reason_is_exposed_before_it_happens() -> None:
    """Each error that has a status on the wire has its counter, at 0 in a service that has just started."""
    metrics = Metrics("test")
    assert {"PoolFull", "ShareExhausted", "WouldBeLate", "BatchFailed", "StoreError"} <= set(reasons())
    for reason in (*reasons(), "InternalFault"):
        assert value(metrics, "harness_refusals_total", reason=reason) == 0
        metrics.refused(reason)
        assert value(metrics, "harness_refusals_total", reason=reason) == 1


def test_reasons_are_the_errors_with_a_status() -> None:
    """A class is a reason if and only if it has a place on the wire and is no kind of others."""
    for name, kind in vars(errors).items():
        if not isinstance(kind, type) or not issubclass(kind, HarnessError) or kind.__subclasses__():
            continue
        made = kind.__new__(kind)
        assert (name in reasons()) == (status_of(made) != 500), name


def test_a_distribution_counts_into_its_buckets() -> None:
    """Buckets are cumulative, a value on a bound belongs below it, and many values are the same as one by one."""
    metrics = Metrics("test")
    together = metrics.distribution("harness_a_seconds", "A.", bounds=(0.1, 1))
    single = metrics.distribution("harness_b_seconds", "B.", bounds=(0.1, 1))
    assert value(metrics, "harness_a_seconds_count") == 0
    values = (0.05, 0.1, 0.5, 3.0)
    together.observe_all(values)
    for each in values:
        single.observe(each)
    for name in ("harness_a_seconds", "harness_b_seconds"):
        buckets = [value(metrics, f"{name}_bucket", le=bound) for bound in ("0.1", "1", "+Inf")]
        assert buckets == [2, 3, 4]
        assert value(metrics, f"{name}_count") == 4
        assert value(metrics, f"{name}_sum") == pytest.approx(3.65)


def test_series_are_bounded() -> None:
    """However many values a label takes, a metric keeps a bounded number of series and loses no count."""
    metrics = Metrics("test")
    count = metrics.counter("harness_x_total", "X.", labels=("a",))
    spread = metrics.distribution("harness_y_seconds", "Y.", bounds=(1,), labels=("a",))
    for number in range(SERIES + 10):
        count.add(str(number))
        spread.observe(0.0, str(number))
    assert value(metrics, "harness_x_total", a="other") == 10
    assert value(metrics, "harness_y_seconds_count", a="other") == 10
    assert len(figures(metrics).labels("harness_x_total")) == SERIES + 1


def test_series_of_what_is_gone_are_forgotten() -> None:
    """A series that is not kept is exposed no more, and begins anew at 0."""
    metrics = Metrics("test")
    count = metrics.counter("harness_x_total", "X.", labels=("tenant",))
    count.add("alice", by=3)
    count.add("bob")
    count.forget(lambda labels: labels != ("alice",))
    assert value(metrics, "harness_x_total", tenant="alice") is None
    assert value(metrics, "harness_x_total", tenant="bob") == 1
    assert count.value("alice") == 0


def test_services_share_nothing() -> None:
    """Two services in one process count apart, with the same names."""
    first, second = Metrics("a"), Metrics("b")
    first.refused("PoolFull")
    assert value(second, "harness_refusals_total", reason="PoolFull") == 0


def test_a_name_is_given_once() -> None:
    """A metric whose name is taken is refused when it is made, not when it is read."""
    metrics = Metrics("test")
    metrics.counter("harness_x_total", "X.")
    with pytest.raises(ValueError, match="harness_x"):
        metrics.gauge("harness_x_total", "Y.", lambda: 0.0)
