"""Where the services' time goes under load: py-spy looks into them from outside, if it is installed.

Invariants:
    1. Nothing is measured while it looks: a profile is made of a load of its own.
"""

from __future__ import annotations

import asyncio
import collections
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from harness.bench import Result
from harness.bench_context import Bench
from harness.bench_poisson import OpenLoop
from harness.bench_run import Loader

_LINES = 15
_FLUSH_S = 30.0
_RATE = "200"


async def profile_of(bench: Bench, result: Result) -> None:
    """Adds a profile of each service under the open loop: of threads that hold the interpreter. Without py-spy none.

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
    async with Loader(bench.order(shape.poisson(bench, seconds))) as loader:  # its connections are open before
        spies = [await _spy(spy, pid, files[name], seconds) for name, pid in bench.site.pids.items()]
        try:
            loader.go()
            await loader.done()
            async with asyncio.timeout(_FLUSH_S):
                await asyncio.gather(*(each.wait() for each in spies))
        except TimeoutError:
            result.method.append("no profile: py-spy did not end in time")
        finally:
            for each in spies:
                if each.returncode is None:
                    each.kill()
                    await each.wait()
    for name, path in files.items():
        if path.exists():
            raw = path.read_text(encoding="utf-8")
            result.profile[f"{name}, by library"] = by_library(raw)
            result.profile[f"{name}, by function"] = by_function(raw)


async def _spy(program: str, pid: int, output: Path, seconds: float) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(
            program,
            "record",
            "--format",
            "raw",
            "--full-filenames",
            "--gil",
            "--rate",
            _RATE,
            "--duration",
            str(int(seconds)),
        ),
        *("--output", str(output), "--pid", str(pid)),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )


def by_function(raw: str) -> list[tuple[str, float]]:
    """Share of samples in each function itself, the largest first.

    Args:
        raw: stacks as py-spy writes them, outermost first: ``a (file.py:1);b (file.py:2) 17``.
    """
    return _shares(raw, lambda stack: _function(stack[-1]))


def by_library(raw: str) -> list[tuple[str, float]]:
    """Share of samples in each library itself: the first part of its modules' path; arguments as for `by_function`."""
    return _shares(raw, lambda stack: _module(stack[-1]).split("/")[0].removesuffix(".py"))


def _shares(raw: str, key: Callable[[Sequence[str]], str]) -> list[tuple[str, float]]:
    counted: collections.Counter[str] = collections.Counter()
    for line in raw.splitlines():
        stack, _, count = line.rpartition(" ")
        if stack and count.isdecimal():
            counted[key(stack.split(";"))] += int(count)
    total = counted.total()
    return [(name, round(count / total, 4)) for name, count in counted.most_common(_LINES)]


def _function(frame: str) -> str:
    """``name (module)`` without folders and line numbers: those of another machine say nothing."""
    return f"{frame.partition(' (')[0]} ({_module(frame)})"


def _module(frame: str) -> str:
    place = frame.partition(" (")[2].rstrip(")")
    parts = Path(place.rpartition(":")[0] or place).parts
    for root in ("site-packages", "harness"):
        if root in parts:
            last = len(parts) - 1 - parts[::-1].index(root)
            return "/".join(parts[last + (root != "harness") :])
    library = next((number for number, part in enumerate(parts) if part.startswith("python3.")), len(parts) - 2)
    return "/".join(parts[library + 1 :])
