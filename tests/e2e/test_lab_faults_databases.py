"""The databases of a whole lab: locked by another program, read-only, damaged; and the way back to each of them."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.lab_faults import Eye, damaged, databases, enrolled, mounted, tracebacks, why
from tests.support.processes import left_by
from tests.support.running_lab import RunningLab, running_lab

pytestmark = [pytest.mark.needs_swtpm, pytest.mark.timeout(900)]

LOCKED_S = 15.0
SETTINGS = {
    "provider-registrar": "p/registrar.yml",
    "host1-agent": "h/host1/agent.yml",
    "alice-registrar": "t/alice/registrar.yml",
    "alice-verifier": "t/alice/verifier.yml",
    "bob-registrar": "t/bob/registrar.yml",
    "bob-verifier": "t/bob/verifier.yml",
}
"""One service for each database, and its settings below the lab's folder."""
_HOLD = """
import sqlite3, sys
held = [sqlite3.connect(path, isolation_level=None, timeout=30) for path in sys.argv[1:]]
for connection in held:
    connection.execute("BEGIN EXCLUSIVE")
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[RunningLab]:
    """A lab that is up; every test leaves it attested."""
    with running_lab() as running:
        yield running
    assert left_by(running.state) == {}


@contextlib.contextmanager
def held(paths: list[Path]) -> Iterator[None]:
    """Another program holds the write locks of databases."""
    command = [sys.executable, "-c", _HOLD, *map(str, paths)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == "held\n"
        try:
            yield
        finally:
            other.stdin.close()


def test_every_database_has_its_service(lab: RunningLab) -> None:
    """No database of the lab is left out below."""
    named = {path.relative_to(lab.state).as_posix() for path in databases(lab)}
    assert named == {
        "p/provider.db",
        "h/host1/agent/host.db",
        *(f"t/{tenant}/{name}.db" for tenant in ("alice", "bob") for name in ("registrar", "verifier")),
    }


def test_databases_that_another_program_locks_for_a_while(lab: RunningLab) -> None:
    """All of them at once: attested runs out and comes back, no process ends, and nobody enrols anew."""
    before, keys = lab.pids(), enrolled(lab)
    with Eye(lab) as eye:
        with held(databases(lab)):
            since = time.time()
            time.sleep(LOCKED_S)  # the length of the fault; it ends by itself
        lab.until_attested(count=3)
    assert [guest for guest in lab.guests() if not eye.saw(guest, lambda look: not look.attested, since)] == []
    assert (lab.pids(), enrolled(lab)) == (before, keys)
    assert (damaged(lab), tracebacks(lab)) == ([], [])


@pytest.mark.needs_mount
def test_services_on_a_read_only_disk_are_tried_until_it_can_be_written(lab: RunningLab) -> None:
    """Each that is started there names its database and says what to do; when it can be written, all go on."""
    keys = enrolled(lab)
    places = sorted({path.parent for path in databases(lab)})
    with Eye(lab):
        with contextlib.ExitStack() as stack:
            for place in places:
                stack.enter_context(mounted(place, "--bind", "-o", "ro", str(place)))
            since = time.time()
            for service in SETTINGS:
                lab.kill(service)
            for service in SETTINGS:
                said = lab.until(f"{service} says why", lambda name=service: why(lab, name, since), 60)
                assert f"database sqlite+aiosqlite:///{lab.state}/" in said
                assert "writable" in said, said
        lab.until_attested(count=3)
    assert enrolled(lab) == keys
    assert (damaged(lab), tracebacks(lab)) == ([], [])


def test_damaged_databases_are_named_and_restored_from_their_backups(lab: RunningLab, tmp_path: Path) -> None:
    """Each service says which file and which command; after it the supervisor starts it, and nobody enrols anew."""
    keys = enrolled(lab)
    for service, settings in SETTINGS.items():
        done = lab.run("db", "backup", "--config", str(lab.state / settings), "--out", str(tmp_path / service))
        assert done.returncode == 0, done.stderr
    assert lab.run("lab", "down").returncode == 0
    for path in databases(lab):
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # a log that is left would mend what follows
        with path.open("r+b") as file:
            file.seek(4096)
            file.write(b"\xa5" * (path.stat().st_size - 4096))
    since = time.time()
    refused = lab.run("lab", "up")
    assert refused.returncode in {1, 2}, refused.stdout
    assert "Traceback" not in refused.stderr
    assert "harness db restore" in refused.stderr + refused.stdout, refused.stderr + refused.stdout
    for service in SETTINGS:
        said = lab.until(f"{service} says why", lambda name=service: why(lab, name, since), 60)
        assert f"database sqlite+aiosqlite:///{lab.state}/" in said
        assert "restore a backup with `harness db restore`" in said
    for service, settings in SETTINGS.items():
        done = lab.run("db", "restore", "--config", str(lab.state / settings), "--from", str(tmp_path / service))
        assert done.returncode == 0, done.stderr
    lab.until_attested(count=3)
    assert enrolled(lab) == keys
    assert not lab.up()["changed"]
    assert damaged(lab) == []
