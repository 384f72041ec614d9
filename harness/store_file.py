"""A SQLite database's file: made private and whole, leased while it is in use, and missed when it is gone.

The lease is a lock of the kernel (``flock``) on ``NAME.lock`` beside the file: shared for each store that has the
database open, exclusive for whoever replaces the file. It ends with the process, however that ends.

Invariants:
    1. A file is readable by its owner only from its first byte on, and appears with its write-ahead log switched on.
    2. While a store holds its lease, nobody of ours replaces the file.
    3. A file that was deleted or replaced under a store is found out before the next transaction: SQLite would go on
       writing into a file that nobody can find any more.

Spec: SQLite, "How To Corrupt An SQLite Database File" (2.2, 2.4: closing a descriptor of the file drops its locks, so
the lease is on a file of its own); flock(2); docs/adr/0010.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import sqlite3
import tempfile
import time
from pathlib import Path

from sqlalchemy.engine import URL

from harness.errors import StoreError
from harness.store_errors import name_of

_PATIENCE_S = 2.0
_TURN_S = 0.02
_PUT_BACK = "put the file or a backup back (`harness db restore`)"


def path_of(url: URL) -> Path | None:
    """File of a SQLite database; None for one in memory, one that is named as a URI, and for other databases."""
    path = url.database if url.get_backend_name() == "sqlite" else None
    return None if not path or path.startswith((":memory:", "file:")) else Path(path)


def make(path: Path) -> None:
    """Makes a SQLite file where none is.

    It is made under another name. Two that switch the log on at once would not wait for each other (`busy_timeout` does
    not hold there), and closing a descriptor of a file that SQLite has open in this process would drop SQLite's locks.

    Raises:
        StoreError: only its log is there: SQLite would play that into the new file.
        OSError, sqlite3.Error: it cannot be made.
    """
    if os.path.lexists(path):
        return
    log = Path(f"{path}-wal")
    if os.path.lexists(log) and not os.path.lexists(path):  # looked at again: both may have been made just now
        raise StoreError(
            f"database {path}: the file is missing, its log {log.name} is not; {_PUT_BACK}, or move the log away"
        )
    descriptor, half = tempfile.mkstemp(dir=path.parent, prefix=".new-database-")  # 0600
    os.close(descriptor)
    try:
        with contextlib.closing(sqlite3.connect(half)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
        with contextlib.suppress(FileExistsError):  # somebody else was faster
            os.link(half, path)
    finally:
        os.unlink(half)


class Lease:
    """The right to use, or to replace, a database's file. Made by `take`; given back by `release`.

    Args:
        url: of the database.
        path: of its file.
        descriptor: of the lock.
    """

    def __init__(self, url: URL, path: Path, descriptor: int) -> None:
        self._url = url
        self._path = path
        self._lock = descriptor
        self._file = _identity(path)

    @classmethod
    async def take(cls, url: URL, path: Path, *, exclusive: bool = False) -> Lease:
        """Takes the lease; waits a moment for one that is just being given back.

        Raises:
            StoreError: the database is in use (exclusive), or its file is being replaced.
            OSError: the lock cannot be made.

        *Cancellation:* nothing is held.
        """
        until = time.monotonic() + _PATIENCE_S
        while (descriptor := _try_lock(path, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)) is None:
            if time.monotonic() > until:
                reason = (
                    "a service has it open; stop the services that use it"
                    if exclusive
                    else "it is being restored; try again"
                )
                raise StoreError(f"{name_of(url)}: {reason}")
            await asyncio.sleep(_TURN_S)
        return cls(url, path, descriptor)

    def check(self) -> None:
        """Checks that the path still leads to the file that was opened.

        Raises:
            StoreError: it was deleted or replaced.
        """
        if _identity(self._path) != self._file:
            found = "the file was deleted or replaced while it was in use"
            raise StoreError(f"{name_of(self._url)}: {found}; stop the service, {_PUT_BACK}, and start it again")

    def release(self) -> None:
        """Gives the lease back; the last one takes the lock's file away."""
        if self._lock < 0:
            return
        with contextlib.suppress(OSError):  # others still use it
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(_lock_of(self._path))
        os.close(self._lock)
        self._lock = -1


def _lock_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


def _try_lock(path: Path, kind: int) -> int | None:
    lock = _lock_of(path)
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        status = os.fstat(descriptor)
        if _identity(lock) == (status.st_dev, status.st_ino):  # else its last user took it away just before
            return descriptor
    except BlockingIOError:
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
