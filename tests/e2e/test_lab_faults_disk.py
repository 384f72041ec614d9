"""A whole lab on a disk without a byte left: nobody is shown as attested, nothing ends for good, and space heals it."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.lab_faults import Eye, damaged, enrolled, full, mounted, tracebacks
from tests.support.processes import left_by
from tests.support.running_lab import RunningLab

pytestmark = [pytest.mark.needs_swtpm, pytest.mark.needs_mount, pytest.mark.timeout(900)]

DISK = "64m"


@pytest.fixture(scope="module")
def lab() -> Iterator[RunningLab]:
    """A lab that is up, with all its state on a small disk of its own."""
    with tempfile.TemporaryDirectory(prefix="hl") as name:
        state = Path(name) / ".lab"
        state.mkdir(mode=0o700)
        with mounted(state, "-t", "tmpfs", "-o", f"size={DISK},mode=0700", "tmpfs"):
            lab = RunningLab(Path(name))
            try:
                lab.up()
                yield lab
            finally:
                lab.run("lab", "down")
                assert left_by(lab.state) == {}


def unattested(lab: RunningLab) -> bool:
    """Whether nobody is shown as attested, and the database is said to be why."""
    rows = lab.guests().values()
    return all(not row["attested"] and row["error"] == "StoreError" for row in rows)


def test_a_full_disk_costs_attestation_and_nothing_else(lab: RunningLab) -> None:
    """Sessions say StoreError, processes and keys stay, the databases are whole, and space brings everything back."""
    before, keys = lab.pids(), enrolled(lab)
    with Eye(lab):
        with full(lab.state):
            lab.until("nobody attested for want of space", lambda: unattested(lab), 60)
        lab.until_attested(count=3)
    assert (lab.pids(), enrolled(lab)) == (before, keys)
    assert (damaged(lab), tracebacks(lab)) == ([], [])


def test_services_that_die_on_a_full_disk_come_back_with_space(lab: RunningLab) -> None:
    """However far they come meanwhile, nobody is attested; the supervisor goes on trying, and nobody enrols anew."""
    keys = enrolled(lab)
    killed = {name: pid for name, pid in lab.pids().items() if pid and name != "host1-tpm"}
    with Eye(lab):
        with full(lab.state):
            for pid in killed.values():
                os.kill(pid, signal.SIGKILL)
            lab.until("nobody attested", lambda: not any(row["attested"] for row in lab.guests().values()), 60)
        lab.until_attested(count=3)
    after = lab.pids()
    assert [name for name, pid in killed.items() if after[name] in (None, pid)] == []
    assert enrolled(lab) == keys
    assert (damaged(lab), tracebacks(lab)) == ([], [])


def test_down_and_up_on_a_full_disk(lab: RunningLab) -> None:
    """The lab ends in order; it is refused in one sentence while there is no space, and starts when there is."""
    keys = enrolled(lab)
    with full(lab.state):
        assert lab.run("lab", "down").returncode == 0
        assert left_by(lab.state) == {}
        refused = lab.run("lab", "up")
        assert refused.returncode in {1, 2}
        assert f"{lab.state}/" in refused.stderr, refused.stderr
        assert "No space left on device" in refused.stderr, refused.stderr
        assert "Traceback" not in refused.stderr
    lab.up()
    lab.until_attested(count=3)
    assert enrolled(lab) == keys
    assert (damaged(lab), tracebacks(lab)) == ([], [])
