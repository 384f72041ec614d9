"""What a provider verifier counts of its tenants and hosts."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from harness.errors import BatchFailed, HarnessError, PoolFull
from harness.metrics import Metrics
from harness.provider.proxy_metrics import ProxyFigures
from tests.support.figures import figures

NAME = "harness_tenant_requests_total"


def made(states: dict[str, str] | None = None) -> tuple[Metrics, ProxyFigures]:
    """Figures with the tenants alice and bob."""
    metrics = Metrics("provider-verifier")
    shown = ProxyFigures(metrics, lambda: states or {})
    shown.follow({"alice", "bob"})
    return metrics, shown


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, "answered"),
        (PoolFull("x"), "refused"),
        (BatchFailed("x", batch_id="b"), "failed"),
        (asyncio.CancelledError(), "abandoned"),
    ],
    ids=["answered", "refused", "failed", "abandoned"],
)
def test_a_tenants_call_is_counted_by_how_it_ended(error: BaseException | None, outcome: str) -> None:
    """Each call is counted under its tenant and its outcome, while it is in work and afterwards."""
    metrics, shown = made()
    with contextlib.suppress(HarnessError, asyncio.CancelledError), shown.call("alice"):
        assert figures(metrics).value("harness_tenant_requests_in_work", tenant="alice") == 1
        if error is not None:
            raise error
    found = figures(metrics)
    assert found.value(NAME, tenant="alice", outcome=outcome) == 1
    assert found.sum(NAME) == 1
    assert found.labels("harness_tenant_requests_in_work") == []


def test_a_tenant_that_is_removed_takes_its_series_with_it() -> None:
    """Names of tenants that are none any more are not shown, nor is a call that they had in work."""
    metrics, shown = made()
    with shown.call("alice"), shown.call("bob"):
        shown.follow({"bob"})
    with shown.call("nobody"):
        pass
    assert figures(metrics).labels(NAME) == [{"tenant": "bob", "outcome": "answered"}]


def test_hosts_are_counted_with_those_that_are_connected() -> None:
    """A host that cannot be reached is in the records and not connected."""
    states = {"a": "ok", "b": "not connected: refused", "c": "ok"}
    metrics, _ = made(states)
    assert figures(metrics).value("harness_hosts") == 3
    assert figures(metrics).value("harness_hosts_connected") == 2
    states["b"] = "ok"
    assert figures(metrics).value("harness_hosts_connected") == 3
