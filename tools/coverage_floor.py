"""Reports branch coverage of core, provider and tenant, and fails when one of them is below the floor.

Its arguments are the tox environments whose runs are added up (``.coverage.ENV``); one that did not run is left out.
The table of a part is printed where the part is below it; else its figure says enough.

Composition roots (command line, demo, lab, serve) are programs that wire parts: the end-to-end tests run them, in
other processes, and they do not count here.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from coverage import Coverage

ROOT = Path(__file__).parents[1]
FLOOR = 90.0
ROOTS = [
    "__main__",
    "bench",
    "bench_*",
    "cli",
    "cli_*",
    "demo",
    "demo_*",
    "lab",
    "lab_*",
    "preload",
    "serve",
    "serve_*",
]
PARTS = {
    "core": (["harness/*.py"], [f"harness/{name}.py" for name in ROOTS]),
    "provider": (["harness/provider/*.py"], []),
    "tenant": (["harness/tenant/*.py"], []),
}


def main() -> int:
    """Print one report for each part; 1 when a part is below the floor, 2 when nothing was measured."""
    measured = [path for name in sys.argv[1:] if (path := ROOT / f".coverage.{name}").is_file()]
    if not measured:
        print("nothing was measured; run the tests first: make test ARGS='-e py311,e2e,coverage'", file=sys.stderr)
        return 2
    coverage = Coverage(data_file=None)
    coverage.combine([str(path) for path in measured], keep=True)
    totals = {}
    for part, (include, omit) in PARTS.items():
        table = io.StringIO()
        totals[part] = coverage.report(include=include, omit=omit, show_missing=True, skip_covered=True, file=table)
        if totals[part] < FLOOR:
            print(f"== {part}\n{table.getvalue()}")
    for part, total in totals.items():
        print(f"{part}: {total:.1f} % of lines and branches{'' if total >= FLOOR else f', below the floor of {FLOOR}'}")
    return int(min(totals.values()) < FLOOR)


if __name__ == "__main__":
    sys.exit(main())
