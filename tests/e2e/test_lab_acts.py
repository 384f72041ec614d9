"""What is done to a lab that runs: hosts switched off and on, certificates renewed, guests removed and brought back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.running_lab import RunningLab, running_lab

pytestmark = [pytest.mark.needs_swtpm, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def lab() -> Iterator[RunningLab]:
    """A lab of two tenants and three guests."""
    with running_lab() as lab:
        yield lab


def printed(lab: RunningLab, *words: str, code: int = 0) -> str:
    """What a command prints."""
    done = lab.run(*words)
    assert done.returncode == code, done.stderr + done.stdout
    return done.stdout


def test_a_power_cycle_takes_guests_and_agent_along(lab: RunningLab) -> None:
    """Host agent, guest manager and every vTPM are other processes afterwards; all guests are attested again."""
    before, tpms = lab.pids(), lab.swtpms()
    assert "booted good; 3 of its guests run again" in printed(lab, "lab", "power-cycle", "host1")
    after, again = lab.pids(), lab.swtpms()
    other = {name for name in before if before[name] != after[name]}
    assert other == {"host1-agent", "host1-guests"}
    assert again.keys() == tpms.keys()
    assert not set(again.values()) & set(tpms.values())
    lab.until_attested(count=3)


def test_a_power_cut_stops_nothing_in_order(lab: RunningLab) -> None:
    """The clock of the hardware TPM is not safe, or was not told of the end; guests come back and are attested."""
    assert "3 of its guests run again" in printed(lab, "lab", "power-cycle", "host1", "--unorderly")
    lab.until_attested(count=3)
    kinds = [alarm["kind"] for alarm in lab.json("tenant", "alarms", "--tenant", "alice", code=1)]
    assert set(kinds) <= {"HostRebooted", "ClockNotSafe"}
    assert "HostRebooted" in kinds


def test_another_kernel_is_booted_until_it_is_said_otherwise(lab: RunningLab) -> None:
    """A scenario stays for later power cycles; what the tenants' policies do not know is refused."""
    assert "booted tampered-kernel" in printed(lab, "lab", "power-cycle", "host1", "--scenario", "tampered-kernel")
    lab.until("a refusal", lambda: _errors(lab) == {"ReferenceValueMismatch"})
    assert "booted tampered-kernel" in printed(lab, "lab", "power-cycle", "host1")
    assert "booted good" in printed(lab, "lab", "power-cycle", "host1", "--scenario", "good")
    for tenant in ("alice", "bob"):
        printed(lab, "tenant", "guest", "resume", "--all", "--tenant", tenant, "--reason", "the good kernel is back")
    lab.until_attested(count=3)


def test_the_hardware_tpm_alone_can_be_restarted(lab: RunningLab) -> None:
    """`lab restart HOST-tpm` leaves guests and agent as they are."""
    before = lab.pids()
    printed(lab, "lab", "restart", "host1-tpm")
    lab.until_attested(count=3)
    after = lab.pids()
    assert before["host1-guests"] == after["host1-guests"]
    assert before["host1-tpm"] != after["host1-tpm"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("lab", "power-cycle", "host9"), "no host host9; this lab has host1"),
        (("lab", "power-cycle", "host1", "--scenario", "nonsense"), "nonsense"),
    ],
)
def test_what_cannot_be_done_touches_nothing(lab: RunningLab, words: tuple[str, ...], said: str) -> None:
    """Exit code 2 with one sentence; every process is the one before."""
    before = lab.pids()
    done = lab.run(*words)
    assert (done.returncode, said in done.stderr) == (2, True), done.stderr
    assert lab.pids() == before


def test_certificates_are_renewed_while_everything_goes_on(lab: RunningLab) -> None:
    """No process is started anew, guests stay attested, and the status counts the days of those that end soon."""
    before = lab.pids()
    assert "certificate" not in printed(lab, "lab", "status").splitlines()[0]
    rows = lab.json("lab", "renew", "--days", "12", "--reason", "a short one")
    ways = {row["name"]: row["by"] for row in rows}
    assert {name for name, by in ways.items() if by == "file"} == {
        "provider-operator",
        *(f"{tenant}-{who}" for tenant in ("alice", "bob") for who in ("operator", "client")),
    }
    assert {"agent-alice-vm1", "host1-agent", "bob-verifier"} <= ways.keys()
    status = printed(lab, "lab", "status")
    assert "certificate" in status.splitlines()[0]
    assert sum("11 days" in line for line in status.splitlines()) == 7
    lab.until_attested(count=3)
    printed(lab, "lab", "renew", "--reason", "the yearly renewal")
    assert "certificate" not in printed(lab, "lab", "status").splitlines()[0]
    assert lab.pids() == before
    trail = [
        entry for entry in lab.json("tenant", "audit", "--tenant", "bob") if entry["action"] == "certificate-renew"
    ]
    assert {(entry["service"], entry["reason"]) for entry in trail} == {
        (service, reason) for service in ("registrar", "verifier") for reason in ("a short one", "the yearly renewal")
    }


def test_a_removed_guest_is_added_again_without_a_restart(lab: RunningLab) -> None:
    """Its agent notices that the registrar has forgotten it, and registers with the keys that it has."""
    before = lab.swtpms()
    printed(lab, "tenant", "guest", "remove", "alice-vm1", "--tenant", "alice", "--reason", "by mistake")
    assert len(lab.guests()) == 2
    printed(lab, "tenant", "guest", "add", "alice-vm1", "--tenant", "alice", "--allow-reboots", "--wait", "90")
    lab.until_attested(count=3)
    assert lab.swtpms() == before


def test_up_brings_a_guest_back_that_was_removed_by_hand(lab: RunningLab) -> None:
    """What lab.yml has is under attestation after `lab up`, without another vTPM."""
    before = lab.swtpms()
    printed(lab, "tenant", "guest", "remove", "bob-vm1", "--tenant", "bob", "--reason", "by mistake")
    shown = lab.up()
    assert shown["changed"]
    lab.until_attested(count=3)
    assert lab.swtpms() == before


def _errors(lab: RunningLab) -> set[Any]:
    return {guest["error"] for guest in lab.guests().values()}
