"""What happens to the SQLite file under a service that runs, for as long as a context lasts."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from tests.support.service_process import ServiceProcess


class Site(Protocol):
    """A service and its file."""

    @property
    def database(self) -> Path: ...

    @property
    def process(self) -> ServiceProcess: ...


class Fault(Protocol):
    """One of those below."""

    def __call__(self, site: Site, /) -> contextlib.AbstractContextManager[None]: ...


@contextlib.contextmanager
def locked(site: Site) -> Iterator[None]:
    """Another process holds the write lock for longer than anybody waits for it."""
    connection = sqlite3.connect(site.database, isolation_level=None)
    try:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")
    finally:
        connection.close()


@contextlib.contextmanager
def full(site: Site) -> Iterator[None]:
    """No byte more can be written to any file."""
    site.process.limit_files(0)
    yield
    site.process.limit_files(None)
