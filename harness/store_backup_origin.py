"""Whose a backup is: the service it was made for, kept inside the backup, so that a backup remains one file.

In a SQLite copy it is a table of one row, which a restored database does not have; behind a PostgreSQL archive it is a
last line, which `pg_restore` does not read: the archive's own directory says where each part begins.

Invariants:
    1. A backup without an origin (of an older program, or made by URL) has none; one that cannot be read is an error.
    2. The database that is backed up is not written.

It guards against a mistake, not against somebody who can write the backup: an origin can be taken out.

Spec: docs/adr/0010.
"""

from __future__ import annotations

import os
import re
import sqlite3
from dataclasses import dataclass
from pathlib import Path

from harness.errors import StoreError

_FORM = re.compile(r"[a-z][a-z-]{0,63}( of [a-z0-9][a-z0-9-]{0,62})?")
_MARK = b"\nharness backup origin: "
_TAIL = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """The service whose database is meant.

    Args:
        whose: kind and name, as in "tenant-verifier of alice".
        settings: its file.
    """

    whose: str
    settings: Path


def check_origin(backup: Path, found: str | None, service: Service | None) -> None:
    """Checks that a backup of this origin is for the service; where one of them is not known there is nothing to check.

    Raises:
        StoreError: it is another service's.
    """
    if found is not None and service is not None and found != service.whose:
        raise StoreError(f"{backup} is a backup of {found}; {service.settings} is {service.whose}")


def put_in_table(copy: sqlite3.Connection, origin: str | None) -> None:
    """Makes this the origin of a SQLite copy, in place of the one it may have; None takes it away."""
    copy.execute("DROP TABLE IF EXISTS backup_origin")
    if origin is not None:
        copy.execute("CREATE TABLE backup_origin (service TEXT NOT NULL)")
        copy.execute("INSERT INTO backup_origin VALUES (?)", (origin,))
    copy.commit()


def in_table(backup: Path, copy: sqlite3.Connection) -> str | None:
    """Origin of a SQLite copy.

    Raises:
        StoreError: it has one that is not ours.
    """
    if not copy.execute("SELECT 1 FROM sqlite_master WHERE name = 'backup_origin'").fetchall():
        return None
    rows = copy.execute("SELECT * FROM backup_origin LIMIT 2").fetchall()
    return _checked(backup, rows[0][0] if len(rows) == 1 else None)


def put_behind(archive: Path, origin: str | None) -> None:
    """Writes the origin behind a PostgreSQL archive that is complete."""
    if origin is not None:
        with archive.open("ab") as file:
            file.write(_MARK + origin.encode() + b"\n")


def behind(archive: Path) -> str | None:
    """Origin of a PostgreSQL archive.

    Raises:
        StoreError: it has one that is not ours.
        OSError: the file cannot be read.
    """
    with archive.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
        _, mark, line = file.read().rpartition(_MARK)
    if not mark:
        return None
    return _checked(archive, line[:-1].decode(errors="replace") if line.endswith(b"\n") else None)


def _checked(backup: Path, found: object) -> str:
    if not isinstance(found, str) or not _FORM.fullmatch(found):
        raise StoreError(f"backup {backup}: it does not say clearly whose it is")
    return found
