"""``harness bench verifier``: what an attestation round of both layers costs a tenant verifier.

The verifier is the real service in a process of its own, with its database in a file, its log and its metrics; guests,
provider and registrar are another process (`bench_peers`). A round is a guest quote, a host quote bound to it, both
appraisals, and the success on disk.

Invariants:
    1. CPU time is that of the verifier's process alone, all of it: nothing is taken off for what is not a round.
    2. A window in which a guest was not attested, or no round was accepted, is no measurement.

Spec: DESIGN 3.8; docs/performance.md, method.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path

from harness.bench import BenchOptions, Result, Sample, at_most, reported
from harness.bench_tenant import Cost, VerifierSite

_GUESTS, _QUICK_GUESTS = (400, 200, 16), (4, 2)
"""The target is judged at the first; the others are reported, because a round costs more where there are fewer."""
_INTERVAL_S, _QUICK_INTERVAL_S = 2.0, 0.3
_BATCH_S = 0.187
_WINDOW_S, _QUICK_WINDOW_S = 5.0, 1.0
_SETTLE_S = 3.0
_MS = 1000.0
_LIMIT_MS = 2.0


def run(options: BenchOptions) -> Result:
    """Measures a verifier of many guests, and others of fewer.

    Raises:
        HarnessError: the verifier or its peers did not come up, or a guest was refused.
    """
    folder = Path(tempfile.mkdtemp(prefix="hv"))
    try:
        return asyncio.run(_run(options, folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def _run(options: BenchOptions, folder: Path) -> Result:
    many, *fewer = _QUICK_GUESTS if options.quick else _GUESTS
    interval_s = _QUICK_INTERVAL_S if options.quick else _INTERVAL_S
    result = Result(benchmark="verifier", method=_method(many, interval_s))
    costs = await _windows(options, folder / "many", many, interval_s)
    result.add(
        at_most(_title(many), _per_round(costs), unit="ms", limit=_LIMIT_MS),
        reported(
            "rounds per second in that run", Sample.of([cost.rounds / cost.elapsed_s for cost in costs]), unit="/s"
        ),
    )
    for guests in fewer:
        costs = await _windows(options, folder / str(guests), guests, interval_s)
        result.add(reported(_title(guests), _per_round(costs), unit="ms"))
    return result


def _title(guests: int) -> str:
    return f"tenant verifier CPU per round, both layers, {guests} guests"


async def _windows(options: BenchOptions, folder: Path, guests: int, interval_s: float) -> list[Cost]:
    options.say(f"a tenant verifier of {guests} guests, a round each {interval_s:g} s")
    seconds = _QUICK_WINDOW_S if options.quick else _WINDOW_S
    async with VerifierSite(folder, guests=guests, interval_s=interval_s, batch_s=_BATCH_S) as site:
        await asyncio.sleep(0 if options.quick else _SETTLE_S)
        return [await site.cost(seconds) for _ in range(options.repetitions)]


def _per_round(costs: list[Cost]) -> Sample:
    return Sample.of([cost.per_round_s * _MS for cost in costs])


def _method(guests: int, interval_s: float) -> list[str]:
    return [
        f"a tenant verifier in a process of its own (SQLite file, log file, mutual TLS on loopback) with {guests} "
        f"guests, each with an address, a certificate and a P-256 AK of its own, a round each {interval_s:g} s; the "
        "host's AK is RSA-2048; PCR 0 to 7 of both, all in the policy",
        f"all host quotes that wait are answered together each {_BATCH_S * _MS:g} ms, as by a host agent with a slow "
        "TPM",
        "the figure depends on the number of guests: more of them share a transaction, and the processor's caches are "
        "warm; the target is judged at the largest number, and smaller ones are reported beside it",
        "CPU time is that of the kernel's accounts (/proc/PID/stat), all threads, divided by the rounds that the"
        " verifier's own metrics count in the same window",
    ]
