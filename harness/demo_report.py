"""Draws a demo: the chain of trust as a tree, what one quote served, and how each guest ended.

What was checked is shown with the verdict that the services gave; nothing is decided here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from harness import console
from harness.lab_outcome import ENROLMENT, GuestOutcome
from harness.lab_plan import TAMPER_CASES

if TYPE_CHECKING:
    from harness.demo import DemoResult

_OK, _BAD = ("✔", "green"), ("✘", "bold red")


def draw(result: DemoResult, tamper: str | None) -> None:
    """Prints the whole report on standard output.

    Args:
        result: of the demo.
        tamper: the case that was played, or None.
    """
    out = console.console()
    if tamper is not None:
        case = TAMPER_CASES[tamper]
        out.print(Text(f"tampering: {case.what}; must be refused by: {case.refused_by}\n", style="bold yellow"))
    out.print(_tree(result))
    out.print(_batches(result))
    out.print(_guests(result))
    out.print(_timings(result))
    out.print(_conclusion(result))


def _line(outcome: bool | None, text: str, detail: str = "") -> Text:
    mark, style = ("·", "dim") if outcome is None else _OK if outcome else _BAD
    return Text.assemble((f"{mark} ", style), text, (f"  {detail}" if detail else "", "dim" if outcome else style))


def _tree(result: DemoResult) -> Tree:
    timings = result.timings_s
    root = Tree(_line(True, "TPM vendor root CA", "pinned by every tenant"))
    ek = root.add(_line(True, "EK certificate, EK of the hardware TPM", f"chip {result.plan.hosts[0].chip}"))
    seconds = f"{timings['host_enrolment']:.1f} s for {len(result.plan.tenants)} tenants"
    ak = ek.add(_line(True, "AK activated and pinned by each tenant", f"host {result.host_id}, {seconds}"))
    ca = ak.add(_line(True, "vTPM CA key certified by the AK", "TPM2_Certify"))
    for tenant in result.plan.tenants:
        branch = ca.add(Text(tenant.name, style="bold"))
        for outcome in result.outcomes:
            if outcome.tenant == tenant.name:
                _guest(branch, outcome)
    return root


def _guest(branch: Tree, outcome: GuestOutcome) -> None:
    node = branch.add(_line(outcome.accepted, outcome.name, outcome.agent_id))
    layers = (
        (ENROLMENT, "vTPM EK certificate signed by the CA key, guest AK activated"),
        ("guest", "guest quote: kernel and boot as expected"),
        ("host", "host quote over this guest's evidence, from the shared batch"),
    )
    reached = True
    for layer, text in layers:
        if not reached:
            node.add(_line(None, text, "not reached"))
        elif outcome.layer == layer:
            node.add(_line(False, text, _why(outcome)))
            reached = False
        else:
            node.add(_line(True, text))
    released = outcome.payload_released
    node.add(_line(released if outcome.accepted else None, "payload", "released" if released else "locked"))


def _why(outcome: GuestOutcome) -> str:
    check = f"check {outcome.failed_check}: " if outcome.failed_check else ""
    return f"{check}{outcome.error}: {outcome.detail}"


def _batches(result: DemoResult) -> Text:
    requests = sum(batch["requests"] for batch in result.batches)
    quotes = sum(batch["tpm_quotes"] for batch in result.batches)
    sizes = " + ".join(str(batch["requests"]) for batch in result.batches)
    if not requests:
        return Text("\nhost quotes: none were made\n")
    return Text(f"\nhost quotes: {requests} requests ({sizes}) served by {quotes} TPM quotes\n")


def _guests(result: DemoResult) -> Table:
    table = Table("guest", "tenant", "verdict", "state", "refused by", "payload", box=None, pad_edge=False)
    for outcome in result.outcomes:
        verdict = Text("accepted", style="green") if outcome.accepted else Text("refused", style="bold red")
        check = f", check {outcome.failed_check}" if outcome.failed_check else ""
        refused_by = "" if outcome.accepted else f"{outcome.layer}{check}: {outcome.error}"
        payload = "released" if outcome.payload_released else "locked"
        table.add_row(outcome.name, outcome.tenant, verdict, outcome.state or "not enrolled", refused_by, payload)
    return table


def _timings(result: DemoResult) -> Text:
    steps = ", ".join(f"{step.replace('_', ' ')} {seconds:.1f} s" for step, seconds in result.timings_s.items())
    return Text(f"\n{steps}\n", style="dim")


def _conclusion(result: DemoResult) -> Text:
    accepted = sum(outcome.accepted for outcome in result.outcomes)
    text = f"{accepted} of {len(result.outcomes)} guests accepted"
    return Text(text, style="bold green" if result.accepted else "bold red")
