"""A private PostgreSQL server of the distribution's packages, for tests: started once, with a database for each test.

It listens on a UNIX socket in a short folder only, trusts whoever reaches that, does not sync to the disk, and ends
with the test run. It refuses to run as root: there it runs as ``postgres``, or ``nobody``.
"""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

USER = "harness"
PORT = 5432
_START_S = 120.0
_STOP_S = 60.0
_POLL_S = 0.02
_SETTINGS = {
    "listen_addresses": "",
    "fsync": "off",
    "full_page_writes": "off",
    "shared_buffers": "16MB",
    "max_connections": "100",
    "dynamic_shared_memory_type": "mmap",
    "timezone": "UTC",
}


def program(name: str) -> Path | None:
    """A program of the newest server here: Debian keeps it beside the version, Fedora in PATH."""
    versions = [path for path in Path("/usr/lib/postgresql").glob("*") if path.name.isdigit()]
    for folder in sorted(versions, key=lambda path: int(path.name), reverse=True):
        if (folder / "bin" / name).exists():
            return folder / "bin" / name
    found = shutil.which(name)
    return None if found is None else Path(found)


class PostgresServer:
    """The server. `start` and `stop` may be called again and again: the databases stay."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="hpg"))
        self._process: subprocess.Popen[bytes] | None = None
        self._numbers = itertools.count(1)
        self._data = self.folder / "data"
        owner = _unprivileged()
        if owner is not None:
            os.chown(self.folder, owner.pw_uid, owner.pw_gid)
        self._as_user = [] if owner is None else _setpriv(owner)
        options = ("-D", self._data, "-U", USER, "-A", "trust", "-E", "UTF8", "--locale=C", "-N")
        self._run(program("initdb"), *options, prefix=self._as_user)

    @property
    def pid(self) -> int:
        """Of the server that runs."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Starts it and waits until it answers."""
        assert self._process is None
        settings = [word for name, value in _SETTINGS.items() for word in ("-c", f"{name}={value}")]
        command = [*self._as_user, str(program("postgres")), "-D", str(self._data), "-k", str(self.folder), *settings]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/")
        until = time.monotonic() + _START_S
        while not self._answers():
            log_text = (self.folder / "log").read_text(errors="replace")
            assert self._process.poll() is None, f"PostgreSQL ended: {log_text}"
            assert time.monotonic() < until, f"PostgreSQL does not answer: {log_text}"
            time.sleep(_POLL_S)  # nothing tells when it is ready but an answer

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """Stops it: at once and in order (SIGINT), or as a crash does (SIGQUIT)."""
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(how)
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(_STOP_S)

    def close(self) -> None:
        """Stops it and removes what it kept."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def new_database(self) -> str:
        """An empty database's URL."""
        name = f"test{next(self._numbers)}"
        self.sql("postgres", f"CREATE DATABASE {name}")
        return self.url(name)

    def url(self, database: str) -> str:
        """Database's URL."""
        return f"postgresql+asyncpg://{USER}@/{database}?host={self.folder}&port={PORT}"

    def sql(self, database: str, statements: str) -> str:
        """Runs SQL as the superuser; the rows, as text."""
        options = ("-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-h", self.folder, "-p", PORT, "-U", USER)
        return self._run(program("psql"), *options, "-d", database, "-f", "-", text=statements)

    def _answers(self) -> bool:
        command = [str(program("pg_isready")), "-q", "-h", str(self.folder), "-p", str(PORT)]
        return subprocess.run(command, timeout=_START_S, check=False).returncode == 0

    def _run(self, path: Path | None, *words: object, prefix: Sequence[str] = (), text: str = "") -> str:
        command = [*prefix, str(path), *map(str, words)]
        ran = subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=240, check=False, cwd=self.folder
        )
        assert ran.returncode == 0, ran.stderr
        return ran.stdout


def _unprivileged() -> pwd.struct_passwd | None:
    """Who the server runs as, where that is not who runs the tests."""
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name: entry for entry in pwd.getpwall()}
    return names.get("postgres") or names["nobody"]


def _setpriv(owner: pwd.struct_passwd) -> list[str]:
    ids = (f"--reuid={owner.pw_uid}", f"--regid={owner.pw_gid}", "--clear-groups")
    return ["setpriv", *ids, "--pdeathsig=INT"]
