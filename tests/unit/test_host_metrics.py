"""What a host agent counts of batches, waits, tenants and its TPM."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from harness.config import BatchSettings
from harness.errors import DeviceFault
from harness.metrics import Metrics
from harness.provider.batcher import Batcher, BatchReport, Surroundings
from harness.provider.host_metrics import HostFigures
from tests.support.batching import FakeQuoter, FakeResidency, settle
from tests.support.figures import figures
from tests.support.pendings import a_request
from tests.support.soft_tpm import SoftTpm

TIME_S = 60.0


@dataclass(slots=True)
class Counts:
    """Stands for batcher and keys."""

    waiting: int = 0
    open_pools: int = 0
    waiting_by_tenant: dict[str, int] = field(default_factory=dict)
    quotes_made: int = 0
    races: int = 0
    asked_again: int = 0


def report(**changes: object) -> BatchReport:
    """Three requests, answered with one quote."""
    members = {
        "batch_id": "b",
        "requests": 3,
        "refused": 0,
        "tree_size": 16,
        "tpm_quotes": 1,
        "waited_s": 0.3,
        "sealing_s": 0.002,
        "quote_s": 0.19,
        "waiting": 0,
        "outcome": "quoted",
        "waits_s": (0.2, 0.3, 0.35),
    }
    return BatchReport(**(members | changes))  # type: ignore[arg-type]


def test_a_batch_is_counted_with_its_size_its_times_and_every_wait() -> None:
    """One batch gives one size, one time of sealing and of the TPM, and as many waits as it had members."""
    metrics, counts = Metrics("host-agent"), Counts()
    HostFigures(metrics, counts, counts, lambda: 0).batch(report())
    found = figures(metrics)
    assert found.value("harness_batches_total", outcome="quoted") == 1
    assert found.value("harness_batch_size_sum") == 3
    assert found.value("harness_batch_size_bucket", le="2") == 0
    assert found.value("harness_batch_size_bucket", le="5") == 1
    assert found.value("harness_batch_sealing_seconds_sum") == 0.002
    assert found.value("harness_tpm_quote_seconds_sum") == 0.19
    assert found.value("harness_batch_wait_seconds_count") == 3
    assert found.value("harness_batch_wait_seconds_bucket", le="0.2") == 1


def test_a_batch_that_failed_is_counted_under_its_error() -> None:
    """The outcome is the error's name; the TPM's time was spent all the same."""
    metrics, counts = Metrics("host-agent"), Counts()
    HostFigures(metrics, counts, counts, lambda: 0).batch(report(outcome="DeviceFault", tpm_quotes=0, waits_s=()))
    found = figures(metrics)
    assert found.value("harness_batches_total", outcome="DeviceFault") == 1
    assert found.value("harness_batches_total", outcome="quoted") == 0
    assert found.value("harness_tpm_quote_seconds_count") == 1


def test_a_batch_of_nobody_has_neither_size_nor_time() -> None:
    """When all members have left before the sealing, only the batch is counted."""
    metrics, counts = Metrics("host-agent"), Counts()
    HostFigures(metrics, counts, counts, lambda: 0).batch(report(outcome="nobody left", requests=0, waits_s=()))
    found = figures(metrics)
    assert found.value("harness_batches_total", outcome="nobody_left") == 1
    assert found.value("harness_batch_size_count") == found.value("harness_tpm_quote_seconds_count") == 0


def test_states_and_the_counts_of_the_tpm_are_read_when_asked() -> None:
    """Waiting requests, pools, streams, quotes, races and busy answers are what they are at that moment."""
    metrics, counts = Metrics("host-agent"), Counts()
    HostFigures(metrics, counts, counts, lambda: 2)
    counts.waiting, counts.open_pools = 7, 3
    counts.quotes_made, counts.races, counts.asked_again = 11, 2, 5
    found = figures(metrics)
    assert found.value("harness_waiting_requests") == 7
    assert found.value("harness_pools_open") == 3
    assert found.value("harness_streams_open") == 2
    assert found.value("harness_tpm_quotes_total") == 11
    assert found.value("harness_tpm_races_total") == 2
    assert found.value("harness_tpm_busy_total") == 5


def test_tenants_that_wait_are_shown_and_no_others() -> None:
    """A tenant has a series while it waits, so that whoever fills the pools can be seen."""
    metrics, counts = Metrics("host-agent"), Counts()
    HostFigures(metrics, counts, counts, lambda: 0)
    counts.waiting_by_tenant = {"alice": 4}
    assert figures(metrics).value("harness_tenant_waiting_requests", tenant="alice") == 4
    counts.waiting_by_tenant = {}
    assert figures(metrics).labels("harness_tenant_waiting_requests") == []


async def test_the_batcher_drives_them() -> None:
    """Requests that wait, their pools and tenants, and the batches that answer them or fail."""
    metrics, quoter = Metrics("host-agent"), FakeQuoter(SoftTpm(), held=True)
    quoter.faults_after[2] = DeviceFault("no", response_code=0x101)
    told: list[BatchReport] = []
    batcher = Batcher(quoter, FakeResidency(), BatchSettings(), surroundings=Surroundings(observe=told.append))
    shown = HostFigures(metrics, batcher, Counts(), lambda: 0)
    owner = asyncio.create_task(batcher.run())
    asking = [asyncio.create_task(batcher.submit(a_request(tenant))) for tenant in ("alice", "bob", "bob")]
    await quoter.arrival(1)
    asking.append(asyncio.create_task(batcher.submit(a_request("bob"))))
    await settle()
    found = figures(metrics)
    assert found.value("harness_waiting_requests") == 4
    assert found.value("harness_pools_open") == 1
    assert found.value("harness_tenant_waiting_requests", tenant="bob") == 3
    quoter.let_go()
    async with asyncio.timeout(TIME_S):
        answers = await asyncio.gather(*asking, return_exceptions=True)
    await settle()
    for each in told:
        shown.batch(each)
    found = figures(metrics)
    assert [isinstance(answer, BaseException) for answer in answers] == [False, False, False, True]
    assert found.value("harness_batches_total", outcome="quoted") == 1
    assert found.value("harness_batches_total", outcome="DeviceFault") == 1
    assert found.value("harness_batch_size_sum") == 4
    assert found.value("harness_waiting_requests") == found.value("harness_pools_open") == 0
    batcher.stop()
    async with asyncio.timeout(TIME_S):
        await owner
