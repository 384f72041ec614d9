"""Databases: transactions that do not overtake each other, typed errors, a schema version.

SQLite in a file by default, PostgreSQL by URL. Tables live with their owners (``provider/tables.py``,
``tenant/tables.py``), and how they came to be in ``migrations/``.

Invariants:
    1. A database with an older schema is migrated before it is used; one with a newer schema is refused, not written.
    2. An error of the database is a StoreError that names it and says what to do; an error of the caller inside a
       transaction rolls it back.
    3. Transactions are serialisable: what one has read is still true when it commits, or it fails.
    4. A SQLite file is readable by its owner only; no password of a URL gets into an error.

Spec: SQLAlchemy 2 (asyncio); docs/adr/0008 (schemas), docs/adr/0009 (one writer at a time).
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path

from sqlalchemy import Connection, MetaData
from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from harness import events, store_file
from harness.store_engine import engine_of
from harness.store_errors import late, store_error
from harness.store_file import Lease
from harness.store_schema import MIGRATIONS, bring_to
from harness.store_thread import ThreadTransactions

_DEADLINE_S = 20.0
_MIGRATION_S = 600.0


class Store:
    """An open database. Made by `open_store`; closed by `close`.

    Args:
        engine: connected to it.
        lease: of its file, if it is one.
        deadline_s: for one transaction.
    """

    def __init__(self, engine: AsyncEngine, *, lease: Lease | None = None, deadline_s: float = _DEADLINE_S) -> None:
        self._engine = engine
        self._lease = lease
        self._deadline_s = deadline_s
        self._sessions = async_sessionmaker(engine, expire_on_commit=False)
        is_file = store_file.path_of(engine.url) is not None
        self._thread = ThreadTransactions(engine.url, deadline_s=deadline_s) if is_file else None

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[AsyncSession]:
        """A session in a transaction: committed at the end, rolled back on an exception.

        It holds the component's one lock: it is to be short, and waits for nothing but the database.

        Raises:
            StoreError: the database refuses, or is not done in time; the transaction is rolled back.

        *Cancellation:* the transaction is rolled back.
        """
        async with self._in_time(), self._sessions.begin() as session:
            with self._reaching():
                await session.connection()
            yield session

    async def run(self, work: Callable[[Connection], None]) -> None:
        """Does statements without objects in a transaction of their own, at a fraction of the CPU time of `begin`.

        Args:
            work: executes them; called in another thread where the database is a file. It may be called for a caller
                that has been cancelled.

        Raises:
            StoreError: as `begin`.
            Exception: what the work raises.

        *Cancellation:* a transaction that began may still be committed.
        """
        if self._thread is None:
            async with self._in_time(), AsyncExitStack() as stack:
                with self._reaching():
                    connection = await stack.enter_async_context(self._engine.begin())
                await connection.run_sync(work)
            return
        with self._reaching():
            try:
                await self._thread.run(work)
            except SQLAlchemyError as error:
                raise store_error(self._engine.url, error) from error

    @asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        url = self._engine.url
        try:
            async with asyncio.timeout(self._deadline_s) as deadline:
                yield
        except TimeoutError as error:
            if not deadline.expired():
                raise
            raise late(url, self._deadline_s) from error
        except SQLAlchemyError as error:
            raise store_error(url, error) from error

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        if self._lease is not None:
            self._lease.check()
        try:
            yield
        except OSError as error:  # a network's: the driver hands it on as it is
            if isinstance(error, TimeoutError):
                raise
            raise store_error(self._engine.url, error) from error

    async def close(self) -> None:
        """Closes all connections.

        *Cancellation:* they are being closed all the same.
        """
        try:
            if self._thread is not None:
                await self._thread.close()
            await self._engine.dispose()
        finally:
            if self._lease is not None:
                self._lease.release()


async def open_store(
    url: str, metadata: MetaData, *, component: str, version: int, migrations: Path = MIGRATIONS
) -> Store:
    """Opens a database, made or brought to this program's schema where that is needed.

    Args:
        url: SQLAlchemy URL, for example ``sqlite+aiosqlite:////var/lib/harness/tenant.db``.
        metadata: the tables.
        component: whose tables these are; services of one component may share a database.
        version: schema of this program.
        migrations: folder with a folder of alembic revisions for each component.

    Raises:
        StoreError: unusable URL, unreachable, read-only or corrupt database, or one with a newer schema.

    *Cancellation:* nothing is left open; a migration that was under way has not happened.
    """
    parsed, engine = engine_of(url, component)
    lease = None
    try:
        lease = await _leased(parsed)
        async with asyncio.timeout(_MIGRATION_S), engine.begin() as connection:
            found = await connection.run_sync(bring_to, component, version, metadata, migrations)
    except BaseException as error:
        await engine.dispose()
        if lease is not None:
            lease.release()
        if isinstance(error, SQLAlchemyError | sqlite3.Error | OSError):  # a refused connection and our deadline, too
            raise store_error(parsed, error) from error
        raise
    if found not in (None, version):
        events.emit("database_migrated", component=component, from_schema=found, to_schema=version)
    return Store(engine, lease=lease)


async def _leased(url: URL) -> Lease | None:
    path = store_file.path_of(url)
    if path is None:
        return None
    async with asyncio.timeout(_DEADLINE_S):
        await asyncio.to_thread(store_file.make, path)
        return await Lease.take(url, path)
