"""Parts that every command line file shares: examples under the help, and options with one meaning everywhere.

Invariants:
    1. What can be judged without asking anybody is judged while the command line is read: exit code 2 at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from harness import cli_complete
from harness.audit import parse_reason
from harness.errors import MalformedMessage

LONGEST_S = 86_400.0


def examples(*lines: str) -> str:
    """Text under a command's help: one command a line, copied as it is."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def group(summary: str) -> typer.Typer:
    """A group of commands; without a command it prints its help."""
    return typer.Typer(help=summary, no_args_is_help=True, pretty_exceptions_enable=False)


def seconds(*, zero: bool = False) -> Callable[[float], float]:
    """Callback of an option in seconds: up to a day, more than zero unless zero has a meaning."""

    def judged(value: float) -> float:
        if math.isnan(value) or value < 0 or value > LONGEST_S or (value == 0 and not zero):
            raise typer.BadParameter(
                f"{value:g} must be {'from' if zero else 'more than'} 0 up to {LONGEST_S:g} seconds"
            )
        return value

    return judged


def _reason(text: str | None) -> str | None:
    try:
        return None if text is None else parse_reason(text)
    except MalformedMessage as error:
        raise typer.BadParameter(error.detail) from None


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Lab = Annotated[
    Path | None,
    typer.Option(
        "--lab",
        envvar="HARNESS_LAB",
        metavar="PATH",
        help="The lab: its folder, or its lab.yml (default: ./lab.yml when it is there).",
    ),
]
Tenant = Annotated[
    str | None,
    typer.Option(
        "--tenant",
        envvar="HARNESS_TENANT",
        metavar="NAME",
        help="Which tenant; not needed if only one.",
        autocompletion=cli_complete.tenants,
    ),
]
Reason = Annotated[
    str, typer.Option("--reason", metavar="TEXT", help="Why; it goes into the audit trail.", callback=_reason)
]
OptionalReason = Annotated[
    str | None, typer.Option("--reason", metavar="TEXT", help="Why; it goes into the audit trail.", callback=_reason)
]
Guest = Annotated[
    str,
    typer.Argument(
        metavar="GUEST",
        help="The guest: its UUID, the first characters of it, or its name.",
        autocompletion=cli_complete.guests,
    ),
]
HostId = Annotated[
    str, typer.Argument(metavar="HOST_ID", help="The host's id as `host list` shows it, or the first characters of it.")
]
HostName = Annotated[
    str | None,
    typer.Option(
        "--host",
        metavar="NAME",
        help="Which host; may be left out if only one.",
        autocompletion=cli_complete.hosts,
    ),
]
