"""Parts that every command line file shares: examples under the help, and options with one meaning everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Lab = Annotated[
    Path | None,
    typer.Option("--lab", envvar="HARNESS_LAB", metavar="DIR", help="Folder of the running lab (it holds site.yml)."),
]


def examples(*lines: str) -> str:
    """Text under a command's help: one command a line, copied as it is."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def group(summary: str) -> typer.Typer:
    """A group of commands; without a command it prints its help."""
    return typer.Typer(help=summary, no_args_is_help=True, pretty_exceptions_enable=False)
