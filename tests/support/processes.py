"""Which processes work on a folder: what a test that ends things must not leave behind."""

from __future__ import annotations

import os
import time
from pathlib import Path

_END_S = 120.0
_POLL_S = 0.01


def processes_of(folder: Path) -> dict[int, str]:
    """Command lines, by PID, of the processes that were given a path below this folder."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes()
        except OSError:
            continue  # it has just ended
        if os.fsencode(folder) in line:
            found[int(path.parent.name)] = line.replace(b"\0", b" ").decode(errors="replace")
    return found


def left_by(folder: Path) -> dict[int, str]:
    """As `processes_of`, after those that were killed or told to stop had time to end (a guest manager has 28 s)."""
    until = time.monotonic() + _END_S
    while (found := processes_of(folder)) and time.monotonic() < until:
        time.sleep(_POLL_S)  # the kernel tells only the parent, which is not always this process
    return found
