"""Migrations: databases of every earlier schema, kept as dumps, are brought to this program's schema, or stay as they
were."""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import sys
import uuid
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, MetaData

from harness import store_schema
from harness.audit import AuditEntry
from harness.errors import StoreError
from harness.provider.journal import Journal
from harness.provider.registrar_store import RegistrarStore as ProviderStore
from harness.provider.registrar_store import load_snapshot
from harness.tenant.registrar_store import RegistrarStore
from harness.tenant.states import State
from harness.tenant.verifier_store import VerifierStore
from harness.values import parse_agent_id, parse_host_id
from tests.support.databases import sqlite_url, write_revision
from tests.support.postgres import PostgresServer
from tests.support.schemas import COMPONENTS, HOST, OLD, PROVIDER, TENANT, Component, old_database, shape

GUEST = parse_agent_id("9e12539a-aab7-4f49-8185-42a61770faa7")
HOST_ID = parse_host_id("7c4c9c0a-cd0d-8895-a1db-0f5d6e474da4")
NOW = 1_795_600_000.0


def rows(path: Path, statement: str) -> list[tuple[object, ...]]:
    connection = sqlite3.connect(path)
    try:
        return connection.execute(statement).fetchall()
    finally:
        connection.close()


def contents(path: Path) -> str:
    connection = sqlite3.connect(path)
    try:
        return "\n".join(connection.iterdump())
    finally:
        connection.close()


@pytest.fixture
def next_schema(tmp_path: Path) -> Path:
    """The steps of a program with one more schema, whose tenant's step fails at its end."""
    folder = tmp_path / "migrations"
    shutil.copytree(store_schema.MIGRATIONS, folder)
    body = (
        '    op.execute("CREATE TABLE half_done (x INTEGER)")\n'
        '    op.execute("DELETE FROM key_names")\n'
        '    op.execute("INSERT INTO nowhere VALUES (1)")'
    )
    return write_revision(folder, "tenant", TENANT.schema + 1, body)


# --- what is there stays there ------------------------------------------------------------------------------


async def test_the_tenants_registrar_works_on_a_database_of_schema_1(tmp_path: Path) -> None:
    """Pinned host and guest are read with their keys and clock, the alarm is there, and new records are written."""
    store = await TENANT.open(old_database(tmp_path / "t.db", "tenant-registrar"))
    registrar = RegistrarStore(store)
    (host,) = await registrar.hosts()
    assert (host.host_id, host.baseline.reset_count) == (HOST_ID, 3010041542)
    guest = await registrar.guest(GUEST)
    assert guest.keys is not None
    assert guest.keys.port == 39049
    act = AuditEntry(at=NOW, who="op", action="guest-state", subject="g", reason="r")
    other = await registrar.state_guest(parse_agent_id(str(uuid.UUID(int=7 << 64))), HOST_ID, act)
    assert [one.agent_id for one in await registrar.guests()] == sorted([GUEST, other.agent_id])
    await store.close()
    assert rows(tmp_path / "t.db", "SELECT at, kind, acknowledged_at FROM alarms") == [
        (1795521600.5, "KeyChanged", None)
    ]
    assert rows(tmp_path / "t.db", "SELECT ek_chain FROM hosts") == [(None,)]


async def test_the_tenants_verifier_works_on_a_database_of_schema_1(tmp_path: Path) -> None:
    """The agent comes back with what it reached, V is still gone, and the baselines are those that were believed."""
    store = await TENANT.open(old_database(tmp_path / "t.db", "tenant-verifier"))
    records = VerifierStore(store, lambda: NOW)
    (agent,) = await records.load()
    assert (agent.agent_id, agent.v, agent.progress.state) == (GUEST, None, State.SAVED)
    assert agent.progress.rounds > 0
    ak = bytes.fromhex("000bec3b1db67fd662dd6ef44fbb4dd4a74cce012962e9a75c534fb625d3cbb8f7cf")
    baseline = await records.baseline(ak)
    assert baseline is not None
    assert (baseline.clock, baseline.firmware_version) == (108337, 12825345181354444483)
    await records.save(GUEST, agent.progress)
    await store.close()


async def test_the_provider_works_on_a_database_of_schema_1(tmp_path: Path) -> None:
    """Tenants, hosts, allowlists and guests are admitted as before, and a guest can be removed."""
    store = await PROVIDER.open(old_database(tmp_path / "p.db", "provider"))
    snapshot = await load_snapshot(store)
    assert set(snapshot.tenants) == {"alice", "bob"}
    assert set(snapshot.allowlists) == {("alice", HOST_ID), ("bob", HOST_ID)}
    assert snapshot.guests[GUEST].tenant == "alice"
    act = AuditEntry(at=NOW, who="op", action="guest-remove", subject=str(GUEST), reason="r")
    await ProviderStore(store).remove_guest(GUEST, act)
    assert GUEST not in (await load_snapshot(store)).guests
    await store.close()


async def test_the_journal_works_on_a_database_of_schema_1(tmp_path: Path) -> None:
    """What was certified and seen is what residency is checked with, and it can be released."""
    store = await HOST.open(old_database(tmp_path / "h.db", "host"))
    journal = Journal(store)
    certified = await journal.rsa_eks()
    assert certified == await journal.seen()
    assert len(certified) == 2
    assert GUEST in certified
    await journal.release(GUEST, "moved", who="uid 0")
    assert GUEST not in await journal.rsa_eks()
    await store.close()


# --- one schema, however it came to be ----------------------------------------------------------------------


@pytest.mark.parametrize("name", OLD)
async def test_a_migrated_database_is_as_a_fresh_one(tmp_path: Path, name: str) -> None:
    """Columns with their order and types, keys and indexes are the same; a second start changes nothing."""
    old = old_database(tmp_path / "old.db", name)
    fresh = sqlite_url(tmp_path / "fresh.db")
    for url in (old, fresh, old):
        await (await OLD[name].open(url)).close()
    found = await shape(old)
    assert found == await shape(fresh)
    assert set(OLD[name].metadata.tables) < set(found)


@pytest.mark.parametrize("component", COMPONENTS, ids=lambda component: component.name)
async def test_the_tables_of_the_program_are_those_of_the_migrations(database_url: str, component: Component) -> None:
    """On SQLite and on PostgreSQL alembic finds no difference between tables.py and a migrated database."""

    def differences(connection: Connection) -> list[object]:
        ours = {*component.metadata.tables}
        options = {
            "compare_type": True,
            "include_name": lambda name, kind, _: kind != "table" or name in ours,
        }
        context = MigrationContext.configure(connection, opts=options)
        return list(compare_metadata(context, component.metadata))

    store = await component.open(database_url)
    async with store.begin() as session:
        found = await (await session.connection()).run_sync(differences)
    assert found == []
    await store.close()


@pytest.mark.parametrize("component", COMPONENTS, ids=lambda component: component.name)
def test_each_schema_has_its_step(component: Component) -> None:
    """The steps are numbered from 1 to the program's schema, each on top of the one before."""
    scripts = ScriptDirectory(str(store_schema.MIGRATIONS / component.name.replace("-", "_")))
    steps = [(step.revision, step.down_revision) for step in reversed(list(scripts.walk_revisions()))]
    numbers = range(1, component.schema + 1)
    assert steps == [(f"{number:04}", f"{number - 1:04}" if number > 1 else None) for number in numbers]


# --- what is refused, and what is interrupted ---------------------------------------------------------------


@pytest.mark.parametrize("name", OLD)
async def test_an_older_program_refuses_what_a_newer_one_migrated(tmp_path: Path, name: str) -> None:
    """The table that programs of schema 1 look at says the new schema."""
    await (await OLD[name].open(old_database(tmp_path / "t.db", name))).close()
    assert rows(tmp_path / "t.db", "SELECT component, version FROM schema_version") == [
        (OLD[name].name, OLD[name].schema)
    ]


async def test_a_newer_schema_is_refused_and_not_written(database_url: str) -> None:
    """One sentence with the database, its schema, the program's, and what to do; the tables stay as they were."""
    await (await TENANT.open(database_url)).close()
    before = await shape(database_url)
    with pytest.raises(StoreError) as refused:
        await Component("tenant", MetaData(), 1).open(database_url)
    assert refused.value.detail.endswith(
        f": its tenant schema {TENANT.schema} is newer than this program's schema 1; "
        "use the program that wrote it, or restore an older backup"
    )
    assert refused.value.detail.startswith("database ")
    assert await shape(database_url) == before


async def test_an_unknown_schema_of_the_first_program_is_refused(tmp_path: Path) -> None:
    """A number that only ``schema_version`` knows counts as well."""
    url = old_database(tmp_path / "t.db", "tenant-registrar")
    connection = sqlite3.connect(tmp_path / "t.db")
    with connection:
        connection.execute("UPDATE schema_version SET version = 99")
    connection.close()
    before = contents(tmp_path / "t.db")
    with pytest.raises(StoreError, match="its tenant schema 99 is newer"):
        await TENANT.open(url)
    assert contents(tmp_path / "t.db") == before


async def test_a_migration_that_fails_leaves_the_old_schema(tmp_path: Path, next_schema: Path) -> None:
    """Tables made, rows deleted and steps before it are all undone; the database is what it was."""
    url = old_database(tmp_path / "t.db", "tenant-registrar")
    before = contents(tmp_path / "t.db")
    with pytest.raises(StoreError, match=r"t\.db: no such table: nowhere"):
        await TENANT.open(url, migrations=next_schema, schema=TENANT.schema + 1)
    assert contents(tmp_path / "t.db") == before
    await (await TENANT.open(url)).close()


@pytest.mark.needs_postgres
async def test_a_migration_that_fails_leaves_the_old_schema_on_a_server(
    postgres: PostgresServer, next_schema: Path
) -> None:
    """The same on PostgreSQL."""
    url = postgres.new_database()
    await (await TENANT.open(url)).close()
    before = await shape(url)
    with pytest.raises(StoreError, match='relation "nowhere" does not exist'):
        await TENANT.open(url, migrations=next_schema, schema=TENANT.schema + 1)
    assert await shape(url) == before
    await (await TENANT.open(url)).close()


async def test_a_migration_that_is_cancelled_leaves_the_old_schema(tmp_path: Path) -> None:
    """Cancelled while another holds the lock: nothing has happened, and no lease stays."""
    url = old_database(tmp_path / "t.db", "tenant-registrar")
    before = contents(tmp_path / "t.db")
    holder = sqlite3.connect(tmp_path / "t.db", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    opening = asyncio.create_task(TENANT.open(url))
    await asyncio.sleep(0)
    opening.cancel()
    await asyncio.wait([opening], timeout=30)
    assert opening.cancelled()
    holder.close()
    assert contents(tmp_path / "t.db") == before
    await (await TENANT.open(url)).close()
    assert os.listdir(tmp_path) == ["t.db"]


KILLED = """
import asyncio, sys
from pathlib import Path
from tests.support.schemas import TENANT
asyncio.run(TENANT.open(sys.argv[1], migrations=Path(sys.argv[2]), schema=TENANT.schema + 1))
"""


async def test_a_service_that_is_killed_inside_a_migration_leaves_the_old_schema(
    database_url: str, tmp_path: Path
) -> None:
    """The steps before it, too, are undone by the database; the next start migrates from where it was."""
    await (await Component("tenant", MetaData(), 1).open(database_url)).close()
    before = await shape(database_url)
    folder = shutil.copytree(store_schema.MIGRATIONS, tmp_path / "migrations")
    body = '    op.execute("CREATE TABLE half_done (x INTEGER)")\n    import os\n    os.kill(os.getpid(), 9)'
    write_revision(folder, "tenant", TENANT.schema + 1, body)
    async with asyncio.timeout(60):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", KILLED, database_url, str(folder)), cwd=Path(__file__).parents[2]
        )
        assert await process.wait() == -9
    assert await shape(database_url) == before
    await (await TENANT.open(database_url)).close()


async def test_services_that_start_together_migrate_once(tmp_path: Path) -> None:
    """Six at once on one old database: all of them work, and the audit table was made once."""
    url = old_database(tmp_path / "t.db", "tenant-registrar")
    stores = await asyncio.gather(*(TENANT.open(url) for _ in range(6)))
    for store in stores:
        assert (await RegistrarStore(store).guest(GUEST)).keys is not None
        await store.close()


async def test_tables_of_somebody_else_are_not_taken_over(tmp_path: Path) -> None:
    """A database whose tables have our names and no schema is refused, and one that lost a column as well."""
    connection = sqlite3.connect(tmp_path / "t.db")
    connection.execute("CREATE TABLE hosts (x INTEGER)")
    connection.close()
    with pytest.raises(StoreError, match=r"t\.db: table hosts already exists"):
        await TENANT.open(sqlite_url(tmp_path / "t.db"))
    url = sqlite_url(tmp_path / "u.db")
    await (await TENANT.open(url)).close()
    connection = sqlite3.connect(tmp_path / "u.db")
    connection.execute("ALTER TABLE guests DROP COLUMN port")
    connection.close()
    with pytest.raises(StoreError, match=r"lacks guests\.port; another program changed it"):
        await TENANT.open(url)
