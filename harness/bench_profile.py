"""Where the services' time goes under load: py-spy looks into them from outside, if it is installed.

Invariants:
    1. Nothing is measured while it looks: a profile is made of a load of its own.
"""

from __future__ import annotations

import asyncio
import collections
import shutil
import sys
from pathlib import Path

from harness.bench import Result
from harness.bench_context import Bench
from harness.bench_poisson import OpenLoop

_LINES = 15
_FLUSH_S = 30.0


async def profile_of(bench: Bench, result: Result) -> None:
    """Adds a profile of each service under the open loop; without py-spy none, which is said.

    Raises:
        SimulationError: the load could not be made.

    *Cancellation:* the site is left as it is.
    """
    spy = shutil.which("py-spy", path=str(Path(sys.executable).parent)) or shutil.which("py-spy")
    if spy is None:
        result.method.append("no profile: py-spy is not installed (extra bench)")
        return
    bench.options.say("where the time goes")
    shape = OpenLoop.of(bench)
    seconds = 2.0 if bench.options.quick else 10.0
    files = {name: bench.folder / f"profile-{place}" for place, name in enumerate(bench.site.pids)}
    spies = [
        await asyncio.create_subprocess_exec(
            *(spy, "record", "--format", "raw", "--rate", "200", "--nonblocking", "--duration", str(int(seconds))),
            *("--output", str(files[name]), "--pid", str(pid)),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        for name, pid in bench.site.pids.items()
    ]
    try:
        await bench.load(shape.poisson(bench, seconds))
        async with asyncio.timeout(_FLUSH_S):
            await asyncio.gather(*(each.wait() for each in spies))
    finally:
        for each in spies:
            if each.returncode is None:
                each.kill()
                await each.wait()
    for name, path in files.items():
        if path.exists():
            result.profile[name] = summary(path.read_text(encoding="utf-8"))


def summary(raw: str) -> list[tuple[str, float]]:
    """Share of samples in each function itself, the largest first.

    Args:
        raw: stacks as py-spy writes them, outermost first: ``a (file.py:1);b (file.py:2) 17``.
    """
    own: collections.Counter[str] = collections.Counter()
    for line in raw.splitlines():
        stack, _, count = line.rpartition(" ")
        if stack and count.isdecimal():
            own[_function(stack.rpartition(";")[2])] += int(count)
    total = own.total()
    return [(name, round(count / total, 4)) for name, count in own.most_common(_LINES)]


def _function(frame: str) -> str:
    """``name (module)`` without folders and line numbers: those of another machine say nothing."""
    name, _, place = frame.partition(" (")
    file = place.rstrip(")").rpartition(":")[0] or place.rstrip(")")
    parts = Path(file).parts
    for root in ("harness", "site-packages"):
        if root in parts:
            place_of_root = len(parts) - 1 - parts[::-1].index(root)
            return f"{name} ({'/'.join(parts[place_of_root + (root != 'harness') :])})"
    return f"{name} ({'/'.join(parts[-2:])})"
