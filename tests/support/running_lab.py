"""A lab under its supervisor, driven through the command line as a person does.

A chip without delay and short intervals, so that a test waits for the harness and not for a TPM.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.support.processes import processes_of

TOPOLOGY = """\
hosts: {host1: {chip: swtpm}}
tenants:
  alice: {quote_interval_s: 1, payload: secret, guests: {alice-vm1: , alice-vm2: }}
  bob: {quote_interval_s: 1, guests: {bob-vm1: }}
"""
COMMAND_S = 480
_POLL_S = 0.1


class RunningLab:
    """One lab in a folder of its own, beside a file that nobody may import.

    Args:
        folder: where lab.yml is; short, for the sake of the sockets.
        topology: its text.
        environment: variables of every process of the lab, and of the commands, besides those of this process.
    """

    def __init__(self, folder: Path, topology: str = TOPOLOGY, *, environment: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.environment = dict(environment or {})
        self.state = folder / ".lab"
        (folder / "secret").write_bytes(b"the tenant's secret\n")
        (folder / "yaml.py").write_text("raise SystemError('imported from where a person stands')\n")
        self.write(topology)

    def write(self, topology: str) -> None:
        """Changes lab.yml."""
        (self.folder / "lab.yml").write_text(topology)

    def run(self, *arguments: str, timeout: float = COMMAND_S) -> subprocess.CompletedProcess[str]:
        """``harness ARGUMENTS`` in the lab's folder."""
        environment = {**os.environ, "NO_COLOR": "1", **self.environment}
        environment["HARNESS_LAB"] = str(self.folder / "lab.yml")
        return subprocess.run(
            [sys.executable, "-P", "-m", "harness", *arguments],
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
        return {service["name"]: service["pid"] for service in self.supervisor()["services"]}

    def supervisor(self) -> Any:
        """The supervisor's own answer about the lab."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(20)
            sock.connect(str(self.state / "run" / "s"))
            sock.sendall(b'{"op": "status"}\n')
            with sock.makefile() as answer:
                return json.loads(answer.readline())

    def guests(self) -> dict[str, dict[str, Any]]:
        """Rows of ``harness tenant status`` by agent id."""
        done = self.run("tenant", "status", "--json")
        assert done.returncode in {0, 1}, done.stderr
        return {guest["agent_id"]: guest for guest in json.loads(done.stdout)["guests"]}

    def tenants(self) -> list[str]:
        """Tenants of the lab as it is."""
        return list(self._site()["tenants"])

    def ask(self, tenant: str, service: str, path: str) -> Any:
        """Results of a GET at a tenant's ``registrar`` or ``verifier``, as its operator; None: not answered with 200.

        Without a process of the command line in between: for what a test asks many times.
        """
        site = self._site()["tenants"][tenant]
        tls = site["operator"]
        context = ssl.create_default_context(cafile=tls["authorities"][tenant])
        context.load_cert_chain(tls["certificate"], tls["key"])
        at = urllib.parse.urlsplit(site[service])
        connection = http.client.HTTPSConnection(at.hostname or "", at.port, context=context, timeout=240)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            body = json.loads(answer.read())
        except (OSError, http.client.HTTPException, ValueError):
            return None
        finally:
            connection.close()
        return body["results"] if answer.status == 200 else None

    def attestations(self) -> dict[str, dict[str, Any]]:
        """What the verifiers say of every guest of lab.yml, by its name; an empty one while its verifier is away."""
        guests = {name: (tenant, uuid) for tenant in self.tenants() for name, uuid in self._guests_of(tenant).items()}
        return {
            name: self.ask(tenant, "verifier", f"/v2.1/agents/{uuid}") or {} for name, (tenant, uuid) in guests.items()
        }

    def pinned(self) -> dict[str, Any]:
        """Everything that was enrolled: hosts with keys and the time of their enrolment, guests with their keys."""
        found: dict[str, Any] = {}
        for tenant in self.tenants():
            for host in self.ask(tenant, "registrar", "/v1/hosts")["hosts"]:
                found[f"{tenant} {host['host_id']}"] = (host["ek"], host["ak"], host["ca"], host["enrolled_at"])
            for uuid in self._guests_of(tenant).values():
                agent = self.ask(tenant, "registrar", f"/v2.1/agents/{uuid}")
                found[uuid] = (agent["ek_tpm"], agent["aik_tpm"], agent["ekcert"], agent["host_id"])
        return found

    def until_attested(self, deadline_s: float = 240.0, *, count: int | None = None) -> float:
        """Waits until each guest was attested by evidence that was asked for from now on; returns the seconds."""
        began, since = time.monotonic(), time.time()
        while True:
            views = self.attestations()
            fresh = [
                view for view in views.values() if view.get("attested") and view["last_successful_attestation"] > since
            ]
            if len(fresh) == len(views) and len(fresh) >= (count or 1):
                return time.monotonic() - began
            stands = {
                name: (view.get("state"), view.get("attested"), view.get("detail")) for name, view in views.items()
            }
            assert time.monotonic() - began < deadline_s, f"not attested again: {stands}\n{self.tail()}"
            time.sleep(_POLL_S)

    def _site(self) -> Any:
        return yaml.safe_load((self.state / "site.yml").read_text())

    def _guests_of(self, tenant: str) -> dict[str, str]:
        found: dict[str, str] = self._site()["tenants"][tenant].get("guests", {})
        return found

    def until(self, what: str, holds: Any, deadline_s: float = 120.0) -> Any:
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
def running_lab(topology: str = TOPOLOGY, *, environment: Mapping[str, str] | None = None) -> Iterator[RunningLab]:
    """A lab that is up, and ended with everything that belongs to it."""
    with tempfile.TemporaryDirectory(prefix="hl") as name:
        lab = RunningLab(Path(name), topology, environment=environment)
        try:
            lab.up()
            yield lab
        finally:
            lab.run("lab", "down")
