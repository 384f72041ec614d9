"""A backup says whose it is: it goes back to the service it was made for, and to no other."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import select
from typer.testing import CliRunner, Result

from harness.cli_db import app
from harness.config import (
    HostAgentSettings,
    ProviderRegistrarSettings,
    TenantRegistrarSettings,
    TenantVerifierSettings,
    TlsSettings,
    dump,
)
from harness.errors import StoreError
from harness.store_backup import back_up, restore, schemas_in_use
from harness.store_backup_origin import Service
from harness.tenant.tables import AlarmRow
from tests.support.databases import sqlite_url
from tests.support.schemas import HOST, PROVIDER, TENANT

PROGRAMS = {"tenant": TENANT.schema, "provider": PROVIDER.schema, "host-agent": HOST.schema}
TLS = TlsSettings(certificate=Path("c.pem"), key=Path("k.pem"), authorities={})
ALICE = Service(whose="tenant-verifier of alice", settings=Path("alice.yml"))
OTHERS = [
    Service(whose="tenant-verifier of bob", settings=Path("bob.yml")),
    Service(whose="tenant-registrar of alice", settings=Path("registrar.yml")),
]


async def write(url: str, detail: str) -> None:
    store = await TENANT.open(url)
    async with store.begin() as session:
        session.add(AlarmRow(at=1.0, kind="k", detail=detail))
    await store.close()


async def found_in(url: str) -> list[str]:
    store = await TENANT.open(url)
    async with store.begin() as session:
        found = list(await session.scalars(select(AlarmRow.detail).order_by(AlarmRow.id)))
    await store.close()
    return found


@pytest.fixture
async def filled(database_url: str) -> str:
    """A tenant's database with the row "first", which nobody has open."""
    await write(database_url, "first")
    return database_url


@pytest.fixture
def backup(tmp_path: Path) -> Path:
    folder = tmp_path / "backups"
    folder.mkdir()
    return folder / "t.backup"


# --- the library, on SQLite and on PostgreSQL -----------------------------------------------------------------


async def test_the_same_service_gets_its_backup_back(filled: str, backup: Path) -> None:
    """The file is one file, and the restored database has no trace of the origin."""
    await back_up(filled, backup, service=ALICE)
    assert [file.name for file in backup.parent.iterdir()] == [backup.name]
    await write(filled, "second")
    await restore(filled, backup, PROGRAMS, component="tenant", service=ALICE)
    assert await found_in(filled) == ["first"]
    again = backup.with_name("again")
    await back_up(filled, again)
    for other in OTHERS:  # a copy that was not told whose it is does not say what its database once was
        await restore(filled, again, PROGRAMS, service=other)


@pytest.mark.parametrize("other", OTHERS, ids=["other tenant", "other service"])
async def test_another_services_backup_is_refused(filled: str, backup: Path, other: Service) -> None:
    """One sentence says whose it is and whose the settings are; the database stays, and nothing is put aside."""
    await back_up(filled, backup, service=ALICE)
    await write(filled, "second")
    with pytest.raises(StoreError) as refused:
        await restore(filled, backup, PROGRAMS, component="tenant", service=other)
    said = f"{backup} is a backup of tenant-verifier of alice; {other.settings} is {other.whose}"
    assert refused.value.detail == said
    assert [file.name for file in backup.parent.iterdir()] == [backup.name]
    assert await found_in(filled) == ["first", "second"]


async def test_where_one_of_them_is_not_known_a_backup_is_accepted(filled: str, backup: Path) -> None:
    """A backup without an origin goes into any service's database, one with an origin into one that is named by URL."""
    await back_up(filled, backup)
    named = backup.with_name("named")
    await back_up(filled, named, service=ALICE)
    await write(filled, "second")
    await restore(filled, backup, PROGRAMS, component="tenant", service=ALICE)
    assert await found_in(filled) == ["first"]
    await write(filled, "third")
    await restore(filled, named, PROGRAMS)
    assert await found_in(filled) == ["first"]


async def test_an_origin_that_cannot_be_read_is_refused(filled: str, backup: Path) -> None:
    """It is not taken for a backup without an origin."""
    await back_up(filled, backup, service=ALICE)
    if filled.startswith("sqlite"):
        with contextlib.closing(sqlite3.connect(backup)) as copy, copy:
            copy.execute("UPDATE backup_origin SET service = ?", ("alice\x1b[2J",))
    else:
        _cut(backup, 3)
    with pytest.raises(StoreError, match=r"t\.backup: it does not say clearly whose it is"):
        await restore(filled, backup, PROGRAMS, service=ALICE)
    assert await found_in(filled) == ["first"]


def _cut(file: Path, octets: int) -> None:
    file.write_bytes(file.read_bytes()[:-octets])


# --- the command -----------------------------------------------------------------------------------------------


def harness(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def services(folder: Path) -> dict[str, Path]:
    """Settings of one service of each kind, and of another tenant's; each has a fresh database."""
    urls = {name: sqlite_url(folder / f"{name}.db") for name in ("av", "bv", "ar", "p", "h1", "h2")}
    host = {"tcti": "swtpm:path=x", "state_dir": "s", "local_socket": "l", "guest_manager": "g", "peer_uids": [0]}
    all_settings = {
        "av": TenantVerifierSettings(tls=TLS, tenant="alice", database=urls["av"], registrar="https://127.0.0.1:1"),
        "bv": TenantVerifierSettings(tls=TLS, tenant="bob", database=urls["bv"], registrar="https://127.0.0.1:1"),
        "ar": TenantRegistrarSettings(tls=TLS, tenant="alice", database=urls["ar"], vendor_roots=[Path("v")]),
        "p": ProviderRegistrarSettings(tls=TLS, database=urls["p"]),
        **{
            name: HostAgentSettings.model_validate({**host, "tls": TLS, "name": f"host-{name}", "database": urls[name]})
            for name in ("h1", "h2")
        },
    }
    files = {name: folder / f"{name}.yml" for name in all_settings}
    for name, settings in all_settings.items():
        dump(settings, files[name])
        assert harness("migrate", "--config", files[name]).exit_code == 0
    return files


@pytest.mark.parametrize(
    ("made_by", "given_to", "said"),
    [
        ("av", "bv", "is a backup of tenant-verifier of alice; {file} is tenant-verifier of bob"),
        ("av", "ar", "is a backup of tenant-verifier of alice; {file} is tenant-registrar of alice"),
        ("ar", "bv", "is a backup of tenant-registrar of alice; {file} is tenant-verifier of bob"),
        ("h1", "h2", "is a backup of host-agent of host-h1; {file} is host-agent of host-h2"),
    ],
)
def test_the_command_knows_each_service_by_its_settings(tmp_path: Path, made_by: str, given_to: str, said: str) -> None:
    """Exit code 2, and another's database is byte for byte what it was; the own service gets the backup back."""
    files, made = services(tmp_path), tmp_path / "b"
    assert harness("backup", "--config", files[made_by], "--out", made).exit_code == 0
    before = (tmp_path / f"{given_to}.db").read_bytes()
    refused = subprocess.run(
        [sys.executable, "-m", "harness", "db", "restore", "--config", files[given_to], "--from", made],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert (refused.returncode, refused.stdout) == (2, "")
    assert f"{made} {said.format(file=files[given_to])}" in refused.stderr
    assert (tmp_path / f"{given_to}.db").read_bytes() == before
    assert harness("restore", "--config", files[made_by], "--from", made).exit_code == 0


def test_the_providers_services_share_a_database_and_its_backups(tmp_path: Path) -> None:
    """Its origin is the provider, whichever service's settings are given; the restored file has the tables it had."""
    files, made = services(tmp_path), tmp_path / "b"
    assert harness("backup", "--config", files["p"], "--out", made).exit_code == 0
    with contextlib.closing(sqlite3.connect(made)) as copy:
        assert copy.execute("SELECT service FROM backup_origin").fetchall() == [("provider",)]
    assert harness("restore", "--config", files["p"], "--from", made).exit_code == 0
    with contextlib.closing(sqlite3.connect(tmp_path / "p.db")) as restored:
        assert restored.execute("SELECT 1 FROM sqlite_master WHERE name = 'backup_origin'").fetchall() == []
    assert asyncio.run(schemas_in_use(sqlite_url(tmp_path / "p.db"))) == {"provider": PROVIDER.schema}
