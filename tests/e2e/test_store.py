"""Databases: a real SQLite file and a real PostgreSQL server, several connections, and files that are no database."""

from __future__ import annotations

import asyncio
import sqlite3
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from sqlalchemy import ForeignKey, event, insert, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from harness.errors import NotFound, StoreError
from harness.store import Store, open_store
from harness.store_file import make
from tests.support.databases import sqlite_url, write_migrations
from tests.support.postgres import PostgresServer

WAIT_S = 120


class Base(DeclarativeBase):
    pass


class Host(Base):
    __tablename__ = "hosts"
    name: Mapped[str] = mapped_column(primary_key=True)
    rounds: Mapped[int] = mapped_column(default=0)


class Guest(Base):
    __tablename__ = "guests"
    name: Mapped[str] = mapped_column(primary_key=True)
    host: Mapped[str] = mapped_column(ForeignKey("hosts.name"))


@pytest.fixture
def migrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The steps of a few made-up components."""
    folder = tmp_path_factory.mktemp("migrations")
    for component in ("tenant", "other", "c0", "c1", "c2"):
        write_migrations(folder, component, 1)
    return folder


Opener = Callable[..., Awaitable[Store]]


@pytest.fixture
async def opened(migrations: Path) -> AsyncIterator[Opener]:
    """Opens stores, which are closed afterwards."""
    stores = []

    async def opener(url: str, *, version: int = 1, component: str = "tenant", migrations: Path = migrations) -> Store:
        async with asyncio.timeout(WAIT_S):
            made = await open_store(url, Base.metadata, component=component, version=version, migrations=migrations)
        stores.append(made)
        return made

    yield opener
    for made in stores:
        await made.close()


@pytest.fixture
async def store(opened: Opener, database_url: str) -> Store:
    return await opened(database_url)


@pytest.fixture
def file_url(tmp_path: Path) -> str:
    return sqlite_url(tmp_path / "t.db")


def names(folder: Path, pattern: str) -> list[str]:
    return [path.name for path in folder.glob(pattern)]


def modes(folder: Path) -> set[int]:
    return {file.stat().st_mode & 0o777 for file in folder.iterdir()}


async def rounds(store: Store) -> int | None:
    async with store.begin() as session:
        host = await session.get(Host, "h")
        return None if host is None else host.rounds


async def test_what_was_committed_is_there_after_a_restart(opened: Opener, database_url: str) -> None:
    """A record outlives the process that wrote it."""
    first = await opened(database_url)
    async with first.begin() as session:
        session.add(Host(name="h", rounds=3))
    await first.close()
    assert await rounds(await opened(database_url)) == 3


async def test_sqlite_is_set_up(opened: Opener, file_url: str, tmp_path: Path) -> None:
    """Write-ahead log that is on the disk at each commit, foreign keys, a bounded wait for locks; private files."""
    store = await opened(file_url)
    async with store.begin() as session:
        found = {
            name: await session.scalar(text(f"PRAGMA {name}"))
            for name in ("journal_mode", "foreign_keys", "busy_timeout", "synchronous")
        }
        session.add(Host(name="h"))
        await session.flush()
        assert modes(tmp_path) == {0o600}
    assert found == {"journal_mode": "wal", "foreign_keys": 1, "busy_timeout": 5000, "synchronous": 2}


async def test_an_exception_rolls_back(store: Store) -> None:
    """An error of the caller inside a transaction undoes it and comes out as it is."""

    async def write_and_fail() -> None:
        async with store.begin() as session:
            session.add(Host(name="h"))
            await session.flush()
            raise NotFound("x")

    with pytest.raises(NotFound):
        await write_and_fail()
    assert await rounds(store) is None


async def test_cancellation_rolls_back(store: Store) -> None:
    """A cancelled transaction leaves nothing, and no lock."""
    inside = asyncio.Event()

    async def write() -> None:
        async with store.begin() as session:
            session.add(Host(name="h"))
            await session.flush()
            inside.set()
            await asyncio.Event().wait()

    async with asyncio.timeout(WAIT_S):
        task = asyncio.create_task(write())
        await inside.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert await rounds(store) is None
        async with store.begin() as session:
            session.add(Host(name="h", rounds=1))


async def test_foreign_keys_are_enforced(store: Store) -> None:
    """A guest of no host is refused, as a StoreError, and not stored."""
    with pytest.raises(StoreError, match=r"(?i)foreign key"):
        async with store.begin() as session:
            session.add(Guest(name="g", host="nowhere"))


async def test_a_caller_may_catch_what_its_flush_violates(store: Store) -> None:
    """Inside the transaction a violated constraint is SQLAlchemy's own error: the caller knows what it means."""
    async with store.begin() as session:
        session.add(Host(name="h", rounds=1))

    async def write_again() -> None:
        async with store.begin() as session:
            try:
                await session.execute(insert(Host).values(name="h", rounds=2))
            except IntegrityError:
                raise NotFound("mapped") from None

    with pytest.raises(NotFound):
        await write_again()
    assert await rounds(store) == 1


async def test_an_error_tells_no_value_of_a_row(store: Store) -> None:
    """What a statement was given, a key or a secret, is in no error text, and so in no log."""
    async with store.begin() as session:
        session.add(Host(name="5ec3e7"))

    async def write_again() -> None:
        async with store.begin() as session:
            await session.execute(insert(Host).values(name="5ec3e7", rounds=2))

    with pytest.raises(StoreError) as refused:
        await write_again()
    cause = refused.value.__cause__
    assert isinstance(cause, IntegrityError)
    assert "INSERT INTO hosts" in str(cause)
    assert "[parameters: (" not in str(cause)


async def test_transactions_do_not_overtake_each_other(store: Store) -> None:
    """Forty concurrent read-then-write transactions lose no update."""
    async with store.begin() as session:
        session.add(Host(name="h", rounds=0))

    async def count() -> None:
        async with store.begin() as session:
            found = await session.scalar(select(Host.rounds).where(Host.name == "h"))
            assert found is not None
            await session.execute(update(Host).where(Host.name == "h").values(rounds=found + 1))

    async with asyncio.timeout(WAIT_S):
        await asyncio.gather(*(count() for _ in range(40)))
    assert await rounds(store) == 40


async def test_only_one_of_two_stores_takes_what_is_free(opened: Opener, database_url: str) -> None:
    """Check-then-insert is safe across two processes' stores on one database: one wins, the other sees it."""
    stores = [await opened(database_url) for _ in range(2)]

    async def take(store: Store, number: int) -> bool:
        async with store.begin() as session:
            if await session.get(Host, "h") is not None:
                return False
            session.add(Host(name="h", rounds=number))
            return True

    async with asyncio.timeout(WAIT_S):
        assert sorted(await asyncio.gather(*(take(store, at) for at, store in enumerate(stores)))) == [False, True]


async def test_many_open_one_new_file_at_once(opened: Opener, tmp_path: Path) -> None:
    """Services that share a database may start together, again and again: the file and its tables are made once."""
    for turn in range(5):
        url = sqlite_url(tmp_path / f"{turn}.db")
        stores = await asyncio.gather(*(opened(url, component=f"c{at % 3}") for at in range(8)))
        for store in stores:
            assert await rounds(store) is None
        await asyncio.gather(*(store.close() for store in stores))
    assert not names(tmp_path, ".new-*")
    assert not names(tmp_path, "*.lock")


@pytest.mark.needs_postgres
async def test_many_open_one_new_database_at_once(opened: Opener, postgres: PostgresServer) -> None:
    """The same on a server, where services of one component share a database: its tables are made once."""
    for _ in range(3):
        url = postgres.new_database()
        stores = await asyncio.gather(*(opened(url) for _ in range(8)))
        for store in stores:
            assert await rounds(store) is None
        await asyncio.gather(*(store.close() for store in stores))


def test_a_new_file_has_its_log_before_anybody_opens_it(tmp_path: Path) -> None:
    """SQLite does not wait when two switch the log on at once: the file appears with it (file format, 1.3: 18, 19)."""
    make(tmp_path / "t.db")
    assert (tmp_path / "t.db").read_bytes()[18:20] == b"\x02\x02"
    assert names(tmp_path, "*") == ["t.db"]


TAKE_THE_LOG_AWAY = """
import sqlite3, sys
print(sqlite3.connect(sys.argv[1], timeout=0).execute("PRAGMA journal_mode=DELETE").fetchone()[0])
"""


async def test_opening_drops_no_lock(opened: Opener, file_url: str, tmp_path: Path) -> None:
    """When a second store opens the file, another process still sees the first one's lock, and cannot take the
    write-ahead log away from under it."""
    first = await opened(file_url)
    async with first.begin() as session:
        session.add(Host(name="h"))
    await (await opened(file_url, component="other")).close()
    async with asyncio.timeout(WAIT_S):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", TAKE_THE_LOG_AWAY, str(tmp_path / "t.db")),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await process.communicate()
    assert (out, err.splitlines()[-1]) == (b"", b"sqlite3.OperationalError: database is locked")
    assert await rounds(first) == 0


async def test_a_locked_file_is_a_store_error(opened: Opener, file_url: str, tmp_path: Path) -> None:
    """Somebody who holds the lock for ever costs a bounded wait, then a StoreError; afterwards all is well."""
    made = await opened(file_url)
    impatient = Store(made._engine, deadline_s=0.5)
    holder = sqlite3.connect(tmp_path / "t.db", isolation_level=None)
    try:
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match=r"t\.db: not done within 0\.5 s; another program may hold its lock"):
            async with asyncio.timeout(WAIT_S), impatient.begin() as session:
                session.add(Host(name="h"))
    finally:
        holder.close()
    assert await rounds(made) is None


async def test_components_have_versions_of_their_own(opened: Opener, database_url: str, migrations: Path) -> None:
    """Two components share a database, each with its schema."""
    write_migrations(migrations, "other", 7)
    await (await opened(database_url, version=1)).close()
    await (await opened(database_url, version=7, component="other")).close()
    await (await opened(database_url, version=1)).close()


BAD_URLS = [
    "",
    "state.db",
    "oracle-of-delphi://x",
    "sqlite:///x.db",
    "postgresql+no_such_driver://u:5ec3e7@db/x",
]


@pytest.mark.parametrize("url", BAD_URLS)
async def test_unusable_urls(opened: Opener, url: str) -> None:
    """A URL without meaning, a driver without asyncio or one that is missing: a StoreError without its password."""
    with pytest.raises(StoreError) as refused:
        await opened(url)
    assert "5ec3e7" not in str(refused.value)
    assert refused.value.detail


def no_database(path: Path) -> Path:
    path.write_bytes(b"this is a text of some length, and no database at all" * 200)
    return path


@pytest.mark.parametrize("make", ["no_folder", "folder", "text", "read_only"])
async def test_files_that_cannot_be_used(opened: Opener, file_url: str, tmp_path: Path, make: str) -> None:
    """A missing folder, a folder, a file that is no database, a read-only one: a StoreError that names the file."""
    url = sqlite_url(tmp_path / "no" / "t.db")
    if make == "folder":
        url = sqlite_url(tmp_path)
    elif make == "text":
        url = sqlite_url(no_database(tmp_path / "t.db"))
    elif make == "read_only":
        await (await opened(file_url)).close()
        url = f"sqlite+aiosqlite:///file:{tmp_path / 't.db'}?mode=ro&uri=true"
    with pytest.raises(StoreError, match=str(tmp_path)):
        await opened(url)
    assert not names(tmp_path, "*.lock")
    assert not names(tmp_path.parent, f"{tmp_path.name}.lock")


async def test_a_file_that_breaks_later_is_a_store_error(opened: Opener, file_url: str, tmp_path: Path) -> None:
    """Damage under a running service is a typed error of that call."""
    made = await opened(file_url)
    async with made.begin() as session:
        session.add_all(Host(name=f"h{at}" * 50) for at in range(500))
    await made.close()
    again = await opened(file_url)
    size = (tmp_path / "t.db").stat().st_size
    with (tmp_path / "t.db").open("r+b") as file:
        file.seek(8192)
        file.write(b"\xa5" * (size - 8192))
    with pytest.raises(StoreError, match=r"t\.db: .*; restore a backup with `harness db restore`"):
        async with again.begin() as session:
            (await session.execute(select(Host))).all()


async def test_an_unreachable_server_is_a_store_error() -> None:
    """A network error that the driver hands on as it is becomes a StoreError, too."""
    engine = create_async_engine("sqlite+aiosqlite://")

    def refuse(*_: object, **__: object) -> None:
        raise ConnectionRefusedError(111, "Connection refused")

    event.listen(engine.sync_engine, "do_connect", refuse)
    unreachable = Store(engine)
    with pytest.raises(StoreError, match="Connection refused"):
        async with unreachable.begin():
            raise AssertionError("there is no transaction")
    await unreachable.close()
