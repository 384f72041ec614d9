"""``harness bench batching``: one slow TPM under the load of many tenants, beside its physical bound.

A request that comes while the TPM works waits for the batch in work and for its own: with TPM time L at most 2 L, and
1.5 L on average, whatever the load. Real services, real sockets, mutual TLS; the TPM is a swtpm behind the command
proxy, with the latency of a real chip.

Invariants:
    1. Bound and yardstick are measured in the same run as what is compared with them.

Spec: DESIGN 4; docs/performance.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from harness import bench_closed, bench_memory, bench_poisson
from harness.bench import BenchOptions, Result
from harness.bench_context import Bench
from harness.bench_profile import profile_of
from harness.bench_site import BenchSite
from harness.config import BatchSettings
from harness.errors import ConfigError, HarnessError
from harness.sim.profiles import load_profile

MOST_TENANTS = 1_000
_SLOW_S, _QUICK_SLOW_S = 11.0, 3.0


def run(options: BenchOptions) -> Result:
    """Makes all loads and gives the rows.

    Raises:
        ConfigError: an option that no site can have.
        HarnessError: the site could not be set up, or an answer was not acceptable.
    """
    if not 2 <= options.tenants <= MOST_TENANTS:
        raise ConfigError(f"--tenants {options.tenants}: a load has 2 to {MOST_TENANTS} tenants")
    try:
        load_profile(options.chip)
    except ConfigError as error:
        raise ConfigError(f"--chip {options.chip}: {error.detail}") from error
    folder = Path(tempfile.mkdtemp(prefix="hb"))  # short: UNIX socket paths hold 107 bytes
    try:
        return asyncio.run(_run(options, folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def _run(options: BenchOptions, folder: Path) -> Result:
    result = Result(benchmark="batching", method=_method(options))
    options.say(f"setting up a host with chip {options.chip} and {options.tenants} tenants")
    async with BenchSite(folder / "a", chip=options.chip, tenants=options.tenants) as site:
        bench = Bench(site=site, options=options, folder=folder)
        body_bytes, open_loop = await bench_poisson.measure(bench, result)
        closed_loop = await bench_closed.measure(bench, result)
        with _part(result, "flood"):
            await bench_closed.flood(bench, result)
        found = await bench_memory.growth(bench)
        await profile_of(bench, result)
        await site.change(BatchSettings(strategy="single"))
        await bench_poisson.single(bench, result, open_loop)
        await bench_closed.single(bench, result, closed_loop)
    slow = bench_memory.slow_chip(options.chip, folder, _QUICK_SLOW_S if options.quick else _SLOW_S)
    options.say("setting up a host with a very slow chip")
    with _part(result, "memory of waiting requests"):
        async with BenchSite(folder / "b", chip=str(slow), tenants=options.tenants) as site:
            bench = Bench(site=site, options=options, folder=folder)
            found.append(await bench_memory.memory(bench, result, body_bytes))
    bench_memory.growth_rows(result, found)
    return result


@contextlib.contextmanager
def _part(result: Result, name: str) -> Iterator[None]:
    """A part whose failure is noted, and costs no other part its figures."""
    try:
        yield
    except HarnessError as error:
        result.failed.append(f"{name}: {error.detail}")


def _method(options: BenchOptions) -> list[str]:
    return [
        f"one host (chip {options.chip}, AK RSA-2048, scenario good) and {options.tenants} tenants, each with a "
        "certification authority of its own; every service in a process of its own, mutual TLS (1.3) on loopback; "
        "host-only requests for PCR 0 to 7",
        "L is the TPM's time per batch, PCR values included, from the host agent's own events of the same windows; "
        "L alone is the same with one request at a time before any load",
        "the load generator is a process of its own with keep-alive connections; open loop: arrival times are drawn "
        "beforehand (Poisson), and a response time counts from the drawn time, whenever the request could be sent",
        "figures are medians of at least five windows of one load, whose first seconds are left out",
        "CPU time is that of the kernel's accounts (/proc/PID/stat) of provider verifier and host agent; the bare "
        "handler has the same TLS, body size, clients and arrival rate, in the same run",
        "memory is the growth of RSS of provider verifier and host agent together, in five steps; connections first, "
        "then requests, which all wait while the TPM is kept busy by a chip profile of several seconds; the size of "
        "TLS buffers is the difference of idle connections of a bare handler with and without TLS; the bare handler is "
        "given a fourth of the connections",
    ]
