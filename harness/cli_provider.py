"""`harness provider`: what the provider's operator does with its registrar: tenants, hosts, the audit trail."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness import cli_complete, cli_metrics, cli_policy_view, cli_provider_guest, cli_show, cli_site
from harness.cli_help import AsJson, HostName, Lab, OptionalReason, Reason, examples, group
from harness.cli_tenant_alarms import show_audit
from harness.errors import ConfigError, HarnessError

if TYPE_CHECKING:
    from harness.provider.operator import ProviderOperator
    from harness.values import PcrSelection

app = group("Act as the provider's operator: tenants, what they may see, hosts and guests.")
tenant_app = group("Tenants, and the PCRs of each host that they may see.")
host_app = group("Hosts whose agents have announced themselves.")
app.add_typer(tenant_app, name="tenant")
app.add_typer(host_app, name="host")
app.add_typer(cli_provider_guest.app, name="guest")
cli_metrics.register_provider(app)

TenantName = Annotated[
    str, typer.Argument(metavar="NAME", help="The tenant's name.", autocompletion=cli_complete.tenants)
]
Host = Annotated[
    str,
    typer.Argument(
        metavar="HOST_ID",
        help="The host's id, the first characters of it, or its name.",
        autocompletion=cli_complete.hosts,
    ),
]

_LOCAL_S = 10.0
_TENANT_COLUMNS = ("tenant", "host", "may see")
_HOST_COLUMNS = ("host", "name", "where")


# --- tenants ----------------------------------------------------------------------------------------------


@tenant_app.command(
    "add", epilog=examples('harness provider tenant add carol --ca carol-ca.pem --reason "contract 4711"')
)
def tenant_add(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The tenant's name.")],
    ca: Annotated[Path, typer.Option(metavar="FILE", help="Certificate (PEM) of the tenant's own authority.")],
    reason: OptionalReason = None,
    lab: Lab = None,
) -> None:
    """Onboard a tenant: certificates of its authority are listened to from now on."""
    site = cli_site.site_of(lab)
    pem = cli_site.read_file(ca, "--ca").decode("ascii", "replace")
    cli_site.as_provider(site, lambda operator: operator.add_tenant(name, pem, reason))


@tenant_app.command(
    "allow",
    epilog=examples(
        "harness provider tenant allow carol --pcrs 0-7,14",
        "harness provider tenant allow carol --host host1 --bank sha384 --pcrs 0-15",
    ),
)
def tenant_allow(
    name: TenantName,
    pcrs: Annotated[str, typer.Option(metavar="LIST", help="PCRs, such as 0-7,14.")] = "0-15",
    bank: Annotated[str, typer.Option(metavar="NAME", help="sha256, sha384 or sha512.")] = "sha256",
    host: HostName = None,
    reason: OptionalReason = None,
    lab: Lab = None,
) -> None:
    """Set what a tenant may see of a host; it replaces what was allowed before."""
    site = cli_site.site_of(lab)
    host_name, _ = cli_site.host_of(site, host)
    allowlist = _selection(bank, pcrs)

    async def allow(operator: ProviderOperator) -> None:
        await operator.allow(name, await cli_provider_guest.announced(operator, host_name), allowlist, reason)

    cli_site.as_provider(site, allow)


@tenant_app.command("list", epilog=examples("harness provider tenant list"))
def tenant_list(lab: Lab = None, as_json: AsJson = False) -> None:
    """List the tenants with their allowlists."""
    tenants = cli_site.as_provider(cli_site.site_of(lab), lambda operator: operator.tenants())
    if as_json:
        cli_show.show(tenants, lambda _: (), _TENANT_COLUMNS, as_json=True, empty="")
        return
    rows: list[Mapping[str, Any]] = [
        {"name": tenant["name"], "host": host, "banks": banks}
        for tenant in tenants
        for host, banks in (tenant["allowlists"] or {"-": {}}).items()
    ]
    short = cli_show.shortener(row["host"] for row in rows)

    def row(tenant: Mapping[str, Any]) -> tuple[str, ...]:
        banks = tenant.get("banks") or {}
        seen = "; ".join(f"{bank}: {cli_policy_view.ranges(pcrs)}" for bank, pcrs in banks.items())
        return tenant["name"], short(tenant["host"]), seen or "nothing"

    cli_show.show(rows, row, _TENANT_COLUMNS, as_json=False, empty="no tenants")


@tenant_app.command("remove", epilog=examples('harness provider tenant remove carol --reason "contract ended"'))
def tenant_remove(name: TenantName, reason: OptionalReason = None, lab: Lab = None) -> None:
    """Remove a tenant that has no guests; its certificates are refused from now on."""
    cli_site.as_provider(cli_site.site_of(lab), lambda operator: operator.remove_tenant(name, reason))


# --- hosts ------------------------------------------------------------------------------------------------


@host_app.command("list", epilog=examples("harness provider host list", "harness provider host list --json"))
def host_list(lab: Lab = None, as_json: AsJson = False) -> None:
    """List the hosts, with the id of the TPM that a host's agent announces in place of the known one, if it does."""
    hosts = cli_site.as_provider(cli_site.site_of(lab), lambda operator: operator.hosts())
    short = cli_show.shortener(host[name] for host in hosts for name in ("host_id", "replacement") if host.get(name))

    def row(host: Mapping[str, Any]) -> tuple[str, ...]:
        other = host.get("replacement")
        where = cli_show.text(host.get("url")) + (f"; announces another TPM: {short(other)}" if other else "")
        return short(host["host_id"]), cli_show.text(host.get("name")), where

    cli_show.show(hosts, row, _HOST_COLUMNS, as_json=as_json, empty="no host has announced itself")


@host_app.command("remove", epilog=examples('harness provider host remove 3c5d7a0e --reason "taken out of service"'))
def host_remove(host: Host, reason: Reason, lab: Lab = None) -> None:
    """Forget a host on which no guest is defined, with what tenants may see of it."""

    async def remove(operator: ProviderOperator) -> None:
        await operator.remove_host(await cli_provider_guest.known_host(operator, host), reason)

    cli_site.as_provider(cli_site.site_of(lab), remove)


@host_app.command(
    "replace",
    epilog=examples('harness provider host replace 3c5d7a0e 9b1f0c2d --reason "TPM replaced, ticket 4711"'),
)
def host_replace(
    old: Annotated[str, typer.Argument(metavar="OLD_HOST_ID", help="The host's id with its former TPM.")],
    new: Annotated[str, typer.Argument(metavar="NEW_HOST_ID", help="The id that it has with the new one.")],
    reason: Reason,
    lab: Lab = None,
) -> None:
    """Let a host whose TPM was replaced keep its guests, and what tenants may see of it, under its new id.

    Each tenant decides for itself whether it trusts the new TPM: `harness tenant host add`, then `guest re-enrol` with
    --host for each of its guests.
    """

    async def replace(operator: ProviderOperator) -> None:
        await operator.replace_host(
            await cli_provider_guest.known_host(operator, old),
            await cli_provider_guest.known_host(operator, new),
            reason,
        )

    cli_site.as_provider(cli_site.site_of(lab), replace)


# --- audit ------------------------------------------------------------------------------------------------


@app.command("audit", epilog=examples("harness provider audit", "harness provider audit --json"))
def audit(lab: Lab = None, as_json: AsJson = False) -> None:
    """Show what operators have changed at the registrar and on the hosts, when and why, oldest first.

    Exits 1 when a host does not answer; it is named on standard error.
    """
    site = cli_site.site_of(lab)
    silent: list[str] = []

    async def trail(operator: ProviderOperator) -> list[Mapping[str, Any]]:
        from harness.console import say

        entries = [{"service": "registrar", **entry} for entry in await operator.audit()]
        for name, host in site.hosts.items():
            try:
                entries += [{"service": name, **entry} for entry in await _on_host(host.local_socket)]
            except HarnessError as error:
                silent.append(name)
                say(f"harness: the audit trail of {name} cannot be read: {error.detail}")
        return sorted(entries, key=lambda entry: entry.get("at") or 0.0)

    show_audit(cli_site.as_provider(site, trail), as_json=as_json)
    raise typer.Exit(1 if silent else 0)


async def _on_host(local_socket: Path | None) -> list[Mapping[str, Any]]:
    from harness.unix_client import ask

    if local_socket is None:
        return []
    answer = await ask(local_socket, {"op": "audit"}, deadline_s=_LOCAL_S)
    entries = answer.get("entries")
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


# --- helpers ----------------------------------------------------------------------------------------------


def _selection(bank: str, pcrs: str) -> PcrSelection:
    from harness.errors import MalformedMessage
    from harness.values import HashAlg, PcrSelection

    indices: set[int] = set()
    try:
        for part in pcrs.split(","):
            first, _, last = part.partition("-")
            indices.update(range(int(first), int(last or first) + 1))
        selection = PcrSelection.from_lists({HashAlg.parse(bank): sorted(indices)})
    except MalformedMessage as error:
        raise ConfigError(f"--bank {bank}: {error.detail}") from None
    except ValueError:
        raise ConfigError(f"--pcrs {pcrs}: must be a list such as 0-7,14, of PCRs from 0 to 23") from None
    if not selection.banks:
        raise ConfigError(f"--pcrs {pcrs}: names no PCR")
    return selection
