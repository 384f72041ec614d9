"""`harness provider`: what the provider's operator does with its registrar and with the guests of its hosts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness import cli_show, cli_site
from harness.cli_help import AsJson, Lab, examples, group
from harness.errors import ConfigError

if TYPE_CHECKING:
    from harness.config import HostSite, SiteSettings
    from harness.provider.operator import ProviderOperator
    from harness.values import AgentId, HostId, PcrSelection

app = group("Act as the provider's operator: tenants, what they may see, and guests.")
tenant_app = group("Tenants, and the PCRs of each host that they may see.")
guest_app = group("Guests of the hosts, and whose they are.")
app.add_typer(tenant_app, name="tenant")
app.add_typer(guest_app, name="guest")

TenantName = Annotated[str, typer.Argument(metavar="NAME", help="The tenant's name.")]
Guest = Annotated[str, typer.Argument(metavar="GUEST", help="The guest's UUID, or its name.")]
Host = Annotated[str | None, typer.Option("--host", metavar="NAME", help="Which host; may be left out if only one.")]

_MANAGER_S = 120.0
"""Longest order to a guest manager: a start manufactures the vTPM first."""
_TENANT_COLUMNS = ("tenant", "host", "may see")
_GUEST_COLUMNS = ("guest", "name", "tenant", "host", "state", "registered")


# --- tenants ----------------------------------------------------------------------------------------------


@tenant_app.command("add", epilog=examples("harness provider tenant add carol --ca carol-ca.pem"))
def tenant_add(
    name: TenantName,
    ca: Annotated[Path, typer.Option(metavar="FILE", help="Certificate (PEM) of the tenant's own authority.")],
    lab: Lab = None,
) -> None:
    """Onboard a tenant: certificates of its authority are listened to from now on."""
    site = cli_site.site_of(lab)
    pem = cli_site.read_file(ca, "--ca").decode("ascii", "replace")
    cli_site.as_provider(site, lambda operator: operator.add_tenant(name, pem))


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
    host: Host = None,
    lab: Lab = None,
) -> None:
    """Set what a tenant may see of a host; it replaces what was allowed before."""
    site = cli_site.site_of(lab)
    host_name, _ = cli_site.host_of(site, host)
    allowlist = _selection(bank, pcrs)

    async def allow(operator: ProviderOperator) -> None:
        await operator.allow(name, await _host_id(operator, host_name), allowlist)

    cli_site.as_provider(site, allow)


@tenant_app.command("list", epilog=examples("harness provider tenant list"))
def tenant_list(lab: Lab = None, as_json: AsJson = False) -> None:
    """List the tenants with their allowlists."""
    tenants = cli_site.as_provider(cli_site.site_of(lab), lambda operator: operator.tenants())
    if as_json:
        cli_show.show(tenants, _tenant_row, _TENANT_COLUMNS, as_json=True, empty="")
        return
    rows: list[Mapping[str, Any]] = [
        {"name": tenant["name"], "host": host, "banks": banks}
        for tenant in tenants
        for host, banks in (tenant["allowlists"] or {"-": {}}).items()
    ]
    cli_show.show(rows, _tenant_row, _TENANT_COLUMNS, as_json=False, empty="no tenants")


@tenant_app.command("remove", epilog=examples("harness provider tenant remove carol"))
def tenant_remove(name: TenantName, lab: Lab = None) -> None:
    """Remove a tenant that has no guests; its certificates are refused from now on."""
    cli_site.as_provider(cli_site.site_of(lab), lambda operator: operator.remove_tenant(name))


# --- guests -----------------------------------------------------------------------------------------------


@guest_app.command(
    "define",
    epilog=examples(
        "harness provider guest define web1 --tenant alice",
        "harness provider guest define web2 --tenant alice --scenario guest-tampered-kernel --json",
    ),
)
def guest_define(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name for people.")],
    tenant: Annotated[str, typer.Option("--tenant", envvar="HARNESS_TENANT", metavar="NAME", help="Whose it is.")],
    scenario: Annotated[str, typer.Option(metavar="NAME", help="What it boots, by name or file.")] = "guest-good",
    agent_id: Annotated[
        str | None, typer.Option("--uuid", metavar="UUID", help="Its UUID (default: a new one).")
    ] = None,
    host: Host = None,
    lab: Lab = None,
    as_json: AsJson = False,
) -> None:
    """Define a guest with a vTPM on a host, with an image of its tenant; `start` manufactures the vTPM.

    Prints the guest's UUID.
    """
    import uuid

    from harness.console import print_json
    from harness.lab_plan import GuestPlan
    from harness.lab_site import write_image
    from harness.values import AgentId as Id

    site = cli_site.site_of(lab)
    host_name, at = cli_site.host_of(site, host)
    cli_site.tenant_of(site, tenant)
    chosen = Id(cli_site.parse_id(agent_id, "--uuid") if agent_id else uuid.uuid4())
    plan = GuestPlan(agent_id=chosen, name=name, tenant=tenant, scenario=scenario)

    async def define(operator: ProviderOperator) -> None:
        await operator.define_guest(chosen, tenant, await _host_id(operator, host_name), name)
        image = write_image(site, plan, host_name)
        order = {"uuid": str(chosen), "name": name, "scenario": scenario, "agent_config": str(image)}
        await _order(at, "define", **order)

    cli_site.as_provider(site, define)
    if as_json:
        print_json({"agent_id": str(chosen), "name": name, "tenant": tenant, "host": host_name})
    else:
        print(chosen)


@guest_app.command("start", epilog=examples("harness provider guest start web1"))
def guest_start(guest: Guest, lab: Lab = None) -> None:
    """Start a guest; the first start manufactures its vTPM with certificates signed in the hardware TPM."""
    _on_manager(cli_site.site_of(lab), guest, "start")


@guest_app.command("stop", epilog=examples("harness provider guest stop web1"))
def guest_stop(guest: Guest, lab: Lab = None) -> None:
    """Stop a guest; its vTPM keeps its state."""
    _on_manager(cli_site.site_of(lab), guest, "stop")


@guest_app.command("list", epilog=examples("harness provider guest list"))
def guest_list(lab: Lab = None, as_json: AsJson = False) -> None:
    """List the guests with their owners and what their hosts report."""
    guests = cli_site.as_provider(cli_site.site_of(lab), lambda operator: operator.guests())
    cli_show.show(guests, _guest_row, _GUEST_COLUMNS, as_json=as_json, empty="no guests")


@guest_app.command("remove", epilog=examples("harness provider guest remove web1"))
def guest_remove(guest: Guest, lab: Lab = None) -> None:
    """Stop a guest, destroy its vTPM and its image, and forget whose it was."""
    site = cli_site.site_of(lab)

    async def remove(operator: ProviderOperator) -> None:
        agent_id, at = await _find(operator, site, guest)
        await _order(at, "undefine", uuid=str(agent_id))
        await operator.remove_guest(agent_id)

    cli_site.as_provider(site, remove)


# --- helpers ----------------------------------------------------------------------------------------------


def _on_manager(site: SiteSettings, guest: str, order: str) -> None:
    async def run(operator: ProviderOperator) -> None:
        agent_id, at = await _find(operator, site, guest)
        await _order(at, order, uuid=str(agent_id))

    cli_site.as_provider(site, run)


async def _order(host: HostSite, order: str, **members: str) -> None:
    from harness.unix_client import ask

    await ask(host.guest_manager, {"op": order, **members}, deadline_s=_MANAGER_S)


async def _find(operator: ProviderOperator, site: SiteSettings, guest: str) -> tuple[AgentId, HostSite]:
    """A guest by UUID or name, and the host that it is defined on."""
    from harness.errors import NotFound
    from harness.values import parse_agent_id

    found = [entry for entry in await operator.guests() if guest in (entry["agent_id"], entry["name"])]
    if not found:
        raise NotFound(f"no guest {guest}; `harness provider guest list` shows them all")
    if len(found) > 1:
        raise ConfigError(f"several guests are called {guest}; name one by its UUID")
    hosts = {entry["host_id"]: entry["name"] for entry in await operator.hosts()}
    _, at = cli_site.host_of(site, hosts.get(found[0]["host_id"]))
    return parse_agent_id(found[0]["agent_id"]), at


async def _host_id(operator: ProviderOperator, name: str) -> HostId:
    from harness.errors import NotFound
    from harness.values import parse_host_id

    for entry in await operator.hosts():
        if entry["name"] == name:
            return parse_host_id(entry["host_id"])
    raise NotFound(f"host {name} has not announced itself yet")


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


def _tenant_row(tenant: Mapping[str, Any]) -> tuple[str, ...]:
    banks = tenant.get("banks") or {}
    seen = "; ".join(f"{bank}: {_ranges(pcrs)}" for bank, pcrs in banks.items())
    return tenant["name"], cli_show.text(tenant.get("host")), seen or "nothing"


def _ranges(pcrs: list[int]) -> str:
    """PCRs as `--pcrs` takes them, such as 0-7,14."""
    firsts = [pcr for pcr in pcrs if pcr - 1 not in pcrs]
    lasts = [pcr for pcr in pcrs if pcr + 1 not in pcrs]
    return ",".join(
        str(first) if first == last else f"{first}-{last}" for first, last in zip(firsts, lasts, strict=True)
    )


def _guest_row(guest: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(
        cli_show.text(guest.get(name)) for name in ("agent_id", "name", "tenant", "host_id", "state", "registered")
    )
