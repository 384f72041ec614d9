"""What a benchmark ran on: the facts without which its figures say nothing.

Invariants:
    1. A program that does not answer is named as missing; nothing is guessed.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import ssl
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path

from harness import __version__

_VERSION = re.compile(r"\d+(?:\.\d+)+")
_ANSWER_S = 20
_MISSING = "missing"
_LOOK_S = 1.0


def machine_facts() -> dict[str, object]:
    """CPU, memory, kernel, versions and the load before the run, as plain data."""
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "openssl": ssl.OPENSSL_VERSION,
        "harness": __version__,
        **{name: _installed(name) for name in ("aiohttp", "cryptography", "tpm2-pytss")},
        "swtpm": _program("swtpm", "--version"),
        "load_before": [round(load, 2) for load in os.getloadavg()],
        "busy_before_percent": round(100 * busy_share(_LOOK_S), 1),
    }


def busy_share(seconds: float) -> float:
    """Share of all cores' time that somebody uses, watched for this long: what else the machine has to do."""
    before = _jiffies()
    time.sleep(seconds)
    idle, whole = (after - begun for after, begun in zip(_jiffies(), before, strict=True))
    return 1.0 - idle / whole if whole else 0.0


def _jiffies() -> tuple[int, int]:
    """Idle time and all time of the machine's cores so far, in the kernel's ticks (proc(5), /proc/stat)."""
    with Path("/proc/stat").open(encoding="ascii") as file:
        ticks = [int(number) for number in file.readline().split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return _MISSING


def _program(*command: str) -> str:
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_S, check=False).stdout
    except (OSError, subprocess.SubprocessError):
        return _MISSING
    found = _VERSION.search(said)
    return found[0] if found else _MISSING
