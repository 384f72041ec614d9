"""``harness bench``: measures what the project promises, beside a yardstick of the same run.

Invariants:
    1. Results go to standard output, progress to standard error.
    2. Exit codes: 0 every target was met, 1 one was missed, 2 a benchmark could not be run.
"""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from harness import cli_complete
from harness.cli_help import AsJson, examples, group

if TYPE_CHECKING:
    from harness.bench import BenchOptions

app = group("Measure what is promised: one slow TPM under load, trees, appraisal, the tenant verifier.")

Quick = Annotated[bool, typer.Option("--quick", help="Tiny counts, to see that it works; the figures mean nothing.")]
Chip = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="TPM latency profile.", autocompletion=cli_complete.chips),
]
Tenants = Annotated[int | None, typer.Option(metavar="N", help="Number of tenants that ask (2 to 1000).", min=2)]
Seconds = Annotated[
    float | None, typer.Option(metavar="S", help="Length of the open loop, in seconds.", min=1, max=600)
]
Seed = Annotated[int, typer.Option(metavar="N", help="Seed of arrival times and leaves.", min=0)]
Output = Annotated[
    Path | None, typer.Option("--output", metavar="FILE", help="Also keep the results there, for `bench report`.")
]
Label = Annotated[
    str, typer.Option("--label", metavar="TEXT", help="What is another in this run than usual, for `bench report`.")
]


class _Benchmark(enum.StrEnum):
    BATCHING = "batching"
    APPRAISE = "appraise"
    TREE = "tree"
    VERIFIER = "verifier"


@app.command(
    epilog=examples("harness bench batching", "harness bench batching --chip ntc-npct75x --tenants 200 --json")
)
def batching(
    chip: Chip = None,
    tenants: Tenants = None,
    seconds: Seconds = None,
    seed: Seed = 1,
    quick: Quick = False,
    output: Output = None,
    label: Label = "",
    as_json: AsJson = False,
) -> None:
    """Load one host through real services: response times, throughput, CPU, floods and memory.

    Exits 0 when every target was met, 1 when one was missed, 2 when it cannot be run.
    """
    options = _options(quick, seed, chip=chip, tenants=tenants, seconds=seconds)
    _run([_Benchmark.BATCHING], options, output=output, as_json=as_json, label=label)


@app.command(epilog=examples("harness bench appraise", "harness bench appraise --json"))
def appraise(seed: Seed = 1, quick: Quick = False, output: Output = None, as_json: AsJson = False) -> None:
    """Appraise one answer, beside stock Keylime's check of an equal quote (`make keylime` installs it).

    Exits 0 when every target was met, 1 when one was missed, 2 when it cannot be run.
    """
    _run([_Benchmark.APPRAISE], _options(quick, seed), output=output, as_json=as_json)


@app.command(epilog=examples("harness bench tree", "harness bench tree --quick --json"))
def tree(seed: Seed = 1, quick: Quick = False, output: Output = None, as_json: AsJson = False) -> None:
    """Build a tree of 65,536 leaves with all its proofs, beside merklelib and pymerkle.

    Exits 0 when every target was met, 1 when one was missed, 2 when it cannot be run.
    """
    _run([_Benchmark.TREE], _options(quick, seed), output=output, as_json=as_json)


@app.command(epilog=examples("harness bench verifier", "harness bench verifier --json"))
def verifier(seed: Seed = 1, quick: Quick = False, output: Output = None, as_json: AsJson = False) -> None:
    """Measure the CPU time of a tenant verifier's round over both layers.

    Exits 0 when every target was met, 1 when one was missed, 2 when it cannot be run.
    """
    _run([_Benchmark.VERIFIER], _options(quick, seed), output=output, as_json=as_json)


@app.command(
    "all",
    epilog=examples("harness bench all", "harness bench all --json --output docs/performance/today.json"),
)
def everything(
    chip: Chip = None,
    tenants: Tenants = None,
    seconds: Seconds = None,
    seed: Seed = 1,
    quick: Quick = False,
    output: Output = None,
    label: Label = "",
    as_json: AsJson = False,
) -> None:
    """Run every benchmark, one after the other; about ten minutes on two cores.

    Exits 0 when every target was met, 1 when one was missed, 2 when a benchmark cannot be run (the others are).
    """
    options = _options(quick, seed, chip=chip, tenants=tenants, seconds=seconds)
    _run(list(_Benchmark), options, output=output, as_json=as_json, label=label)


@app.command(epilog=examples("harness bench report docs/performance/*.json"))
def report(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Results that were kept, in any order.")],
    to: Annotated[
        Path, typer.Option("--to", metavar="DIR", help="Folder for performance.md and the plots below it.")
    ] = Path("docs"),
) -> None:
    """Write docs/performance.md and its plots from results that were kept; the newest run is shown in full."""
    from harness import bench_report

    for path in bench_report.write(files, to):
        print(path)


def _options(
    quick: bool,
    seed: int,
    *,
    chip: str | None = None,
    tenants: int | None = None,
    seconds: float | None = None,
) -> BenchOptions:
    from harness import console
    from harness.bench import BenchOptions

    given = {"chip": chip, "tenants": tenants, "seconds": seconds}
    stated = {name: value for name, value in given.items() if value is not None}
    quickly = {"repetitions": 2, "tenants": 4} if quick else {}
    return BenchOptions(quick=quick, seed=seed, say=console.say, **{**quickly, **stated})  # type: ignore[arg-type]


def _run(
    which: list[_Benchmark], options: BenchOptions, *, output: Path | None, as_json: bool, label: str = ""
) -> None:
    from harness import bench_all

    names = [each.value for each in which]
    code = bench_all.run(names, options, output=output, as_json=as_json, label=label)
    raise typer.Exit(code)
