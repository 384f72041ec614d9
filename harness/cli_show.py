"""How the operators' commands show what services answered: a table for people, JSON for programs."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Entry = Mapping[str, Any]


def show(
    entries: Sequence[Entry],
    row: Callable[[Entry], tuple[str, ...]],
    columns: tuple[str, ...],
    *,
    as_json: bool,
    empty: str,
) -> None:
    """Print a list.

    Args:
        entries: as the service answered them; this is what ``--json`` prints.
        row: cells of one entry.
        columns: headings.
        as_json: whether a program reads it.
        empty: the sentence for people when there are none.
    """
    from harness.console import print_json, print_table

    if as_json:
        print_json(list(entries))
    else:
        print_table(columns, [row(entry) for entry in entries], empty=empty)


def show_one(entry: Entry, *, as_json: bool) -> None:
    """Print one object, a member a line; members that are objects follow with their own."""
    from harness.console import print_json, print_table

    if as_json:
        print_json(entry)
        return
    print_table(("what", "value"), _rows(entry), empty="nothing is known")


def _rows(entry: Entry, within: str = "") -> list[tuple[str, str]]:
    rows = []
    for name, value in entry.items():
        if isinstance(value, Mapping):
            rows += _rows(value, f"{within}{name}.")
        else:
            rows.append((within + name, text(value)))
    return rows


def text(value: object) -> str:
    """A value as people read it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def time(seconds: object) -> str:
    """Seconds since the epoch as a date and time in UTC."""
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        return "-"
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")
