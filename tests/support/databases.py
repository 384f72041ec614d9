"""Databases for the stores' tests: each test that asks for ``database_url`` runs on SQLite and on PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.postgres import PostgresServer

REVISION = '''"""Schema {number}."""

import sqlalchemy as sa

revision = "{number:04}"
down_revision = {before!r}


def upgrade(op):
    """One step."""
{body}
'''
FIRST_BODY = """
    op.create_table("hosts", sa.Column("name", sa.String, primary_key=True),
                    sa.Column("rounds", sa.Integer, nullable=False), if_not_exists=True)
    op.create_table("guests", sa.Column("name", sa.String, primary_key=True),
                    sa.Column("host", sa.String, sa.ForeignKey("hosts.name"), nullable=False), if_not_exists=True)
"""


def sqlite_url(path: Path) -> str:
    """URL of a SQLite file."""
    return f"sqlite+aiosqlite:///{path}"


def write_revision(migrations: Path, component: str, number: int, body: str = "    pass") -> Path:
    """Writes the step to one schema of a made-up component; the folder of all components' steps."""
    versions = migrations / component / "versions"
    versions.mkdir(parents=True, exist_ok=True)
    before = f"{number - 1:04}" if number > 1 else None
    text = REVISION.format(number=number, before=before, body=body)
    (versions / f"{number:04}_step.py").write_text(text, encoding="utf-8")
    return migrations


def write_migrations(migrations: Path, component: str, last: int) -> Path:
    """Steps up to a schema: the first makes hosts and guests, the others do nothing."""
    for number in range(1, last + 1):
        write_revision(migrations, component, number, FIRST_BODY if number == 1 else "    pass")
    return migrations


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A server that runs; a test that stops it starts it again."""
    server = PostgresServer()
    try:
        server.start()
        yield server
    finally:
        server.close()


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.needs_postgres)])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of a database that is not there yet (SQLite), or empty (PostgreSQL)."""
    if request.param == "sqlite":
        return sqlite_url(tmp_path / "t.db")
    server: PostgresServer = request.getfixturevalue("postgres")
    return server.new_database()


@pytest.fixture
def store_url(tmp_path: Path) -> str:
    """URL of a database that is not there yet: on SQLite; ``e2e/test_records_on_postgres`` has its own."""
    return sqlite_url(tmp_path / "t.db")
