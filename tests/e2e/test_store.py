"""Databases: a real SQLite file, several connections, and files that are no database of ours."""

from __future__ import annotations

import asyncio
import sqlite3
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import ForeignKey, MetaData, Table, event, insert, select, text, update
from sqlalchemy.engine import make_url
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from harness.errors import HarnessError, NotFound, StoreError
from harness.store import Store, _make_sqlite_file, open_store

WAIT_S = 20


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


def url_of(path: Path) -> str:
    return f"sqlite+aiosqlite:///{path}"


async def opened(path: Path, version: int = 1, component: str = "tenant") -> Store:
    async with asyncio.timeout(WAIT_S):
        return await open_store(url_of(path), Base.metadata, component=component, version=version)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    made = await opened(tmp_path / "t.db")
    yield made
    await made.close()


def names(folder: Path, pattern: str) -> list[str]:
    return [path.name for path in folder.glob(pattern)]


def modes(folder: Path) -> set[int]:
    return {file.stat().st_mode & 0o777 for file in folder.iterdir()}


async def rounds(store: Store) -> int | None:
    async with store.begin() as session:
        host = await session.get(Host, "h")
        return None if host is None else host.rounds


async def test_what_was_committed_is_there_after_a_restart(tmp_path: Path) -> None:
    """A record outlives the process that wrote it."""
    first = await opened(tmp_path / "t.db")
    async with first.begin() as session:
        session.add(Host(name="h", rounds=3))
    await first.close()
    second = await opened(tmp_path / "t.db")
    assert await rounds(second) == 3
    await second.close()


async def test_sqlite_is_set_up(store: Store, tmp_path: Path) -> None:
    """Write-ahead log, foreign keys, a bounded wait for locks; and the files are their owner's only."""
    async with store.begin() as session:
        found = {
            name: await session.scalar(text(f"PRAGMA {name}"))
            for name in ("journal_mode", "foreign_keys", "busy_timeout", "synchronous")
        }
        session.add(Host(name="h"))
        await session.flush()
        assert modes(tmp_path) == {0o600}
    assert found == {"journal_mode": "wal", "foreign_keys": 1, "busy_timeout": 5000, "synchronous": 1}


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
    with pytest.raises(StoreError, match="FOREIGN KEY"):
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


async def test_only_one_of_two_stores_takes_what_is_free(tmp_path: Path) -> None:
    """Check-then-insert is safe across two processes' stores on one file: one wins, the other sees it."""
    stores = [await opened(tmp_path / "t.db") for _ in range(2)]

    async def take(store: Store, number: int) -> bool:
        async with store.begin() as session:
            if await session.get(Host, "h") is not None:
                return False
            session.add(Host(name="h", rounds=number))
            return True

    async with asyncio.timeout(WAIT_S):
        assert sorted(await asyncio.gather(*(take(store, at) for at, store in enumerate(stores)))) == [False, True]
    for store in stores:
        await store.close()


async def test_many_open_one_new_file_at_once(tmp_path: Path) -> None:
    """Services that share a database may start together, again and again: the file and its tables are made once."""
    for turn in range(5):
        path = tmp_path / f"{turn}.db"
        stores = await asyncio.gather(*(opened(path, component=f"c{at % 3}") for at in range(8)))
        for store in stores:
            assert await rounds(store) is None
        await asyncio.gather(*(store.close() for store in stores))
    assert not names(tmp_path, ".new-*")


def test_a_new_file_has_its_log_before_anybody_opens_it(tmp_path: Path) -> None:
    """SQLite does not wait when two switch the log on at once: the file appears with it (file format, 1.3: 18, 19)."""
    _make_sqlite_file(make_url(url_of(tmp_path / "t.db")))
    assert (tmp_path / "t.db").read_bytes()[18:20] == b"\x02\x02"
    assert names(tmp_path, "*") == ["t.db"]


TAKE_THE_LOG_AWAY = """
import sqlite3, sys
print(sqlite3.connect(sys.argv[1], timeout=0).execute("PRAGMA journal_mode=DELETE").fetchone()[0])
"""


async def test_opening_drops_no_lock(tmp_path: Path) -> None:
    """When a second store opens the file, another process still sees the first one's lock, and cannot take the
    write-ahead log away from under it."""
    first = await opened(tmp_path / "t.db")
    async with first.begin() as session:
        session.add(Host(name="h"))
    await (await opened(tmp_path / "t.db", component="other")).close()
    async with asyncio.timeout(WAIT_S):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", TAKE_THE_LOG_AWAY, str(tmp_path / "t.db")),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await process.communicate()
    assert (out, err.splitlines()[-1]) == (b"", b"sqlite3.OperationalError: database is locked")
    assert await rounds(first) == 0
    await first.close()


async def test_a_locked_database_is_a_store_error(tmp_path: Path) -> None:
    """Somebody who holds the lock for ever costs a bounded wait, then a StoreError; afterwards all is well."""
    made = await opened(tmp_path / "t.db")
    impatient = Store(made._engine, deadline_s=0.5)
    holder = sqlite3.connect(tmp_path / "t.db", isolation_level=None)
    try:
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match=r"t\.db: not done within 0\.5 s"):
            async with asyncio.timeout(WAIT_S), impatient.begin() as session:
                session.add(Host(name="h"))
    finally:
        holder.close()
    assert await rounds(made) is None
    await made.close()


@pytest.mark.parametrize(("written", "opens", "age"), [(3, 2, "newer"), (1, 2, "older")])
async def test_another_schema_is_refused_and_not_written(tmp_path: Path, written: int, opens: int, age: str) -> None:
    """A database of a newer or older program is refused with one sentence, and stays as it was."""
    await (await opened(tmp_path / "t.db", version=written)).close()
    other = MetaData()
    Table("new_table", other)
    with pytest.raises(StoreError) as refused:
        await open_store(url_of(tmp_path / "t.db"), other, component="tenant", version=opens)
    assert refused.value.detail == f"the tenant database has schema {written}, {age} than this program's schema {opens}"
    with sqlite3.connect(tmp_path / "t.db") as look:
        assert look.execute("SELECT component, version FROM schema_version").fetchall() == [("tenant", written)]
        assert not look.execute("SELECT 1 FROM sqlite_master WHERE name = 'new_table'").fetchall()
    look.close()
    await (await opened(tmp_path / "t.db", version=written)).close()


async def test_components_have_versions_of_their_own(tmp_path: Path) -> None:
    """Two components share a file, each with its schema."""
    await (await opened(tmp_path / "t.db", version=1, component="verifier")).close()
    await (await opened(tmp_path / "t.db", version=7, component="registrar")).close()
    await (await opened(tmp_path / "t.db", version=1, component="verifier")).close()


BAD_URLS = [
    "",
    "state.db",
    "oracle-of-delphi://x",
    "sqlite:///x.db",
    "postgresql+no_such_driver://u:5ec3e7@db/x",
]


@pytest.mark.parametrize("url", BAD_URLS)
async def test_unusable_urls(url: str) -> None:
    """A URL without meaning, a driver without asyncio or one that is missing: a StoreError without its password."""
    with pytest.raises(StoreError) as refused:
        await open_store(url, Base.metadata, component="tenant", version=1)
    assert "5ec3e7" not in str(refused.value)
    assert refused.value.detail


def no_database(path: Path) -> Path:
    path.write_bytes(b"this is a text of some length, and no database at all" * 200)
    return path


@pytest.mark.parametrize("make", ["no_folder", "folder", "text", "read_only"])
async def test_files_that_cannot_be_used(tmp_path: Path, make: str) -> None:
    """A missing folder, a folder, a file that is no database, a read-only one: a StoreError that names the file."""
    url = url_of(tmp_path / "no" / "t.db")
    if make == "folder":
        url = url_of(tmp_path)
    elif make == "text":
        url = url_of(no_database(tmp_path / "t.db"))
    elif make == "read_only":
        await (await opened(tmp_path / "t.db")).close()
        url = f"sqlite+aiosqlite:///file:{tmp_path / 't.db'}?mode=ro&uri=true"
    with pytest.raises(StoreError, match=str(tmp_path)):
        await open_store(url, Base.metadata, component="tenant", version=1)


async def test_a_file_that_breaks_later_is_a_store_error(tmp_path: Path) -> None:
    """Damage under a running service is a typed error of that call."""
    made = await opened(tmp_path / "t.db")
    async with made.begin() as session:
        session.add_all(Host(name=f"h{at}" * 50) for at in range(500))
    await made.close()
    again = await opened(tmp_path / "t.db")
    size = (tmp_path / "t.db").stat().st_size
    with (tmp_path / "t.db").open("r+b") as file:
        file.seek(8192)
        file.write(b"\xa5" * (size - 8192))
    with pytest.raises(HarnessError) as refused:
        async with again.begin() as session:
            (await session.execute(select(Host))).all()
    assert isinstance(refused.value, StoreError)
    await again.close()


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
