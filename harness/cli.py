"""The `harness` command: composition root of everything a person types.

Invariants:
    1. A command imports what it needs when it runs: `harness --help` loads typer and nothing of the harness's own
       services.
    2. Exit codes are made in ``cli_exit`` only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from harness import __version__, cli_bench, cli_complete, cli_db, cli_exit, cli_lab, cli_provider, cli_tenant
from harness.cli_help import AsJson, examples

app = typer.Typer(
    name="harness",
    help="Deep attestation for KVM: a tenant's vTPM tied to the host's hardware TPM, with simulated hardware.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    epilog=examples("harness demo", "harness demo --tamper host-kernel", "harness doctor", "harness tenant guest list"),
)


def main() -> None:
    """Entry point of the console script; ends the process with the command's exit code."""
    raise SystemExit(cli_exit.run(lambda: app(prog_name="harness")))


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"harness {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command(
    epilog=examples(
        "harness demo",
        "harness demo --tenants 3 --guests 2 --chip swtpm",
        "harness demo --tamper host-kernel",
        "harness demo --json",
    )
)
def demo(
    tenants: Annotated[int, typer.Option(metavar="N", help="Number of tenants.")] = 2,
    guests: Annotated[int, typer.Option(metavar="N", help="Guests of each tenant.")] = 3,
    chip: Annotated[
        str | None, typer.Option(metavar="NAME", help="TPM latency profile; `swtpm` means no delay.")
    ] = None,
    tamper: Annotated[str | None, typer.Option(metavar="CASE", help="Cheat in one way, and see who refuses.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the lab running until Ctrl-C.")] = False,
    lab: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for the lab (default: a temporary one).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Let two tenants attest their guests and the host below them, through one slow hardware TPM.

    Exits 0 when every guest was accepted, 1 when one was refused.
    """
    from harness import lab_processes

    lab_processes.warm_up()  # before the demo's own imports, which take as long
    from harness import demo as command
    from harness.demo_options import DemoOptions

    options = DemoOptions(tenants=tenants, guests=guests, chip=chip, tamper=tamper, keep=keep, json=as_json, lab=lab)
    raise typer.Exit(command.run(options))


@app.command(epilog=examples("harness serve tenant-verifier --config verifier.yml"))
def serve(
    service: Annotated[
        str,
        typer.Argument(
            metavar="SERVICE",
            help="host-agent, provider-verifier, provider-registrar, tenant-registrar, tenant-verifier or guest-agent.",
            autocompletion=cli_complete.services,
        ),
    ],
    config: Annotated[Path, typer.Option("--config", metavar="FILE", help="Settings of the service (YAML).")],
) -> None:
    """Run one service, until it is told to stop."""
    from harness import serve as command

    command.run(service, config)


@app.command(epilog=examples("harness appraise --request request.json --response response.json --trust trust.json"))
def appraise(
    request: Annotated[Path, typer.Option(metavar="FILE", help="What was asked: nonce, mask, hash_alg, ...")],
    response: Annotated[Path, typer.Option(metavar="FILE", help="The provider's answer, as received.")],
    trust: Annotated[Path, typer.Option(metavar="FILE", help="What is trusted: host_id, ak, policy, last_clock.")],
) -> None:
    """Appraise saved evidence without any service.

    Prints one JSON object. Exits 0 when the evidence is accepted, 1 when a check failed, 2 when the request or the
    trust file cannot be used.
    """
    from harness.console import print_json
    from harness.tenant import offline

    verdict, code = offline.appraise_files(request, response, trust)
    print_json(verdict)
    raise typer.Exit(code)


@app.command(epilog=examples("harness doctor", "harness doctor --json"))
def doctor(as_json: AsJson = False) -> None:
    """Say what is missing on this machine, and the one command that mends it.

    Exits 0 when nothing is missing, else 1.
    """
    from harness import console
    from harness import doctor as examination

    with console.progress("asking this machine"):
        diagnosis = examination.examine(examination.ThisMachine())
    if as_json:
        console.print_json(diagnosis.as_json())
    else:
        rows = [(check.name, "ok" if check.ok else "missing", check.found or check.why) for check in diagnosis.checks]
        console.print_table(("what", "state", "found, or why it is needed"), rows, empty="nothing was checked")
        print(f"\nto mend it:\n  {diagnosis.remedy}" if diagnosis.remedy else "nothing is missing")
    raise typer.Exit(0 if diagnosis.ok else 1)


app.add_typer(cli_lab.app, name="lab")
app.add_typer(cli_tenant.app, name="tenant")
app.add_typer(cli_provider.app, name="provider")
app.add_typer(cli_db.app, name="db")
app.add_typer(cli_bench.app, name="bench")
