"""Memory of a waiting request, and what a request costs as more of them wait.

Invariants:
    1. Memory is read while every request waits and nothing else happens.

Spec: docs/performance.md, method.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import yaml

from harness.bench import Result, Sample, Series, at_most, reported
from harness.bench_context import Bench
from harness.bench_orders import Burst, Order
from harness.bench_process import CpuWatch, cpu_s, memory_bytes
from harness.bench_run import BareServer, Loader
from harness.errors import SimulationError
from harness.sim.profiles import load_profile

MEMORY_LIMIT = 2.0
WAITERS = 10_000
_BARE_SHARE = 4
"""The bare handler is given a fourth of the connections: what each of them takes does not depend on their number."""
_KIB = 1024.0
_US = 1e6
_QUIET_S = 0.3
_SETTLE_S = 60.0
_BEGUN_S = 1.0
"""What little work there is has begun by then, though the kernel's clock ticks may not show it."""
_LOOK_S = 0.05
_GROWTH = {1: 10, 10: 8, 100: 4, 1_000: 2}
"""Waiters, and bursts of so many in one repetition."""


def slow_chip(chip: str, folder: Path, busy_s: float) -> Path:
    """Profile of a chip that takes this long for a quote, so that requests pile up; its file is in the folder."""
    profile = load_profile(chip).model_dump(mode="json", exclude_none=False)
    quantiles = {"p50": 1000 * busy_s, "p95": 1000 * busy_s, "p99": 1000 * busy_s}
    profile |= {"name": "slow", "private_key": {**profile["private_key"], "rsa2048": quantiles}}
    path = folder / "slow.yml"
    path.write_text(yaml.safe_dump(profile), encoding="utf-8")
    return path


def steps(bench: Bench) -> list[int]:
    """Waiters that come in each step; together they are all that are ever waiting."""
    count = bench.options.repetitions
    return [(10 if bench.options.quick else WAITERS) // count] * count


class Growth:
    """Memory of some processes as connections are opened, and as requests wait on them.

    Args:
        pids: whose memory it is.
        orders: one for each step.
    """

    def __init__(self, pids: Mapping[str, int], orders: Sequence[Order]) -> None:
        self._pids = pids
        self._orders = orders
        self.idle: list[float] = []
        """Bytes for each connection of a step, before it asked anything."""
        self.waiting: list[float] = []
        """Bytes more for each of its requests, once all of them wait."""

    async def open(self, stack: AsyncExitStack) -> list[Loader]:
        """Opens the connections, step by step; they are closed with the stack.

        Raises:
            SimulationError: a process has ended, or never came to rest.
        """
        loaders = []
        before = await self._at_rest()
        for order in self._orders:
            loaders.append(await stack.enter_async_context(Loader(order)))
            after = await self._at_rest()
            self.idle.append((after - before) / _connections(order))
            before = after
        return loaders

    async def ask(self, loaders: Sequence[Loader]) -> None:
        """Lets them ask, step by step; what waits goes on waiting.

        Raises:
            SimulationError: a process has ended, or never came to rest.
        """
        before = float(sum(memory_bytes(pid) for pid in self._pids.values()))
        for loader, order in zip(loaders, self._orders, strict=True):
            used = cpu_s_of(self._pids)
            loader.go()
            after = await self._at_rest(after=used)
            self.waiting.append((after - before) / _connections(order))
            before = after

    async def _at_rest(self, *, after: float | None = None) -> float:
        """Memory once the processes have nothing to do, or almost; ``after``: they must have begun to do something."""
        asked_s = time.monotonic()
        used = cpu_s_of(self._pids)
        while (passed_s := time.monotonic() - asked_s) < _SETTLE_S:
            await asyncio.sleep(_QUIET_S)
            now = cpu_s_of(self._pids)
            if now - used < _QUIET_S / 10 and (after is None or now > after or passed_s > _BEGUN_S):
                return float(sum(memory_bytes(pid) for pid in self._pids.values()))
            used = now
        raise SimulationError(f"the services did not come to rest within {_SETTLE_S:g} s")


def _connections(order: Order) -> int:
    return sum(load.connections for load in order.loads)


def cpu_s_of(pids: Mapping[str, int]) -> float:
    """Seconds of CPU of all of them."""
    return sum(cpu_s(pid) for pid in pids.values())


async def memory(bench: Bench, result: Result, body_bytes: int) -> tuple[int, Sample]:
    """Memory of 10,000 waiting requests beside that of a bare handler; the site's chip is slow (`slow_chip`).

    Returns:
        How many waited in the end, and microseconds of CPU that each of them cost.

    Raises:
        SimulationError: a load could not be made, or an answer was not acceptable.

    *Cancellation:* the site is left as it is.
    """
    counts = steps(bench)
    bench.options.say(f"memory of {sum(counts):,} waiting requests")
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(Loader(bench.order(_burst(bench, 1))))
        ours = Growth(bench.site.pids, [bench.order(_burst(bench, count)) for count in counts])
        loaders = await ours.open(stack)
        used = cpu_s_of(bench.site.pids)
        first.go()  # its batch is with the TPM while the others come
        await ours.ask(loaders)
        for loader in loaders:
            await loader.done()
        cost = (cpu_s_of(bench.site.pids) - used) / sum(counts)
        outcomes = [(await loader.results()).outcomes[0] for loader in loaders]
    refused = [why for outcome in outcomes for why in outcome.refused]
    if refused:
        raise SimulationError(f"of {sum(counts):,} waiting requests some were not answered: {', '.join(set(refused))}")
    fewer = [max(2, count // _BARE_SHARE) for count in counts]
    bare = await _bare(bench, fewer, body_bytes, tls=True)
    plain = await _bare(bench, fewer, body_bytes, tls=False)
    memory_rows(result, sum(counts), ours, bare, plain)
    return sum(counts), Sample.of([cost * _US])


def _burst(bench: Bench, count: int) -> Burst:
    return Burst(connections=count, rounds=1, tenants=bench.tenants)


async def _bare(bench: Bench, counts: Sequence[int], body_bytes: int, *, tls: bool) -> Growth:
    bench.options.say(f"the same on a bare aiohttp handler {'with' if tls else 'without'} TLS")
    settings = bench.site.bare_tls() if tls else None
    async with (
        BareServer(bench.folder, body_bytes=body_bytes, tls=settings) as server,
        AsyncExitStack() as stack,
    ):
        orders = [bench.bare_order(server.port, "/wait", _burst(bench, count), tls=tls) for count in counts]
        grown = Growth({"bare": server.pid}, orders)
        loaders = await grown.open(stack)
        await grown.ask(loaders)
        server.release()
        for loader in loaders:
            await loader.done()
    return grown


def memory_rows(result: Result, waiters: int, ours: Growth, bare: Growth, plain: Growth) -> None:
    """Rows on memory.

    Args:
        result: to add to.
        waiters: how many waited on the services.
        ours: the services.
        bare: the yardstick with TLS.
        plain: the yardstick without.
    """
    tls = Sample.of(bare.idle).median - Sample.of(plain.idle).median
    name = f"memory per waiting request at {waiters:,} waiters"
    if Sample.of(ours.idle).median >= tls:
        mine, theirs = _whole(ours, tls), _whole(bare, tls)
        of = "waiting request in a bare aiohttp handler"
        row = f"{name}, without TLS buffers"
        result.add(at_most(row, mine, unit="KiB", limit=MEMORY_LIMIT, baseline=theirs, of=of))
    else:  # another TLS layer: what its buffers take is not known from the bare handler
        result.method.append("TLS of the services is not that of the bare handler: no figure without its buffers")
    result.add(
        reported(f"{name}, TLS buffers included", _whole(ours), unit="KiB", baseline=_whole(bare), expected="bare"),
        reported("TLS buffers of a connection", Sample.of([tls / _KIB]), unit="KiB"),
        reported("idle connection", _kib(ours.idle), unit="KiB", baseline=_kib(bare.idle), expected="bare"),
        reported(
            "waiting request on an open connection",
            _kib(ours.waiting),
            unit="KiB",
            baseline=_kib(bare.waiting),
            expected="bare",
        ),
    )


def _whole(grown: Growth, tls: float = 0.0) -> Sample:
    """KiB of a connection with its waiting request, step by step; without TLS buffers where their size is given."""
    return _kib([idle + waiting - tls for idle, waiting in zip(grown.idle, grown.waiting, strict=True)])


def _kib(sizes: Sequence[float]) -> Sample:
    return Sample.of(sizes).scaled(1 / _KIB)


async def growth(bench: Bench) -> list[tuple[int, Sample]]:
    """Microseconds of CPU of a request in bursts of 1 to 1,000, on the site with the real chip's time.

    Raises:
        SimulationError: a load could not be made, or an answer was not acceptable.

    *Cancellation:* the site is left as it is.
    """
    found = []
    for waiters, rounds in ({1: 1, 4: 1} if bench.options.quick else _GROWTH).items():
        bench.options.say(f"cost of a request among {waiters:,}")
        count = bench.options.repetitions
        burst = Burst(connections=waiters, rounds=rounds * count, tenants=bench.tenants)
        async with CpuWatch(bench.site.pids, every_s=_LOOK_S) as watch, Loader(bench.order(burst)) as loader:
            loader.go()
            await loader.done()
            outcome = (await loader.results()).outcomes[0]
        edges = [*outcome.scheduled_s[:: waiters * rounds], outcome.end_s]
        costs = [watch.between(*edge) * _US / (waiters * rounds) for edge in itertools.pairwise(edges)]
        found.append((waiters, Sample.of(costs)))
    return found


def growth_rows(result: Result, found: Sequence[tuple[int, Sample]]) -> None:
    """Row and plot of the cost per request from 1 waiter to the most that were measured.

    Args:
        result: to add to.
        found: waiters and cost, ascending.
    """
    named = dict(found)
    most, small = max(named), 100 if 100 in named else min(named)
    limit = math.log2(max(2, most)) / math.log2(max(2, small))
    result.add(
        at_most(
            f"CPU per request at {most:,} waiters, against {small:,}",
            named[most],
            unit="us",
            limit=round(limit, 2),
            baseline=named[small],
            of=f"cost at {small:,} (log n)",
        )
    )
    through = [
        (waiters, math.log2(max(2, waiters)) / math.log2(max(2, small))) for waiters in named if waiters >= small
    ]
    result.series["growth"] = Series(
        title="CPU per request, provider verifier + host agent",
        x="requests that wait together",
        y="CPU per request, us",
        lines={
            "measured": [(waiters, round(cost.median, 1)) for waiters, cost in found],
            f"log n through {small:,}": [
                (waiters, round(named[small].median * factor, 1)) for waiters, factor in through
            ],
        },
        log_x=True,
    )
