"""A lab under its supervisor, driven through the command line as a person does.

A chip without delay and short intervals, so that a test waits for the harness and not for a TPM.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.support.processes import processes_of

TOPOLOGY = """\
hosts: {host1: {chip: swtpm}}
tenants:
  alice: {quote_interval_s: 1, payload: secret, guests: {alice-vm1: , alice-vm2: }}
  bob: {quote_interval_s: 1, guests: {bob-vm1: }}
"""
COMMAND_S = 240
_POLL_S = 0.1


class RunningLab:
    """One lab in a folder of its own.

    Args:
        folder: where lab.yml is; short, for the sake of the sockets.
        topology: its text.
    """

    def __init__(self, folder: Path, topology: str = TOPOLOGY) -> None:
        self.folder = folder
        self.state = folder / ".lab"
        (folder / "secret").write_bytes(b"the tenant's secret\n")
        self.write(topology)

    def write(self, topology: str) -> None:
        """Changes lab.yml."""
        (self.folder / "lab.yml").write_text(topology)

    def run(self, *arguments: str, timeout: float = COMMAND_S) -> subprocess.CompletedProcess[str]:
        """``harness ARGUMENTS`` in the lab's folder."""
        environment = {**os.environ, "HARNESS_LAB": str(self.folder / "lab.yml"), "NO_COLOR": "1"}
        return subprocess.run(
            [sys.executable, "-m", "harness", *arguments],
            cwd=self.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def json(self, *arguments: str, code: int = 0) -> Any:
        """The one JSON object that a command prints."""
        done = self.run(*arguments, "--json")
        assert done.returncode == code, done.stderr + done.stdout
        return json.loads(done.stdout)

    def up(self, *options: str) -> Mapping[str, Any]:
        """Starts the lab; every guest must be attested."""
        shown: Mapping[str, Any] = self.json("lab", "up", *options)
        assert shown["attested"], shown
        return shown

    def pid(self, service: str) -> int | None:
        """Process of a service; None while it is away."""
        return self.pids()[service]

    def pids(self) -> dict[str, int | None]:
        """Processes of all services."""
        return {service["name"]: service["pid"] for service in self.json("lab", "status")["services"]}

    def guests(self) -> dict[str, dict[str, Any]]:
        """Rows of ``harness tenant status`` by agent id."""
        done = self.run("tenant", "status", "--json")
        assert done.returncode in {0, 1}, done.stderr
        return {guest["agent_id"]: guest for guest in json.loads(done.stdout)["guests"]}

    def until_attested(self, deadline_s: float = 60.0, *, count: int | None = None) -> float:
        """Waits until each guest was attested by evidence that was asked for from now on; returns the seconds."""
        began, since = time.monotonic(), time.time()
        while True:
            guests = self.guests()
            fresh = [guest for guest in guests.values() if guest["attested"] and (guest["last_success"] or 0) > since]
            if len(fresh) == len(guests) and len(fresh) >= (count or 1):
                return time.monotonic() - began
            assert time.monotonic() - began < deadline_s, f"not attested again: {guests}\n{self.tail()}"
            time.sleep(_POLL_S)

    def until(self, what: str, holds: Any, deadline_s: float = 30.0) -> Any:
        """Waits until something holds; returns it."""
        until = time.monotonic() + deadline_s
        while not (found := holds()):
            assert time.monotonic() < until, f"{what} has not come true\n{self.tail()}"
            time.sleep(_POLL_S)
        return found

    def kill(self, service: str) -> None:
        """``kill -9`` of a service."""
        pid = self.pid(service)
        assert pid is not None, f"{service} is away"
        os.kill(pid, signal.SIGKILL)

    def swtpms(self) -> dict[str, int]:
        """The swtpms of this lab: PID by the folder of its TPM, below the lab's."""
        found = {}
        for pid, line in processes_of(self.state).items():
            if "swtpm socket" in line and "--tpmstate dir=" in line:
                state = line.split("--tpmstate dir=")[1].split(" ")[0]
                found[str(Path(state).parent.relative_to(self.state))] = pid
        return found

    def tail(self) -> str:
        """The end of the lab's logs, for a failed assertion."""
        return self.run("lab", "logs", "-n", "60").stdout


@contextlib.contextmanager
def running_lab(topology: str = TOPOLOGY) -> Iterator[RunningLab]:
    """A lab that is up, and ended with everything that belongs to it."""
    with tempfile.TemporaryDirectory(prefix="hl") as name:
        lab = RunningLab(Path(name), topology)
        try:
            lab.up()
            yield lab
        finally:
            lab.run("lab", "down")
