"""`harness tenant policy`: reference values of guests and hosts: shown, captured from what was proven, and replaced."""

from __future__ import annotations

import enum
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness import cli_names, cli_policy_view, cli_show, cli_site
from harness.cli_help import AsJson, Guest, Lab, Reason, Tenant, examples, group
from harness.cli_tenant_guest import done, resume_as_it_stopped, stopped
from harness.errors import ConfigError, HarnessError

if TYPE_CHECKING:
    from harness.config import SiteSettings, TenantSite
    from harness.tenant.operator import TenantOperator
    from harness.tenant.policy import Policy
    from harness.values import AgentId

app = group("Reference values: which PCRs a guest and its host may have.")


class Layer(enum.StrEnum):
    """Whose reference values."""

    GUEST = "guest"
    HOST = "host"
    BOTH = "both"

    @property
    def names(self) -> tuple[str, ...]:
        """The layers that are meant."""
        return cli_policy_view.LAYERS if self is Layer.BOTH else (self.value,)


OfLayer = Annotated[Layer, typer.Option("--layer", help="Whose reference values.")]


@app.command(
    "show",
    epilog=examples(
        "harness tenant policy show web1 --tenant alice",
        "harness tenant policy show web1 --tenant alice --layer host --json",
    ),
)
def policy_show(
    guest: Guest, layer: OfLayer = Layer.BOTH, tenant: Tenant = None, lab: Lab = None, as_json: AsJson = False
) -> None:
    """Show the reference values in force for a guest, beside what was last proven. Exits 1 when it differs."""
    answer = _policy_of(lab, tenant, guest)
    entries = {name: cli_policy_view.compared(answer, name) for name in layer.names}
    if as_json:
        shown = {
            name: {
                "policy": answer.get(f"{name}_policy"),
                "seen": (answer.get("seen") or {}).get(name),
                "differences": [entry.as_json() for entry in found if entry.differs],
            }
            for name, found in entries.items()
        }
        cli_show.show_one(shown, as_json=True)
    else:
        for name in layer.names:
            cli_policy_view.draw(answer, name)
    differs = any(entry.differs for found in entries.values() for entry in found)
    raise typer.Exit(1 if differs else 0)


@app.command(
    "capture",
    epilog=examples(
        "harness tenant policy capture web1 --tenant alice --layer host --out host-policy.json",
        "harness tenant policy capture web1 --tenant alice --out new-policies",
        "harness tenant policy capture web1 --tenant alice --layer host --site --force",
    ),
)
def policy_capture(
    guest: Guest,
    layer: OfLayer = Layer.BOTH,
    out: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="File to write; with both layers the folder for both (default: print)."),
    ] = None,
    to_site: Annotated[
        bool, typer.Option("--site", help="Write the site's own policy files, which `guest add` uses.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that is there.")] = False,
    tenant: Tenant = None,
    lab: Lab = None,
) -> None:
    """Make reference values from what a guest, or its host, has last proven.

    Only what a quote has proven is captured, and only for PCRs that the policy in force names. What differs from it is
    told on standard error: look at it before you use it. Nothing is in force before `policy set`.
    """
    if out is not None and to_site:
        raise ConfigError("give --out or --site, not both")
    site = cli_site.site_of(lab)
    own = cli_site.tenant_of(site, tenant)
    answer = _policy_of(lab, tenant, guest)
    found = {name: cli_policy_view.captured(answer, name) for name in layer.names}
    if layer is Layer.BOTH:
        found = {name: policy for name, policy in found.items() if policy}
    if not found or not all(found.values()):
        raise ConfigError(f"{guest}: nothing was proven yet of which {layer.value} reference values could be made")
    _tell_differences(answer, list(found))
    files = _files(own, layer, out, to_site=to_site)
    if files is None:
        whole: object = found[layer.value] if layer is not Layer.BOTH else {f"{n}_policy": p for n, p in found.items()}
        print(json.dumps(whole, indent=2))
        return
    _write({files[name]: json.dumps(policy, indent=2) + "\n" for name, policy in found.items()}, force=force)


@app.command(
    "set",
    epilog=examples(
        'harness tenant policy set web1 --tenant alice --guest-policy guest.json --resume --reason "kernel 6.1.90"',
        'harness tenant policy set --all --tenant alice --host-policy host.json --resume --reason "host update 4711"',
    ),
)
def policy_set(
    reason: Reason,
    guest: Annotated[str | None, typer.Argument(metavar="GUEST", help="The guest, as for `show`.")] = None,
    everyone: Annotated[bool, typer.Option("--all", help="All guests of the tenant under attestation.")] = False,
    guest_policy: Annotated[Path | None, typer.Option(metavar="FILE", help="Reference values of the guest.")] = None,
    host_policy: Annotated[Path | None, typer.Option(metavar="FILE", help="Reference values of the host.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Let the guest go on if it has stopped.")] = False,
    tenant: Tenant = None,
    lab: Lab = None,
) -> None:
    """Replace the reference values of a guest, from its next round on.

    A guest that has stopped stays so without --resume. With --all each guest is tried: the ones that were refused are
    named, and the exit code is 1. They do not change the site's own files, which `guest add` uses (`capture --site`).
    """
    if (guest is None) == (not everyone):
        raise ConfigError("give a guest, or --all")
    if guest_policy is None and host_policy is None:
        raise ConfigError("give --guest-policy FILE, --host-policy FILE, or both")
    site = cli_site.site_of(lab)
    own = cli_site.tenant_of(site, tenant)
    policies = {
        "guest": None if guest_policy is None else cli_site.read_policy(guest_policy),
        "host": None if host_policy is None else cli_site.read_policy(host_policy),
    }
    results = cli_site.as_tenant(own, _setting(site, guest, policies, reason, resume=resume))
    refused = {agent_id: error for agent_id, error in results.items() if error is not None}
    if guest is not None and refused:
        raise next(iter(refused.values()))
    what = "reference values replaced, in force from the next round on"
    accepted = [agent_id for agent_id in results if agent_id not in refused]
    print(done(site, tenant, accepted, what) or "no reference values were replaced")
    if refused:
        from harness.console import say

        names = cli_names.guest_names(site)
        for agent_id, error in refused.items():
            say(f"harness: {names.get(str(agent_id), agent_id)}: {error.detail}")
        raise typer.Exit(1)


# --- helpers ----------------------------------------------------------------------------------------------


def _policy_of(lab: Path | None, tenant: str | None, guest: str) -> Mapping[str, Any]:
    site = cli_site.site_of(lab)

    async def look(operator: TenantOperator) -> Mapping[str, Any]:
        return await operator.policy(await cli_site.guest_of(site, operator, guest))

    return cli_site.as_tenant(cli_site.tenant_of(site, tenant), look)


def _setting(
    site: SiteSettings, guest: str | None, policies: dict[str, Policy | None], reason: str, *, resume: bool
) -> Callable[[TenantOperator], Any]:
    async def one(operator: TenantOperator, agent_id: AgentId, halted: list[AgentId]) -> HarnessError | None:
        try:
            await operator.set_policy(agent_id, reason, **policies)
            if agent_id in halted:
                await resume_as_it_stopped(operator, agent_id, reason)
        except HarnessError as error:
            return error
        return None

    async def everybody(operator: TenantOperator) -> dict[AgentId, HarnessError | None]:
        from harness.values import parse_agent_id

        chosen = (
            [parse_agent_id(each["agent_id"]) for each in await operator.guests() if each.get("attestation")]
            if guest is None
            else [await cli_site.guest_of(site, operator, guest)]
        )
        halted = await stopped(operator) if resume else []
        return {agent_id: await one(operator, agent_id, halted) for agent_id in chosen}

    return everybody


def _tell_differences(answer: Mapping[str, Any], layers: list[str]) -> None:
    from harness.console import say

    lines = [line for name in layers for line in cli_policy_view.differences(answer, name)]
    for line in lines or ["what was last proven is what is in force"]:
        say(line)


def _files(own: TenantSite, layer: Layer, out: Path | None, *, to_site: bool) -> dict[str, Path] | None:
    if to_site:
        return {"guest": own.guest_policy, "host": own.host_policy}
    if out is None:
        return None
    if layer is Layer.BOTH:
        return {name: out / f"{name}-policy.json" for name in layer.names}
    return {layer.value: out}


def _write(files: dict[Path, str], *, force: bool) -> None:
    there = [str(path) for path in files if path.exists()]
    if there and not force:
        raise ConfigError(f"{', '.join(there)}: is there already; --force overwrites")
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_name(f".{path.name}.new")
        half.write_text(content, encoding="utf-8")
        half.replace(path)
        print(path)
