"""Runs benchmarks one after the other, shows their rows and keeps what they found.

Invariants:
    1. A benchmark, or a part of one, that cannot be run keeps no other from being run; it is said, and makes the exit
       code 2.
    2. Ctrl-C and SIGTERM leave no process behind; what was measured until then is in the file.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import cast

from harness import console
from harness.bench import BenchOptions, Measured, Result
from harness.bench_machine import machine_facts
from harness.errors import ConfigError, HarnessError

_MET, _MISSED, _UNUSABLE = 0, 1, 2
_VERDICTS = {True: "ok", False: "missed", None: ""}


Benchmark = Callable[[BenchOptions], Result]


def benchmark(name: str) -> Benchmark:
    """The benchmark of this name; its module is imported now."""
    return cast(Benchmark, importlib.import_module(f"harness.bench_{name}").run)


def run(
    names: Sequence[str],
    options: BenchOptions,
    *,
    output: Path | None,
    as_json: bool,
    label: str = "",
    find: Callable[[str], Benchmark] = benchmark,
) -> int:
    """Runs benchmarks and prints what came of them.

    Args:
        names: which, of ``batching``, ``appraise``, ``tree`` and ``verifier``.
        options: for all of them.
        output: file for the results, too.
        as_json: print one JSON object instead of a table.
        label: what is another in this run than usual; such a run stands apart in the report.
        find: gives the benchmark of a name.

    Returns:
        0 when every target was met, 1 when one was missed, 2 when a benchmark could not be run.

    Raises:
        ConfigError: the only one that was asked for cannot be run, or the file cannot be written.
        HarnessError: the only one that was asked for failed.
    """
    facts = machine_facts()
    begun = time.monotonic()
    results: list[Result] = []
    failed = False
    kept = as_data(results, facts, options, label=label)
    for name in names:
        try:
            with _ended_in_order():
                results.append(find(name)(options))
            for part in results[-1].failed:
                console.say(f"bench {name}: {part}")
                failed = True
        except HarnessError as error:
            if len(names) == 1:
                raise
            console.say(f"bench {name} could not be run: {error.detail}")
            failed = True
        facts["seconds"] = round(time.monotonic() - begun, 1)
        kept = as_data(results, facts, options, label=label)
        if output is not None:
            keep(kept, output)  # a run that is ended has what it has measured
    if as_json:
        console.print_json(kept)
    else:
        show(results)
    if failed:
        return _UNUSABLE
    return _MET if all(result.ok for result in results) else _MISSED


@contextlib.contextmanager
def _ended_in_order() -> Iterator[None]:
    """SIGTERM ends a benchmark as Ctrl-C does: its services and load generators are stopped, its folder is removed."""
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, interrupt)


def as_data(
    results: Sequence[Result], facts: dict[str, object], options: BenchOptions, *, label: str = ""
) -> dict[str, object]:
    """What is printed and kept: ``rows`` of all benchmarks and ``machine``, and under ``benchmarks`` the details."""
    details = [result.as_json() for result in results]
    rows = [row for each in details for row in cast("list[object]", each["rows"])]
    return {
        "rows": rows,
        "machine": facts,
        "quick": options.quick,
        "label": label,
        "options": {"chip": options.chip, "tenants": options.tenants, "seconds": options.seconds, "seed": options.seed},
        "benchmarks": details,
    }


def keep(data: dict[str, object], path: Path) -> None:
    """Writes results to a file. Raises ConfigError when it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error


def show(results: Sequence[Result]) -> None:
    """Prints the table of targets."""
    rows = [_cells(each) for result in results for each in result.measured]
    console.print_table(("verdict", "figure", "ratio", "target", "what"), rows, empty="nothing was measured")


def _cells(each: Measured) -> tuple[str, ...]:
    row = each.row
    ratio = "" if row.ratio is None else f"{row.ratio:.3g}"
    return (_VERDICTS[row.ok], f"{row.value:,.5g} {row.unit}", ratio, row.target, row.name)
