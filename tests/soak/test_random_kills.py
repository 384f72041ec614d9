"""Random ``kill -9`` of a running lab's processes: it ends attested, with the keys of before, and nothing has leaked.

``HARNESS_SOAK_S`` says how long it kills (default: 60 s; ``make soak`` takes 600), ``HARNESS_SOAK_SEED`` repeats a run.
The figures are printed (``pytest -s``): kills by kind, and how long it took until all guests were attested again.
"""

from __future__ import annotations

import collections
import contextlib
import os
import random
import signal
import sqlite3
import statistics
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from tests.support.running_lab import RunningLab, running_lab

SECONDS = float(os.environ.get("HARNESS_SOAK_S", "60"))
SEED = int(os.environ.get("HARNESS_SOAK_SEED") or random.SystemRandom().randrange(1 << 32))
pytestmark = [pytest.mark.needs_swtpm, pytest.mark.timeout(SECONDS + 600)]

MARK = "HARNESS_SOAK_MARK"
RECOVERED_S = 120.0
"""After the last kill everybody is attested within this time: longest pauses, a round, a busy machine."""
PSS_GROWTH = 1.10


class Processes:
    """All processes of one lab: they carry its mark in their environment, whoever their parent is now.

    Args:
        mark: of the lab.
    """

    def __init__(self, mark: str) -> None:
        self._mark = mark

    def all(self) -> dict[int, psutil.Process]:
        """Living processes by PID; zombies are dead."""
        found = {}
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found[process.pid] = process
            except psutil.Error:
                continue
        return found

    def pss(self) -> int:
        """Bytes of proportional set size, over all of them."""
        total = 0
        for process in self.all().values():
            try:
                total += process.memory_full_info().pss
            except psutil.Error:
                continue
        return total


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[RunningLab, Processes]]:
    """A lab whose processes are marked."""
    mark = str(uuid.uuid4())
    monkeypatch.setenv(MARK, mark)
    with running_lab() as running:
        yield running, Processes(mark)


def victims(lab: RunningLab, processes: Processes) -> dict[str, list[int]]:
    """PIDs by kind. The supervisor is not among them: with it the whole lab ends, and `up` starts it again."""
    services = {pid: name for name, pid in lab.pids().items() if pid is not None}
    kinds: dict[str, list[int]] = collections.defaultdict(list)
    for pid, name in services.items():
        kinds[name].append(pid)
    for name, pid in lab.swtpms().items():
        kinds["swtpm of a guest" if "/guests/" in name else "swtpm of the host"].append(pid)
    for connection in psutil.net_connections("tcp4"):
        agent = connection.status == psutil.CONN_LISTEN and connection.pid in processes.all()
        if agent and connection.pid not in services and connection.pid != lab.supervisor()["pid"]:
            kinds["guest agent"].append(connection.pid)
    return kinds


def consistent(folder: Path) -> list[str]:
    """What SQLite finds wrong in the databases of a lab that is down; nothing, if all is well."""
    wrong = []
    databases = list(folder.rglob("*.db"))
    assert len(databases) >= 6
    for path in databases:
        with sqlite3.connect(path) as connection:
            wrong += [
                f"{path.name}: {row[0]}" for row in connection.execute("PRAGMA integrity_check") if row[0] != "ok"
            ]
            wrong += [f"{path.name}: {row}" for row in connection.execute("PRAGMA foreign_key_check")]
        connection.close()
    return wrong


def test_a_lab_survives_random_kills(lab: tuple[RunningLab, Processes]) -> None:
    """Everybody is attested at the end, nobody was enrolled again, no process and no memory has leaked."""
    running, processes = lab
    print(f"\nHARNESS_SOAK_SEED={SEED}", flush=True)
    chance = random.Random(SEED)
    running.until_attested(count=3)
    pinned, before, pss = running.pinned(), len(processes.all()), processes.pss()
    killed: collections.Counter[str] = collections.Counter()
    recoveries: list[float] = []
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        for _ in range(chance.choice((1, 1, 1, 2, 4))):  # mostly one at a time, sometimes several together
            kinds = victims(running, processes)
            kind = chance.choice(sorted(kinds))
            with contextlib.suppress(ProcessLookupError):  # it has died meanwhile, of another one's death
                os.kill(chance.choice(kinds[kind]), signal.SIGKILL)
                killed[kind] += 1
                print(f"{SECONDS - until + time.monotonic():6.1f} s: kill -9 of {kind}", flush=True)
        if chance.random() < 0.5:
            recoveries.append(running.until_attested(RECOVERED_S, count=3))
        else:
            time.sleep(chance.uniform(0, 3))  # the next kill meets a lab that is still coming up
    recoveries.append(running.until_attested(RECOVERED_S, count=3))
    running.until("the number of processes of before", lambda: len(processes.all()) == before, RECOVERED_S)
    after = processes.pss()
    print(
        f"\n{sum(killed.values())} kills in {SECONDS:g} s: {dict(sorted(killed.items()))}\n"
        f"attested again after {statistics.median(recoveries):.1f} s (median), {max(recoveries):.1f} s (longest)\n"
        f"PSS {pss / 1e6:.0f} MB before, {after / 1e6:.0f} MB after; {before} processes"
    )
    assert running.pinned() == pinned
    assert after <= pss * PSS_GROWTH
    assert running.run("lab", "down").returncode == 0
    assert processes.all() == {}
    assert consistent(running.state) == []
