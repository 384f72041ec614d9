"""`harness bench batching` with tiny counts, as a person runs it: every row is there, and every answer was verified."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.support.processes import left_by

pytestmark = pytest.mark.needs_swtpm
_DEADLINE_S = 900
MEMBERS = {"name", "target", "value", "unit", "baseline", "ratio", "ok"}
ROWS = (
    "L alone",
    "response time p50",
    "response time p99",
    "requests without an answer",
    "TPM quotes per L",
    "requests per quote",
    "CPU per request, provider verifier + host agent",
    "strategy single",
    "closed loop, 8 clients: throughput",
    "the others' p99",
    "its own without answer or typed refusal",
    "peak of memory",
    "memory per waiting request at 10 waiters",
    "TLS buffers",
    "CPU per request at 10 waiters",
)


@pytest.mark.timeout(_DEADLINE_S)
def test_a_quick_run_measures_every_row() -> None:
    """All loads are made on real services and a real swtpm; what has no load's size is not judged here."""
    command = [sys.executable, "-m", "harness", "bench", "batching", "--quick", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_DEADLINE_S, check=False)
    assert done.returncode in {0, 1}, done.stderr
    shown = json.loads(done.stdout)
    assert shown["quick"] is True
    assert all(set(row) == MEMBERS for row in shown["rows"])
    names = [row["name"] for row in shown["rows"]]
    assert len(names) == len(set(names))
    assert [part for part in ROWS if not any(part in name for name in names)] == []
    values = {row["name"]: row["value"] for row in shown["rows"]}
    assert values["Poisson 60/s: requests without an answer"] == 0
    assert all(value == 0 for name, value in values.items() if "without answer" in name)
    [batching] = shown["benchmarks"]
    assert any("all accepted" in sentence for sentence in batching["method"])
    assert batching["series"].keys() == {"response-times", "growth"}


@pytest.mark.timeout(_DEADLINE_S)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_ended_leaves_nothing_behind(number: signal.Signals) -> None:
    """Told to stop under load it ends its services and its load generator, and removes its folder."""
    folder = Path(tempfile.mkdtemp(prefix="hx"))
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "harness", "bench", "batching", "--quick"],
            env={**os.environ, "TMPDIR": str(folder)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        with process:
            assert process.stderr is not None
            for line in process.stderr:
                if line.startswith("L alone"):
                    process.send_signal(number)
                    break
            assert process.wait(_DEADLINE_S) == 130
        assert left_by(folder) == {}
        assert list(folder.glob("hb*")) == []
    finally:
        for left in folder.iterdir():
            left.unlink()
        folder.rmdir()
