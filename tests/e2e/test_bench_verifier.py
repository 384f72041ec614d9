"""``bench verifier`` from end to end, with a few guests: rounds of both layers are made, and their cost is counted."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import bench_verifier
from harness.bench import BenchOptions
from harness.bench_tenant import VerifierSite
from harness.errors import SimulationError
from harness.events import read_events
from tests.support.tpms import short_folder


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short name."""
    with short_folder() as made:
        yield made


def test_a_quick_run_gives_every_row() -> None:
    """A target for the cost of a round, and what it was measured under beside it."""
    result = bench_verifier.run(BenchOptions(quick=True, repetitions=2))
    target, rate, few = (each.row for each in result.measured)
    assert (target.unit, target.target) == ("ms", "<= 2 ms")
    assert target.ok is not None
    assert target.value > 0
    assert rate.value > 0
    assert (rate.ok, few.ok) == (None, None)
    assert (target.name.split(", ")[-1], few.name.split(", ")[-1]) == ("4 guests", "2 guests")


async def test_the_rounds_are_rounds_of_both_layers(folder: Path) -> None:
    """Each accepted round went through the guest's quote and the host's; nothing else happened to a session."""
    async with VerifierSite(folder / "s", guests=3, interval_s=0.3, batch_s=0.02) as site:
        cost = await site.cost(1.5)
        assert cost.rounds >= 3
        assert cost.cpu_s > 0
    states = [event for event in read_events(folder / "s" / "verifier.log") if event["event"] == "state"]
    causes = {str(event["cause"]) for event in states}
    assert causes <= {"BEGIN", "GUEST_ACCEPTED", "ROUND_ACCEPTED", "SUSPEND"}
    assert {"GUEST_ACCEPTED", "ROUND_ACCEPTED"} <= causes


async def test_nothing_is_measured_once_a_guest_is_not_attested(folder: Path) -> None:
    """The peers are gone: the window is no measurement, and says so."""
    async with VerifierSite(folder / "s", guests=2, interval_s=0.3, batch_s=0.02) as site:
        await site.end_peers()
        async with asyncio.timeout(60):
            with pytest.raises(SimulationError, match="attested"):
                await _measured_for_ever(site)


async def _measured_for_ever(site: VerifierSite) -> None:
    while True:
        await site.cost(0.3)
