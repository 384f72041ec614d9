"""The logs of a lab for people: the events of all its processes in the order in which they happened.

Owner: the command line.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.errors import NotFound

_POLL_S = 0.3
_TAIL_BYTES = 1 << 20
_PLAIN = ("event", "level", "timestamp", "service")


def logs_of(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """Logs of a lab by name.

    Args:
        folder: of the lab.
        names: which; none: all.

    Raises:
        NotFound: no log of this name.
    """
    found = {path.stem: path for path in sorted((folder / "log").glob("*.log"))}
    for name in names:
        if name not in found:
            raise NotFound(f"no log of {name}; this lab has {', '.join(found) or 'none yet'}")
    return {name: found[name] for name in names or found}


def last_lines(logs: Mapping[str, Path], count: int) -> list[tuple[str, str]]:
    """The newest lines of all logs together, oldest first, as pairs of the log's name and the line."""
    lines = [(_when(line), name, line) for name, path in logs.items() for line in _tail(path)[-count:]]
    return [(name, line) for _, name, line in sorted(lines, key=lambda entry: entry[0])[-count:]]


def follow(logs: Mapping[str, Path]) -> Iterator[tuple[str, str]]:
    """New lines as they come, for ever; a log that was rotated is read on in its new file."""
    at = {name: _size(path) for name, path in logs.items()}
    inodes = {name: _inode(path) for name, path in logs.items()}
    while True:
        for name, path in logs.items():
            if _inode(path) != inodes[name] or _size(path) < at[name]:
                inodes[name], at[name] = _inode(path), 0
            if _size(path) > at[name]:
                with path.open("rb") as log:
                    log.seek(at[name])
                    new = log.read(_TAIL_BYTES)
                whole = new[: new.rfind(b"\n") + 1]
                at[name] += len(whole)
                for line in whole.decode(errors="replace").splitlines():
                    yield name, line
        time.sleep(_POLL_S)


def for_people(name: str, line: str) -> str:
    """One event on one line: time, process, event, and what belongs to it."""
    event = _event(line)
    if event is None:
        return f"{'':8} {name:20} {line}"
    more = " ".join(f"{key}={_short(value)}" for key, value in event.items() if key not in _PLAIN and value is not None)
    mark = {"warning": "! ", "error": "!! "}.get(str(event.get("level")), "")
    return f"{str(event.get('timestamp', ''))[11:19]:8} {name:20} {mark}{event['event']} {more}".rstrip()


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text.strip().splitlines()[-1] if text.strip() else text


def _event(line: str) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) and "event" in event else None


def _when(line: str) -> str:
    event = _event(line)
    return "" if event is None else str(event.get("timestamp", ""))


def _tail(path: Path) -> list[str]:
    try:
        with path.open("rb") as log:
            log.seek(max(0, _size(path) - _TAIL_BYTES))
            return log.read().decode(errors="replace").splitlines()
    except OSError:
        return []


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except OSError:
        return 0
