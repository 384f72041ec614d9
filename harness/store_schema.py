"""Schema versions: a database is brought to the program's schema by alembic's revisions, or refused.

Schema N of a component is alembic's revision ``000N``; ``alembic_version_COMPONENT`` says which one a database has. The
table ``schema_version`` of schema 1 is kept up to date with it, so that older programs refuse the database too.

Invariants:
    1. All steps and the new version are one transaction of the caller, which holds the component's lock: they happen
       once, or not at all.
    2. A database with a newer schema, or with other tables than its schema says, is refused and not written.
    3. A fresh database goes through the same steps as an old one.

Spec: docs/adr/0008; alembic ("Using the operations directly", `MigrationContext`).
"""

from __future__ import annotations

from pathlib import Path

from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Column, Connection, Integer, MetaData, String, Table, delete, insert, inspect, select, update

from harness.errors import StoreError
from harness.store_errors import name_of

MIGRATIONS = Path(__file__).parent / "migrations"
"""One folder a component, named as it with ``_`` for ``-``."""

_PREFIX = "alembic_version_"
_VERSIONS = Table(
    "schema_version",
    MetaData(),
    Column("component", String(64), primary_key=True),
    Column("version", Integer, nullable=False),
)


def schemas_in(connection: Connection) -> dict[str, int]:
    """Schema of each component in this database."""
    names = inspect(connection).get_table_names()
    found = {}
    if _VERSIONS.name in names:
        found = {row.component: row.version for row in connection.execute(select(_VERSIONS))}
    for component in list(found):
        table = _revisions_of(component)
        revision = connection.scalar(select(table.c.version_num)) if table.name in names else None
        found[component] = found[component] if revision is None else int(revision)
    return found


def check_schema(name: str, component: str, found: int, version: int) -> None:
    """Checks that this program knows the schema of the database, or backup, of this name.

    Raises:
        StoreError: it is newer.
    """
    if found > version:
        raise StoreError(
            f"{name}: its {component} schema {found} is newer than this program's schema {version}; "
            "use the program that wrote it, or restore an older backup"
        )


def bring_to(
    connection: Connection, component: str, version: int, metadata: MetaData, migrations: Path = MIGRATIONS
) -> int | None:
    """Brings the component's tables to a schema, in the transaction that is open.

    Args:
        connection: in a transaction that holds the component's lock.
        component: whose tables.
        version: the program's schema.
        metadata: the tables as the program knows them.
        migrations: folder of all components' revisions.

    Returns:
        The schema that was found; None for a fresh database.

    Raises:
        StoreError: the database has a newer schema, or tables that do not belong to its schema.
    """
    found = schemas_in(connection).get(component)
    if found is not None:
        check_schema(name_of(connection.engine.url), component, found, version)
    if found != version:
        _upgrade(connection, component, found, version, migrations)
    _note(connection, component, version, known=found is not None)
    _check_tables(connection, component, version, metadata)
    return found


def _upgrade(connection: Connection, component: str, found: int | None, version: int, migrations: Path) -> None:
    scripts = ScriptDirectory(str(migrations / component.replace("-", "_")))
    options = {
        "version_table": _revisions_of(component).name,
        "script": scripts,
        "fn": lambda heads, _: scripts._upgrade_revs(_revision(version), heads),
    }
    context = MigrationContext.configure(connection, opts=options)
    if found is not None and not context.get_current_heads():
        context.stamp(scripts, _revision(found))  # a program before alembic made it
    context.run_migrations(op=Operations(context))


def _note(connection: Connection, component: str, version: int, *, known: bool) -> None:
    """Written at each start: a database that is read-only shows itself now, not at the first guest."""
    own = _VERSIONS.c.component == component
    _VERSIONS.create(connection, checkfirst=True)
    if known:
        connection.execute(update(_VERSIONS).where(own).values(version=version))
    else:
        connection.execute(delete(_VERSIONS).where(own))
        connection.execute(insert(_VERSIONS).values(component=component, version=version))


def _check_tables(connection: Connection, component: str, version: int, metadata: MetaData) -> None:
    found = {name: {one["name"] for one in some} for (_, name), some in inspect(connection).get_multi_columns().items()}
    for table in metadata.sorted_tables:
        missing = {column.name for column in table.columns} - found.get(table.name, set())
        if missing:
            raise StoreError(
                f"{name_of(connection.engine.url)}: its {component} schema {version} lacks {table.name}.{min(missing)};"
                " another program changed it: restore a backup with `harness db restore`"
            )


def _revisions_of(component: str) -> Table:
    name = f"{_PREFIX}{component.replace('-', '_')}"
    return Table(name, MetaData(), Column("version_num", String(32), primary_key=True))


def _revision(schema: int) -> str:
    return f"{schema:04}"
