"""Open loop: response times against L, what one quote serves, and what a request costs beside a bare handler.

Spec: docs/performance.md, method.
"""

from __future__ import annotations

from dataclasses import dataclass

from harness.bench import Result, Sample, Series, at_least, at_most, reported
from harness.bench_context import MS, Bench, answered, busy_s, ended, quantile, sample_of, windows
from harness.bench_orders import Burst, Outcome, Poisson, Results
from harness.bench_process import CpuWatch
from harness.bench_run import BareServer, run_load
from harness.errors import SimulationError

P50_LIMIT, P99_LIMIT = 1.6, 2.15
REQUESTS_PER_QUOTE = 180
CPU_LIMIT = 3.0
_CURVE = 200
_US = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenLoop:
    """What an open loop consists of: requests a second, connections, and seconds until it has settled."""

    rate: float
    connections: int
    settle_s: float
    seconds: float
    single_s: float
    bare_s: float

    @classmethod
    def of(cls, bench: Bench) -> OpenLoop:
        """The load of the table, or a tiny one."""
        if bench.options.quick:
            return cls(rate=60, connections=40, settle_s=0.5, seconds=2.0, single_s=1.5, bare_s=1.0)
        return cls(rate=1000, connections=900, settle_s=3.0, seconds=bench.options.seconds, single_s=15.0, bare_s=15.0)

    def poisson(self, bench: Bench, seconds: float) -> Poisson:
        """As an order."""
        return Poisson(
            rate=self.rate, seconds=self.settle_s + seconds, connections=self.connections, tenants=bench.tenants
        )


async def busy_alone(bench: Bench) -> Sample:
    """L with one request at a time, before any load. Raises SimulationError."""
    rounds = 2 if bench.options.quick else 12
    outcome = (await bench.load(Burst(connections=1, rounds=rounds, tenants=[0]))).outcomes[0]
    batches = await bench.batches(outcome.begin_s, outcome.end_s + 1.0)
    return Sample.of([batch.quote_s for batch in batches])


async def measure(bench: Bench, result: Result) -> tuple[int, Outcome]:
    """Open loop with batches: times, quotes, CPU; then the bare handler.

    Returns:
        The size of an answer in bytes, and what came of the open loop.

    Raises:
        SimulationError: a load could not be made, or an answer was not acceptable.

    *Cancellation:* the site is left as it is.
    """
    shape = OpenLoop.of(bench)
    bench.options.say(f"L alone, then {shape.rate:g} requests/s for {shape.seconds:g} s")
    alone = await busy_alone(bench)
    async with CpuWatch(bench.site.pids) as watch:
        results = await bench.load(shape.poisson(bench, shape.seconds))
    outcome = results.outcomes[0]
    cuts = windows(outcome, settled_s=shape.settle_s, count=max(6, bench.options.repetitions))
    await _times(bench, result, outcome, cuts, alone)
    cost = sample_of(
        [_US * watch.between(*cut) / max(1, ended(outcome, *cut)) for cut in cuts if ended(outcome, *cut)], "CPU time"
    )
    bench.options.say("the same load on a bare aiohttp handler")
    bare = await _bare_cost(bench, shape, results.body_bytes)
    name = "CPU per request, provider verifier + host agent"
    result.add(at_most(name, cost, unit="us", limit=CPU_LIMIT, baseline=bare, of="bare aiohttp mTLS handler"))
    result.add(reported("CPU per request, load generator", Sample.of([_client_us(results)]), unit="us"))
    result.method.append(
        f"answers verified after the load, as a tenant does: {results.verified} of {len(outcome.status)}, all accepted"
    )
    return results.body_bytes, outcome


async def _times(
    bench: Bench, result: Result, outcome: Outcome, cuts: list[tuple[float, float]], alone: Sample
) -> None:
    busy, quotes, requests = [], [], []
    for begin, end in cuts:
        batches = await bench.batches(begin, end)
        busy.append(busy_s(batches))
        if len(batches) > 1:
            between_s = (batches[-1].at_s - batches[0].at_s) / sum(batch.tpm_quotes for batch in batches[1:])
            quotes.append(busy[-1] / between_s)
        requests.append(sum(batch.requests for batch in batches) / sum(batch.tpm_quotes for batch in batches))
    latencies = [times for cut in cuts if (times := answered(outcome, *cut))]
    loaded = Sample.of(busy).scaled(MS)
    p50 = sample_of([MS * quantile(times, 0.50) for times in latencies], "response times")
    p99 = sample_of([MS * quantile(times, 0.99) for times in latencies], "response times")
    rate = f"Poisson {OpenLoop.of(bench).rate:,.0f}/s"
    failed = float(sum(status != 200 for status in outcome.status))
    least = 1 if bench.options.quick else REQUESTS_PER_QUOTE
    result.add(
        reported("L alone", alone.scaled(MS), unit="ms"),
        reported(f"L under {rate}", loaded, unit="ms", baseline=alone.scaled(MS), expected="L alone"),
        at_most(f"{rate}: response time p50", p50, unit="ms", limit=P50_LIMIT, baseline=loaded, of="L"),
        at_most(f"{rate}: response time p99", p99, unit="ms", limit=P99_LIMIT, baseline=loaded, of="L"),
        at_most(f"{rate}: requests without an answer", Sample.of([failed]), unit="requests", limit=0),
        at_most(f"{rate}: TPM quotes per L", sample_of(quotes, "quotes"), unit="quotes", limit=1),
        at_least(f"{rate}: requests per quote", Sample.of(requests), unit="requests", limit=least),
    )
    whole = [time for times in latencies for time in times]
    for share in (0.5, 0.99, 0.999, 1.0):
        name = "longest response time" if share == 1 else f"response time p{100 * share:g}"
        worst = Sample.of([MS * quantile(whole, share)])
        text = f"{rate}: {name}, whole run, by L alone"
        result.add(reported(text, worst, unit="ms", baseline=alone.scaled(MS), expected="L alone"))
    result.series["response-times"] = Series(
        title=f"Response time, {rate}",
        x="response time / L",
        y="share of requests",
        lines={
            "measured": _distribution([time * MS / loaded.median for time in whole]),
            "bound (uniform from 1 L to 2 L)": [(0.0, 0.0), (1.0, 0.0), (2.0, 1.0), (3.0, 1.0)],
        },
    )


def _distribution(values: list[float]) -> list[tuple[float, float]]:
    shares = [place / _CURVE for place in range(1, _CURVE + 1)]
    return [(round(quantile(values, share), 4), share) for share in shares]


async def _bare_cost(bench: Bench, shape: OpenLoop, body_bytes: int) -> Sample:
    load = shape.poisson(bench, shape.bare_s)
    async with (
        BareServer(bench.folder, body_bytes=body_bytes, tls=bench.site.bare_tls()) as server,
        CpuWatch({"bare": server.pid}) as watch,
    ):
        results = await run_load(bench.bare_order(server.port, "/fixed", load))
    outcome = results.outcomes[0]
    cuts = windows(outcome, settled_s=shape.settle_s, count=bench.options.repetitions)
    if any(status != 200 for status in outcome.status):
        raise SimulationError("the bare handler did not answer every request")
    return Sample.of([max(1.0, _US * watch.between(*cut) / max(1, ended(outcome, *cut))) for cut in cuts])


async def single(bench: Bench, result: Result, batched: Outcome) -> None:
    """The same load where every request has a quote of its own: most are refused, and the rest wait.

    Args:
        bench: with strategy single.
        result: to add to.
        batched: what came of the load with batches.

    Raises:
        SimulationError: the load could not be made, or an answer was not acceptable.

    *Cancellation:* the site is left as it is.
    """
    shape = OpenLoop.of(bench)
    bench.options.say(f"{shape.rate:g} requests/s with strategy single")
    load = shape.poisson(bench, shape.single_s)
    outcome = (await bench.load(load, drain_s=1.0)).outcomes[0]
    cut = (outcome.begin_s + shape.settle_s, outcome.begin_s + shape.settle_s + shape.single_s)
    alone = Sample.of([max(1, ended(outcome, *cut)) / (cut[1] - cut[0])])
    span = (batched.begin_s + shape.settle_s, max(batched.scheduled_s))
    rate = Sample.of([ended(batched, *span) / (span[1] - span[0])])
    name = f"Poisson {shape.rate:,.0f}/s: answers per second"
    result.add(
        reported(f"{name}, strategy single", alone, unit="answers/s"),
        reported(f"{name}, strategy batched", rate, unit="answers/s", baseline=alone, expected="single"),
    )
    refused = ", ".join(f"{count:,} {why}" for why, count in sorted(outcome.refused.items()))
    result.method.append(
        f"strategy single under the same load, {len(outcome.status):,} requests: {refused or 'none refused'}"
    )


def _client_us(results: Results) -> float:
    return _US * results.client_cpu_s / max(1, len(results.outcomes[0].status))
