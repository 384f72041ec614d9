"""How figures are made of what was measured: quantiles, windows, CPU between two moments, profiles."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from harness.bench import Result
from harness.bench_context import answered, ended, quantile, sample_of, windows
from harness.bench_machine import busy_share
from harness.bench_memory import Growth, memory_rows, slow_chip
from harness.bench_orders import Outcome
from harness.bench_process import CpuWatch, cpu_s, memory_bytes, peak_bytes
from harness.bench_profile import by_function, by_library
from harness.errors import SimulationError
from harness.sim.profiles import load_profile

NOBODY = 2**22 + 1
"""A process id above what Linux gives."""


def an_outcome() -> Outcome:
    """Requests due at 10, 11, ... 19 s; each took half a second, the fourth was refused, the last not answered."""
    return Outcome(
        begin_s=10.0,
        end_s=20.0,
        scheduled_s=[10.0 + number for number in range(10)],
        latency_s=[0.5] * 9 + [-1.0],
        status=[200, 200, 200, 503, 200, 200, 200, 200, 200, -1],
        refused={"PoolFull": 1, "not answered": 1},
        connected=1,
    )


@pytest.mark.parametrize(("share", "value"), [(0.5, 2.0), (0.75, 3.0), (0.76, 4.0), (1.0, 4.0), (0.01, 1.0)])
def test_a_quantile_is_a_value_that_was_measured(share: float, value: float) -> None:
    """The smallest one that this share does not exceed; the order of the values does not matter."""
    assert quantile([4.0, 1.0, 3.0, 2.0], share) == value


def test_windows_cut_what_has_settled_into_equal_parts() -> None:
    """From the settled begin to the last request that was due."""
    assert windows(an_outcome(), settled_s=1.0, count=2) == [(11.0, 15.0), (15.0, 19.0)]


def test_only_answers_count_in_a_window() -> None:
    """A refusal and what was never answered have no response time, and are no throughput."""
    assert answered(an_outcome(), 10.0, 14.0) == [0.5, 0.5, 0.5]
    assert ended(an_outcome(), 10.5, 20.0) == 8
    assert ended(an_outcome(), 10.6, 20.0) == 7


def test_nothing_measured_is_said_with_what_is_missing() -> None:
    """A figure is never made of no value."""
    with pytest.raises(SimulationError, match="nothing was measured of quotes"):
        sample_of([], "quotes")


def test_the_kernel_counts_this_process() -> None:
    """CPU time does not fall, memory is not above its peak."""
    first = cpu_s(os.getpid())
    sum(number * number for number in range(10**6))
    assert cpu_s(os.getpid()) >= first
    assert 0 < memory_bytes(os.getpid()) <= peak_bytes(os.getpid())


@pytest.mark.parametrize("ask", [cpu_s, memory_bytes, peak_bytes])
def test_a_process_that_is_gone_is_an_error(ask: object) -> None:
    """A service that ended is noticed, and has no figure."""
    assert callable(ask)
    with pytest.raises(SimulationError, match="is gone"):
        ask(NOBODY)


def test_what_the_machine_does_besides_is_a_share() -> None:
    """Of all cores: never below nothing or above everything."""
    assert 0.0 <= busy_share(0.05) <= 1.0


def test_cpu_between_two_moments_is_interpolated() -> None:
    """Between two looks it grows evenly; before the first and after the last it stands still."""
    watch = CpuWatch({}, _seen=[(0.0, 1.0), (10.0, 3.0), (20.0, 3.0)])
    assert watch.between(0.0, 10.0) == 2.0
    assert watch.between(2.5, 5.0) == pytest.approx(0.5)
    assert watch.between(10.0, 20.0) == 0.0
    assert watch.between(-5.0, 100.0) == 2.0


def test_a_profile_names_functions_without_folders_of_this_machine() -> None:
    """Shares of samples in the function itself, the largest first; lines that are none are left out."""
    raw = (
        "run (/a/lib/python3.11/asyncio/runners.py:118);seal (/home/x/harness/harness/provider/batch.py:9) 3\n"
        "run (/a/lib/python3.11/asyncio/runners.py:118);select (/a/lib/python3.11/selectors.py:4) 1\n"
        "run (/a/x.py:1);feed (/a/lib/python3.11/site-packages/aiohttp/http.py:7) 4\n"
        "broken\n"
    )
    assert by_function(raw) == [
        ("feed (aiohttp/http.py)", 0.5),
        ("seal (harness/provider/batch.py)", 0.375),
        ("select (selectors.py)", 0.125),
    ]
    assert by_library(raw) == [("aiohttp", 0.5), ("harness", 0.375), ("selectors", 0.125)]


def test_a_slow_chip_is_slow_in_its_quotes_only(tmp_path: Path) -> None:
    """The profile that lets requests pile up is the chip's own but for the key that quotes."""
    slow = load_profile(slow_chip("ifx-slb9670", tmp_path, 3.0))
    usual = load_profile("ifx-slb9670")
    changed = {kind for kind in usual.private_key if slow.private_key[kind] != usual.private_key[kind]}
    assert {kind.value for kind in changed} == {"rsa2048"}
    assert slow.commands == usual.commands
    quick = next(iter(changed))
    assert slow.latency(None, quick).p50 == 3000  # type: ignore[union-attr]


@pytest.mark.parametrize(("idle", "shown"), [(300, True), (40, False)])
def test_tls_buffers_are_taken_off_only_where_they_can_be_in_it(idle: int, shown: bool) -> None:
    """A service whose connections are smaller than the yardstick's TLS buffers has other ones: no row is made up."""
    ours, bare, plain = (Growth({}, []) for _ in range(3))
    for grown, size in ((ours, idle), (bare, 290), (plain, 6)):
        grown.idle, grown.waiting = [1024.0 * size] * 5, [10_240.0] * 5
    result = Result(benchmark="b")
    memory_rows(result, 10, ours, bare, plain)
    rows = {each.row.name: each.row for each in result.measured}
    name = "memory per waiting request at 10 waiters, without TLS buffers"
    assert (name in rows) is shown
    assert not shown or (rows[name].value, rows[name].baseline) == (26.0, 16.0)
    assert rows["TLS buffers of a connection"].value == 284.0
