"""Backup and restore: consistent while services write, refused while they run, and never a part of anything."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
from pathlib import Path

import pytest
from sqlalchemy import MetaData, select
from sqlalchemy.engine import make_url

from harness.errors import StoreError
from harness.store import Store
from harness.store_backup import back_up, restore, schemas_in_use
from harness.store_backup_postgres import PostgresCopies, environment_of
from harness.store_file import Lease
from harness.tenant.tables import AlarmRow
from tests.support.databases import sqlite_url
from tests.support.postgres import PostgresServer
from tests.support.schemas import HOST, OLD, PROVIDER, TENANT, Component, old_database

PROGRAMS = {"tenant": TENANT.schema, "provider": PROVIDER.schema, "host-agent": HOST.schema}
WAIT_S = 240


async def write(store: Store, *details: str) -> None:
    async with store.begin() as session:
        session.add_all(AlarmRow(at=1.0, kind="k", detail=detail) for detail in details)


async def details(store: Store) -> list[str]:
    async with store.begin() as session:
        return list(await session.scalars(select(AlarmRow.detail).order_by(AlarmRow.id)))


async def found_in(url: str) -> list[str]:
    store = await TENANT.open(url)
    try:
        return await details(store)
    finally:
        await store.close()


@pytest.fixture
async def filled(database_url: str) -> str:
    """A tenant's database with one row, which nobody has open."""
    store = await TENANT.open(database_url)
    await write(store, "first")
    await store.close()
    return database_url


@pytest.fixture
def backup(tmp_path: Path) -> Path:
    folder = tmp_path / "backups"
    folder.mkdir()
    return folder / "t.backup"


# --- the way there and back ---------------------------------------------------------------------------------


async def test_what_was_backed_up_is_there_after_the_restore(filled: str, backup: Path) -> None:
    """Rows written after the backup are gone, and kept in what was replaced; new rows are numbered on."""
    made = await back_up(filled, backup)
    assert (made.schemas, made.size) == ({"tenant": TENANT.schema}, len(_bytes(backup)))
    store = await TENANT.open(filled)
    await write(store, "second")
    await store.close()
    done = await restore(filled, backup, PROGRAMS, component="tenant")
    assert done.schemas == made.schemas
    store = await TENANT.open(filled)
    assert await details(store) == ["first"]
    await write(store, "third")
    assert await details(store) == ["first", "third"]
    await store.close()
    assert done.kept is not None
    await restore(filled, done.kept, PROGRAMS)
    assert await found_in(filled) == ["first", "second"]


async def test_a_backup_is_private_and_one_file(filled: str, backup: Path) -> None:
    """Only its owner reads it, nothing is beside it, and a file that is there is not overwritten."""
    await back_up(filled, backup)
    assert os.stat(backup).st_mode & 0o777 == 0o600
    assert os.listdir(backup.parent) == [backup.name]
    before = _bytes(backup)
    with pytest.raises(StoreError, match=r"t\.backup: the file is there already"):
        await back_up(filled, backup)
    assert _bytes(backup) == before


async def test_a_backup_under_load_is_one_moment(database_url: str, backup: Path) -> None:
    """While rows are added in pairs, each backup holds whole pairs, and the service does not notice."""
    store = await TENANT.open(database_url)
    await write(store, *(f"{number}" * 500 for number in range(200)))
    ended = asyncio.Event()

    async def load() -> int:
        pairs = 0
        while not ended.is_set():
            await write(store, "left", "right")
            pairs += 1
        return pairs

    async with asyncio.timeout(WAIT_S):
        loading = asyncio.create_task(load())
        for number in range(3):
            await back_up(database_url, backup.with_name(f"{number}"))
        ended.set()
        pairs = await loading
    assert (await details(store)).count("left") == pairs > 0
    await store.close()
    await restore(database_url, backup.with_name("2"), PROGRAMS)
    rows = await found_in(database_url)
    assert len(rows) >= 200
    assert rows.count("left") == rows.count("right")


@pytest.mark.parametrize("name", OLD)
async def test_a_backup_of_schema_1_is_migrated_at_the_next_start(tmp_path: Path, backup: Path, name: str) -> None:
    """An older backup is restored over a newer database, and the service brings it to its own schema."""
    made = await back_up(old_database(tmp_path / "old.db", name), backup)
    assert made.schemas == {OLD[name].name: 1}
    url = sqlite_url(tmp_path / "t.db")
    await (await OLD[name].open(url)).close()
    await restore(url, backup, PROGRAMS, component=OLD[name].name)
    assert await schemas_in_use(url) == {OLD[name].name: 1}
    await (await OLD[name].open(url)).close()
    assert await schemas_in_use(url) == {OLD[name].name: OLD[name].schema}


async def test_an_older_backup_leaves_no_table_of_the_newer_schema(database_url: str, backup: Path) -> None:
    """What the backup does not know is away, so that the migration can make it."""
    await (await Component("tenant", MetaData(), 1).open(database_url)).close()
    await back_up(database_url, backup)
    await (await TENANT.open(database_url)).close()
    await restore(database_url, backup, PROGRAMS)
    assert await schemas_in_use(database_url) == {"tenant": 1}
    assert await found_in(database_url) == []


async def test_a_database_that_is_not_there_is_made_from_a_backup(
    filled: str, backup: Path, request: pytest.FixtureRequest
) -> None:
    """A lost file, or a fresh database on a server: nothing is kept, because nothing was there."""
    await back_up(filled, backup)
    url = _elsewhere(filled, request, backup.parent)
    assert (await restore(url, backup, PROGRAMS)).kept is None
    assert await found_in(url) == ["first"]


def _elsewhere(url: str, request: pytest.FixtureRequest, folder: Path) -> str:
    if url.startswith("sqlite"):
        return sqlite_url(folder / "lost.db")
    server: PostgresServer = request.getfixturevalue("postgres")
    return server.new_database()


# --- what is refused ----------------------------------------------------------------------------------------


async def test_a_restore_under_a_running_service_is_refused(filled: str, backup: Path) -> None:
    """Also when the service does nothing at the moment; its database stays what it was."""
    await back_up(filled, backup)
    store = await TENANT.open(filled)
    await write(store, "second")
    with pytest.raises(StoreError, match="a service has it open; stop the services that use it"):
        await restore(filled, backup, PROGRAMS)
    assert await details(store) == ["first", "second"]
    await store.close()
    await restore(filled, backup, PROGRAMS)


async def test_a_restore_under_another_program_is_refused(tmp_path: Path, backup: Path) -> None:
    """A program that knows no lease (an older one of ours, the sqlite3 shell) is found by SQLite's own lock."""
    url = sqlite_url(tmp_path / "t.db")
    store = await TENANT.open(url)
    await write(store, "first")
    await store.close()
    await back_up(url, backup)
    with contextlib.closing(sqlite3.connect(tmp_path / "t.db")) as other:
        other.execute("SELECT * FROM alarms").fetchall()
        with pytest.raises(StoreError, match=r"t\.db: another program has it open; end that program"):
            await restore(url, backup, PROGRAMS)
    assert sorted(os.listdir(tmp_path)) == ["backups", "t.db"]
    await restore(url, backup, PROGRAMS)


async def test_a_service_does_not_start_under_a_restore(tmp_path: Path) -> None:
    """While the file is being replaced nobody opens it."""
    url = sqlite_url(tmp_path / "t.db")
    await (await TENANT.open(url)).close()
    lease = await Lease.take(make_url(url), tmp_path / "t.db", exclusive=True)
    with pytest.raises(StoreError, match=r"t\.db: it is being restored; try again"):
        await TENANT.open(url)
    lease.release()
    await (await TENANT.open(url)).close()


@pytest.mark.needs_postgres
async def test_a_service_does_not_start_under_a_restore_on_the_server(
    postgres: PostgresServer, backup: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the question whether it is in use to the end of the restore; afterwards it starts, on what was restored."""
    url = postgres.new_database()
    store = await TENANT.open(url)
    await write(store, "first")
    await store.close()
    await back_up(url, backup)
    run, tried = PostgresCopies._run, []

    async def run_and_start(self: PostgresCopies, program: str, *words: str, what: str | None = None) -> str:
        if program in {"pg_dump", "psql"}:  # the second after the first is when the tables are taken away
            with pytest.raises(StoreError, match="it is being restored; try again"):
                await TENANT.open(url)
            tried.append(program)
        return await run(self, program, *words, what=what)

    monkeypatch.setattr(PostgresCopies, "_run", run_and_start)
    await restore(url, backup, PROGRAMS)
    assert tried == ["pg_dump", "psql"]
    assert await found_in(url) == ["first"]


@pytest.mark.needs_postgres
async def test_a_service_that_connects_anew_does_not_get_into_a_restore(postgres: PostgresServer, backup: Path) -> None:
    """The lock is of each connection: one made while a restore holds the database is an error, a later one is not."""
    url = postgres.new_database()
    store = await TENANT.open(url)
    await store._engine.dispose()  # a service that has lost its connections, as after a restart of the server
    holder = PostgresCopies(make_url(url))
    async with holder._engine() as engine, engine.connect() as connection:
        await holder._alone(connection)
        with pytest.raises(StoreError, match="it is being restored; try again"):
            await write(store, "first")
    await write(store, "second")
    assert await details(store) == ["second"]
    await store.close()


async def test_a_newer_backup_is_refused(filled: str, backup: Path) -> None:
    """With its schema, the program's, and what to do; nothing is replaced, and nothing is left."""
    await back_up(filled, backup)
    with pytest.raises(StoreError) as refused:
        await restore(filled, backup, {"tenant": 1})
    assert refused.value.detail == (
        f"backup {backup}: its tenant schema {TENANT.schema} is newer than this program's schema 1; "
        "use the program that wrote it, or restore an older backup"
    )
    assert os.listdir(backup.parent) == [backup.name]
    assert await found_in(filled) == ["first"]


async def test_another_components_backup_is_refused(filled: str, backup: Path) -> None:
    """A provider's service does not get a tenant's tables."""
    await back_up(filled, backup)
    with pytest.raises(StoreError, match="it holds the tables of tenant; this database is for provider"):
        await restore(filled, backup, PROGRAMS, component="provider")


async def test_a_damaged_backup_is_refused(filled: str, backup: Path) -> None:
    """Cut, overwritten, empty, or no backup at all: the database stays what it was."""
    await back_up(filled, backup)
    whole = _bytes(backup)
    middle = len(whole) // 2
    for bad in (
        whole[:middle],
        whole[: -len(whole) // 8],
        whole[:200] + os.urandom(len(whole) - 200),
        b"",
        b"text" * 999,
    ):
        _write(backup, bad)
        with pytest.raises(StoreError, match=r"backup .*t\.backup: "):
            await restore(filled, backup, PROGRAMS)
    os.unlink(backup)
    with pytest.raises(StoreError, match=r"t\.backup: "):
        await restore(filled, backup, PROGRAMS)
    assert await found_in(filled) == ["first"]


async def test_a_damaged_database_is_not_backed_up_and_is_replaced(tmp_path: Path, backup: Path) -> None:
    """A copy of damage is no backup; a good one goes into its place, and the damaged file is kept."""
    path = tmp_path / "t.db"
    url = sqlite_url(path)
    store = await TENANT.open(url)
    await write(store, *("x" * 4000 for _ in range(20)))
    await store.close()
    await back_up(url, backup)
    damaged = _bytes(path)[:8192] + os.urandom(len(_bytes(path)) - 8192)
    _write(path, damaged)
    for refused in (back_up(url, backup.with_name("second")), schemas_in_use(url)):
        with pytest.raises(StoreError, match=r"t\.db: .*malformed.*; restore a backup"):
            await refused
    assert os.listdir(backup.parent) == [backup.name]
    done = await restore(url, backup, PROGRAMS)
    assert done.kept is not None
    assert _bytes(done.kept)[8192:] == damaged[8192:]
    assert len(await found_in(url)) == 20


@pytest.mark.needs_postgres
async def test_without_the_servers_programs_a_backup_says_what_to_install(
    postgres: PostgresServer, backup: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No half file is left."""
    url = postgres.new_database()
    await (await TENANT.open(url)).close()
    monkeypatch.setenv("PATH", str(backup.parent))
    with pytest.raises(StoreError, match="pg_dump is not installed; install PostgreSQL's client programs"):
        await back_up(url, backup)
    assert os.listdir(backup.parent) == []


@pytest.mark.needs_postgres
async def test_a_restore_that_fails_on_the_server_changes_nothing(postgres: PostgresServer, backup: Path) -> None:
    """One transaction: a table that cannot be taken away stays, and so do all others."""
    url = postgres.new_database()
    store = await TENANT.open(url)
    await write(store, "first")
    await store.close()
    await back_up(url, backup)
    guard = (
        "CREATE FUNCTION refuse() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'not today'; END $$;"
        "CREATE EVENT TRIGGER refuse ON ddl_command_end WHEN TAG IN ('CREATE TABLE') EXECUTE FUNCTION refuse();"
    )
    name = str(make_url(url).database)
    postgres.sql(name, guard)
    with pytest.raises(StoreError, match="not today"):
        await restore(url, backup, PROGRAMS)
    postgres.sql(name, "DROP EVENT TRIGGER refuse")
    assert await found_in(url) == ["first"]


def test_a_servers_password_is_in_the_environment_only() -> None:
    """The URL's parts become libpq's variables, whichever way the URL names them."""
    assert environment_of(make_url("postgresql+asyncpg://u:5ec%40et@db:5433/x?ssl=require")) == {
        "PGHOST": "db",
        "PGPORT": "5433",
        "PGUSER": "u",
        "PGPASSWORD": "5ec@et",
        "PGDATABASE": "x",
        "PGSSLMODE": "require",
    }
    assert environment_of(make_url("postgresql+asyncpg://u@/x?host=/run/pg&port=5434")) == {
        "PGHOST": "/run/pg",
        "PGPORT": "5434",
        "PGUSER": "u",
        "PGDATABASE": "x",
    }


@pytest.mark.parametrize("url", ["sqlite+aiosqlite://", "mysql+aiomysql://u:5ec3e7@h/x", "nonsense"])
async def test_other_databases_are_refused(url: str, backup: Path) -> None:
    """One sentence, without a password."""
    with pytest.raises(StoreError) as refused:
        await back_up(url, backup)
    assert "5ec3e7" not in refused.value.detail


def _bytes(path: Path) -> bytes:
    return path.read_bytes()


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
