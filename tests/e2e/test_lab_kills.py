"""``kill -9`` of every process of a lab in turn: all guests are attested again, with the same keys, and nobody enrols.

Recovery times are measured by `tests.soak.recovery`; here only the bound counts.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator

import psutil  # type: ignore[import-untyped]
import pytest

from tests.support.running_lab import RunningLab, running_lab

pytestmark = [pytest.mark.needs_swtpm, pytest.mark.timeout(900)]

SERVICES = (
    "host1-tpm",
    "host1-agent",
    "host1-guests",
    "provider-registrar",
    "provider-verifier",
    "alice-registrar",
    "alice-verifier",
    "bob-registrar",
    "bob-verifier",
)
BACK_S = 240.0
"""Within this time of a kill every guest is attested again; twice what is asked, for a machine with other work."""


@pytest.fixture(scope="module")
def lab() -> Iterator[RunningLab]:
    """A lab that is up; every test leaves it attested."""
    with running_lab() as running:
        yield running


def test_every_service_is_in_the_list(lab: RunningLab) -> None:
    """No service of the lab is left out below."""
    assert set(lab.pids()) == set(SERVICES)


@pytest.mark.parametrize("service", SERVICES)
def test_a_killed_service_costs_no_enrolment(lab: RunningLab, service: str) -> None:
    """It is started again; all guests are attested by new evidence, with the keys of before."""
    before, pid = lab.pinned(), lab.pid(service)
    lab.kill(service)
    lab.until_attested(BACK_S, count=3)
    assert lab.pid(service) not in (None, pid)
    assert lab.pinned() == before


@pytest.mark.parametrize("whose", ["h/host1", "guest"])
def test_a_killed_swtpm_is_a_power_cycle(lab: RunningLab, whose: str) -> None:
    """The TPM of the host, or of a guest, comes back with its boot replayed; nothing is enrolled anew."""
    before, swtpms = lab.pinned(), lab.swtpms()
    chosen = whose if whose in swtpms else next(name for name in swtpms if "/guests/" in name)
    os.kill(swtpms[chosen], signal.SIGKILL)
    lab.until_attested(BACK_S, count=3)
    assert lab.swtpms()[chosen] != swtpms[chosen]
    assert lab.pinned() == before


def test_a_killed_guest_agent_is_restarted_in_its_guest(lab: RunningLab) -> None:
    """The agent alone comes back, at its address; the vTPM goes on."""
    before, swtpms = lab.pinned(), lab.swtpms()
    port = _agent_port(lab)
    pid = lab.until("the agent listens", lambda: _listener(port))
    os.kill(pid, signal.SIGKILL)
    lab.until_attested(BACK_S, count=3)
    assert _listener(port) not in (None, pid)
    assert (lab.pinned(), lab.swtpms()) == (before, swtpms)


def _agent_port(lab: RunningLab) -> int:
    return int(json.loads((lab.state / "lab.json").read_text())["ports"]["agent-alice-vm1"])


def _listener(port: int) -> int | None:
    """PID of the process that listens on this port of the loopback interface."""
    for connection in psutil.net_connections("tcp4"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
            return int(connection.pid) if connection.pid else None
    return None
