"""Connections to a database, set up so that transactions of one component come one after the other.

SQLite: each transaction begins with the file's one write lock (``BEGIN IMMEDIATE``). PostgreSQL: each begins with one
advisory lock of the component, held until its end (docs/adr/0009). What a transaction has read is then still true when
it commits.

Invariants:
    1. No transaction of ours begins without that lock.
    2. A connection that broke is found out before it is used again.
    3. What is committed outlives a power cut: a certificate that exists is in the journal, a pinned key stays pinned.
       SQLite's log is therefore synced at each commit (``synchronous=FULL``), which costs a transaction that writes one
       fsync: 0.4 ms on an idle virtual disk, 3 ms on a busy one, where it took 0.04 ms without. Reading costs nothing
       more. On PostgreSQL it is the server's ``synchronous_commit``, which is on unless somebody turns it off.
    4. No value that a statement was given is in an error text.
    5. Whoever is connected to a PostgreSQL database holds its "in use" lock, shared, until the connection ends; nobody
       connects while a restore holds it alone.

Spec: SQLite, "PRAGMA synchronous"; SQLAlchemy 2 (asyncio; "Serializable isolation" of the pysqlite dialect; "Disconnect
handling - pessimistic"); PostgreSQL 13.3.5 (advisory locks).
"""

from __future__ import annotations

import hashlib
from typing import Any

from sqlalchemy import Connection, Engine, StaticPool, create_engine, event
from sqlalchemy.engine import URL, Dialect, make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from harness.errors import StoreError
from harness.store_errors import name_of, reason_of

_BUSY_MS = 5000
_IDLE_IN_TRANSACTION_MS = 60_000
IN_USE = "in use"
"""Name of the lock that a restore takes alone; no component is called that."""
APPLICATION = "harness"
"""Our connections' name at a PostgreSQL server."""


def engine_of(url: str, component: str) -> tuple[URL, AsyncEngine]:
    """The parsed URL and an engine; nothing is connected yet.

    Raises:
        StoreError: unknown database, or a driver that is missing or has no asyncio; without the URL's password.
    """
    scheme = url.split(":", 1)[0][:40]
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() == "sqlite":
            engine = create_async_engine(parsed, hide_parameters=True)
        else:
            engine = create_async_engine(
                parsed, hide_parameters=True, pool_pre_ping=True, connect_args=_connect_args(parsed)
            )
    except (SQLAlchemyError, ImportError, ValueError) as error:
        raise StoreError(f"database URL with scheme {scheme!r} cannot be used: {reason_of(error)}") from error
    if parsed.get_backend_name() == "sqlite":
        event.listen(engine.sync_engine, "connect", _prepare_sqlite)
        event.listen(engine.sync_engine, "begin", _begin_sqlite)
    elif parsed.get_backend_name() == "postgresql":
        event.listen(engine.sync_engine, "begin", _Turn(component))
        event.listen(engine.sync_engine, "connect", _InUse(parsed, engine.dialect))
    return parsed, engine


def thread_engine_of(url: URL) -> Engine:
    """Engine for a SQLite file with one connection, for one thread; nothing is connected yet."""
    engine = create_engine(
        url.set(drivername="sqlite"),
        hide_parameters=True,
        poolclass=StaticPool,
        connect_args={"check_same_thread": False},  # it is closed by whoever ends the thread
    )
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def lock_number(component: str) -> int:
    """Number of a component's advisory lock: 63 bits that follow from its name."""
    return int.from_bytes(hashlib.sha256(f"harness {component}".encode()).digest()[:8], "big") >> 1


def _connect_args(url: URL) -> dict[str, Any]:
    """A transaction whose program hangs or is cut off must not hold the component's lock for ever."""
    if url.get_driver_name() != "asyncpg":
        return {}
    settings = {
        "application_name": APPLICATION,
        "idle_in_transaction_session_timeout": str(_IDLE_IN_TRANSACTION_MS),
    }
    return {"server_settings": settings}


class _Turn:
    def __init__(self, component: str) -> None:
        self._statement = f"SELECT pg_advisory_xact_lock({lock_number(component)})"

    def __call__(self, connection: Connection) -> None:
        connection.exec_driver_sql(self._statement)


class _InUse:
    """A lock of the session, not of a transaction: it is held as long as the connection."""

    def __init__(self, url: URL, dialect: Dialect) -> None:
        self._url = url
        self._dialect = dialect
        self._statement = f"SELECT pg_try_advisory_lock_shared({lock_number(IN_USE)})"

    def __call__(self, connection: Any, _record: Any) -> None:
        try:
            self._hold(connection)
        except BaseException:
            self._dialect.do_terminate(connection)  # the pool does not have it yet
            raise

    def _hold(self, connection: Any) -> None:
        cursor = connection.cursor()
        cursor.execute(self._statement)
        [held] = cursor.fetchone()
        cursor.close()
        connection.rollback()  # the transaction in which the driver asked; the lock stays
        if not held:
            raise StoreError(f"{name_of(self._url)}: it is being restored; try again when that is done")


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # else the driver begins a transaction at the first write, after the reads
    cursor = connection.cursor()
    for pragma in (f"busy_timeout={_BUSY_MS}", "journal_mode=WAL", "foreign_keys=ON", "synchronous=FULL"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")
