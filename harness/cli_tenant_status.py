"""`harness tenant status`: how all guests of all tenants stand, once or as it changes.

Invariants:
    1. A guest is attested only when its verifier says so now; one that nobody answers for is not.
    2. A tenant whose registrar does not answer is named on standard error, and the answer is "not all attested".
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness import cli_guest_view, cli_names, cli_show, cli_site
from harness.cli_help import AsJson, Lab, Tenant, examples, seconds
from harness.errors import CertificateExpired, HarnessError, NotFound

if TYPE_CHECKING:
    from rich.table import Table

    from harness.config import SiteSettings, TenantSite
    from harness.tenant.operator import TenantOperator

_COLUMNS = ("guest", "tenant", "attested", "last success", "state", "why")
_FOR_PEOPLE = frozenset({"layer", "unasked"})


@dataclass(frozen=True, slots=True)
class Standing:
    """All guests at one moment, and the tenants that could not be asked with the reason.

    Args:
        guests: with what only people are shown (`_FOR_PEOPLE`).
        silent: reasons by tenant.
        down: the sentence that says that the whole lab is down, if it is.
    """

    guests: list[dict[str, Any]]
    silent: dict[str, str]
    down: str | None = None

    @property
    def all_attested(self) -> bool:
        """Whether everybody answered and every guest is attested."""
        return not self.silent and all(guest["attested"] for guest in self.guests)

    def as_json(self) -> dict[str, Any]:
        """The one object for programs."""
        return {
            "guests": [
                {name: value for name, value in guest.items() if name not in _FOR_PEOPLE} for guest in self.guests
            ]
        }


def register(parent: typer.Typer) -> None:
    """Adds `status` to its group."""
    epilog = examples(
        "harness tenant status",
        "harness tenant status --tenant alice --json",
        "harness tenant status --watch",
    )
    parent.command("status", epilog=epilog)(status)


def status(
    watch: Annotated[bool, typer.Option("--watch", help="Go on showing it until Ctrl-C.")] = False,
    every: Annotated[float, typer.Option(metavar="SECONDS", help="How often --watch looks.", callback=seconds())] = 1.0,
    tenant: Tenant = None,
    lab: Lab = None,
    as_json: AsJson = False,
) -> None:
    """Show how the guests of all tenants stand, or of the one that is given.

    Exits 0 when all are attested, else 1. A tenant whose services do not answer is named on standard error and counts
    as not attested; the others are shown. --watch ends with Ctrl-C, exit code 0; with --json it prints one object a
    line, whenever something has changed.
    """
    site = cli_site.site_of(lab)
    tenants = cli_site.tenants_of(site, tenant)
    if watch:
        _watch(site, tenants, every, as_json=as_json)
        return
    standing = ask(tenants)
    _say_silent(standing)
    if as_json:
        cli_show.show_one(standing.as_json(), as_json=True)
    else:
        from harness.console import console

        print_standing(console(), standing, cli_names.guest_names(site))
    raise typer.Exit(0 if standing.all_attested else 1)


def ask(tenants: Mapping[str, TenantSite]) -> Standing:
    """How the guests of some tenants stand now."""
    guests: list[dict[str, Any]] = []
    silent: dict[str, str] = {}
    down: str | None = None
    for name, answer in cli_site.as_tenants(tenants, _guests).items():
        if isinstance(answer, HarnessError):
            down = answer.detail if isinstance(answer, cli_site.LabDown) else down
            silent[name] = cli_site.reason_of(answer, f"{name}-registrar")
        else:
            guests += answer
    return Standing(guests, silent, down)


async def _guests(tenant: str, operator: TenantOperator) -> list[dict[str, Any]]:
    import asyncio

    return await asyncio.gather(*(_guest(tenant, operator, guest) for guest in await operator.stated()))


async def _guest(tenant: str, operator: TenantOperator, guest: Mapping[str, Any]) -> dict[str, Any]:
    from harness.values import parse_agent_id

    session: Mapping[str, Any] = {}
    error, unasked = (guest.get("refused") or {}).get("error"), None
    try:
        session = await operator.attestation(parse_agent_id(guest["agent_id"]))
    except NotFound:
        pass  # stated, and not under attestation
    except HarnessError as failure:
        unasked = cli_site.reason_of(failure, f"{tenant}-verifier")
        error = CertificateExpired.__name__ if cli_site.is_expired(failure) else type(failure).__name__
    return {
        "agent_id": guest["agent_id"],
        "tenant": tenant,
        "state": session.get("state"),
        "attested": cli_guest_view.is_attested(guest, session),
        "last_success": session.get("last_successful_attestation"),
        "attestations": session.get("attestation_count", 0),
        "failed_check": session.get("failed_check"),
        "error": session.get("error") or error,
        "layer": session.get("layer"),
        "unasked": unasked,
    }


# --- showing ----------------------------------------------------------------------------------------------


def print_standing(out: Any, standing: Standing, names: Mapping[str, str]) -> None:
    """Print it for people."""
    if standing.guests:
        out.print(table(standing, names, time.time(), boxed=out.is_terminal))
    if standing.down is None:
        out.print(_summary(standing), highlight=False)


def table(standing: Standing, names: Mapping[str, str], now: float, *, boxed: bool) -> Table:
    """The guests as a table that fits 80 columns."""
    from harness.console import table_of

    short = cli_show.shortener((guest["agent_id"] for guest in standing.guests), wide=False)
    rows = [
        (
            names.get(guest["agent_id"]) or short(guest["agent_id"]),
            str(guest["tenant"]),
            cli_show.text(guest["attested"]),
            "-"
            if guest["last_success"] is None and (guest["attestations"] or guest.get("unasked"))
            else cli_show.ago(guest["last_success"], now),
            cli_show.text(guest["state"]),
            cli_guest_view.brief(guest.get("layer"), guest["failed_check"], guest["error"]),
        )
        for guest in standing.guests
    ]
    return table_of(_COLUMNS, rows, boxed=boxed)


def _summary(standing: Standing) -> str:
    attested = sum(guest["attested"] for guest in standing.guests)
    return f"{attested} of {len(standing.guests)} guests are attested"


def _say_silent(standing: Standing) -> None:
    from harness.console import say

    for line in _unasked(standing):
        say(f"harness: {line}")


def _unasked(standing: Standing) -> list[str]:
    """Who could not be asked and why; of a lab that is down this is said once."""
    if standing.down is not None:
        return [standing.down]
    lines = [f"the guests of {tenant} cannot be listed: {reason}" for tenant, reason in standing.silent.items()]
    unasked = dict.fromkeys((guest["tenant"], guest["unasked"]) for guest in standing.guests if guest.get("unasked"))
    return lines + [f"the verifier of {tenant} cannot be asked: {reason}" for tenant, reason in unasked]


# --- watching ---------------------------------------------------------------------------------------------


def _watch(site: SiteSettings, tenants: Mapping[str, TenantSite], every: float, *, as_json: bool) -> None:
    from harness.console import OutputGone, console

    out = console()
    try:
        if out.is_terminal and not as_json:
            _redraw(site, tenants, every)
        else:
            _print_changes(site, tenants, every, as_json=as_json)
    except (KeyboardInterrupt, OutputGone):
        return  # the reader has seen enough


def _print_changes(site: SiteSettings, tenants: Mapping[str, TenantSite], every: float, *, as_json: bool) -> None:
    from harness.console import console

    before: Standing | None = None
    for standing in _standings(tenants, every):
        if standing == before:
            continue
        if before is None or _unasked(standing) != _unasked(before):
            _say_silent(standing)
        before = standing
        if as_json:
            cli_show.show_one(standing.as_json(), as_json=True)
        else:
            print_standing(console(), standing, cli_names.guest_names(site))


def _redraw(site: SiteSettings, tenants: Mapping[str, TenantSite], every: float) -> None:
    from rich.console import Group
    from rich.live import Live

    from harness.console import console

    with Live(console=console(), auto_refresh=False, transient=False) as live:
        for standing in _standings(tenants, every):
            parts: list[Any] = []
            if standing.guests:
                parts.append(table(standing, cli_names.guest_names(site), time.time(), boxed=True))
            parts += _unasked(standing)
            live.update(Group(*parts, f"{_summary(standing)}; {cli_show.time(time.time())}; Ctrl-C ends"), refresh=True)


def _standings(tenants: Mapping[str, TenantSite], every: float) -> Iterator[Standing]:
    while True:
        yield ask(tenants)
        time.sleep(every)
