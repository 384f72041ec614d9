"""`harness lab replace-tpm`: a host gets another TPM, and every party's operator does what has to be done then."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from harness.sim.control import ask
from tests.support.running_lab import RunningLab, running_lab

pytestmark = [pytest.mark.needs_swtpm, pytest.mark.timeout(1200)]

WHY = ("--reason", "board replaced, ticket 4711")
TOPOLOGY = """\
hosts: {host1: {chip: swtpm}, host2: {chip: swtpm}}
tenants:
  alice: {quote_interval_s: 1, payload: secret, guests: {alice-vm1: {host: host1}, alice-vm2: {host: host2}}}
  bob: {quote_interval_s: 2, provider_quote_interval: 2, guests: {bob-vm1: {host: host1}}}
"""
COMMAND = [sys.executable, "-P", "-m", "harness", "lab", "replace-tpm", "host1", *WHY]


@pytest.fixture(scope="module")
def lab() -> Iterator[RunningLab]:
    """A lab of two hosts and two tenants."""
    with running_lab(TOPOLOGY) as lab:
        yield lab


def host_ids(lab: RunningLab) -> list[str]:
    """Ids of host1 and host2."""
    return [host["host_id"] for host in lab.json("lab", "status")["hosts"]]


def enrolled(lab: RunningLab, tenant: str) -> set[str]:
    """Hosts that a tenant trusts."""
    return {host["host_id"] for host in lab.json("tenant", "host", "list", "--tenant", tenant)}


def orders(lab: RunningLab) -> dict[str, Any]:
    """How each guest is attested, and by which keys."""
    members = ("quote_interval_s", "provider_quote_interval", "allow_reboots", "guest_mask", "host_mask")
    return {agent_id: {name: view[name] for name in members} for agent_id, view in lab.attestations().items()}


def interrupted(lab: RunningLab, said: str) -> None:
    """Begins or goes on with the replacement, and kills the command when it has said something."""
    environment = {**os.environ, "HARNESS_LAB": str(lab.folder / "lab.yml"), "NO_COLOR": "1"}
    command = subprocess.Popen(COMMAND, env=environment, cwd=lab.folder, stdout=subprocess.PIPE, text=True)
    assert command.stdout is not None
    with command.stdout as lines:
        told = []
        for line in lines:
            told.append(line)
            if said in line:
                os.kill(command.pid, signal.SIGKILL)
                break
    assert command.wait(30) == -signal.SIGKILL, told


def acts(entries: list[dict[str, Any]]) -> set[str]:
    """What was done for this reason."""
    return {entry["action"] for entry in entries if entry["reason"] == WHY[1]}


def test_a_host_gets_another_tpm_and_all_guests_are_attested_again(lab: RunningLab) -> None:
    """Another id for this host, other keys for its guests and no others; each party's trail has its acts."""
    before, keys, ordered = host_ids(lab), lab.attestations(), orders(lab)
    done = lab.run(*COMMAND[4:])
    assert done.returncode == 0, done.stderr + done.stdout
    after = host_ids(lab)
    assert after[0] != before[0]
    assert after[1] == before[1]
    lab.until_attested(count=3)
    assert enrolled(lab, "alice") == set(after)
    assert enrolled(lab, "bob") == set(after)
    again = lab.attestations()
    moved = {agent_id for agent_id in keys if again[agent_id]["ak_name"] != keys[agent_id]["ak_name"]}
    assert {again[agent_id]["host_id"] for agent_id in moved} == {after[0]}
    assert len(moved) == 2
    assert orders(lab) == ordered
    trails = lab.json("provider", "audit")
    assert acts([each for each in trails if each["service"] == "registrar"]) == {"host-replace"}
    assert acts([each for each in trails if each["service"] == "host1"]) == {"vtpm-release"}
    assert acts([each for each in trails if each["service"] == "host2"]) == set()
    for tenant in ("alice", "bob"):
        wanted = {"agent-remove", "host-add", "guest-re-enrol", "host-remove"}
        assert acts(lab.json("tenant", "audit", "--tenant", tenant)) == wanted
        assert lab.json("tenant", "alarms", "--tenant", tenant) == []  # what operators do alarms nobody


def test_a_replacement_that_was_interrupted_is_completed(lab: RunningLab) -> None:
    """Killed three times on the way, it goes on each time; one TPM was put in, and everybody is attested in the end."""
    before, replaced = host_ids(lab)[0], chips(lab)
    for said in ("host1 has another TPM", "alice: host", "runs with a vTPM"):
        interrupted(lab, said)
    done = lab.run(*COMMAND[4:])
    assert done.returncode == 0, done.stderr + done.stdout
    assert f"going on with the replacement of host {before}" in done.stdout
    assert chips(lab) == replaced + 1
    assert host_ids(lab)[0] != before
    assert not (lab.state / "h" / "host1" / "replacing.json").exists()
    lab.until_attested(count=3)
    assert not lab.up()["changed"]


def test_a_tpm_that_was_replaced_by_hand_is_not_replaced_again(lab: RunningLab) -> None:
    """The agent that announces another TPM already is what is completed."""
    before, replaced = host_ids(lab)[0], chips(lab)
    asyncio.run(ask(lab.state / "h" / "host1" / "c", {"op": "replace"}))
    lab.run("lab", "restart", "host1-agent")

    def announced() -> Any:
        hosts = {host["name"]: host for host in lab.json("provider", "host", "list")}
        return hosts["host1"]["replacement"]

    announced_id = lab.until("the announcement", announced)
    done = lab.run(*COMMAND[4:])
    assert done.returncode == 0, done.stderr + done.stdout
    assert chips(lab) == replaced + 1
    assert host_ids(lab)[0] == announced_id != before
    lab.until_attested(count=3)


def test_an_unknown_host_touches_nothing(lab: RunningLab) -> None:
    """Exit code 2 with one sentence; every process is the one before."""
    before = lab.pids()
    done = lab.run("lab", "replace-tpm", "host9", *WHY)
    assert (done.returncode, "no host host9; this lab has host1, host2" in done.stderr) == (2, True), done.stderr
    assert lab.run("lab", "replace-tpm", "host1").returncode == 2  # no reason
    assert lab.pids() == before


def chips(lab: RunningLab) -> int:
    """How many TPMs of host1 were replaced."""
    return len(list((lab.state / "h" / "host1").glob("tpm.old-*")))
