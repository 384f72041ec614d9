"""Closed loop: throughput of N clients against N / (2 L); and a tenant that floods beside others that do not.

Spec: docs/performance.md, method.
"""

from __future__ import annotations

import itertools

from harness.bench import Result, Sample, at_least, at_most, reported
from harness.bench_context import MS, Bench, answered, busy_s, ended, quantile, sample_of
from harness.bench_orders import Closed, Outcome, Poisson
from harness.bench_process import forget_peak, memory_bytes, peak_bytes

SHARES = {256: 0.95, 512: 0.8, 1000: 0.6}
"""Least share of N / (2 L) for N clients."""
FLOOD_LIMIT = 2.5
TYPED = frozenset({"ShareExhausted", "PoolFull", "WouldBeLate", "TooManyConnections"})
"""What a request of a flood may be refused with."""
_MIB = 1 << 20


async def measure(bench: Bench, result: Result) -> tuple[int, float]:
    """Throughput for each number of clients.

    Returns:
        The smallest number of clients, and their throughput in requests a second.

    Raises:
        SimulationError: a load could not be made, or an answer was not acceptable.

    *Cancellation:* the site is left as it is.
    """
    quick = bench.options.quick
    points = []
    for clients, share in ({8: 0.1} if quick else SHARES).items():
        bench.options.say(f"closed loop, {clients} clients")
        settle_s, seconds = (0.5, 2.0) if quick else (3.0, 15.0)
        load = Closed(connections=clients, seconds=settle_s + seconds, tenants=bench.tenants)
        outcome = (await bench.load(load)).outcomes[0]
        rates, bounds = await _rates(bench, outcome, clients, settle_s, seconds)
        name = f"closed loop, {clients:,} clients: throughput"
        result.add(at_least(name, rates, unit="requests/s", limit=share, baseline=bounds, of="N / (2 L)"))
        points.append((clients, rates.median))
    return points[0]


async def _rates(
    bench: Bench, outcome: Outcome, clients: int, settle_s: float, seconds: float
) -> tuple[Sample, Sample]:
    """Throughput and its bound, in parts that begin and end with a batch: answers come in batches."""
    begin = outcome.begin_s + settle_s
    batches = await bench.batches(begin, begin + seconds)
    count = min(bench.options.repetitions, len(batches) - 1)
    edges = [batches[place * (len(batches) - 1) // count].at_s for place in range(count + 1)] if count > 0 else []
    rates, bounds = [], []
    for first, last in itertools.pairwise(edges):
        inside = [batch for batch in batches if first < batch.at_s <= last]
        rates.append(sum(batch.requests for batch in inside) / (last - first))
        bounds.append(clients / (2 * busy_s(inside)))
    return sample_of(rates, "throughput"), sample_of(bounds, "throughput")


async def single(bench: Bench, result: Result, batched: tuple[int, float]) -> None:
    """The same clients where every request has a quote of its own.

    Args:
        bench: with strategy single.
        result: to add to.
        batched: number of clients, and their throughput with batches.

    Raises:
        SimulationError: the load could not be made, or an answer was not acceptable.

    *Cancellation:* the site is left as it is.
    """
    clients, rate = batched
    bench.options.say(f"closed loop, {clients} clients, strategy single")
    seconds = 2.0 if bench.options.quick else 10.0
    load = Closed(connections=clients, seconds=seconds, tenants=bench.tenants)
    outcome = (await bench.load(load, drain_s=0.5)).outcomes[0]
    alone = Sample.of([max(1, ended(outcome, outcome.begin_s, outcome.begin_s + seconds)) / seconds])
    name = f"closed loop, {clients:,} clients: throughput"
    result.add(
        reported(f"{name}, strategy single", alone, unit="requests/s"),
        reported(f"{name}, batched", Sample.of([rate]), unit="requests/s", baseline=alone, expected="single"),
    )


async def flood(bench: Bench, result: Result) -> None:
    """One tenant sends 10,000 requests as fast as it is answered or refused; the others go on as before.

    Raises:
        SimulationError: a load could not be made, or an answer was not acceptable.

    *Cancellation:* the site is left as it is.
    """
    quick = bench.options.quick
    requests, connections, seconds, rate = (100, 20, 1.5, 40.0) if quick else (10_000, 1_088, 7.0, 200.0)
    others = [tenant for tenant in bench.tenants if tenant != 0]
    p99, busy, peaks, grown, untyped, lost = [], [], [], [], [], []
    refused: dict[str, int] = {}
    for number in range(bench.options.repetitions):
        bench.options.say(f"flood {number + 1} of {bench.options.repetitions}: {requests} requests of one tenant")
        before = {name: memory_bytes(pid) for name, pid in bench.site.pids.items()}
        for pid in bench.site.pids.values():
            forget_peak(pid)
        calm = Poisson(rate=rate, seconds=seconds, connections=50 if quick else 300, tenants=others)
        wild = Closed(connections=connections, requests=requests, tenants=[0], after_s=seconds / 8)
        quiet, flooding = (await bench.load(calm, wild)).outcomes
        span = (flooding.begin_s, min(flooding.end_s, max(quiet.scheduled_s)))
        p99.append(MS * quantile(answered(quiet, *span) or answered(quiet, quiet.begin_s, quiet.end_s), 0.99))
        busy.append(MS * busy_s(await bench.batches(quiet.begin_s, quiet.end_s + 1.0)))
        peaks.append(sum(peak_bytes(pid) for pid in bench.site.pids.values()) / _MIB)
        grown.append(peaks[-1] - sum(before.values()) / _MIB)
        untyped.append(float(sum(count for why, count in flooding.refused.items() if why not in TYPED)))
        lost.append(float(sum(quiet.refused.values())))
        for why, count in flooding.refused.items():
            refused[why] = refused.get(why, 0) + count
    name = f"flood of {requests:,} requests by one tenant"
    result.add(
        at_most(
            f"{name}: the others' p99", Sample.of(p99), unit="ms", limit=FLOOD_LIMIT, baseline=Sample.of(busy), of="L"
        ),
        at_most(f"{name}: the others' requests without an answer", Sample.of(lost), unit="requests", limit=0),
        at_most(f"{name}: its own without answer or typed refusal", Sample.of(untyped), unit="requests", limit=0),
        reported(f"{name}: peak of memory, provider verifier + host agent", Sample.of(peaks), unit="MiB"),
        reported(f"{name}: growth of memory to that peak", Sample.of(grown), unit="MiB"),
    )
    said = ", ".join(f"{count:,} {why}" for why, count in sorted(refused.items()))
    result.method.append(
        f"{bench.options.repetitions} floods over {connections:,} connections, each asking again as soon as it was "
        f"answered or refused; the others: Poisson {rate:g}/s; refusals in all floods: {said or 'none'}"
    )
