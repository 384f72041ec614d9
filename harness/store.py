"""Databases: transactions that do not overtake each other, typed errors, a schema version.

SQLite in a file by default; any URL that SQLAlchemy's asyncio supports. Tables live with their owners
(``provider/tables.py``, ``tenant/tables.py``).

Invariants:
    1. A database with another schema than the program's is refused, never written.
    2. An error of the database is a StoreError; an error of the caller inside a transaction rolls it back.
    3. Transactions are serialisable: what one has read is still true when it commits, or it fails.
    4. A SQLite file is readable by its owner only; no password of a URL gets into an error.

Spec: SQLAlchemy 2 (asyncio; "Serializable isolation" of the pysqlite dialect); SQLite, write-ahead log.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from sqlalchemy import Column, Connection, Integer, MetaData, String, Table, event, insert, select, update
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

from harness.errors import StoreError

_BUSY_MS = 5000
_DEADLINE_S = 20.0


class Store:
    """An open database. Made by `open_store`; closed by `close`.

    Args:
        engine: connected to it.
        deadline_s: for one transaction.
    """

    def __init__(self, engine: AsyncEngine, *, deadline_s: float = _DEADLINE_S) -> None:
        self._engine = engine
        self._deadline_s = deadline_s
        self._sessions = async_sessionmaker(engine, expire_on_commit=False)

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[AsyncSession]:
        """A session in a transaction: committed at the end, rolled back on an exception.

        On SQLite it holds the database's one write lock: it is to be short, and waits for nothing but the database.

        Raises:
            StoreError: the database refuses, or is not done in time; the transaction is rolled back.

        *Cancellation:* the transaction is rolled back.
        """
        try:
            async with asyncio.timeout(self._deadline_s) as deadline, self._sessions.begin() as session:
                await self._connect(session)
                yield session
        except TimeoutError as error:
            if not deadline.expired():
                raise
            raise StoreError(f"{_name(self._engine.url)}: not done within {self._deadline_s:g} s") from error
        except SQLAlchemyError as error:
            raise StoreError(f"{_name(self._engine.url)}: {_reason(error)}") from error

    async def _connect(self, session: AsyncSession) -> None:
        try:
            await session.connection()
        except OSError as error:  # a network's: the driver hands it on as it is
            if isinstance(error, TimeoutError):
                raise
            raise StoreError(f"{_name(self._engine.url)}: {_reason(error)}") from error

    async def close(self) -> None:
        """Closes all connections.

        *Cancellation:* they are being closed all the same.
        """
        await self._engine.dispose()


async def open_store(url: str, metadata: MetaData, *, component: str, version: int) -> Store:
    """Opens a database and makes the tables that it lacks.

    Args:
        url: SQLAlchemy URL, for example ``sqlite+aiosqlite:////var/lib/harness/tenant.db``.
        metadata: the tables.
        component: whose tables these are; several components may share a database.
        version: schema version of this program.

    Raises:
        StoreError: unusable URL, unreachable, read-only or corrupt database, or one with another schema.

    *Cancellation:* nothing is left open.
    """
    parsed, engine = _engine(url)
    try:
        async with asyncio.timeout(_DEADLINE_S):
            await asyncio.to_thread(_make_sqlite_file, parsed)
        async with asyncio.timeout(_DEADLINE_S), engine.begin() as connection:
            await _check_version(connection, component, version)
            await connection.run_sync(metadata.create_all)
    except (SQLAlchemyError, sqlite3.Error, OSError) as error:  # a refused connection and our deadline are OSErrors
        await engine.dispose()
        raise StoreError(f"{_name(parsed)}: {_reason(error)}") from error
    except BaseException:
        await engine.dispose()
        raise
    return Store(engine)


def _engine(url: str) -> tuple[URL, AsyncEngine]:
    scheme = url.split(":", 1)[0][:40]
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() != "sqlite":
            return parsed, create_async_engine(parsed, isolation_level="SERIALIZABLE")
        engine = create_async_engine(parsed)
    except (SQLAlchemyError, ImportError, ValueError) as error:  # unknown, without asyncio, or its driver is missing
        raise StoreError(f"database URL with scheme {scheme!r} cannot be used: {_reason(error)}") from error
    event.listen(engine.sync_engine, "connect", _prepare_sqlite)
    event.listen(engine.sync_engine, "begin", _begin_sqlite)
    return parsed, engine


def _make_sqlite_file(url: URL) -> None:
    """Makes a SQLite file where none is: private, and with its write-ahead log switched on.

    It is made under another name. Two that switch at once would not wait for each other (`busy_timeout` does not hold
    there), and closing a descriptor of a file that SQLite has open in this process would drop SQLite's locks on it.
    """
    path = url.database if url.get_backend_name() == "sqlite" else None
    if not path or path.startswith((":memory:", "file:")) or os.path.lexists(path):
        return
    descriptor, half = tempfile.mkstemp(dir=os.path.dirname(path) or ".", prefix=".new-database-")  # 0600
    os.close(descriptor)
    try:
        with contextlib.closing(sqlite3.connect(half)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
        with contextlib.suppress(FileExistsError):  # somebody else was faster
            os.link(half, path)
    finally:
        os.unlink(half)


async def _check_version(connection: AsyncConnection, component: str, version: int) -> None:
    versions = Table(
        "schema_version",
        MetaData(),
        Column("component", String(64), primary_key=True),
        Column("version", Integer, nullable=False),
    )
    await connection.run_sync(versions.metadata.create_all)
    found = await connection.scalar(select(versions.c.version).where(versions.c.component == component))
    if found is None:
        await connection.execute(insert(versions).values(component=component, version=version))
    elif found != version:
        age = "newer" if found > version else "older"
        raise StoreError(f"the {component} database has schema {found}, {age} than this program's schema {version}")
    else:  # a read-only database shows itself now, not at the first guest
        await connection.execute(update(versions).where(versions.c.component == component).values(version=version))


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # else the driver begins a transaction at the first write, after the reads
    cursor = connection.cursor()
    for pragma in (f"busy_timeout={_BUSY_MS}", "journal_mode=WAL", "foreign_keys=ON", "synchronous=NORMAL"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _name(url: URL) -> str:
    return f"database {url.render_as_string(hide_password=True)}"


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, DBAPIError) and error.orig is not None:
        return str(error.orig)
    return str(error)
