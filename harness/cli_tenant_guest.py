"""`harness tenant guest`: guests under attestation, and how one that has stopped comes back."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness import cli_guest_view, cli_names, cli_show, cli_site
from harness.cli_advice import look_again
from harness.cli_help import (
    AsJson,
    Guest,
    Lab,
    OptionalReason,
    Reason,
    Tenant,
    examples,
    group,
    seconds,
)
from harness.errors import ConfigError, Conflict, NotFound
from harness.tenant.states import STOPPED_NAMES, State

if TYPE_CHECKING:
    from harness.config import SiteSettings, TenantSite
    from harness.tenant.operator import TenantOperator
    from harness.values import AgentId, HostId

app = group("Guests of this tenant, and how their attestation stands.")

PolicyFile = Annotated[Path | None, typer.Option(metavar="FILE", help="Reference values (default: the site's own).")]
Payload = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Secret for the guest, released when all was accepted.")
]
OnHost = Annotated[
    str | None, typer.Option("--host", metavar="HOST_ID", help="Where it runs (default: the only enrolled host).")
]
Wait = Annotated[
    float,
    typer.Option(metavar="SECONDS", help="How long to wait for its registration.", callback=seconds()),
]

_ENDED = STOPPED_NAMES | {State.TERMINATED.name}
_HOW = ("guest_policy", "host_policy", "guest_only", "provider_verifier", "every", "interval", "allow_reboots")
"""Options of `guest add` that say how a guest is attested."""
_CHECK_OF_CLOCKS = 10
_POLL_S = 0.2


@app.command(
    "add",
    epilog=examples(
        "harness tenant guest add web1 --tenant alice --payload secret.txt",
        "harness tenant guest add 6f1d2c3b-4a59-4e6f-8a7b-0c1d2e3f4a5b --tenant alice --guest-only",
    ),
)
def guest_add(
    ctx: typer.Context,
    guest: Guest,
    host: OnHost = None,
    payload: Payload = None,
    guest_policy: PolicyFile = None,
    host_policy: PolicyFile = None,
    guest_only: Annotated[bool, typer.Option("--guest-only", help="Ask for no quote of the host.")] = False,
    provider_verifier: Annotated[
        str | None, typer.Option(metavar="URL", help="Where host quotes are asked for (default: the site's).")
    ] = None,
    every: Annotated[int, typer.Option(metavar="N", min=1, max=1_000_000, help="A host quote in every Nth round.")] = 1,
    interval: Annotated[
        float, typer.Option(metavar="SECONDS", help="Time between two rounds.", callback=seconds())
    ] = 2.0,
    allow_reboots: Annotated[bool, typer.Option("--allow-reboots", help="Report resets instead of refusing.")] = False,
    wait: Wait = 60.0,
    tenant: Tenant = None,
    lab: Lab = None,
) -> None:
    """State where a guest runs, wait until it has registered, and put it under attestation.

    A guest whose re-enrolment was interrupted is attested as before, unless options say how. Exits 1 when the registrar
    refuses its vTPM or its agent cannot be believed.
    """
    from harness.tenant.order import Order

    site = cli_site.site_of(lab)
    own = cli_site.tenant_of(site, tenant)
    order = Order(
        guest_policy=cli_site.read_policy(guest_policy or own.guest_policy),
        host_policy=cli_site.read_policy(host_policy or own.host_policy),
        provider_verifier=None if guest_only else provider_verifier or own.provider_verifier,
        payload=cli_site.read_file(payload, "--payload") if payload else None,
        allow_reboots=allow_reboots,
        quote_interval_s=interval,
        provider_quote_interval=every,
    )

    orders = cli_site.orders_of(lab, site, own)
    stated = any(_is_stated(ctx, name) for name in _HOW)

    async def add(operator: TenantOperator) -> None:
        agent_id = await cli_site.guest_of(site, operator, guest, stated=False)
        kept = None if stated else orders.of(agent_id, order.payload)
        if kept is not None:
            typer.echo(f"{guest} is attested as it was before its re-enrolment", err=True)
        if kept is None or host is not None:
            await operator.state_guest(agent_id, await _host_for(operator, host))
        await operator.admit(await operator.registered(agent_id, deadline_s=wait), kept or order)
        orders.forget(agent_id)

    cli_site.as_tenant(own, add)


@app.command("list", epilog=examples("harness tenant guest list --tenant alice"))
def guest_list(tenant: Tenant = None, lab: Lab = None, as_json: AsJson = False) -> None:
    """List the guests with the state of their attestation."""
    site = cli_site.site_of(lab)
    own = cli_site.tenant_of(site, tenant)
    guests = cli_site.as_tenant(own, lambda operator: operator.guests())
    cli_guest_view.draw_list(guests, cli_names.guest_names(site), as_json=as_json)


@app.command(
    "show",
    epilog=examples(
        "harness tenant guest show web1 --tenant alice",
        "harness tenant guest show 6f1d2c3b --tenant alice --wait 30 --json",
    ),
)
def guest_show(
    guest: Guest,
    wait: Annotated[
        float,
        typer.Option(metavar="SECONDS", help="How long to wait for a verdict.", callback=seconds(zero=True)),
    ] = 0.0,
    tenant: Tenant = None,
    lab: Lab = None,
    as_json: AsJson = False,
) -> None:
    """Show whether a guest is attested, by which chain of keys, the last verdicts, and what to do if it is not.

    Exits 1 when it is not attested now.
    """
    site = cli_site.site_of(lab)
    own = cli_site.tenant_of(site, tenant)

    async def look(operator: TenantOperator) -> Mapping[str, Any]:
        agent_id = await cli_site.guest_of(site, operator, guest)
        found = await _judged(operator, agent_id, wait)
        policy = await operator.policy(agent_id) if found.get("attestation") else None
        return cli_guest_view.whole(found, policy)

    shown = cli_site.as_tenant(own, look)
    if as_json:
        cli_show.show_one(shown, as_json=True)
    else:
        name = cli_names.guest_names(site).get(shown["guest"]["agent_id"])
        cli_guest_view.draw(shown, name, cli_site.to_state(site, tenant))
    raise typer.Exit(0 if cli_guest_view.is_attested(shown["guest"], shown["attestation"]) else 1)


@app.command(
    "resume",
    epilog=examples(
        'harness tenant guest resume web1 --tenant alice --reason "the provider verifier was down"',
        'harness tenant guest resume web1 --tenant alice --accept-reboot --reason "firmware update"',
        'harness tenant guest resume --all --tenant alice --accept-reboot --reason "firmware update"',
    ),
)
def guest_resume(
    reason: Reason,
    guest: Annotated[str | None, typer.Argument(metavar="GUEST", help="The guest, as for `show`.")] = None,
    accept_reboot: Annotated[
        bool, typer.Option("--accept-reboot", help="Take the counters that check 10 refused as the new baseline.")
    ] = False,
    everyone: Annotated[bool, typer.Option("--all", help="All guests of the tenant that have stopped.")] = False,
    tenant: Tenant = None,
    lab: Lab = None,
) -> None:
    """Let a guest whose attestation has stopped be attested again, from the next round on.

    Nothing is believed by it: the next round is judged as every other. For a reboot that was refused (check 10) the new
    counters are accepted with --accept-reboot, of the guest or of its host: when both were reset the second one is
    refused in the next round, and accepted by giving the command again. For other reference values see `policy set`.
    Exits 1 when it has not stopped, or no reboot was refused.
    """
    if (guest is None) == (not everyone):
        raise ConfigError("give a guest, or --all")
    site = cli_site.site_of(lab)
    own = cli_site.tenant_of(site, tenant)

    async def resume(operator: TenantOperator) -> list[AgentId]:
        if guest is not None:
            agent_id = await cli_site.guest_of(site, operator, guest)
            await operator.resume(agent_id, reason, accept_reboot=accept_reboot)
            return [agent_id]
        halted = await stopped(operator)
        for agent_id in halted:
            await resume_as_it_stopped(operator, agent_id, reason, accept_reboot=accept_reboot)
        return halted

    resumed = cli_site.as_tenant(own, resume)
    print(done(site, tenant, resumed, "resumed, judged anew in the next round") or "no guest has stopped")


@app.command(
    "re-enrol",
    epilog=examples(
        'harness tenant guest re-enrol web1 --tenant alice --reason "vTPM made anew, ticket 4711"',
        'harness tenant guest re-enrol web1 --host 3c5d7a0e --payload secret.txt --reason "moved to another host"',
    ),
)
def guest_re_enrol(
    guest: Guest,
    reason: Reason,
    host: Annotated[
        str | None, typer.Option(metavar="HOST_ID", help="Where it runs from now on (default: where it did).")
    ] = None,
    payload: Payload = None,
    wait: Wait = 120.0,
    tenant: Tenant = None,
    lab: Lab = None,
) -> None:
    """Forget a guest's keys, wait until it has registered with the ones that it has now, and attest it as before.

    Reference values, intervals and provider stay what they were; one that was not under attestation gets the site's.
    A payload is handed over anew only with --payload: the old one was sealed for the old keys. The guest's agent
    notices within a minute that it is to register. How it was attested is kept in a file of the lab until it is
    attested again: when the command ended early, `guest add` or the same command goes on. Exits 1 when the registrar
    refuses its vTPM.
    """
    site = cli_site.site_of(lab)
    own = cli_site.tenant_of(site, tenant)
    secret = cli_site.read_file(payload, "--payload") if payload else None
    orders = cli_site.orders_of(lab, site, own)

    async def re_enrol(operator: TenantOperator) -> None:
        from harness.console import progress
        from harness.tenant.order import Order

        agent_id = await cli_site.guest_of(site, operator, guest)
        target = None if host is None else await cli_site.enrolled_host(operator, host)
        try:
            order = await operator.former_order(agent_id, secret)
            orders.keep(agent_id, order)
        except NotFound:
            order = orders.of(agent_id, secret) or Order(payload=secret, **_site_order(own))
        with contextlib.suppress(NotFound):
            await operator.end_attestation(agent_id, reason)
        await operator.re_enrol_guest(agent_id, reason, host_id=target)
        with progress(f"waiting for the agent of {guest}, which looks after its registration twice a minute"):
            contact = await operator.registered(agent_id, deadline_s=wait)
        await operator.admit(contact, order)
        orders.forget(agent_id)

    cli_site.as_tenant(own, re_enrol)


@app.command("remove", epilog=examples('harness tenant guest remove web1 --tenant alice --reason "no longer needed"'))
def guest_remove(guest: Guest, reason: OptionalReason = None, tenant: Tenant = None, lab: Lab = None) -> None:
    """End a guest's attestation and forget its keys."""
    site = cli_site.site_of(lab)
    own = cli_site.tenant_of(site, tenant)

    async def remove(operator: TenantOperator) -> None:
        agent_id = await cli_site.guest_of(site, operator, guest)
        await operator.remove_guest(agent_id, reason)
        cli_site.orders_of(lab, site, own).forget(agent_id)

    cli_site.as_tenant(own, remove)


# --- helpers ----------------------------------------------------------------------------------------------


def done(site: SiteSettings, tenant: str | None, guests: Sequence[AgentId], what: str) -> str:
    """The line that says what was done with guests, and how to see what becomes of them; empty when there are none."""
    names = cli_names.guest_names(site)
    shown = [names.get(str(agent_id), str(agent_id)) for agent_id in guests]
    return f"{', '.join(shown)}: {what}; next: {look_again(shown[0], cli_site.to_state(site, tenant))}" if shown else ""


async def stopped(operator: TenantOperator) -> list[AgentId]:
    """Guests of the tenant whose attestation has stopped."""
    from harness.values import parse_agent_id

    return [
        parse_agent_id(guest["agent_id"])
        for guest in await operator.guests()
        if (guest.get("attestation") or {}).get("state") in _ENDED
    ]


async def resume_as_it_stopped(
    operator: TenantOperator, agent_id: AgentId, reason: str, *, accept_reboot: bool = False
) -> None:
    """Resume one of several guests: a reboot is accepted where one was refused, and not accepted twice for one host."""
    session = await operator.attestation(agent_id)
    if accept_reboot and session.get("failed_check") == _CHECK_OF_CLOCKS:
        try:
            await operator.resume(agent_id, reason, accept_reboot=True)
        except Conflict:  # another guest of the same host has made these counters the baseline
            pass
        else:
            return
    await operator.resume(agent_id, reason)


def _is_stated(ctx: typer.Context, option: str) -> bool:
    """Whether an option was given, rather than left as it is by default."""
    source = ctx.get_parameter_source(option)
    return source is not None and source.name != "DEFAULT"


def _site_order(own: TenantSite) -> dict[str, Any]:
    return {
        "guest_policy": cli_site.read_policy(own.guest_policy),
        "host_policy": cli_site.read_policy(own.host_policy),
        "provider_verifier": own.provider_verifier,
    }


async def _judged(operator: TenantOperator, agent_id: AgentId, wait_s: float) -> Mapping[str, Any]:
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


async def _host_for(operator: TenantOperator, stated: str | None) -> HostId:
    from harness.values import parse_host_id

    if stated is not None:
        return await cli_site.enrolled_host(operator, stated)
    ids = [str(host["host_id"]) for host in await operator.hosts()]
    if len(ids) != 1:
        raise ConfigError(f"which host? give --host HOST_ID: {', '.join(ids) or 'none is enrolled (tenant host add)'}")
    return parse_host_id(ids[0])
