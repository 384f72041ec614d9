"""Copies of a SQLite database: taken online, and put in its place when nobody has it open.

Whether somebody has it open is asked twice: the lease tells of stores of ours, also of those that are just starting;
taking the write-ahead log away needs SQLite's own exclusive lock, and tells of everybody else.

Invariants:
    1. The database's path leads to the old file or to the new one at any moment, also after a crash.
    2. No log of the old file is left beside the new one.

Spec: SQLite, "Online Backup API", "Write-Ahead Logging" (9: leaving WAL mode); `harness.store_file`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from sqlalchemy import create_engine
from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from harness.errors import StoreError
from harness.store_backup_origin import in_table, put_in_table
from harness.store_errors import name_of, store_error
from harness.store_file import Lease
from harness.store_schema import schemas_in

_COPY_S = 600.0
_BUSY_S = 5.0


class SqliteCopies:
    """Implements `harness.store_backup.Copies`.

    Args:
        url: of the database.
        path: of its file.
    """

    def __init__(self, url: URL, path: Path) -> None:
        self._url = url
        self._path = path

    async def schemas(self) -> dict[str, int]:
        """See `Copies`."""
        with self._errors():
            return await asyncio.to_thread(_read, self._path)

    async def copy_to(self, half: Path, origin: str | None = None) -> dict[str, int]:
        """See `Copies`."""
        with self._errors():
            await asyncio.to_thread(_copy, self._path, half, origin)
            return await asyncio.to_thread(_read, half)

    async def schemas_of(self, backup: Path) -> dict[str, int]:
        """See `Copies`."""
        with _unreadable(backup):
            return await asyncio.to_thread(_read, backup)

    async def origin_of(self, backup: Path) -> str | None:
        """See `Copies`."""
        with _unreadable(backup):
            return await asyncio.to_thread(_origin, backup)

    async def replace_with(self, backup: Path, aside: str) -> Path | None:
        """See `Copies`."""
        with self._errors():
            lease = await Lease.take(self._url, self._path, exclusive=True)
            return await asyncio.to_thread(self._replace_leased, lease, backup, aside)

    def _replace_leased(self, lease: Lease, backup: Path, aside: str) -> Path | None:
        try:  # in this thread, which a cancellation does not end
            return self._replace(backup, aside)
        finally:
            lease.release()

    def _replace(self, backup: Path, aside: str) -> Path | None:
        descriptor, name = tempfile.mkstemp(dir=self._path.parent, prefix=f".{self._path.name[:64]}.")  # 0600
        new = Path(name)
        try:
            shutil.copyfile(backup, new)
            with contextlib.closing(sqlite3.connect(new)) as connection:
                put_in_table(connection, None)
                connection.execute("PRAGMA journal_mode=WAL")
            os.fsync(descriptor)
            kept = _keep(self._path, self._path.with_name(f"{self._path.name}.{aside}"))
            os.replace(new, self._path)
        finally:
            os.close(descriptor)
            new.unlink(missing_ok=True)
        _sync_folder(self._path.parent)
        return kept

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise StoreError(f"{name_of(self._url)}: another program has it open; end that program") from error
            raise store_error(self._url, error) from error
        except (sqlite3.Error, SQLAlchemyError, OSError) as error:
            raise store_error(self._url, error) from error


def _read(path: Path) -> dict[str, int]:
    """Reads every page; the schemas."""
    if not path.exists():
        raise sqlite3.OperationalError("unable to open database file: there is none")
    with contextlib.closing(_connect(path)) as connection:
        [(found,), *_] = connection.execute("PRAGMA integrity_check(1)").fetchall()
    if found != "ok":
        raise sqlite3.DatabaseError(f"database disk image is malformed: {' '.join(str(found).split())}")
    engine = create_engine("sqlite://", creator=lambda: _connect(path), poolclass=NullPool)
    with engine.connect() as checked:
        return schemas_in(checked)


def _origin(backup: Path) -> str | None:
    with contextlib.closing(_connect(backup)) as connection:
        return in_table(backup, connection)


@contextlib.contextmanager
def _unreadable(backup: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, SQLAlchemyError) as error:
        raise StoreError(f"backup {backup}: it cannot be read: {error}") from error


def _copy(source: Path, target: Path, origin: str | None) -> None:
    until = time.monotonic() + _COPY_S

    def progress(*_: int) -> None:  # asked after each step, also while another program's lock is in the way
        if time.monotonic() > until:
            raise TimeoutError

    with contextlib.closing(_connect(source)) as old, contextlib.closing(sqlite3.connect(target)) as new:
        old.backup(new, pages=1024, progress=progress, sleep=0.05)
        new.execute("PRAGMA journal_mode=DELETE")  # one file, which can be read where nobody may write
        put_in_table(new, origin)


def _keep(path: Path, aside: Path) -> Path | None:
    """Gives the old file a second name and takes its log away, or along."""
    if not path.exists():
        return None
    with contextlib.suppress(sqlite3.DatabaseError), contextlib.closing(_connect(path)) as old:
        try:
            old.execute("PRAGMA journal_mode=DELETE")
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise StoreError(f"database {path}: another program has it open; end that program") from error
    os.link(path, aside)
    for ending in ("-wal", "-shm"):  # of a file that is too damaged to be opened
        with contextlib.suppress(FileNotFoundError):
            os.rename(f"{path}{ending}", f"{aside}{ending}")
    return aside


def _connect(path: Path) -> sqlite3.Connection:
    """A connection that makes no file."""
    return sqlite3.connect(f"file:{quote(str(path.absolute()))}?mode=rw", uri=True, timeout=_BUSY_S)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
