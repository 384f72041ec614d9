"""`harness tenant alarms` and `harness tenant audit`: what an operator must look at, and what operators have done."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness import cli_names, cli_show, cli_site
from harness.cli_help import AsJson, Lab, Reason, Tenant, examples
from harness.errors import ConfigError

if TYPE_CHECKING:
    from harness.config import SiteSettings
    from harness.tenant.operator import TenantOperator

app = typer.Typer(
    help="What an operator must look at: changed keys, clones, refused certificates and evidence.",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    epilog=examples(
        "harness tenant alarms --tenant alice",
        'harness tenant alarms ack r12 v7 --tenant alice --reason "reboot for maintenance"',
    ),
)

All = Annotated[bool, typer.Option("--all", help="Also those that were acknowledged.")]

_ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_COLUMNS = ("id", "at", "what", "about", "detail")
_AUDIT_COLUMNS = ("at", "service", "who", "action", "subject", "reason")
_NARROW_AUDIT_COLUMNS = ("at", "who", "action", "subject", "reason")


@app.callback()
def alarms(
    ctx: typer.Context, everything: All = False, tenant: Tenant = None, lab: Lab = None, as_json: AsJson = False
) -> None:
    """List the alarms; the same as `alarms list`. Exits 1 when there is one that nobody has acknowledged."""
    if ctx.invoked_subcommand is None:
        _list(everything, tenant, lab, as_json=as_json)
    typed = [name for name in ctx.params if getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE"]
    if typed:
        raise ConfigError(f"options come after the command: harness tenant alarms {ctx.invoked_subcommand} ...")


@app.command(
    "list", epilog=examples("harness tenant alarms list --tenant alice", "harness tenant alarms list --all --json")
)
def alarms_list(everything: All = False, tenant: Tenant = None, lab: Lab = None, as_json: AsJson = False) -> None:
    """List the alarms of registrar (r) and verifier (v). Exits 1 when there is one that nobody has acknowledged."""
    _list(everything, tenant, lab, as_json=as_json)


@app.command(
    "ack",
    epilog=examples(
        'harness tenant alarms ack v7 --tenant alice --reason "kernel update, new reference values are set"',
        'harness tenant alarms ack r12 r13 --tenant alice --reason "test of a cloned guest"',
    ),
)
def alarms_ack(
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="Alarms, such as r12 or v7.")],
    reason: Reason,
    tenant: Tenant = None,
    lab: Lab = None,
) -> None:
    """Acknowledge alarms: you have looked, and nothing more is to be done.

    It changes nothing else: a guest that has stopped stays stopped until `guest resume`.
    """
    from harness.tenant.operator_acts import parse_alarm_id

    for each in ids:
        parse_alarm_id(each)
    own = cli_site.tenant_of(cli_site.site_of(lab), tenant)

    async def acknowledge(operator: TenantOperator) -> None:
        for each in dict.fromkeys(ids):
            await operator.acknowledge(each, reason)

    cli_site.as_tenant(own, acknowledge)


def register_audit(parent: typer.Typer) -> None:
    """Adds `audit` to its group."""
    parent.command("audit", epilog=examples("harness tenant audit --tenant alice", "harness tenant audit --json"))(
        audit
    )


def audit(tenant: Tenant = None, lab: Lab = None, as_json: AsJson = False) -> None:
    """Show what the tenant's operators have changed, when and why, oldest first."""
    own = cli_site.tenant_of(cli_site.site_of(lab), tenant)
    entries = cli_site.as_tenant(own, lambda operator: operator.audit())
    show_audit(entries, as_json=as_json)


def show_audit(entries: list[Mapping[str, Any]], *, as_json: bool) -> None:
    """Print an audit trail; each entry has the service that kept it as ``service``."""
    short = cli_show.shortener(found for entry in entries for found in _ID.findall(str(entry.get("subject"))))

    wide = cli_show.is_wide()

    def row(entry: Mapping[str, Any]) -> tuple[str, ...]:
        subject, who = cli_show.text(entry.get("subject")), cli_show.text(entry.get("who"))
        cells = {
            "at": cli_show.when(entry.get("at"), wide=wide),
            "service": cli_show.text(entry.get("service")),
            "who": who if wide else who.rpartition("/")[2],
            "action": cli_show.text(entry.get("action")),
            "subject": _ID.sub(lambda found: short(found[0]), subject),
            "reason": cli_show.text(entry.get("reason")),
        }
        return tuple(cells[column] for column in columns)

    columns = _AUDIT_COLUMNS if wide else _NARROW_AUDIT_COLUMNS
    cli_show.show(entries, row, columns, as_json=as_json, empty="nothing was overruled or changed")


def _list(everything: bool, tenant: str | None, lab: Path | None, *, as_json: bool) -> None:
    site = cli_site.site_of(lab)
    own = cli_site.tenant_of(site, tenant)
    found = cli_site.as_tenant(own, lambda operator: operator.alarms(everything=everything))
    if as_json:
        cli_show.show(found, lambda _: (), _COLUMNS, as_json=True, empty="")
    else:
        _draw(site, found)
    raise typer.Exit(1 if any(alarm.get("acknowledged_at") is None for alarm in found) else 0)


def _draw(site: SiteSettings, found: list[Mapping[str, Any]]) -> None:
    from harness.cli_advice import step_for
    from harness.console import say

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
        return str(alarm["id"]), at, cli_show.text(alarm.get("kind")), about(alarm), detail

    cli_show.show(found, row, _COLUMNS, as_json=False, empty="no alarms")
    waiting = [alarm for alarm in found if alarm.get("acknowledged_at") is None]
    for kind in dict.fromkeys(str(alarm.get("kind")) for alarm in waiting):
        subject = next(alarm for alarm in waiting if alarm.get("kind") == kind)
        step = step_for(kind, guest=about(subject), host=cli_show.text(subject.get("host_id")))
        if step is not None:
            say(f"{kind}: {step}")
    if waiting:
        say(f"when it is settled: harness tenant alarms ack {waiting[0]['id']} --reason TEXT")
