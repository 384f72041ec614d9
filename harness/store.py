"""Databases: one transaction at a time per caller, typed errors, a schema version.

SQLite in a file by default; any URL that SQLAlchemy's asyncio supports. Tables live with their owners
(``provider/tables.py``, ``tenant/tables.py``).

Invariants:
    1. A database that is newer than the program is refused, never written.
    2. An error of the database is a StoreError; an error of the caller inside a transaction rolls it back.

Spec: SQLAlchemy 2 (asyncio); SQLite, write-ahead log.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from sqlalchemy import Column, Integer, MetaData, String, Table, event, insert, select
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

from harness.errors import StoreError

_BUSY_MS = 5000


class Store:
    """An open database. Made by `open_store`; closed by `close`."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._sessions = async_sessionmaker(engine, expire_on_commit=False)

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[AsyncSession]:
        """A session in a transaction: committed at the end, rolled back on an exception.

        Raises:
            StoreError: the database refuses; the transaction is rolled back.

        *Cancellation:* the transaction is rolled back.
        """
        try:
            async with self._sessions.begin() as session:
                yield session
        except SQLAlchemyError as error:
            raise StoreError(f"database {self._engine.url.render_as_string()}: {_reason(error)}") from error

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
        StoreError: unusable URL, unreachable, read-only or corrupt database, or one that a newer program has written.

    *Cancellation:* nothing is left open.
    """
    try:
        engine = create_async_engine(make_url(url))
    except (ArgumentError, ImportError) as error:
        raise StoreError(f"database URL {url!r} cannot be used: {error}") from error
    if engine.dialect.name == "sqlite":
        event.listen(engine.sync_engine, "connect", _prepare_sqlite)
    try:
        async with engine.begin() as connection:
            await _check_version(connection, component, version)
            await connection.run_sync(metadata.create_all)
    except SQLAlchemyError as error:
        await engine.dispose()
        raise StoreError(f"database {engine.url.render_as_string()}: {_reason(error)}") from error
    except BaseException:
        await engine.dispose()
        raise
    return Store(engine)


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
    elif found > version:
        raise StoreError(
            f"the {component} database has schema {found}, this program knows up to {version}: use a newer program"
        )


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", f"busy_timeout={_BUSY_MS}", "foreign_keys=ON", "synchronous=NORMAL"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _reason(error: SQLAlchemyError) -> str:
    return str(error.orig) if isinstance(error, DBAPIError) and error.orig is not None else str(error)
