"""The operators' commands against a real lab: each way back from a finding, typed as the lab's own advice says it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.needs_swtpm, pytest.mark.timeout(900)]

HARNESS = str(Path(sys.executable).parent / "harness")
TOPOLOGY = """
hosts:
  host1: {chip: swtpm}
tenants:
  alice:
    quote_interval_s: 1
    allow_reboots: false
    guests: {web1: {}}
"""
LIMIT_S = 240.0
WHY = ("--reason", "ticket 4711")


@dataclass(frozen=True)
class Shell:
    """A terminal in the folder of the lab's topology."""

    folder: Path

    def run(self, *words: str, code: int | None = 0) -> subprocess.CompletedProcess[str]:
        """A command that ends with this exit code."""
        environ = {name: value for name, value in os.environ.items() if not name.startswith("HARNESS_")}
        ended = subprocess.run(
            [HARNESS, *words],
            cwd=self.folder,
            env={**environ, "NO_COLOR": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        assert code is None or ended.returncode == code, f"{words}\n{ended.stdout}\n{ended.stderr}"
        return ended

    def json(self, *words: str, code: int | None = 0) -> Any:
        """What a command prints for programs."""
        return json.loads(self.run(*words, "--json", code=code).stdout)

    def status_once(self, **expected: object) -> dict[str, Any]:
        """The only guest's status, once it shows what is expected."""
        until = time.monotonic() + LIMIT_S
        while True:
            (guest,) = self.json("tenant", "status", code=None)["guests"]
            if expected.items() <= guest.items():
                return dict(guest)
            assert time.monotonic() < until, f"waited for {expected}, saw {guest}"
            time.sleep(0.2)


@pytest.fixture(scope="module")
def shell() -> Iterator[Shell]:
    """A lab with one attested guest."""
    with tempfile.TemporaryDirectory(prefix="hc") as folder:
        made = Shell(Path(folder))
        (made.folder / "lab.yml").write_text(TOPOLOGY, encoding="utf-8")
        try:
            made.run("lab", "up")
            yield made
        finally:
            made.run("lab", "down", code=None)
            shutil.rmtree(made.folder / ".lab", ignore_errors=True)


def test_reference_values_are_captured_changed_and_brought_back(shell: Shell) -> None:
    """A guest that was refused by its policy is attested again by `policy set --resume`; the alarm is acknowledged."""
    agent_id = shell.status_once(attested=True)["agent_id"]
    shell.run("tenant", "policy", "capture", "web1", "--layer", "host", "--out", "good.json")
    policy = json.loads((shell.folder / "good.json").read_text())
    policy["sha256"]["4"] = ["00" * 32]
    (shell.folder / "bad.json").write_text(json.dumps(policy))
    shell.run("tenant", "policy", "set", "web1", "--host-policy", "bad.json", *WHY)
    shell.status_once(attested=False, failed_check=9, error="ReferenceValueMismatch")
    shown = shell.run("tenant", "guest", "show", "web1", code=1).stdout
    assert "harness tenant policy show web1" in shown
    assert "differs" in shell.run("tenant", "policy", "show", "web1", "--layer", "host", code=1).stdout

    shell.run("tenant", "policy", "set", agent_id[:8], "--host-policy", "good.json", "--resume", *WHY)
    shell.status_once(attested=True)
    (alarm,) = shell.json("tenant", "alarms", code=1)
    assert (alarm["kind"], alarm["agent_id"]) == ("ReferenceValueMismatch", agent_id)
    shell.run("tenant", "alarms", "ack", alarm["id"], *WHY)
    shell.run("tenant", "alarms", "ack", alarm["id"], *WHY, code=1)
    assert shell.json("tenant", "alarms") == []
    acts = [entry["action"] for entry in shell.json("tenant", "audit")]
    assert acts[-4:] == ["policy-set", "policy-set", "resume", "alarm-acknowledge"]


def test_a_guest_that_is_attested_is_not_resumed(shell: Shell) -> None:
    """The verifier's conflict is the answer, with 1; an id that nobody knows is unusable input, with 2."""
    shell.status_once(attested=True)
    shell.run("tenant", "guest", "resume", "web1", *WHY, code=1)
    shell.run("tenant", "guest", "resume", "00000000-0000-4000-8000-000000000000", *WHY, code=2)
    shell.run("tenant", "guest", "resume", "web1", "--accept-reboot", *WHY, code=1)


def test_a_guest_is_re_enrolled_and_attested_as_before(shell: Shell) -> None:
    """Its keys are forgotten, its agent registers anew by itself, and the order stays what it was."""
    before = shell.json("tenant", "guest", "show", "web1", code=None)
    shell.run("tenant", "guest", "re-enrol", "web1", *WHY)
    shell.status_once(attested=True)
    after = shell.json("tenant", "guest", "show", "web1", code=None)
    same = ("quote_interval_s", "allow_reboots", "provider_verifier", "provider_quote_interval", "ak_name")
    assert [after["attestation"][name] for name in same] == [before["attestation"][name] for name in same]
    policies = ("guest_policy", "host_policy")
    assert [after["policy"][name] for name in policies] == [before["policy"][name] for name in policies]
    assert after["chain"][0]["what"] == "vendor root"
    assert after["chain"][-1]["what"] == "guest AK"


def test_the_provider_is_refused_what_would_orphan_a_guest(shell: Shell) -> None:
    """A host with guests is not removed; a vTPM is released on its host, and the trail of both says who and why."""
    refused = shell.run("provider", "host", "remove", "host1", *WHY, code=1)
    assert "guests are defined on host" in refused.stderr
    shell.run("provider", "guest", "release", "web1", *WHY)
    (released,) = [entry for entry in shell.json("provider", "audit") if entry["action"] == "vtpm-release"]
    assert (released["service"], released["reason"]) == ("host1", "ticket 4711")


def test_watching_ends_with_its_reader(shell: Shell) -> None:
    """`status --watch --json` gives one object a line and ends without an error when its pipe is closed."""
    with subprocess.Popen(
        [HARNESS, "tenant", "status", "--watch", "--json", "--every", "0.1"],
        cwd=shell.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as watching:
        assert watching.stdout is not None
        assert watching.stderr is not None
        lines = [json.loads(watching.stdout.readline()) for _ in range(2)]
        watching.stdout.close()
        assert watching.wait(timeout=LIMIT_S) == 0
        assert watching.stderr.read() == ""
    assert lines[0] != lines[1]


def test_a_lab_that_is_down_is_said_with_the_command_that_starts_it(shell: Shell) -> None:
    """It is one sentence, whatever was asked, and nobody is shown as attested."""
    shell.run("lab", "down")
    for code, words in ((1, ("status",)), (2, ("guest", "list")), (2, ("alarms",))):
        ended = shell.run("tenant", *words, code=code)
        assert ended.stdout == ""
        assert re.fullmatch(r"harness: the lab in .+ is down; `harness lab up` starts it\n", ended.stderr)
