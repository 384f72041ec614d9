"""What commands print: tables and progress for people, JSON for programs.

Invariants:
    1. rich is imported when something is drawn, never at import: `harness --help` and `--json` do not pay for more.
    2. ``NO_COLOR`` is honoured, and a stream that is no terminal gets no control sequences and no line breaks that
       depend on a width.
    3. Output that cannot be written (a full disk, a closed pipe) is `OutputGone`, wherever it was written.
    4. Progress goes to standard error, results to standard output.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TextIO

from harness.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_PIPE_WIDTH = 200
_GAP = 3
_NARROWEST = 12


class OutputGone(ConfigError):
    """Standard output is closed or cannot be written."""


class ReaderGone(OutputGone):
    """Whoever read standard output has read enough, as `head` does."""


class _Output(io.TextIOWrapper):
    """Standard output; what it cannot write is `OutputGone`, which no library takes for something else."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            raise self._gone(error) from None

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            raise self._gone(error) from None

    def _gone(self, error: OSError) -> OutputGone:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())  # the interpreter flushes once more when it ends
        os.close(nowhere)
        kind = ReaderGone if error.errno == errno.EPIPE else OutputGone
        return kind(f"standard output cannot be written: {error.strerror}")


@contextlib.contextmanager
def claimed_output() -> Iterator[None]:
    """Standard output of this process, written to its end when the context is left.

    Raises:
        OutputGone: it is closed or cannot be written.
    """
    if sys.stdout is None:
        raise OutputGone("standard output is closed")
    out = sys.stdout
    if not isinstance(out, io.TextIOWrapper):
        yield
        return
    claimed = _Output(out.buffer, encoding=out.encoding, errors=out.errors, line_buffering=out.line_buffering)
    sys.stdout = claimed
    try:
        yield
    finally:
        sys.stdout = out  # whoever gave it to us keeps it, whole
        try:
            claimed.flush()
        finally:
            claimed.detach()


def console(stream: TextIO | None = None) -> Console:
    """Rich console on a stream (default: standard output as it is now)."""
    from rich.console import Console

    stream = stream or sys.stdout
    return Console(file=stream, width=None if stream.isatty() else _PIPE_WIDTH, highlight=False)


def print_json(value: object) -> None:
    """Print one JSON object on one line, for programs."""
    print(json.dumps(value, ensure_ascii=False, separators=(", ", ": ")), flush=True)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, empty: str) -> None:
    """Print a table.

    Args:
        columns: headings.
        rows: cells as text, shown as they are; a cell that starts with a word of `_GOOD` or `_BAD` is coloured.
        empty: the sentence to print when there are no rows.
    """
    if not rows:
        print(empty)
        return
    out = console()
    out.print(table_of(columns, rows, boxed=out.is_terminal))


def table_of(columns: Sequence[str], rows: Sequence[Sequence[str]], *, boxed: bool) -> Table:
    """A table that rich can draw: cells are text, and the words that say how something stands are coloured.

    Where there is too little room the last column is broken into lines, and the others only when that is not enough.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    firsts = [max(len(column), *(len(row[place]) for row in rows)) for place, column in enumerate(columns[:-1])]
    whole = sum(firsts) + _GAP * len(columns) + _NARROWEST <= console().width
    table = Table(box=box.SIMPLE_HEAD if boxed else None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=whole and column != columns[-1])
    for row in rows:
        table.add_row(*(Text(cell, style=_style(cell)) for cell in row))
    return table


_GOOD = frozenset({"ok", "accepted", "yes"})
_BAD = frozenset({"missing", "refused", "no", "differs", "FAILED", "INVALID_QUOTE", "TENANT_FAILED"})


def _style(cell: str) -> str:
    word = cell.split(" ")[0]
    return "green" if word in _GOOD else "bold red" if word in _BAD else ""


@contextlib.contextmanager
def progress(text: str) -> Iterator[None]:
    """Show that something takes its time: a spinner on a terminal, nothing in a pipe."""
    if not sys.stderr.isatty():
        yield
        return
    with console(sys.stderr).status(text):
        yield


def say(text: str) -> None:
    """Print a remark for people on standard error."""
    print(text, file=sys.stderr, flush=True)
