"""How the operators' commands show what services answered: a table for people, JSON for programs."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Entry = Mapping[str, Any]
_WIDE = 100
_SHORTEST = 8
_LONGEST, _SHOWN = 100, 16
_MINUTE, _HOUR, _DAY = 60, 3_600, 86_400


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
            rows.append((within + name, _cut(text(value))))
    return rows


def _cut(value: str) -> str:
    """Keys and certificates are for programs; --json has them whole."""
    return value if len(value) <= _LONGEST else f"{value[:_SHOWN]}… ({len(value)} characters, whole in --json)"


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
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def ago(seconds: object, now: float) -> str:
    """Seconds since the epoch as people say them, such as ``12 s ago``; what is no time is ``never``."""
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        return "never"
    age = now - seconds
    if age < -1:
        return f"in {_duration(-age)}"
    return f"{_duration(max(0.0, age))} ago"


def when(seconds: object, *, wide: bool) -> str:
    """Seconds since the epoch as a date and time where there is room, else as people say them."""
    return time(seconds) if wide else ago(seconds, now())


def now() -> float:
    """Seconds since the epoch."""
    return datetime.datetime.now(datetime.UTC).timestamp()


def _duration(age: float) -> str:
    for unit, name in ((_DAY, "d"), (_HOUR, "h"), (_MINUTE, "min")):
        if age >= 2 * unit:
            return f"{age / unit:.0f} {name}"
    return f"{age:.0f} s"


def is_wide() -> bool:
    """Whether there is room for complete ids; there is in a pipe."""
    from harness.console import console

    return console().width >= _WIDE


def shortener(ids: Iterable[object], *, wide: bool | None = None) -> Callable[[object], str]:
    """How ids are shown in a table: as they are where there is room, else as their first characters.

    Args:
        ids: all that the table shows; their short forms are different.
        wide: whether there is room; None: as the terminal is.
    """
    if is_wide() if wide is None else wide:
        return text
    known = {str(each) for each in ids if each is not None}
    longest = max((len(each) for each in known), default=0)
    size = next(
        (size for size in range(_SHORTEST, longest) if len({each[:size] for each in known}) == len(known)), longest
    )
    return lambda value: text(value) if value is None else str(value)[: max(size, _SHORTEST)]
