"""`harness lab`: an embedded lab that lives on, from its topology file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from harness import cli_complete, cli_lab_acts, cli_site
from harness.cli_help import AsJson, Lab, examples, group
from harness.errors import ConfigError
from harness.lab_names import TOPOLOGY_FILE

app = group("A lab that lives on: hosts, tenants and guests from lab.yml, under a supervisor.")

Service = Annotated[
    str,
    typer.Argument(metavar="SERVICE", help="As `lab status` shows it.", autocompletion=cli_complete.lab_services),
]


@app.command("init", epilog=examples("harness lab init", "harness lab init my-lab/lab.yml"))
def init(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write it.")] = Path(TOPOLOGY_FILE),
) -> None:
    """Write a lab.yml with every key explained; a file that is there is left alone."""
    from harness.lab_topology import EXAMPLE

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(EXAMPLE)
    except FileExistsError:
        raise ConfigError(f"{path}: exists; edit it, or name another file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error
    print(f"{path} is written; edit it, then: harness lab up --lab {path}")


@app.command("up", epilog=examples("harness lab up", "harness lab up --lab my-lab/lab.yml", "harness lab up --fresh"))
def up(
    lab: Lab = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Remove the lab that is there, and start anew.")] = False,
    as_json: AsJson = False,
) -> None:
    """Start the lab, or bring the running one to what lab.yml says now; repeat it as often as you like.

    Returns when every guest is attested, or says who is not and why. Exits 0 when all are, else 1.
    """
    import asyncio

    from harness import console
    from harness.lab_up import up as bring_up

    try:
        result = asyncio.run(bring_up(cli_site.topology_of(lab), fresh=fresh))
    except KeyboardInterrupt:
        console.say("interrupted; what was started goes on: `harness lab up` completes it, `harness lab down` ends it")
        raise
    if as_json:
        console.print_json(result.as_json())
        raise typer.Exit(0 if result.attested else 1)
    for what in result.removed:
        console.say(f"removed: {what}")
    for remark in result.remarks:
        console.say(remark)
    rows = [(guest.name, guest.tenant, *cli_lab_acts.verdict(guest)) for guest in result.outcomes]
    console.print_table(("guest", "tenant", "verdict", "why"), rows, empty="the lab has no guests")
    state = "is up" if result.changed else "is up already; nothing was changed"
    attested = sum(guest.accepted for guest in result.outcomes)
    print(f"\nthe lab {state}: {attested} of {len(result.outcomes)} guests attested ({result.seconds:.0f} s)")
    print(f"its folder is {result.folder}\nnext: harness tenant status, harness lab status, harness lab down")
    raise typer.Exit(0 if result.attested else 1)


@app.command("status", epilog=examples("harness lab status", "harness lab status --json"))
def status(lab: Lab = None, as_json: AsJson = False) -> None:
    """Show the lab's services, hosts and tenants; --json is all that another client needs to talk to it.

    Exits 1 when the lab is down.
    """
    import asyncio

    from harness import console

    control = cli_site.control_of(lab)
    found = asyncio.run(control.status())
    if found is None:
        console.say(f"the lab in {control.folder} is down; `harness lab up` starts it")
        raise typer.Exit(1)
    if as_json:
        console.print_json(control.shown(found))
        return
    shown: Mapping[str, Any] = control.shown(found)
    ending = cli_lab_acts.ending(control.folder)
    services = [
        (
            service["name"],
            str(service["pid"] or "missing"),
            str(service["restarts"]),
            *([ending.get(service["name"], "")] if ending else []),
            service["url"] or service["why"] or "",
        )
        for service in found["services"]
    ]
    columns = ("service", "pid", "restarts", *(["certificate"] if ending else []), "where")
    console.print_table(columns, services, empty="no services")
    hosts = [(str(host["host_id"]), host["chip"], host["tpm_socket"]) for host in shown["hosts"]]
    console.print_table(("host", "chip", "TPM socket"), hosts, empty="no hosts")
    tenants = [(tenant["name"], str(len(tenant["guests"])), tenant["provider_verifier"]) for tenant in shown["tenants"]]
    console.print_table(("tenant", "guests", "provider verifier"), tenants, empty="no tenants")
    if ending:
        console.say(f"{len(ending)} certificates end soon; `harness lab renew --reason TEXT` renews them")


@app.command("down", epilog=examples("harness lab down"))
def down(lab: Lab = None) -> None:
    """End every process of the lab; its state stays, and `up` goes on with it."""
    import asyncio

    from harness import console

    control = cli_site.control_of(lab)
    with console.progress("ending the lab: guests first, hardware last"):
        was_up = asyncio.run(control.down())
    print(f"the lab in {control.folder} {'is down' if was_up else 'was down already'}")


@app.command("restart", epilog=examples("harness lab restart alice-verifier", "harness lab restart host1-tpm"))
def restart(service: Service, lab: Lab = None) -> None:
    """End a service in order and start it again.

    For HOST-tpm that is a power cycle of the hardware TPM alone; `power-cycle` is one of the host with its guests.
    """
    import asyncio

    from harness import console

    control = cli_site.control_of(lab)
    with console.progress(f"restarting {service}"):
        pid = asyncio.run(control.restart(service))
    print(f"{service} runs again as process {pid}")


@app.command(
    "logs", epilog=examples("harness lab logs", "harness lab logs host1-agent --follow", "harness lab logs --json")
)
def logs(
    services: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SERVICE]...",
            help="Which (default: all).",
            show_default=False,
            autocompletion=cli_complete.logs,
        ),
    ] = None,
    lines: Annotated[int, typer.Option("--lines", "-n", metavar="N", min=0, max=100_000, help="How many.")] = 40,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes, until Ctrl-C.")] = False,
    lab: Lab = None,
    as_json: Annotated[bool, typer.Option("--json", help="The events as they are in the logs.")] = False,
) -> None:
    """Show what the lab's processes say, in the order in which it happened."""
    from harness import lab_logs

    chosen = lab_logs.logs_of(cli_site.control_of(lab).folder, services or [])
    for name, line in lab_logs.last_lines(chosen, lines):
        print(line if as_json else lab_logs.for_people(name, line))
    if follow:
        for name, line in lab_logs.follow(chosen):
            print(line if as_json else lab_logs.for_people(name, line), flush=True)


cli_lab_acts.add_to(app)
