"""The log's file: rotation by size, whole lines, and what happens when the disk is full."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.log_file import LogFile, Rotation

SMALL = Rotation(max_bytes=1000, keep=3)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.log"


@pytest.fixture
def log(path: Path) -> Iterator[LogFile]:
    made = LogFile(path, service="test", rotation=SMALL)
    yield made
    made.close()


def test_a_full_file_becomes_number_one_and_the_oldest_goes(path: Path, log: LogFile) -> None:
    """Every file has whole lines only and about the bound's size; only as many as are to be kept stay; all private."""
    for number in range(200):
        log.write(f"{number:060d}")
    names = {file.name for file in path.parent.iterdir()}
    assert names == {"x.log", "x.log.1", "x.log.2", "x.log.3"}
    newest_first = [path, *(path.with_name(f"x.log.{n}") for n in (1, 2, 3))]
    lines = [line for file in reversed(newest_first) for line in file.read_text().splitlines()]
    assert [int(line) for line in lines] == list(range(200 - len(lines), 200))
    assert all(file.stat().st_size < 1000 + 61 for file in newest_first)
    assert {file.stat().st_mode & 0o777 for file in newest_first} == {0o600}


def test_threads_do_not_mix_their_lines(path: Path) -> None:
    """Four threads write while the file is rotated: every line is whole, none is lost."""
    log = LogFile(path, rotation=Rotation(max_bytes=2000, keep=500))

    def write_all(mark: str) -> None:
        for number in range(300):
            log.write(mark * 50 + str(number))

    threads = [threading.Thread(target=write_all, args=(mark,)) for mark in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=240)
    log.close()
    lines = [line for file in path.parent.iterdir() for line in file.read_text().splitlines()]
    assert sorted(lines) == sorted(mark * 50 + str(n) for mark in "abcd" for n in range(300))


def test_a_folder_that_cannot_be_written_loses_nothing(
    path: Path, log: LogFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file goes on beyond its bound when it cannot be rotated, and is rotated when it can."""

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "no")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", refuse)
        for number in range(50):
            log.write(f"{number:060d}")
    assert [int(line) for line in path.read_text().splitlines()] == list(range(50))


def test_a_full_disk_is_counted_and_told_when_it_is_over(tmp_path: Path) -> None:
    """Nothing is raised while the disk is full; a half line is ended; then the number of lost lines comes first."""
    script = """
import resource, signal, sys
from pathlib import Path
from harness.log_file import LogFile
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
log = LogFile(Path(sys.argv[1]), service="test")
log.write("first")
resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))
for number in range(3):
    log.write(f"lost {number}")
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.write("last")
"""
    path = tmp_path / "x.log"
    subprocess.run([sys.executable, "-c", script, str(path)], check=True, timeout=240)
    first, half, told, last = path.read_text().splitlines()
    assert (first, half, last) == ("first", "lost", "last")
    assert json.loads(told) == {"event": "log_lines_lost", "level": "error", "count": 3, "service": "test"}


@pytest.mark.parametrize(("found", "before"), [(b"", b""), (b"whole\n", b"whole\n"), (b"a\nhalf", b"a\nhalf\n")])
def test_a_half_line_that_was_found_is_ended_first(path: Path, found: bytes, before: bytes) -> None:
    """A process that ended on a full disk left it: the first line of the next one stands alone."""
    path.write_bytes(found)
    log = LogFile(path)
    log.write("next")
    log.close()
    assert path.read_bytes() == before + b"next\n"


def test_a_closed_log_writes_into_nobody_elses_file(path: Path, log: LogFile, tmp_path: Path) -> None:
    """Its descriptor's number is given to the next file that is opened; lines after the end are lost, also twice."""
    log.write("a line")
    log.close()
    with (tmp_path / "other").open("wb"):
        log.write("late")
        log.close()
    assert (path.read_text(), (tmp_path / "other").read_bytes()) == ("a line\n", b"")


def test_tracebacks_follow_into_the_new_file(tmp_path: Path) -> None:
    """What a library prints on standard output and error after a rotation is in the new file, not in the old one."""
    script = """
import os, sys
from pathlib import Path
from harness.log_file import LogFile, Rotation
log = LogFile(Path(sys.argv[1]), rotation=Rotation(max_bytes=100, keep=2), streams=True)
print("before", flush=True)
log.write("x" * 200)
log.write("rotated")
print("printed after", flush=True)
raise SystemError("traceback after")
"""
    path = tmp_path / "x.log"
    ended = subprocess.run([sys.executable, "-c", script, str(path)], check=False, timeout=240, capture_output=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, b"", b"")
    old, new = path.with_name("x.log.1").read_text(), path.read_text()
    assert old.splitlines() == ["before", "x" * 200]
    assert new.startswith("rotated\nprinted after\nTraceback")
    assert "SystemError: traceback after" in new


def test_standard_error_is_never_rotated(capfd: pytest.CaptureFixture[str]) -> None:
    """Without a file the lines go to standard error."""
    log = LogFile(None, rotation=SMALL)
    log.write("a line")
    log.close()
    assert capfd.readouterr().err == "a line\n"
