"""The system clock of a whole lab jumps: a day forward, a day back, and beyond the end of every certificate.

Every process of the lab, and every command, has the same clock, which the test sets; its monotonic clock goes on.
"""

from __future__ import annotations

import os
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.lab_faults import Eye, alarms, enrolled, tracebacks
from tests.support.processes import left_by
from tests.support.running_lab import RunningLab, running_lab

pytestmark = [pytest.mark.needs_swtpm, pytest.mark.needs_cc, pytest.mark.timeout(900)]

TOPOLOGY = """\
hosts: {host1: {chip: swtpm}}
tenants:
  alice: {quote_interval_s: 2, guests: {alice-vm1: }}
  bob: {quote_interval_s: 2, guests: {bob-vm1: }}
"""
GUESTS = 2
DAY_S = 86_400
SOURCE = Path(__file__).parents[1] / "support" / "clock.c"


class Clock:
    """The lab's system clock, as an offset to the test's.

    Args:
        folder: where the offset is kept.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / "offset"
        self.set(0)
        library = folder / "clock.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", str(library), str(SOURCE)], check=True, timeout=240)
        self.environment = {"LD_PRELOAD": str(library), "HARNESS_TEST_CLOCK": str(self._file)}

    def set(self, offset_s: int) -> None:
        """Jumps, in all processes at once: they share the file's one page."""
        descriptor = os.open(self._file, os.O_WRONLY | os.O_CREAT, 0o600)
        os.pwrite(descriptor, struct.pack("=q", offset_s), 0)
        os.close(descriptor)
        self.offset_s = offset_s

    def now(self) -> float:
        """Unix time in the lab."""
        return time.time() + self.offset_s


@pytest.fixture(scope="module")
def clock() -> Iterator[Clock]:
    """A clock that shows the right time."""
    with tempfile.TemporaryDirectory(prefix="hc") as name:
        yield Clock(Path(name))


@pytest.fixture(scope="module")
def lab(clock: Clock) -> Iterator[RunningLab]:
    """A lab by that clock; every test leaves it attested and at the right time."""
    with running_lab(TOPOLOGY, environment=clock.environment) as running:
        yield running
    assert left_by(running.state) == {}


def regained(lab: RunningLab, clock: Clock) -> None:
    """Waits until every guest is attested by evidence of this side of the jump."""
    since = clock.now()

    def all_are() -> bool:
        rows = lab.guests().values()
        return (
            all(row["attested"] and since < row["last_success"] < clock.now() for row in rows) and len(rows) == GUESTS
        )

    lab.until("attested by new evidence", all_are, 60)


@pytest.mark.parametrize("offset_s", [DAY_S, -DAY_S + 60], ids=["forward", "back"])
def test_a_jump_of_a_day_and_back(lab: RunningLab, clock: Clock, offset_s: int) -> None:
    """The old success does not count any more, the next round's does; no process, key, session or back-off is lost."""
    before, keys = lab.pids(), enrolled(lab)
    with Eye(lab, now=clock.now) as eye:
        for offset in (offset_s, 0):
            clock.set(offset)
            regained(lab, clock)
            lab.until("looks by the new clock", lambda: all(map(eye.sees, lab.guests())), 30)
    assert (lab.pids(), enrolled(lab)) == (before, keys)
    assert (alarms(lab), tracebacks(lab)) == ([], [])


def test_an_up_by_another_clock(lab: RunningLab, clock: Clock) -> None:
    """A lab that was down when its clock was put back by an hour starts, and nobody is attested by what is stored."""
    keys = enrolled(lab)
    assert lab.run("lab", "down").returncode == 0
    clock.set(-3600)
    lab.up()
    regained(lab, clock)
    assert enrolled(lab) == keys
    with Eye(lab, now=clock.now) as eye:
        clock.set(0)
        regained(lab, clock)
        lab.until("looks by the new clock", lambda: all(map(eye.sees, lab.guests())), 30)
    assert {kind for kind, _ in alarms(lab)} == {"HostRebooted"}  # it was down
    assert tracebacks(lab) == []


def test_a_jump_beyond_all_certificates(lab: RunningLab, clock: Clock) -> None:
    """Everybody is refused with the sentence that names the renewal; back in time everything goes on."""
    before, keys, known = lab.pids(), enrolled(lab), alarms(lab)
    clock.set(400 * DAY_S)
    try:
        for command in (["tenant", "status"], ["lab", "up"], ["provider", "host", "list"]):
            done = lab.run(*command)
            said = done.stdout + done.stderr
            assert (done.returncode in {1, 2}, "Traceback" in said) == (True, False), said
            assert "expired at" in said, said
            assert "harness lab renew" in said, said
        lab.until("services say so", lambda: "certificate_expired" in lab.run("lab", "logs", "-n", "200").stdout, 30)
    finally:
        clock.set(0)
    with Eye(lab, now=clock.now) as eye:
        regained(lab, clock)
        lab.until("looks by the new clock", lambda: all(map(eye.sees, lab.guests())), 30)
    assert (lab.pids(), enrolled(lab)) == (before, keys)
    assert (alarms(lab), tracebacks(lab)) == (known, [])
