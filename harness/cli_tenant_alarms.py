"""`harness tenant alarms` and `harness tenant audit`: what an operator must look at, and what operators have done."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Awaitable, Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness import cli_names, cli_show, cli_site
from harness.cli_help import AsJson, Lab, Reason, Tenant, examples
from harness.errors import ConfigError, Conflict, HarnessError
from harness.tenant.states import STOPPED_NAMES

if TYPE_CHECKING:
    from harness.config import SiteSettings, TenantSite
    from harness.tenant.operator import TenantOperator

app = typer.Typer(
    help="What an operator must look at: changed keys, clones, refused certificates and evidence.",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    epilog=examples(
        "harness tenant alarms",
        'harness tenant alarms ack r12 v7 --tenant alice --reason "reboot for maintenance"',
    ),
)

All = Annotated[bool, typer.Option("--all", help="Also those that were acknowledged.")]

_ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_REBOOT = "HostRebooted"
_COLUMNS = ("id", "at", "what", "about", "detail")
_AUDIT_COLUMNS = ("at", "service", "who", "action", "subject", "reason")
_NARROW_AUDIT_COLUMNS = ("at", "who", "action", "subject", "reason")


@app.callback()
def alarms(
    ctx: typer.Context, everything: All = False, tenant: Tenant = None, lab: Lab = None, as_json: AsJson = False
) -> None:
    """List the alarms of all tenants; the same as `alarms list`. Exits 1 when one has not been acknowledged."""
    if ctx.invoked_subcommand is None:
        _list(everything, tenant, lab, as_json=as_json)
    typed = [name for name in ctx.params if getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE"]
    if typed:
        raise ConfigError(f"options come after the command: harness tenant alarms {ctx.invoked_subcommand} ...")


@app.command(
    "list", epilog=examples("harness tenant alarms list --tenant alice", "harness tenant alarms list --all --json")
)
def alarms_list(everything: All = False, tenant: Tenant = None, lab: Lab = None, as_json: AsJson = False) -> None:
    """List the alarms of registrar (r) and verifier (v), of all tenants or of the one that is given.

    Exits 1 when there is one that nobody has acknowledged. A tenant whose services do not answer is named on standard
    error, and the exit code is not 0.
    """
    _list(everything, tenant, lab, as_json=as_json)


@app.command(
    "ack",
    epilog=examples(
        'harness tenant alarms ack v7 --tenant alice --reason "kernel update, new reference values are set"',
        'harness tenant alarms ack r12 r13 --tenant alice --reason "test of a cloned guest"',
        'harness tenant alarms ack --all --reason "maintenance 4711"',
    ),
)
def alarms_ack(
    reason: Reason,
    ids: Annotated[
        list[str] | None, typer.Argument(metavar="[ID]...", help="Alarms, such as r12 or v7.", show_default=False)
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All that `alarms` lists.")] = False,
    tenant: Tenant = None,
    lab: Lab = None,
) -> None:
    """Acknowledge alarms: you have looked, and nothing more is to be done.

    It changes nothing else: a guest that has stopped stays stopped until `guest resume`. Ids are those of one tenant;
    --all means all tenants, or the one that is given.
    """
    from harness.tenant.operator_acts import parse_alarm_id

    if bool(ids) == everything:
        raise ConfigError("give ids of alarms, or --all")
    if not ids:
        _acknowledge_all(cli_site.tenants_of(cli_site.site_of(lab), tenant), reason)
        return
    for each in ids:
        parse_alarm_id(each)
    own = cli_site.tenant_of(cli_site.site_of(lab), tenant)

    async def acknowledge(operator: TenantOperator) -> None:
        for each in dict.fromkeys(ids):
            await operator.acknowledge(each, reason)

    cli_site.as_tenant(own, acknowledge)


def _acknowledge_all(tenants: Mapping[str, TenantSite], reason: str) -> None:
    async def acknowledge(operator: TenantOperator) -> list[Mapping[str, Any]]:
        alarms = await operator.alarms()
        for alarm in alarms:
            with contextlib.suppress(Conflict):  # somebody else has done so meanwhile
                await operator.acknowledge(str(alarm["id"]), reason)
        return alarms

    alarms, silent = _of_all(tenants, acknowledge)
    for name in dict.fromkeys(str(alarm["tenant"]) for alarm in alarms):
        print(f"{name}: {', '.join(str(alarm['id']) for alarm in alarms if alarm['tenant'] == name)} acknowledged")
    if not alarms:
        print("no alarms")
    raise typer.Exit(_say_silent(silent, "alarms"))


def register_audit(parent: typer.Typer) -> None:
    """Adds `audit` to its group."""
    parent.command("audit", epilog=examples("harness tenant audit", "harness tenant audit --tenant alice --json"))(
        audit
    )


def audit(tenant: Tenant = None, lab: Lab = None, as_json: AsJson = False) -> None:
    """Show what the operators of all tenants, or of the one that is given, have changed, when and why, oldest first.

    A tenant whose services do not answer is named on standard error, and the exit code is not 0.
    """
    tenants = cli_site.tenants_of(cli_site.site_of(lab), tenant)
    entries, silent = _of_all(tenants, lambda operator: operator.audit())
    show_audit(entries, as_json=as_json, by_tenant=len(tenants) > 1)
    raise typer.Exit(_say_silent(silent, "audit trail"))


def show_audit(entries: list[Mapping[str, Any]], *, as_json: bool, by_tenant: bool = False) -> None:
    """Print an audit trail; each entry has the service that kept it as ``service``, and its ``tenant`` by tenant."""
    short = cli_show.shortener(found for entry in entries for found in _ID.findall(str(entry.get("subject"))))

    wide = cli_show.is_wide()

    def row(entry: Mapping[str, Any]) -> tuple[str, ...]:
        subject, who = cli_show.text(entry.get("subject")), cli_show.text(entry.get("who"))
        cells = {
            "tenant": cli_show.text(entry.get("tenant")),
            "at": cli_show.when(entry.get("at"), wide=wide),
            "service": cli_show.text(entry.get("service")),
            "who": who if wide else who.rpartition("/")[2],
            "action": cli_show.text(entry.get("action")),
            "subject": _ID.sub(lambda found: short(found[0]), subject),
            "reason": cli_show.text(entry.get("reason")),
        }
        return tuple(cells[column] for column in columns)

    columns = (("tenant",) if by_tenant else ()) + (_AUDIT_COLUMNS if wide else _NARROW_AUDIT_COLUMNS)
    cli_show.show(entries, row, columns, as_json=as_json, empty="nothing was overruled or changed")


def _list(everything: bool, tenant: str | None, lab: Path | None, *, as_json: bool) -> None:
    site = cli_site.site_of(lab)
    tenants = cli_site.tenants_of(site, tenant)
    accepted: set[object] = set()

    async def look(operator: TenantOperator) -> list[Mapping[str, Any]]:
        alarms = await operator.alarms(everything=everything)
        if not as_json:
            accepted.update(await _accepted_reboots(operator, alarms))
        return alarms

    found, silent = _of_all(tenants, look)
    if as_json:
        cli_show.show(found, lambda _: (), _COLUMNS, as_json=True, empty="")
    else:
        _draw(site, found, accepted, by_tenant=len(tenants) > 1)
    unasked = _say_silent(silent, "alarms")
    raise typer.Exit(1 if any(alarm.get("acknowledged_at") is None for alarm in found) else unasked)


def _of_all(
    tenants: Mapping[str, TenantSite], ask: Callable[[TenantOperator], Awaitable[list[Mapping[str, Any]]]]
) -> tuple[list[Mapping[str, Any]], dict[str, HarnessError]]:
    """What several tenants have, oldest first and each with its ``tenant``, and those that could not be asked.

    Raises:
        HarnessError: that of the first one, when none could be asked.
    """
    found: list[Mapping[str, Any]] = []
    silent: dict[str, HarnessError] = {}
    for name, answer in cli_site.as_tenants(tenants, lambda _, operator: ask(operator)).items():
        if isinstance(answer, HarnessError):
            silent[name] = answer
        else:
            found += [{**entry, "tenant": name} for entry in answer]
    if silent and len(silent) == len(tenants):
        raise next(iter(silent.values()))
    return sorted(found, key=lambda entry: entry.get("at") or 0.0), silent


def _say_silent(silent: Mapping[str, HarnessError], what: str) -> int:
    """Name the tenants that could not be asked; the exit code that this means."""
    from harness.cli_exit import exit_code_of
    from harness.console import say

    for name, error in silent.items():
        say(f"harness: the {what} of {name} cannot be read: {error.detail}")
    return next((int(exit_code_of(error)) for error in silent.values()), 0)


def _draw(site: SiteSettings, found: list[Mapping[str, Any]], accepted: Collection[object], *, by_tenant: bool) -> None:
    names, wide = cli_names.guest_names(site), cli_show.is_wide()
    short = cli_show.shortener(alarm.get(name) for alarm in found for name in ("agent_id", "host_id"))

    def about(alarm: Mapping[str, Any]) -> str:
        agent_id = alarm.get("agent_id")
        return names.get(str(agent_id)) or short(agent_id or alarm.get("host_id"))

    def row(alarm: Mapping[str, Any]) -> tuple[str, ...]:
        detail = cli_show.text(alarm.get("detail"))
        if alarm.get("acknowledged_at") is not None:
            detail += f" (acknowledged by {alarm.get('acknowledged_by')}: {alarm.get('reason')})"
        at = cli_show.when(alarm.get("at"), wide=wide)
        cells = str(alarm["id"]), at, cli_show.text(alarm.get("kind")), about(alarm), detail
        return (str(alarm["tenant"]), *cells) if by_tenant else cells

    columns = (("tenant",) if by_tenant else ()) + _COLUMNS
    cli_show.show(found, row, columns, as_json=False, empty="no alarms")
    _say_steps(site, [alarm for alarm in found if alarm.get("acknowledged_at") is None], about, accepted)


def _say_steps(
    site: SiteSettings,
    waiting: list[Mapping[str, Any]],
    about: Callable[[Mapping[str, Any]], str],
    accepted: Collection[object],
) -> None:
    from harness.cli_advice import ACCEPTED_REBOOT, step_for, with_tenant
    from harness.console import say

    said, last = set(), {str(alarm["tenant"]): alarm for alarm in reversed(waiting)}
    for alarm in waiting:
        kind, tenant = str(alarm.get("kind")), str(alarm["tenant"])
        goes_on = kind == _REBOOT and alarm.get("agent_id") in accepted
        step = (
            ACCEPTED_REBOOT.format(guest=about(alarm))
            if goes_on
            else step_for(kind, guest=about(alarm), host=cli_show.text(alarm.get("host_id")))
        )
        if step is not None and (kind, goes_on, tenant) not in said:
            say(f"{kind}: {with_tenant(step, cli_site.to_state(site, tenant))}")
        said.add((kind, goes_on, tenant))
    for tenant, alarm in sorted(last.items()):
        command = f"`harness tenant alarms ack {alarm['id']} --reason TEXT`"
        say(f"when it is settled: {with_tenant(command, cli_site.to_state(site, tenant))}")


async def _accepted_reboots(operator: TenantOperator, found: list[Mapping[str, Any]]) -> set[object]:
    """Guests with an alarm about a reboot that did not stop for it, or were resumed since."""
    from harness.values import parse_agent_id

    accepted = set()
    for agent_id in {alarm["agent_id"] for alarm in found if alarm.get("kind") == _REBOOT and alarm.get("agent_id")}:
        with contextlib.suppress(HarnessError):  # then nothing is known about it
            session = await operator.attestation(parse_agent_id(agent_id))
            if session.get("state") not in STOPPED_NAMES or session.get("error") != _REBOOT:
                accepted.add(agent_id)
    return accepted
