"""Backup and restore of a component's database, and what `harness db status` says of it.

SQLite is copied page by page while the service runs; PostgreSQL is left to its own `pg_dump` and `psql`.

Invariants:
    1. A backup appears whole, under its name, readable by its owner only; a file that is there is not overwritten.
    2. A restore refuses while somebody has the database open, and reads and judges the whole backup before it replaces
       anything; what was there is kept.
    3. A backup that says whose it is goes into a database of the same service only (`harness.store_backup_origin`).
    4. A backup of a newer schema than the program's is refused; an older one is migrated at the next start.

Spec: docs/adr/0010.
"""

from __future__ import annotations

import datetime
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from harness.errors import StoreError
from harness.store_backup_origin import Service, check_origin
from harness.store_backup_postgres import PostgresCopies
from harness.store_backup_sqlite import SqliteCopies
from harness.store_errors import name_of
from harness.store_file import path_of
from harness.store_schema import check_schema

Schemas = Mapping[str, int]
"""Schema of each component in a database or a backup."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Copied:
    """What a backup or a restore did.

    Args:
        schemas: of the copy.
        size: of the backup's file, in bytes.
        took_s: seconds.
        kept: where the database that was replaced is now.
    """

    schemas: Schemas
    size: int
    took_s: float
    kept: Path | None = None


class Copies(Protocol):
    """What each kind of database does in its own way; each call raises StoreError, also where the database is not."""

    async def schemas(self) -> Schemas:
        """Schemas of the database, which is checked for damage where that can be done."""

    async def copy_to(self, half: Path, origin: str | None = None) -> Schemas:
        """Copies the database into a file of this name, which says whose it is, and reads it again."""

    async def schemas_of(self, backup: Path) -> Schemas:
        """Reads a whole backup; its schemas."""

    async def origin_of(self, backup: Path) -> str | None:
        """Whose a backup is that has been read, where it says so."""

    async def replace_with(self, backup: Path, aside: str) -> Path | None:
        """Replaces the database, if nobody has it open; keeps what was there under a name with this ending."""


async def schemas_in_use(url: str) -> Schemas:
    """Schemas of the components in a database; nothing is written.

    Raises:
        StoreError: it is not there, cannot be reached, or is damaged.

    *Cancellation:* nothing has happened.
    """
    return await _copies_of(url).schemas()


async def back_up(url: str, target: Path, *, service: Service | None = None) -> Copied:
    """Copies a database into a file, consistent as of one moment, while services may use it.

    Args:
        url: of the database.
        target: the file, which is made.
        service: whose the database is; the backup says so.

    Raises:
        StoreError: the database or the file cannot be used, or the file is there already.

    *Cancellation:* there is no file.
    """
    copies, start = _copies_of(url), time.monotonic()
    with _file_errors(target), _whole(target) as half:
        schemas = await copies.copy_to(half, None if service is None else service.whose)
    return Copied(schemas=schemas, size=_size(target), took_s=time.monotonic() - start)


async def restore(
    url: str, source: Path, programs: Schemas, *, component: str | None = None, service: Service | None = None
) -> Copied:
    """Puts a backup in the place of a database that nobody has open.

    Args:
        url: of the database; it need not be there (SQLite), or be filled (PostgreSQL).
        source: a file that `back_up` made.
        programs: the schema of each component that this program knows.
        component: that the backup must hold.
        service: whose the database is; a backup of another service is not for it.

    Raises:
        StoreError: the backup is damaged, newer than the program, another component's or another service's; the
            database is in use.

    *Cancellation:* the old database is there, or the new one; never a part.
    """
    copies, start = _copies_of(url), time.monotonic()
    with _file_errors(source):
        size = _size(source)
        schemas = await copies.schemas_of(source)
        _judge(source, schemas, programs, component)
        check_origin(source, await copies.origin_of(source), service)
        now = datetime.datetime.now(datetime.UTC)
        kept = await copies.replace_with(source, f"before-restore-{now:%Y%m%dT%H%M%S.%fZ}")
    return Copied(schemas=schemas, size=size, took_s=time.monotonic() - start, kept=kept)


def _judge(source: Path, schemas: Schemas, programs: Schemas, component: str | None) -> None:
    name = f"backup {source}"
    if not schemas:
        raise StoreError(f"{name}: it holds no database of the harness")
    for found, schema in schemas.items():
        if found not in programs or component not in (None, *schemas):
            raise StoreError(f"{name}: it holds the tables of {found}; this database is for {component or 'others'}")
        check_schema(name, found, schema, programs[found])


def _copies_of(url: str) -> Copies:
    try:
        parsed = make_url(url)
    except (SQLAlchemyError, ValueError) as error:
        raise StoreError(f"database URL with scheme {url.split(':', 1)[0][:40]!r} cannot be used") from error
    path = path_of(parsed)
    if path is not None:
        return SqliteCopies(parsed, path)
    if parsed.get_backend_name() == "postgresql":
        return PostgresCopies(parsed)
    raise StoreError(f"{name_of(parsed)}: backup and restore know SQLite files and PostgreSQL servers only")


def _size(path: Path) -> int:
    return path.stat().st_size


@contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """A private file that gets its name when it is complete and on the disk."""
    if os.path.lexists(target):
        raise StoreError(f"backup {target}: the file is there already; choose another name")
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:64]}.")  # 0600
    half = Path(name)
    try:
        yield half
        os.fsync(descriptor)
        os.link(half, target)  # fails if somebody made it meanwhile
    finally:
        os.close(descriptor)
        half.unlink(missing_ok=True)


@contextmanager
def _file_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"backup {path}: {error.strerror or error}") from error
