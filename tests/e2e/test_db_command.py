"""`harness db` as a person types it: exit codes, one sentence, and JSON for programs."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.config import (
    HostAgentSettings,
    ProviderVerifierSettings,
    TenantRegistrarSettings,
    TenantVerifierSettings,
    TlsSettings,
    dump,
)
from tests.support.databases import sqlite_url
from tests.support.schemas import HOST, OLD, TENANT, old_database

TLS = TlsSettings(certificate=Path("c.pem"), key=Path("k.pem"), authorities={})


def harness(*words: object, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "harness", "db", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, **environ},
    )


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A tenant verifier's settings; its database is of schema 1."""
    old_database(tmp_path / "t.db", "tenant-verifier")
    url = sqlite_url(tmp_path / "t.db")
    settings = TenantVerifierSettings(tls=TLS, tenant="alice", database=url, registrar="https://127.0.0.1:1")
    dump(settings, tmp_path / "verifier.yml")
    return tmp_path / "verifier.yml"


def test_the_way_of_an_old_database(config: Path, tmp_path: Path) -> None:
    """Status says that it is old, a backup is made, it is migrated, and the backup brings the old one back."""
    before = harness("status", "--config", config, "--json")
    assert json.loads(before.stdout) == {"components": [{"name": "tenant", "schema": 1, "program": TENANT.schema}]}
    assert "older: migrated when the service starts" in harness("status", "--config", config).stdout
    made = harness("backup", "--config", config, "--out", tmp_path / "b", "--json")
    assert json.loads(made.stdout)["schemas"] == {"tenant": 1}
    migrated = harness("migrate", "--config", config)
    assert (migrated.returncode, migrated.stdout) == (0, f"the tenant database has schema {TENANT.schema}\n")
    restored = harness("restore", "--config", config, "--from", tmp_path / "b")
    assert restored.returncode == 0, restored.stderr
    assert "tenant schema 1" in restored.stdout
    assert f"what was there is kept as {tmp_path / 't.db.before-restore-'}" in restored.stdout
    assert harness("status", "--config", config, "--json").stdout == before.stdout


def test_a_newer_database_is_a_finding(config: Path, tmp_path: Path) -> None:
    """Status exits 1, and every command that would use it 2, with one sentence."""
    harness("migrate", "--config", config)
    subprocess.run(
        [sys.executable, "-c", "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute(sys.argv[2]);"
         " c.commit()", tmp_path / "t.db", "UPDATE alembic_version_tenant SET version_num = '0099'"],
        check=True, timeout=240,
    )  # fmt: skip
    looked = harness("status", "--config", config)
    assert (looked.returncode, "newer than this program, which refuses it" in looked.stdout) == (1, True)
    refused = harness("migrate", "--config", config)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "its tenant schema 99 is newer than this program's schema" in refused.stderr


def test_a_restore_is_refused_while_a_service_runs(config: Path, tmp_path: Path) -> None:
    """Exit code 2 and what to do."""
    harness("migrate", "--config", config)
    harness("backup", "--config", config, "--out", tmp_path / "b")

    async def run() -> subprocess.CompletedProcess[str]:
        store = await TENANT.open(sqlite_url(tmp_path / "t.db"))
        try:
            return await asyncio.to_thread(harness, "restore", "--config", config, "--from", tmp_path / "b")
        finally:
            await store.close()

    refused = asyncio.run(run())
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "a service has it open; stop the services that use it" in refused.stderr


def test_a_damaged_database_is_one_sentence(config: Path, tmp_path: Path) -> None:
    """Exit code 2, and the command that mends it."""
    (tmp_path / "t.db").write_bytes(b"no database" * 1000)
    ran = harness("status", "--config", config)
    assert ran.returncode == 2
    assert "file is not a database; restore a backup with `harness db restore`" in ran.stderr


def test_the_settings_of_each_service_name_their_database(tmp_path: Path) -> None:
    """Whose tables are meant follows from the settings; a provider verifier's are the provider registrar's."""
    known = {
        "provider": ProviderVerifierSettings(tls=TLS, database=old_database(tmp_path / "p.db", "provider")),
        "host": HostAgentSettings(
            tls=TLS,
            name="host1",
            tcti="swtpm:path=x",
            state_dir=Path("s"),
            database=old_database(tmp_path / "h.db", "host"),
            local_socket=Path("l"),
            guest_manager=Path("g"),
            peer_uids=[0],
        ),
        "tenant-registrar": TenantRegistrarSettings(
            tls=TLS,
            tenant="alice",
            database=old_database(tmp_path / "r.db", "tenant-registrar"),
            vendor_roots=[Path("v")],
        ),
    }
    for name, settings in known.items():
        dump(settings, tmp_path / f"{name}.yml")
        ran = harness("migrate", "--config", tmp_path / f"{name}.yml")
        assert ran.stdout == f"the {OLD[name].name} database has schema {OLD[name].schema}\n", ran.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("status",), "which database?"),
        (("status", "--config", "no-such-file.yml"), "no-such-file.yml: cannot be read"),
        (("status", "--url", "sqlite+aiosqlite:////no/such/file.db"), "there is none"),
        (("migrate", "--url", "sqlite+aiosqlite:////no/such/file.db"), "--component must be one of"),
        (("backup", "--url", "sqlite+aiosqlite:////no/such/file.db", "--out", "/no/such/b"), "No such file"),
        (("backup", "--url", "x"), "--out"),
    ],
)
def test_what_cannot_be_used_is_code_2(words: tuple[str, ...], said: str) -> None:
    """Nothing is guessed, and nothing is made."""
    ran = harness(*words, NO_COLOR="1")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert said in ran.stderr


def test_other_settings_have_no_database(tmp_path: Path) -> None:
    """A file that is no service's, or of a service without one."""
    (tmp_path / "x.yml").write_text("tenant: alice\n")
    ran = harness("status", "--config", tmp_path / "x.yml")
    assert ran.returncode == 2
    assert "x.yml: is not the settings file of a service that has a database" in ran.stderr


def test_the_url_may_be_in_the_environment(tmp_path: Path) -> None:
    """A password in a URL need not be on a command line."""
    url = old_database(tmp_path / "h.db", "host")
    ran = harness("migrate", "--component", "host-agent", HARNESS_DATABASE=url)
    assert ran.stdout == f"the host-agent database has schema {HOST.schema}\n"
