"""`harness provider guest`: guests of the hosts, whose they are, and vTPMs that a host's journal holds on to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness import cli_complete, cli_names, cli_show, cli_site
from harness.cli_help import AsJson, Guest, HostName, Lab, OptionalReason, Reason, examples, group
from harness.errors import ConfigError, NotFound

if TYPE_CHECKING:
    from harness.config import HostSite, SiteSettings
    from harness.provider.operator import ProviderOperator
    from harness.values import AgentId, HostId

app = group("Guests of the hosts, and whose they are.")

_MANAGER_S = 120.0
"""Longest order to a guest manager: a start manufactures the vTPM first."""
_LOCAL_S = 30.0
_COLUMNS = ("guest", "name", "tenant", "host", "state", "registered")


@app.command(
    "define",
    epilog=examples(
        "harness provider guest define web1 --tenant alice",
        "harness provider guest define web2 --tenant alice --scenario guest-tampered-kernel --json",
    ),
)
def guest_define(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name for people.")],
    tenant: Annotated[
        str,
        typer.Option(
            "--tenant",
            envvar="HARNESS_TENANT",
            metavar="NAME",
            help="Whose it is.",
            autocompletion=cli_complete.tenants,
        ),
    ],
    scenario: Annotated[
        str,
        typer.Option(metavar="NAME", help="What it boots, by name or file.", autocompletion=cli_complete.scenarios),
    ] = "guest-good",
    agent_id: Annotated[
        str | None, typer.Option("--uuid", metavar="UUID", help="Its UUID (default: a new one).")
    ] = None,
    host: HostName = None,
    lab: Lab = None,
    as_json: AsJson = False,
) -> None:
    """Define a guest with a vTPM on a host, with an image of its tenant; `start` manufactures the vTPM.

    From its first start on it is kept running, as the guests of lab.yml are, until `stop`. Prints the guest's UUID. A
    name that another guest has is refused.
    """
    import uuid

    from harness.console import print_json
    from harness.lab_plan import GuestPlan
    from harness.lab_site import write_image
    from harness.values import AgentId as Id

    site = cli_site.site_of(lab)
    host_name, at = cli_site.host_of(site, host)
    cli_site.tenant_of(site, tenant)
    boots = scenario_of(scenario)
    chosen = Id(cli_site.parse_id(agent_id, "--uuid") if agent_id else uuid.uuid4())
    plan = GuestPlan(agent_id=chosen, name=name, tenant=tenant, host=host_name, scenario=boots)

    async def define(operator: ProviderOperator) -> None:
        host_id = await announced(operator, host_name)
        for other in await operator.guests():
            if other["name"] == name and other["agent_id"] != str(chosen):
                raise ConfigError(f"{name} is the name of guest {other['agent_id']} already; choose another one")
        await operator.define_guest(chosen, tenant, host_id, name)
        image = write_image(site, plan, host_name)
        members = {"uuid": str(chosen), "name": name, "scenario": boots, "agent_config": str(image)}
        await _order(at, "define", **members, autostart=True)

    cli_site.as_provider(site, define)
    if as_json:
        print_json({"agent_id": str(chosen), "name": name, "tenant": tenant, "host": host_name})
    else:
        print(chosen)


@app.command("start", epilog=examples("harness provider guest start web1"))
def guest_start(guest: Guest, lab: Lab = None) -> None:
    """Start a guest; the first start manufactures its vTPM with certificates signed in the hardware TPM."""
    _on_manager(cli_site.site_of(lab), guest, "start")


@app.command("stop", epilog=examples("harness provider guest stop web1"))
def guest_stop(guest: Guest, lab: Lab = None) -> None:
    """Stop a guest; its vTPM keeps its state."""
    _on_manager(cli_site.site_of(lab), guest, "stop")


@app.command("list", epilog=examples("harness provider guest list"))
def guest_list(lab: Lab = None, as_json: AsJson = False) -> None:
    """List the guests with their owners and what their hosts report."""
    guests = cli_site.as_provider(cli_site.site_of(lab), lambda operator: operator.guests())
    short = cli_show.shortener(guest.get(name) for guest in guests for name in ("agent_id", "host_id"))

    def row(guest: Mapping[str, Any]) -> tuple[str, ...]:
        named = (cli_show.text(guest.get(member)) for member in ("name", "tenant"))
        stands = (cli_show.text(guest.get(member)) for member in ("state", "registered"))
        return short(guest.get("agent_id")), *named, short(guest.get("host_id")), *stands

    cli_show.show(guests, row, _COLUMNS, as_json=as_json, empty="no guests")


@app.command(
    "release",
    epilog=examples(
        'harness provider guest release web1 --reason "moved to host2, the old vTPM is destroyed"',
        'harness provider guest release 6f1d2c3b-4a59-4e6f-8a7b-0c1d2e3f4a5b --host host1 --reason "disk lost"',
    ),
)
def guest_release(guest: Guest, reason: Reason, host: HostName = None, lab: Lab = None) -> None:
    """Free a guest's vTPM in its host's journal, so that another vTPM may be certified for the guest there.

    For the alarm of a host that refuses a second vTPM under one UUID. Only root and the host agent's own user may. The
    tenant's registrar keeps the former keys until its operator's `guest re-enrol`.
    """
    from harness.unix_client import ask

    site = cli_site.site_of(lab)

    async def release(operator: ProviderOperator) -> None:
        if host is not None and cli_names.is_id(guest):  # the registrar may know nothing of it any more
            agent_id, at = guest, cli_site.host_of(site, host)[1]
        else:
            found, at = await _find(operator, site, guest)
            agent_id, at = str(found), at if host is None else cli_site.host_of(site, host)[1]
        if at.local_socket is None:
            raise ConfigError("the lab's site does not say where the host agent's local socket is (local_socket)")
        await ask(at.local_socket, {"op": "release", "agent_id": agent_id, "reason": reason}, deadline_s=_LOCAL_S)

    cli_site.as_provider(site, release)


@app.command(
    "move", epilog=examples('harness provider guest move web1 --host host2 --reason "host1 is taken out of service"')
)
def guest_move(
    guest: Guest,
    host: Annotated[
        str,
        typer.Option(
            "--host",
            metavar="HOST_ID",
            help="Where it runs from now on: the host's id, the first characters of it, or its name.",
            autocompletion=cli_complete.hosts,
        ),
    ],
    reason: Reason,
    lab: Lab = None,
) -> None:
    """Record that a guest runs on another host from now on; it has to register there anew.

    This is the record alone. The guest itself is undefined on the old host, and defined and started on the new one,
    where its vTPM is certified anew; its tenant states the new host (`harness tenant guest re-enrol --host`).
    """
    site = cli_site.site_of(lab)

    async def move(operator: ProviderOperator) -> None:
        agent_id, _ = await _find(operator, site, guest)
        await operator.move_guest(agent_id, await known_host(operator, host), reason)

    cli_site.as_provider(site, move)


@app.command("remove", epilog=examples('harness provider guest remove web1 --reason "no longer needed"'))
def guest_remove(guest: Guest, reason: OptionalReason = None, lab: Lab = None) -> None:
    """Stop a guest, destroy its vTPM and its image, and forget whose it was."""
    site = cli_site.site_of(lab)

    async def remove(operator: ProviderOperator) -> None:
        agent_id, at = await _find(operator, site, guest)
        await _order(at, "undefine", uuid=str(agent_id))
        await operator.remove_guest(agent_id, reason)

    cli_site.as_provider(site, remove)


# --- helpers ----------------------------------------------------------------------------------------------


async def announced(operator: ProviderOperator, name: str) -> HostId:
    """Id of a host by its name. Raises NotFound when it has not announced itself."""
    from harness.values import parse_host_id

    for entry in await operator.hosts():
        if entry["name"] == name:
            return parse_host_id(entry["host_id"])
    raise NotFound(f"host {name} has not announced itself yet")


async def known_host(operator: ProviderOperator, text: str) -> HostId:
    """Id of a host from what was typed: an id, the beginning of one, or a name.

    Raises:
        NotFound, ConfigError: it fits none, or several (`cli_names.pick`).
    """
    from harness.values import parse_host_id

    if cli_names.is_id(text):
        return parse_host_id(text)
    hosts = await operator.hosts()
    names = {str(host["host_id"]): str(host.get("name")) for host in hosts}
    known = {*names, *(str(host["replacement"]) for host in hosts if host.get("replacement"))}
    return parse_host_id(cli_names.pick(text, known, names, what="host", listing="harness provider host list"))


def scenario_of(stated: str) -> str:
    """A scenario that can be used, as guest managers and hardware TPMs take it: its name, or its file's whole path."""
    from harness.sim.boot import Scenario

    try:
        Scenario.load(stated)
    except ConfigError as error:
        raise ConfigError(f"--scenario {stated}: {error.detail}") from None
    path = Path(stated)
    return str(path.absolute()) if "/" in stated or path.suffix else stated


def _on_manager(site: SiteSettings, guest: str, order: str) -> None:
    async def run(operator: ProviderOperator) -> None:
        agent_id, at = await _find(operator, site, guest)
        await _order(at, order, uuid=str(agent_id))

    cli_site.as_provider(site, run)


async def _order(host: HostSite, order: str, **members: object) -> None:
    from harness.unix_client import ask

    await ask(host.guest_manager, {"op": order, **members}, deadline_s=_MANAGER_S)


async def _find(operator: ProviderOperator, site: SiteSettings, guest: str) -> tuple[AgentId, HostSite]:
    """A guest by id, the first characters of it, or name, and the host that it is defined on."""
    from harness.values import parse_agent_id

    guests = {str(entry["agent_id"]): entry for entry in await operator.guests()}
    names = {agent_id: str(entry["name"]) for agent_id, entry in guests.items()}
    agent_id = cli_names.pick(guest, guests, names, what="guest", listing="harness provider guest list")
    if agent_id not in guests:
        raise NotFound(f"no guest {guest}; `harness provider guest list` shows them all")
    hosts = {entry["host_id"]: entry["name"] for entry in await operator.hosts()}
    _, at = cli_site.host_of(site, hosts.get(guests[agent_id]["host_id"]))
    return parse_agent_id(agent_id), at
