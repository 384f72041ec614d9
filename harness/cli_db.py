"""`harness db`: schema, migration, backup and restore of a service's database."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from harness.cli_help import AsJson, examples, group
from harness.errors import ConfigError

if TYPE_CHECKING:
    from harness.store_backup import Copied
    from harness.store_backup_origin import Service

app = group("Look after a service's database: schema, backup, restore.")

Config = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="Settings of a service; its database is meant.")
]
DatabaseUrl = Annotated[
    str | None, typer.Option("--url", envvar="HARNESS_DATABASE", metavar="URL", help="The database, without settings.")
]
_COMPONENTS = ("tenant", "provider", "host-agent")
_COLUMNS = ("component", "schema", "program's", "what that means")


class _Meant(NamedTuple):
    """The database that is meant; whose tables it is for, and whose it is, where that is known."""

    url: str
    component: str | None = None
    service: Service | None = None


@app.command(
    epilog=examples(
        "harness db status --config verifier.yml",
        "harness db status --url sqlite+aiosqlite:////var/lib/harness/verifier.db --json",
    )
)
def status(config: Config = None, url: DatabaseUrl = None, as_json: AsJson = False) -> None:
    """Say which schema a database has; a SQLite file is read through for damage.

    Writes nothing; services may use the database. Exits 1 when it is newer than this program.
    """
    import asyncio

    from harness import console
    from harness.store_backup import schemas_in_use

    meant = _database(config, url)
    programs = _programs()
    found = asyncio.run(schemas_in_use(meant.url))
    rows = [(name, str(schema), str(programs.get(name, "-")), _meaning(name, schema)) for name, schema in found.items()]
    if as_json:
        console.print_json(
            {"components": [{"name": name, "schema": found[name], "program": programs.get(name)} for name in found]}
        )
    else:
        console.print_table(_COLUMNS, rows, empty="the database is empty: the service makes its tables when it starts")
    raise typer.Exit(int(any(schema > programs.get(name, 0) for name, schema in found.items())))


@app.command(
    epilog=examples(
        "harness db migrate --config verifier.yml",
        "harness db migrate --url postgresql+asyncpg://harness@/tenant?host=/run/postgresql --component tenant",
    )
)
def migrate(
    config: Config = None,
    url: DatabaseUrl = None,
    component: Annotated[
        str | None, typer.Option(metavar="NAME", help=f"With --url: whose tables; {', '.join(_COMPONENTS)}.")
    ] = None,
) -> None:
    """Bring a database to this program's schema now; a service does the same when it starts.

    Older programs refuse the database from then on: make a backup first.
    """
    import asyncio

    meant = _database(config, url)
    name = component or meant.component
    if name not in _COMPONENTS:
        raise ConfigError(f"--component must be one of {', '.join(_COMPONENTS)}")
    asyncio.run(_migrate(meant.url, name))
    print(f"the {name} database has schema {_programs()[name]}")


@app.command(epilog=examples("harness db backup --config verifier.yml --out verifier-2026-01-01.backup"))
def backup(
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The backup; must not be there yet.")],
    config: Config = None,
    url: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Copy a database into a file, while the service may run.

    The file is as secret as the database: it may hold a payload key that is not delivered yet. With --config it says
    whose it is, and is not restored into another service's database.
    """
    import asyncio

    from harness.store_backup import back_up

    meant = _database(config, url)
    _show(asyncio.run(back_up(meant.url, out, service=meant.service)), f"backup {out}", as_json=as_json)


@app.command(epilog=examples("harness db restore --config verifier.yml --from verifier-2026-01-01.backup"))
def restore(
    source: Annotated[Path, typer.Option("--from", metavar="FILE", help="What `harness db backup` made.")],
    config: Config = None,
    url: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Put a backup in the database's place; the services that use it must be stopped.

    With --config a backup of another service is refused. What was there is kept beside it (SQLite) or beside the backup
    (PostgreSQL). An older schema is migrated when the service starts.
    """
    import asyncio

    from harness.store_backup import restore as put_back

    meant = _database(config, url)
    back = put_back(meant.url, source, _programs(), component=meant.component, service=meant.service)
    done = asyncio.run(back)
    _show(done, f"restored {source}", as_json=as_json)


def _database(config: Path | None, url: str | None) -> _Meant:
    if config is None:
        if url is None:
            raise ConfigError("which database? give the service's settings with --config, or the database with --url")
        return _Meant(url)
    from harness import config as settings
    from harness.store_backup_origin import Service

    settings.read_yaml(config)  # an unreadable file is told as what it is
    kinds: tuple[tuple[Any, str, str, str | None], ...] = (
        (settings.TenantVerifierSettings, "tenant", "tenant-verifier", "tenant"),
        (settings.TenantRegistrarSettings, "tenant", "tenant-registrar", "tenant"),
        (settings.ProviderRegistrarSettings, "provider", "provider", None),
        (settings.ProviderVerifierSettings, "provider", "provider", None),  # the same database
        (settings.HostAgentSettings, "host-agent", "host-agent", "name"),
    )
    for model, component, kind, key in kinds:
        with contextlib.suppress(ConfigError):
            loaded = settings.load(config, model)
            whose = kind if key is None else f"{kind} of {getattr(loaded, key)}"
            return _Meant(str(loaded.database), component, Service(whose=whose, settings=config))
    raise ConfigError(f"{config}: is not the settings file of a service that has a database")


def _programs() -> Mapping[str, int]:
    """Schema of each component that this program knows."""
    from harness.provider.tables import HOST_SCHEMA
    from harness.provider.tables import SCHEMA as PROVIDER_SCHEMA
    from harness.tenant.tables import SCHEMA as TENANT_SCHEMA

    return {"tenant": TENANT_SCHEMA, "provider": PROVIDER_SCHEMA, "host-agent": HOST_SCHEMA}


async def _migrate(url: str, component: str) -> None:
    from harness.provider.tables import Base as Provider
    from harness.provider.tables import HostBase
    from harness.store import open_store
    from harness.tenant.tables import Base as Tenant

    metadata = {"tenant": Tenant.metadata, "provider": Provider.metadata, "host-agent": HostBase.metadata}[component]
    store = await open_store(url, metadata, component=component, version=_programs()[component])
    await store.close()


def _meaning(component: str, schema: int) -> str:
    known = _programs().get(component)
    if known is None or schema > known:
        return "newer than this program, which refuses it"
    return "up to date" if schema == known else "older: migrated when the service starts"


def _show(done: Copied, what: str, *, as_json: bool) -> None:
    from harness import console

    if as_json:
        kept = None if done.kept is None else str(done.kept)
        console.print_json({"schemas": dict(done.schemas), "bytes": done.size, "took_s": done.took_s, "kept": kept})
        return
    schemas = ", ".join(f"{name} schema {schema}" for name, schema in done.schemas.items())
    print(f"{what}: {schemas}, {done.size} bytes, {done.took_s:.1f} s")
    if done.kept is not None:
        print(f"what was there is kept as {done.kept}")
