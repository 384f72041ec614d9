"""CPU time and memory of other processes, as the kernel counts them.

Invariants:
    1. A figure covers all threads of the process, and nothing of its children.

Spec: proc(5).
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from harness.errors import SimulationError

_UTIME, _STIME = 11, 12
"""Place of the two counters behind the command's closing parenthesis."""
_SAMPLE_S = 0.25


def cpu_s(pid: int) -> float:
    """Seconds of CPU, user and system, that a process has used. Raises SimulationError when there is none."""
    fields = _read(pid, "stat").rpartition(")")[2].split()
    return (int(fields[_UTIME]) + int(fields[_STIME])) / float(os.sysconf("SC_CLK_TCK"))


def memory_bytes(pid: int) -> int:
    """Memory of a process that is its own or that it shares (RSS). Raises SimulationError when there is none."""
    return _status(pid, "VmRSS")


def peak_bytes(pid: int) -> int:
    """Largest RSS of a process so far, or since `forget_peak`. Raises SimulationError when there is none."""
    return _status(pid, "VmHWM")


def forget_peak(pid: int) -> None:
    """Lets the peak begin anew. Raises SimulationError when the kernel does not allow it."""
    try:
        Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")
    except OSError as error:
        raise SimulationError(f"process {pid}: its peak of memory cannot be reset: {error.strerror}") from error


def _status(pid: int, name: str) -> int:
    for line in _read(pid, "status").splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    raise SimulationError(f"process {pid}: the kernel does not tell {name}")


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise SimulationError(f"process {pid} is gone") from error


@dataclass(slots=True)
class CpuWatch:
    """CPU time of some processes over time. An async context manager; `between` may be asked afterwards.

    Args:
        pids: by name.
        every_s: seconds between two looks.
    """

    pids: Mapping[str, int]
    every_s: float = _SAMPLE_S
    _seen: list[tuple[float, float]] = field(default_factory=list)
    _task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> CpuWatch:
        self._look()
        self._task = asyncio.create_task(self._keep_looking())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._look()

    def between(self, begin_s: float, end_s: float) -> float:
        """Seconds of CPU that all of them used between two moments of the monotonic clock."""
        return self._at(end_s) - self._at(begin_s)

    def _at(self, when_s: float) -> float:
        before, after = self._seen[0], self._seen[-1]
        for place in self._seen:
            if place[0] <= when_s:
                before = place
            else:
                after = place
                break
        if after[0] <= before[0]:
            return before[1]
        share = min(1.0, max(0.0, (when_s - before[0]) / (after[0] - before[0])))
        return before[1] + share * (after[1] - before[1])

    def _look(self) -> None:
        self._seen.append((time.monotonic(), sum(cpu_s(pid) for pid in self.pids.values())))

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(self.every_s)
            self._look()
