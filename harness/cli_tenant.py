"""`harness tenant`: what a tenant's operator does with its registrar and verifier."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness import cli_show, cli_site
from harness.cli_help import AsJson, Lab, examples, group

if TYPE_CHECKING:
    from harness import values
    from harness.tenant.operator import TenantOperator
    from harness.tenant.policy import Policy

app = group("Act as a tenant's operator: enrol hosts, put guests under attestation.")
host_app = group("Hosts whose hardware TPM this tenant trusts.")
guest_app = group("Guests of this tenant, and how their attestation stands.")
app.add_typer(host_app, name="host")
app.add_typer(guest_app, name="guest")

Tenant = Annotated[
    str | None,
    typer.Option("--tenant", envvar="HARNESS_TENANT", metavar="NAME", help="Which tenant; not needed if only one."),
]
HostId = Annotated[str, typer.Argument(metavar="HOST_ID", help="The host's id, as `host list` shows it.")]
AgentId = Annotated[str, typer.Argument(metavar="AGENT_ID", help="The guest's UUID.")]
PolicyFile = Annotated[Path | None, typer.Option(metavar="FILE", help="Reference values (default: the site's own).")]

_HOST_COLUMNS = ("host", "enrolled at", "where")
_GUEST_COLUMNS = ("guest", "host", "registered", "state", "attested", "rounds", "payload", "why")
_ENDED = frozenset({"FAILED", "INVALID_QUOTE", "TENANT_FAILED", "TERMINATED"})
"""States that only an operator ends."""
_POLL_S = 0.2
_ALARM_COLUMNS = ("at", "what", "guest", "host", "detail")


# --- hosts ------------------------------------------------------------------------------------------------


@host_app.command(
    "add",
    epilog=examples(
        "harness tenant host add --tenant alice",
        "harness tenant host add https://provider.example:8443 --tenant alice",
    ),
)
def host_add(
    url: Annotated[
        str | None, typer.Argument(metavar="URL", help="A provider verifier (default: the one in the site).")
    ] = None,
    tenant: Tenant = None,
    lab: Lab = None,
    as_json: AsJson = False,
) -> None:
    """Enrol the hosts behind a provider verifier, or the one named by .../v1/hosts/HOST_ID.

    Pins EK, AK and vTPM CA key after the tenant's own challenge was answered. Exits 1 when a check fails.
    """
    own = cli_site.tenant_of(cli_site.site_of(lab), tenant)
    hosts = cli_site.as_tenant(own, lambda operator: operator.add_host(url or own.provider_verifier))
    cli_show.show(hosts, _host_row, _HOST_COLUMNS, as_json=as_json, empty="no host was enrolled")


@host_app.command("list", epilog=examples("harness tenant host list --tenant alice"))
def host_list(tenant: Tenant = None, lab: Lab = None, as_json: AsJson = False) -> None:
    """List the enrolled hosts."""
    own = cli_site.tenant_of(cli_site.site_of(lab), tenant)
    hosts = cli_site.as_tenant(own, lambda operator: operator.hosts())
    cli_show.show(hosts, _host_row, _HOST_COLUMNS, as_json=as_json, empty="no host is enrolled")


@host_app.command(
    "show", epilog=examples("harness tenant host show 3c5d7a0e-1f0b-8a4c-9d2e-5b6f7a8c9d0e --tenant alice --json")
)
def host_show(host_id: HostId, tenant: Tenant = None, lab: Lab = None, as_json: AsJson = False) -> None:
    """Show what is pinned of a host."""
    from harness.values import HostId as Id

    own = cli_site.tenant_of(cli_site.site_of(lab), tenant)
    wanted = Id(cli_site.parse_id(host_id, "HOST_ID"))
    cli_show.show_one(cli_site.as_tenant(own, lambda operator: operator.host(wanted)), as_json=as_json)


@host_app.command(
    "remove", epilog=examples("harness tenant host remove 3c5d7a0e-1f0b-8a4c-9d2e-5b6f7a8c9d0e --tenant alice")
)
def host_remove(host_id: HostId, tenant: Tenant = None, lab: Lab = None) -> None:
    """Forget a host that has no guests; it can be enrolled anew, also with other keys."""
    from harness.values import HostId as Id

    own = cli_site.tenant_of(cli_site.site_of(lab), tenant)
    wanted = Id(cli_site.parse_id(host_id, "HOST_ID"))
    cli_site.as_tenant(own, lambda operator: operator.remove_host(wanted))


# --- guests -----------------------------------------------------------------------------------------------


@guest_app.command(
    "add",
    epilog=examples(
        "harness tenant guest add 6f1d2c3b-4a59-4e6f-8a7b-0c1d2e3f4a5b --tenant alice --payload secret.txt",
        "harness tenant guest add 6f1d2c3b-4a59-4e6f-8a7b-0c1d2e3f4a5b --tenant alice --guest-only",
    ),
)
def guest_add(
    agent_id: AgentId,
    host: Annotated[
        str | None, typer.Option(metavar="HOST_ID", help="Where it runs (default: the only enrolled host).")
    ] = None,
    payload: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Secret for the guest, released when all was accepted.")
    ] = None,
    guest_policy: PolicyFile = None,
    host_policy: PolicyFile = None,
    guest_only: Annotated[bool, typer.Option("--guest-only", help="Ask for no quote of the host.")] = False,
    provider_verifier: Annotated[
        str | None, typer.Option(metavar="URL", help="Where host quotes are asked for (default: the site's).")
    ] = None,
    every: Annotated[int, typer.Option(metavar="N", help="A host quote in every Nth round.")] = 1,
    interval: Annotated[float, typer.Option(metavar="SECONDS", help="Time between two rounds.")] = 2.0,
    allow_reboots: Annotated[bool, typer.Option("--allow-reboots", help="Report resets instead of refusing.")] = False,
    wait: Annotated[float, typer.Option(metavar="SECONDS", help="How long to wait for its registration.")] = 60.0,
    tenant: Tenant = None,
    lab: Lab = None,
) -> None:
    """State where a guest runs, wait until it has registered, and put it under attestation.

    Exits 1 when the registrar refuses its vTPM or its agent cannot be believed.
    """
    from harness.tenant.operator import Order
    from harness.values import AgentId as Id

    own = cli_site.tenant_of(cli_site.site_of(lab), tenant)
    guest = Id(cli_site.parse_id(agent_id, "AGENT_ID"))
    order = Order(
        guest_policy=_policy(guest_policy or own.guest_policy),
        host_policy=_policy(host_policy or own.host_policy),
        provider_verifier=None if guest_only else provider_verifier or own.provider_verifier,
        payload=cli_site.read_file(payload, "--payload") if payload else None,
        allow_reboots=allow_reboots,
        quote_interval_s=interval,
        provider_quote_interval=every,
    )

    async def add(operator: TenantOperator) -> None:
        await operator.state_guest(guest, await _host_for(operator, host))
        await operator.admit(await operator.registered(guest, deadline_s=wait), order)

    cli_site.as_tenant(own, add)


@guest_app.command("list", epilog=examples("harness tenant guest list --tenant alice"))
def guest_list(tenant: Tenant = None, lab: Lab = None, as_json: AsJson = False) -> None:
    """List the guests with the state of their attestation."""
    own = cli_site.tenant_of(cli_site.site_of(lab), tenant)
    guests = cli_site.as_tenant(own, lambda operator: operator.guests())
    cli_show.show(guests, _guest_row, _GUEST_COLUMNS, as_json=as_json, empty="no guest is stated")


@guest_app.command(
    "show",
    epilog=examples(
        "harness tenant guest show 6f1d2c3b-4a59-4e6f-8a7b-0c1d2e3f4a5b --tenant alice",
        "harness tenant guest show 6f1d2c3b-4a59-4e6f-8a7b-0c1d2e3f4a5b --tenant alice --wait 30 --json",
    ),
)
def guest_show(
    agent_id: AgentId,
    wait: Annotated[float, typer.Option(metavar="SECONDS", help="How long to wait for a verdict.")] = 0.0,
    tenant: Tenant = None,
    lab: Lab = None,
    as_json: AsJson = False,
) -> None:
    """Show a guest: its registration, state, and what was refused and why.

    Exits 1 when it is not attested now.
    """
    from harness.values import AgentId as Id

    own = cli_site.tenant_of(cli_site.site_of(lab), tenant)
    wanted = Id(cli_site.parse_id(agent_id, "AGENT_ID"))
    guest = cli_site.as_tenant(own, lambda operator: _judged(operator, wanted, wait))
    cli_show.show_one(guest, as_json=as_json)
    raise typer.Exit(0 if (guest["attestation"] or {}).get("attested") else 1)


@guest_app.command(
    "remove", epilog=examples("harness tenant guest remove 6f1d2c3b-4a59-4e6f-8a7b-0c1d2e3f4a5b --tenant alice")
)
def guest_remove(agent_id: AgentId, tenant: Tenant = None, lab: Lab = None) -> None:
    """End a guest's attestation and forget its keys."""
    from harness.values import AgentId as Id

    own = cli_site.tenant_of(cli_site.site_of(lab), tenant)
    wanted = Id(cli_site.parse_id(agent_id, "AGENT_ID"))
    cli_site.as_tenant(own, lambda operator: operator.remove_guest(wanted))


# --- alarms -----------------------------------------------------------------------------------------------


@app.command("alarms", epilog=examples("harness tenant alarms --tenant alice"))
def alarms(tenant: Tenant = None, lab: Lab = None, as_json: AsJson = False) -> None:
    """List what an operator must look at: changed keys, clones, refused certificates. Exits 1 when there is any."""
    own = cli_site.tenant_of(cli_site.site_of(lab), tenant)
    found = cli_site.as_tenant(own, lambda operator: operator.alarms())
    cli_show.show(found, _alarm_row, _ALARM_COLUMNS, as_json=as_json, empty="no alarms")
    raise typer.Exit(1 if found else 0)


# --- helpers ----------------------------------------------------------------------------------------------


def _policy(path: Path) -> Policy:
    from harness import config
    from harness.errors import ConfigError, MalformedMessage
    from harness.tenant.policy import parse_policy

    try:
        return parse_policy(config.read_yaml(path))
    except MalformedMessage as error:
        raise ConfigError(f"{path}: {error.detail}") from None


async def _judged(operator: TenantOperator, agent_id: values.AgentId, wait_s: float) -> Mapping[str, Any]:
    """A guest as soon as there is a verdict on it, or as it is when the wait is over."""
    import asyncio
    import time

    until = time.monotonic() + wait_s
    while True:
        guest = await operator.guest(agent_id)
        session = guest["attestation"] or {}
        if session.get("attested") or session.get("state") in _ENDED or time.monotonic() >= until:
            return guest
        await asyncio.sleep(_POLL_S)


async def _host_for(operator: TenantOperator, stated: str | None) -> values.HostId:
    from harness.errors import ConfigError
    from harness.values import HostId as Id

    if stated is not None:
        return Id(cli_site.parse_id(stated, "--host"))
    ids = [host["host_id"] for host in await operator.hosts()]
    if len(ids) != 1:
        raise ConfigError(f"which host? give --host HOST_ID: {', '.join(ids) or 'none is enrolled (tenant host add)'}")
    return Id(cli_site.parse_id(ids[0], "host_id"))


def _host_row(host: Mapping[str, Any]) -> tuple[str, ...]:
    return cli_show.text(host["host_id"]), cli_show.time(host.get("enrolled_at")), cli_show.text(host.get("url"))


def _guest_row(guest: Mapping[str, Any]) -> tuple[str, ...]:
    session = guest.get("attestation") or {}
    refused = guest.get("refused") or session
    why = " ".join(cli_show.text(refused[name]) for name in ("error", "detail") if refused.get(name))
    return (
        cli_show.text(guest["agent_id"]),
        cli_show.text(guest["host_id"]),
        cli_show.text(guest.get("state")),
        cli_show.text(session.get("state")),
        cli_show.text(session.get("attested")),
        cli_show.text(session.get("attestation_count")),
        "released" if session.get("payload_released") else "locked",
        why,
    )


def _alarm_row(alarm: Mapping[str, Any]) -> tuple[str, ...]:
    members = ("kind", "agent_id", "host_id", "detail")
    return cli_show.time(alarm.get("at")), *(cli_show.text(alarm.get(name)) for name in members)
