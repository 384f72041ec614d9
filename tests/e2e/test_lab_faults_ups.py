"""Several people at one lab: two `up` at once, `down` during an `up`, `up` during a `down`."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.lab_faults import enrolled, tracebacks
from tests.support.processes import left_by, processes_of
from tests.support.running_lab import COMMAND_S, RunningLab

pytestmark = [pytest.mark.needs_swtpm, pytest.mark.timeout(900)]

TOPOLOGY = """\
hosts: {host1: {chip: swtpm}}
tenants:
  alice: {quote_interval_s: 1, guests: {vm1: }}
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[RunningLab]:
    """A lab that has not been started yet."""
    with tempfile.TemporaryDirectory(prefix="hl") as name:
        lab = RunningLab(Path(name), TOPOLOGY)
        try:
            yield lab
        finally:
            lab.run("lab", "down")
            assert left_by(lab.state) == {}


def started(lab: RunningLab, command: str) -> subprocess.Popen[str]:
    """A command that runs while the test goes on."""
    return subprocess.Popen(
        [sys.executable, "-m", "harness", "lab", command, "--lab", str(lab.folder / "lab.yml")],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code of a command, and what it said on standard error: never a traceback."""
    _, said = process.communicate(timeout=COMMAND_S)
    assert "Traceback" not in said, said
    return process.returncode, said


def supervisors(lab: RunningLab) -> list[int]:
    """Processes that supervise the lab."""
    return [pid for pid, line in processes_of(lab.state).items() if "harness.lab_supervisor" in line]


def refused(code: int, said: str) -> bool:
    """Whether a command found somebody else at work, and said so in one sentence."""
    return code in {1, 2} and said.count("harness: ") == 1


def test_two_ups_of_a_new_lab(lab: RunningLab) -> None:
    """One starts it; the other says that somebody else does, or comes to the same lab; one supervisor is left."""
    with started(lab, "up") as one, started(lab, "up") as two:
        ends = [ended(one), ended(two)]
    assert 0 in [code for code, _ in ends], ends
    assert all(code == 0 or refused(code, said) for code, said in ends), ends
    assert len(supervisors(lab)) == 1
    assert not lab.up()["changed"]
    assert len(enrolled(lab)) == 2
    assert tracebacks(lab) == []


def test_two_ups_of_a_lab_that_was_there(lab: RunningLab) -> None:
    """The same for a lab with a history: nobody enrols anew."""
    keys = enrolled(lab)
    assert lab.run("lab", "down").returncode == 0
    with started(lab, "up") as one, started(lab, "up") as two:
        ends = [ended(one), ended(two)]
    assert 0 in [code for code, _ in ends], ends
    assert all(code == 0 or refused(code, said) for code, said in ends), ends
    assert len(supervisors(lab)) == 1
    lab.until_attested(count=1)
    assert enrolled(lab) == keys
    assert tracebacks(lab) == []


def test_a_down_during_an_up(lab: RunningLab) -> None:
    """Whoever comes last wins: the lab is down, nothing is left of it, and the `up` ends with one sentence."""
    keys = enrolled(lab)
    assert lab.run("lab", "down").returncode == 0
    with started(lab, "up") as up:
        lab.until("a supervisor", lambda: (lab.state / "run" / "s").exists(), 60)
        assert lab.run("lab", "down").returncode == 0
        code, said = ended(up)
    assert code == 0 or refused(code, said), said
    assert left_by(lab.state) == {}
    assert [path for path in lab.state.rglob("*") if path.is_socket()] == []
    lab.up()
    assert enrolled(lab) == keys
    assert tracebacks(lab) == []


def test_an_up_during_a_down(lab: RunningLab) -> None:
    """The lab is up as the `up` says, or the `up` says in one sentence why not; the next one is."""
    keys = enrolled(lab)
    with started(lab, "down") as down, started(lab, "up") as up:
        (down_code, down_said), (code, said) = ended(down), ended(up)
    assert (down_code, down_said.count("harness: ")) == (0, 0), down_said
    assert code == 0 or refused(code, said), said
    status = lab.run("lab", "status", "--json")
    assert status.returncode == 1 or all(service["pid"] for service in json.loads(status.stdout)["services"])
    lab.up()
    lab.until_attested(count=1)
    assert enrolled(lab) == keys
    assert tracebacks(lab) == []
