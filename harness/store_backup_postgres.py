"""Copies of a PostgreSQL database, by the server's own programs: `pg_dump`, `pg_restore`, `psql`.

Invariants:
    1. No password is on a command line: the programs get the URL's parts through their environment.
    2. A restore is one transaction: tables away, dump in; or nothing.
    3. From the question whether somebody has the database open to the end of the restore nobody of ours opens it: the
       "in use" lock of `store_engine` is held alone.

Spec: PostgreSQL, "pg_dump", "pg_restore", "Environment Variables" of libpq.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from sqlalchemy import inspect, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from harness.errors import StoreError
from harness.store_backup_origin import behind, put_behind
from harness.store_engine import IN_USE, engine_of, lock_number
from harness.store_errors import name_of, store_error
from harness.store_schema import schemas_in

_TALK_S = 20.0
_PROGRAM_S = 3600.0
_ALONE = text(f"SELECT pg_try_advisory_lock({lock_number(IN_USE)})")
_OTHERS = text(
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    " AND backend_type = 'client backend'"
)


class PostgresCopies:
    """Implements `harness.store_backup.Copies`.

    Args:
        url: of a database on a server.
    """

    def __init__(self, url: URL) -> None:
        self._url = url

    async def schemas(self) -> dict[str, int]:
        """See `Copies`."""
        async with self._engine() as engine, self._talk(), engine.connect() as connection:
            return await connection.run_sync(schemas_in)

    async def copy_to(self, half: Path, origin: str | None = None) -> dict[str, int]:
        """See `Copies`."""
        await self._run("pg_dump", "--format=custom", "--no-owner", "--no-privileges", "-w", f"--file={half}")
        put_behind(half, origin)
        return await self.schemas_of(half)

    async def schemas_of(self, backup: Path) -> dict[str, int]:
        """See `Copies`."""
        await self._run("pg_restore", f"--file={os.devnull}", str(backup), what=f"backup {backup}")
        rows = await self._run(
            "pg_restore", "--data-only", "--table=schema_version", "--file=-", str(backup), what=f"backup {backup}"
        )
        found = {}
        for line in rows.split("\n"):
            component, tab, version = line.partition("\t")
            if tab and version.isdecimal():
                found[component] = int(version)
        return found

    async def origin_of(self, backup: Path) -> str | None:
        """See `Copies`."""
        return behind(backup)

    async def replace_with(self, backup: Path, aside: str) -> Path | None:
        """See `Copies`."""
        async with self._engine() as engine, contextlib.AsyncExitStack() as held:
            async with self._talk():
                connection = await held.enter_async_context(engine.connect())
                names, components = await self._alone(connection)
            return await self._replace(backup, aside, names, components)

    async def _alone(self, connection: AsyncConnection) -> tuple[list[str], list[str]]:
        """Takes the database for this connection alone, until that ends; its tables and components."""
        if not await connection.scalar(_ALONE) or await connection.scalar(_OTHERS):
            raise StoreError(f"{name_of(self._url)}: a service has it open; stop the services that use it")
        names = await connection.run_sync(lambda sync: inspect(sync).get_table_names())
        components = list(await connection.run_sync(schemas_in))
        await connection.rollback()  # what was read here must not be in the way of the restore
        return names, components

    async def _replace(self, backup: Path, aside: str, names: list[str], components: list[str]) -> Path | None:
        kept = backup.with_name(f"{backup.name}.{aside}") if names else None
        if kept is not None:
            with _private(kept):
                await self.copy_to(kept)
        with tempfile.TemporaryDirectory(prefix="harness-restore-") as folder:  # 0700
            script, before = Path(folder, "dump.sql"), Path(folder, "before.sql")
            _write(before, _before(names, components))
            await self._run("pg_restore", "--no-owner", "--no-privileges", f"--file={script}", str(backup))
            options = ("-X", "-q", "-w", "--single-transaction", "-v", "ON_ERROR_STOP=1", "-o", os.devnull)
            await self._run("psql", *options, "-f", str(before), "-f", str(script))
        return kept

    @contextlib.asynccontextmanager
    async def _engine(self) -> AsyncIterator[AsyncEngine]:
        _, engine = engine_of(self._url.render_as_string(hide_password=False), "backup")
        try:
            yield engine
        finally:
            await engine.dispose()

    @contextlib.asynccontextmanager
    async def _talk(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(_TALK_S):
                yield
        except (SQLAlchemyError, OSError) as error:
            raise store_error(self._url, error) from error

    async def _run(self, program: str, *words: str, what: str | None = None) -> str:
        found = shutil.which(program)
        if found is None:
            step = "install PostgreSQL's client programs (Debian: postgresql-client, Fedora: postgresql)"
            raise StoreError(f"{name_of(self._url)}: {program} is not installed; {step}")
        process = await asyncio.create_subprocess_exec(
            *(found, *words),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, **environment_of(self._url)},
        )
        try:
            async with asyncio.timeout(_PROGRAM_S):
                out, err = await process.communicate()
        except TimeoutError:
            raise StoreError(f"{name_of(self._url)}: {program} is not done after {_PROGRAM_S:g} s") from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode:
            said = err.decode(errors="replace").strip().splitlines() or [f"exit code {process.returncode}"]
            raise StoreError(f"{what or name_of(self._url)}: {said[0]}")
        return out.decode(errors="replace")


def environment_of(url: URL) -> dict[str, str]:
    """A URL's parts, for PostgreSQL's own programs."""
    query = {name: value if isinstance(value, str) else ",".join(value) for name, value in url.query.items()}
    found = {
        "PGHOST": url.host or query.get("host"),
        "PGPORT": str(url.port) if url.port else query.get("port"),
        "PGUSER": url.username or query.get("user"),
        "PGPASSWORD": None if url.password is None else str(url.password),
        "PGDATABASE": url.database,
        "PGSSLMODE": query.get("ssl") or query.get("sslmode"),
    }
    return {name: value for name, value in found.items() if value}


def _write(path: Path, statements: str) -> None:
    path.write_text(statements, encoding="utf-8")


def _before(names: list[str], components: list[str]) -> str:
    """What the restoring transaction begins with: no store of ours is inside one, and no table is in the way."""
    locks = [f"SELECT pg_advisory_xact_lock({lock_number(component)});" for component in sorted(components)]
    quoted = [name.replace('"', '""') for name in names]
    return "\n".join([*locks, *(f'DROP TABLE IF EXISTS "{name}" CASCADE;' for name in quoted)]) + "\n"


@contextlib.contextmanager
def _private(path: Path) -> Iterator[None]:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise
