"""`harness tenant`: what a tenant's operator does with its registrar and verifier; here: the hosts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness import (
    cli_metrics,
    cli_show,
    cli_site,
    cli_tenant_alarms,
    cli_tenant_guest,
    cli_tenant_policy,
    cli_tenant_status,
)
from harness.cli_help import AsJson, HostId, Lab, OptionalReason, Reason, Tenant, examples, group

if TYPE_CHECKING:
    from harness.tenant.operator import TenantOperator

app = group("Act as a tenant's operator: enrol hosts, put guests under attestation, find the way back.")
host_app = group("Hosts whose hardware TPM this tenant trusts.")
cli_tenant_status.register(app)
app.add_typer(host_app, name="host")
app.add_typer(cli_tenant_guest.app, name="guest")
app.add_typer(cli_tenant_policy.app, name="policy")
app.add_typer(cli_tenant_alarms.app, name="alarms")
cli_tenant_alarms.register_audit(app)
cli_metrics.register_tenant(app)

_HOST_COLUMNS = ("host", "enrolled at", "where")


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
    _show(hosts, as_json=as_json, empty="no host was enrolled")


@host_app.command("list", epilog=examples("harness tenant host list --tenant alice"))
def host_list(tenant: Tenant = None, lab: Lab = None, as_json: AsJson = False) -> None:
    """List the enrolled hosts."""
    own = cli_site.tenant_of(cli_site.site_of(lab), tenant)
    hosts = cli_site.as_tenant(own, lambda operator: operator.hosts())
    _show(hosts, as_json=as_json, empty="no host is enrolled")


@host_app.command("show", epilog=examples("harness tenant host show 3c5d7a0e --tenant alice --json"))
def host_show(host_id: HostId, tenant: Tenant = None, lab: Lab = None, as_json: AsJson = False) -> None:
    """Show what is pinned of a host."""
    own = cli_site.tenant_of(cli_site.site_of(lab), tenant)

    async def host(operator: TenantOperator) -> Mapping[str, Any]:
        return await operator.host(await cli_site.enrolled_host(operator, host_id))

    cli_show.show_one(cli_site.as_tenant(own, host), as_json=as_json)


@host_app.command(
    "re-enrol",
    epilog=examples('harness tenant host re-enrol 3c5d7a0e --tenant alice --reason "board replaced, ticket 4711"'),
)
def host_re_enrol(
    host_id: HostId, reason: Reason, tenant: Tenant = None, lab: Lab = None, as_json: AsJson = False
) -> None:
    """Take a host through enrolment anew, at the address that is pinned, and replace its keys.

    For the alarm KeyChanged, once you know why the key changed. When the vTPM CA key is another one, the host's guests
    are back to "stated": `guest re-enrol` each of them. Exits 1 when a check fails; then nothing has changed.
    """
    own = cli_site.tenant_of(cli_site.site_of(lab), tenant)

    async def re_enrol(operator: TenantOperator) -> Mapping[str, Any]:
        return await operator.re_enrol_host(await cli_site.enrolled_host(operator, host_id), reason)

    host = cli_site.as_tenant(own, re_enrol)
    if as_json:
        cli_show.show_one(host, as_json=True)
    else:
        print(f"host {host.get('host_id', host_id)} is enrolled with the keys that it has now")


@host_app.command(
    "remove", epilog=examples('harness tenant host remove 3c5d7a0e --tenant alice --reason "taken out of service"')
)
def host_remove(host_id: HostId, reason: OptionalReason = None, tenant: Tenant = None, lab: Lab = None) -> None:
    """Forget a host that has no guests; it can be enrolled anew, also with other keys."""
    own = cli_site.tenant_of(cli_site.site_of(lab), tenant)

    async def remove(operator: TenantOperator) -> None:
        await operator.remove_host(await cli_site.enrolled_host(operator, host_id), reason)

    cli_site.as_tenant(own, remove)


def _show(hosts: list[Mapping[str, Any]], *, as_json: bool, empty: str) -> None:
    short = cli_show.shortener(host["host_id"] for host in hosts)

    def row(host: Mapping[str, Any]) -> tuple[str, ...]:
        return short(host["host_id"]), cli_show.time(host.get("enrolled_at")), cli_show.text(host.get("url"))

    cli_show.show(hosts, row, _HOST_COLUMNS, as_json=as_json, empty=empty)
