"""Databases as earlier programs left them, and what a database's tables look like."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, MetaData, inspect
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from harness.provider import tables as provider
from harness.store import Store, open_store
from harness.tenant import tables as tenant
from tests.support.databases import sqlite_url

FIXTURES = Path(__file__).parents[1] / "fixtures"
_WAIT_S = 240.0


@dataclass(frozen=True, slots=True)
class Component:
    """A component as its services open it."""

    name: str
    metadata: MetaData
    schema: int

    async def open(self, url: str, *, migrations: Path | None = None, schema: int | None = None) -> Store:
        """Its database; with steps and a schema of a newer program where they are given."""
        more = {} if migrations is None else {"migrations": migrations}
        async with asyncio.timeout(_WAIT_S):
            return await open_store(url, self.metadata, component=self.name, version=schema or self.schema, **more)


TENANT = Component("tenant", tenant.Base.metadata, tenant.SCHEMA)
PROVIDER = Component("provider", provider.Base.metadata, provider.SCHEMA)
HOST = Component("host-agent", provider.HostBase.metadata, provider.HOST_SCHEMA)
COMPONENTS = (TENANT, PROVIDER, HOST)
OLD: Mapping[str, Component] = {
    "tenant-registrar": TENANT,
    "tenant-verifier": TENANT,
    "provider": PROVIDER,
    "host": HOST,
}
"""Names of the dumps in ``fixtures/schema1``."""


def old_database(path: Path, name: str, *, schema: str = "schema1") -> str:
    """A database as the program of that schema left it; its URL."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript((FIXTURES / schema / f"{name}.sql").read_text(encoding="utf-8"))
        connection.execute("PRAGMA journal_mode=WAL")
    path.chmod(0o600)
    return sqlite_url(path)


async def shape(url: str) -> dict[str, object]:
    """Everything that tells two databases' tables apart: columns in their order, keys, indexes."""
    engine = create_async_engine(url, poolclass=NullPool)
    async with asyncio.timeout(_WAIT_S), engine.connect() as connection:
        return await connection.run_sync(_shape)


def _shape(connection: Connection) -> dict[str, object]:
    look = inspect(connection)
    return {
        name: {
            "columns": [(one["name"], str(one["type"]), one["nullable"]) for one in look.get_columns(name)],
            "key": look.get_pk_constraint(name)["constrained_columns"],
            "foreign": sorted(str(sorted(one.items(), key=str)) for one in look.get_foreign_keys(name)),
            "unique": sorted(one["column_names"] for one in look.get_unique_constraints(name)),
            "indexes": sorted((one["name"], one["column_names"], one["unique"]) for one in look.get_indexes(name)),
        }
        for name in look.get_table_names()
    }
