"""`harness lab renew|power-cycle|replace-tpm`: what is done to a lab that runs, in the place of its operators.

Invariants:
    1. What changes trust or keys needs a reason, which goes into the audit trail of each party.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from harness import cli_complete, cli_guest_view, cli_provider_guest, cli_show, cli_site
from harness.cli_help import AsJson, Lab, Reason, examples
from harness.errors import ConfigError

if TYPE_CHECKING:
    from harness.lab_outcome import GuestOutcome

HostArgument = Annotated[
    str, typer.Argument(metavar="HOST", help="The host's name.", autocompletion=cli_complete.hosts)
]
SOON_DAYS = 30
"""`lab status` shows how long a certificate is valid when it is less than this."""
_LONGEST_DAYS = 36_500.0
_HOW = {
    "call": "the service has it in use",
    "file": "in its file, for its next use; without the reason in its audit trail",
}


def _days(value: float) -> float:
    if math.isnan(value) or not 0 < value <= _LONGEST_DAYS:
        raise typer.BadParameter(f"{value:g} must be more than 0 up to {_LONGEST_DAYS:g} days")
    return value


def add_to(app: typer.Typer) -> None:
    """Adds the commands to the group."""
    app.command(
        "renew",
        epilog=examples(
            'harness lab renew --reason "the yearly renewal"',
            'harness lab renew alice-verifier alice-operator --days 30 --reason "ends on Friday"',
        ),
    )(renew)
    app.command(
        "power-cycle",
        epilog=examples(
            "harness lab power-cycle host1",
            "harness lab power-cycle host1 --scenario tampered-kernel",
            "harness lab power-cycle host1 --unorderly",
        ),
    )(power_cycle)
    app.command("replace-tpm", epilog=examples('harness lab replace-tpm host1 --reason "board replaced, ticket 4711"'))(
        replace_tpm
    )


def renew(
    reason: Reason,
    services: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SERVICE]...",
            help="Whose (default: all services, agents and operators of the lab).",
            show_default=False,
            autocompletion=cli_complete.certified,
        ),
    ] = None,
    days: Annotated[
        float, typer.Option("--days", metavar="N", callback=_days, help="For how long they are valid.")
    ] = 365.0,
    lab: Lab = None,
    as_json: AsJson = False,
) -> None:
    """Renew certificates on the same keys: a running service takes its own at once, others find it in their file.

    Nothing has to be enrolled or started anew. The reason is in the audit trail of those that took theirs by a call;
    one that finds it in its file audits that, and not the reason. Services are named as `lab status` shows them; a
    guest's agent is agent-GUEST, an operator provider-operator or TENANT-operator, a tenant's client TENANT-client.
    """
    import asyncio

    from harness import console, lab_renewal

    cli_site.site_of(lab)  # says what is wrong with a lab that was never started
    folder = cli_site.control_of(lab).folder
    with console.progress("renewing certificates"):
        done = asyncio.run(lab_renewal.renew(folder, services or [], days, reason))
    if as_json:
        console.print_json([each.as_json() for each in done])
        return
    rows = [(each.name, cli_show.time(each.expires.timestamp()), _HOW[each.by]) for each in done]
    console.print_table(("certificate", "valid until", "how"), rows, empty="nothing was renewed")


def power_cycle(
    host: HostArgument,
    scenario: Annotated[
        str | None,
        typer.Option(
            "--scenario",
            metavar="NAME",
            help="What it boots from now on, by name or file (default: what it booted last).",
            autocompletion=cli_complete.scenarios,
        ),
    ] = None,
    unorderly: Annotated[
        bool, typer.Option("--unorderly", help="Cut the power: nothing is stopped in order, and the TPM is not told.")
    ] = False,
    lab: Lab = None,
) -> None:
    """Switch a host off and on, as a reboot does: its guests and its agent end, and start again after its boot.

    Returns when its guests run again; whether the reboot is accepted is up to the tenants (`harness tenant status`).
    `harness lab restart HOST-tpm` is the hardware TPM alone.
    """
    import asyncio

    from harness import console, lab_hosts

    _known(host, lab)
    boots = None if scenario is None else cli_provider_guest.scenario_of(scenario)
    with console.progress(f"{host} goes off and on"):
        done = asyncio.run(lab_hosts.power_cycle(cli_site.control_of(lab), host, scenario=boots, orderly=not unorderly))
    for name in done.away:
        console.say(f"guest {name} does not run again; `harness lab logs {host}-guests` says why")
    print(f"{host} was switched off and on, and booted {done.scenario}; {done.running} of its guests run again")
    raise typer.Exit(1 if done.away else 0)


def replace_tpm(host: HostArgument, reason: Reason, lab: Lab = None) -> None:
    """Give a host another hardware TPM, and do what each party's operator has to do then.

    The host gets a new id: the provider moves guests and allowlists to it, the guests get new vTPMs, and the tenants
    enrol host and guests anew and forget the old host. Each act is in its party's audit trail with the reason. When it
    is interrupted, the same command completes it. Exits 1 when a guest is not attested in the end.
    """
    import asyncio

    from harness import console, lab_replace

    _known(host, lab)
    control = cli_site.control_of(lab)
    outcomes = asyncio.run(lab_replace.replace_tpm(control, host, reason, lambda step: print(step, flush=True)))
    rows = [(guest.name, guest.tenant, *verdict(guest)) for guest in outcomes]
    console.print_table(("guest", "tenant", "verdict", "why"), rows, empty="no guest was under attestation")
    raise typer.Exit(0 if all(guest.accepted for guest in outcomes) else 1)


def verdict(guest: GuestOutcome) -> tuple[str, str]:
    """How a guest stands and why, as two cells of a table."""
    if guest.accepted:
        return "accepted", ""
    why = cli_guest_view.brief(guest.layer, guest.failed_check, guest.error or "not yet")
    return "refused", f"{why}: {guest.detail or ''}".rstrip(": ")


def _known(host: str, lab: Path | None) -> None:
    hosts = cli_site.site_of(lab).hosts
    if host not in hosts:
        raise ConfigError(f"no host {host}; this lab has {', '.join(hosts)}")


def ending(folder: Path) -> dict[str, str]:
    """Certificates of a lab that end within `SOON_DAYS`, with what is left of them, for people.

    A certificate that cannot be read is not judged here: its service says what is wrong with it.
    """
    from harness import lab_renewal

    try:
        left = {name: days for name, days in lab_renewal.days_left(folder).items() if days < SOON_DAYS}
    except ConfigError:
        return {}
    return {name: f"{math.floor(days)} days" if days >= 0 else "expired" for name, days in left.items()}
