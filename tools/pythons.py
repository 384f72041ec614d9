"""Finds the Python interpreters of this machine by running them, since a command of that name may be a dead shim.

Commands::

    python3 tools/pythons.py best               # prints the interpreter to make .venv with
    python3 tools/pythons.py list               # says which of the supported versions exist
    .venv/bin/python tools/pythons.py tox ...   # runs tox with what was found, and says which versions ran

Invariants:
    1. An interpreter is offered only after it ran and could import what an environment needs (``NEEDED``).
    2. This file needs the standard library only and runs on Python 3.8: it is used before anything is installed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

SUPPORTED = ((3, 11), (3, 12), (3, 13))
"""Versions that the tests run on."""
NEEDED = "venv, ensurepip, ssl, sqlite3, ctypes"
PROBE_TIMEOUT_S = 20

_PROBE = f"""
import json, os, sys, sysconfig
import {NEEDED}
header = os.path.join(sysconfig.get_path("include"), "Python.h")
path = getattr(sys, "_base_executable", sys.executable)  # not the environment that is about to be replaced
print(json.dumps([path, sys.version_info[0], sys.version_info[1], os.path.exists(header)]))
"""


class Interpreter(NamedTuple):
    """An interpreter that ran."""

    path: str
    version: tuple[int, int]
    has_headers: bool

    @property
    def name(self) -> str:
        """Version as people write it, such as 3.11."""
        return ".".join(map(str, self.version))


def probe(command: str) -> Interpreter | None:
    """Run ``command`` as a Python interpreter.

    Returns:
        What it says of itself; None when it does not run, hangs, or lacks a module of ``NEEDED``.
    """
    try:
        ran = subprocess.run(
            [command, "-I", "-c", _PROBE],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=PROBE_TIMEOUT_S,
            check=True,
        )
        path, major, minor, has_headers = json.loads(ran.stdout)
    except (OSError, TypeError, ValueError, subprocess.SubprocessError):
        return None
    return Interpreter(str(path), (int(major), int(minor)), bool(has_headers))


def candidates(environ: dict[str, str]) -> Iterator[str]:
    """Paths that may be interpreters, the machine's default one first, each path once."""
    names = ["python3", *(f"python{major}.{minor}" for major, minor in SUPPORTED), "python3.14"]
    folders = [Path(folder) for folder in environ.get("PATH", os.defpath).split(os.pathsep) if folder]
    roots = [Path(environ["PYENV_ROOT"])] if environ.get("PYENV_ROOT") else []
    if environ.get("HOME"):
        roots.append(Path(environ["HOME"]) / ".pyenv")
    folders += [folder for root in roots for folder in sorted(root.glob("versions/3.*/bin"))]
    seen = set()
    for name in names:
        for folder in folders:
            path = folder / name
            if path not in seen and os.access(path, os.X_OK):
                seen.add(path)
                yield str(path)


def found(environ: dict[str, str]) -> list[Interpreter]:
    """Interpreters that ran, the machine's default one first, each once."""
    probed = (probe(path) for path in candidates(environ))
    return list(dict.fromkeys(interpreter for interpreter in probed if interpreter is not None))


def best(interpreters: Sequence[Interpreter]) -> Interpreter | None:
    """The interpreter for ``.venv``.

    With C headers before without (tpm2-pytss is compiled), tested versions before newer ones, then the machine's
    default; None when every one is older than the oldest supported version.
    """
    usable = [interpreter for interpreter in interpreters if interpreter.version >= SUPPORTED[0]]
    return min(usable, key=lambda one: (one.version not in SUPPORTED, not one.has_headers), default=None)


def by_version(interpreters: Sequence[Interpreter]) -> dict[tuple[int, int], Interpreter]:
    """One interpreter for each supported version, with headers before without."""
    chosen: dict[tuple[int, int], Interpreter] = {}
    for interpreter in sorted(interpreters, key=lambda one: not one.has_headers):
        if interpreter.version in SUPPORTED:
            chosen.setdefault(interpreter.version, interpreter)
    return chosen


def table(chosen: dict[tuple[int, int], Interpreter]) -> list[str]:
    """One line for each supported version."""
    lines = []
    for version in SUPPORTED:
        interpreter = chosen.get(version)
        where = interpreter.path if interpreter else "not found on this machine: its tests are skipped"
        lines.append(f"Python {version[0]}.{version[1]}: {where}")
    return lines


def run_tox(chosen: dict[tuple[int, int], Interpreter], arguments: Sequence[str]) -> int:
    """Run tox with these interpreters; the closing lines say which versions it could use."""
    discover = ["--discover", *(interpreter.path for interpreter in chosen.values())] if chosen else []
    tox = [sys.executable, "-m", "tox", "run", *discover, *arguments]
    status = subprocess.run(tox, check=False).returncode
    print("\n".join(["", *table(chosen)]), flush=True)
    return status


def main(arguments: Sequence[str]) -> int:
    """Run one of the commands in the module's docstring; the exit status is 0, 1 (nothing found) or tox's."""
    command, *rest = arguments or ["list"]
    interpreters = found(dict(os.environ))
    if command == "tox":
        return run_tox(by_version(interpreters), rest)
    if command == "list":
        print("\n".join(table(by_version(interpreters))))
        return 0
    chosen = best(interpreters)
    if chosen is None:
        seen = ", ".join(f"{one.name} ({one.path})" for one in interpreters) or "none"
        print(f"no Python {SUPPORTED[0][0]}.{SUPPORTED[0][1]} or newer with venv; found: {seen}", file=sys.stderr)
        return 1
    print(chosen.path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
