"""SIGTERM in the middle of a batch, of an enrolment and of a guest's registration, in a whole lab with a slow chip."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support import design_client
from tests.support.lab_faults import Eye, alarms, enrolled, tracebacks
from tests.support.processes import left_by
from tests.support.running_lab import RunningLab, running_lab

pytestmark = [pytest.mark.needs_swtpm, pytest.mark.timeout(900)]

TOPOLOGY = """\
hosts: {host1: {chip: ifx-slb9670}}
tenants:
  alice: {quote_interval_s: 1, guests: {alice-vm1: }}
  bob: {quote_interval_s: 1, guests: {bob-vm1: }}
  carol: {quote_interval_s: 1}
"""
WITH_ANOTHER = TOPOLOGY.replace("bob-vm1: }", "bob-vm1: , bob-vm2: }")
JOIN_S = 240.0
MOMENTS_S = (0.8, 1.3)
"""Seconds after the start of a command of about two."""


@pytest.fixture(scope="module")
def lab() -> Iterator[RunningLab]:
    """A lab that is up; every test leaves it attested."""
    with running_lab(TOPOLOGY) as running:
        yield running
    assert left_by(running.state) == {}


class Askers:
    """Clients written from the design alone, who ask for quotes again and again while the context lasts.

    Args:
        tenant: of ``lab status``.
        count: how many.
    """

    def __init__(self, tenant: dict[str, Any], count: int) -> None:
        self.verified = 0
        self.wrong: list[Exception] = []
        self._tenant = tenant
        self._end = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._ask) for _ in range(count)]

    def __enter__(self) -> Askers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(JOIN_S)
        assert not any(thread.is_alive() for thread in self._threads), "a client still waits"

    def _ask(self) -> None:
        while not self._end.is_set():
            try:
                design_client.quote(self._tenant)
            except (OSError, ValueError, http.client.HTTPException, design_client.Refused) as error:
                if isinstance(error, TimeoutError) or "check" in str(error):
                    self.wrong.append(error)  # it hung, or the evidence was not what was asked for
            else:
                with self._lock:
                    self.verified += 1


def test_batches_that_are_stopped_in_the_middle(lab: RunningLab) -> None:
    """Each waiter gets a quote that verifies or an error, soon; afterwards everybody is served and attested."""
    keys, alice = enrolled(lab), lab.json("lab", "status")["tenants"][0]
    with Eye(lab), Askers(alice, count=4) as askers:
        for service in ("host1-agent", "provider-verifier", "host1-agent", "provider-verifier"):
            seen = askers.verified
            lab.until("quotes in work", lambda seen=seen: askers.verified > seen + 1, 60)
            done = lab.run("lab", "restart", service)
            assert done.returncode == 0, done.stderr
        seen = askers.verified
        lab.until("quotes again", lambda: askers.verified > seen, 60)
        lab.until_attested(count=2)
    assert askers.wrong == []
    assert enrolled(lab) == keys
    assert (alarms(lab), tracebacks(lab)) == ([], [])


def started(lab: RunningLab, *arguments: str) -> subprocess.Popen[str]:
    """A command that runs while the test goes on."""
    return subprocess.Popen(
        [sys.executable, "-m", "harness", *arguments, "--lab", str(lab.folder / "lab.yml")],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("service", ["carol-registrar", "provider-verifier", "host1-agent"])
def test_an_enrolment_that_is_stopped_in_the_middle(lab: RunningLab, service: str) -> None:
    """The command ends with its result or one sentence; repeated, it pins the same keys as ever."""
    [host] = lab.json("tenant", "host", "list", "--tenant", "carol")
    keys = {name: host[name] for name in ("host_id", "ek", "ak", "ca")}
    for moment_s in MOMENTS_S:
        reason = ("--tenant", "carol", "--reason", "it is enrolled anew")
        assert lab.run("tenant", "host", "remove", host["host_id"], *reason).returncode == 0
        pid = lab.pid(service)
        assert pid is not None
        with started(lab, "tenant", "host", "add", "--tenant", "carol") as adding:
            time.sleep(moment_s)  # other moments of an enrolment
            os.kill(pid, signal.SIGTERM)
            _, said = adding.communicate(timeout=480)
        assert adding.returncode in {0, 1, 2}, said
        assert "Traceback" not in said
        assert adding.returncode == 0 or "harness: " in said
        again = lab.run("tenant", "host", "add", "--tenant", "carol")
        assert again.returncode == 0, again.stderr
        [found] = lab.json("tenant", "host", "list", "--tenant", "carol")
        assert {name: found[name] for name in keys} == keys
    lab.until_attested(count=2)
    assert tracebacks(lab) == []


def test_a_registration_that_is_stopped_in_the_middle(lab: RunningLab) -> None:
    """A guest that cannot reach its registrar goes on by itself; a second `up` finds it registered and attests it."""
    keys, pid = enrolled(lab), lab.pid("bob-registrar")
    assert pid is not None
    known = set(lab.state.glob("h/*/guests/*/domain.json"))
    lab.write(WITH_ANOTHER)
    with started(lab, "lab", "up") as up:
        lab.until("the guest", lambda: set(lab.state.glob("h/*/guests/*/domain.json")) - known, 60)
        os.kill(pid, signal.SIGTERM)
        _, said = up.communicate(timeout=240)
    assert (up.returncode in {0, 1}, "Traceback" in said) == (True, False), said
    lab.up()
    lab.until_attested(count=3)
    after = enrolled(lab)
    assert {name: after[name] for name in keys} == keys
    assert (alarms(lab), tracebacks(lab)) == ([], [])
