"""Hosts and guests of a whole lab: power that goes, guests that restart or are copied, ports that others want."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import socket
import uuid
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from harness.config import SiteSettings, load
from harness.errors import LocalRefusal
from harness.unix_client import ask
from tests.support.lab_faults import Eye, alarms, enrolled, tracebacks
from tests.support.processes import left_by
from tests.support.running_lab import RunningLab, running_lab

pytestmark = [pytest.mark.needs_swtpm, pytest.mark.timeout(900)]

BACK_S = 240.0


@pytest.fixture(scope="module")
def lab() -> Iterator[RunningLab]:
    """A lab that is up; every test leaves it attested."""
    with running_lab() as running:
        yield running
    assert left_by(running.state) == {}


def guest(lab: RunningLab, name: str) -> str:
    """Id of a guest."""
    tenants = load(lab.state / "site.yml", SiteSettings).tenants.values()
    return next(str(tenant.guests[name]) for tenant in tenants if name in tenant.guests)


def runs(lab: RunningLab, *arguments: str) -> None:
    """A command that must do what it says."""
    done = lab.run(*arguments)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("options", [[], ["--unorderly"]], ids=["orderly", "cut"])
def test_a_power_cycle_of_a_whole_host(lab: RunningLab, options: list[str]) -> None:
    """Everything on it ends and comes back; a TPM whose clock is not safe yet is waited for; the reboot is reported."""
    before, keys, known = lab.pids(), enrolled(lab), len(alarms(lab))
    with Eye(lab):
        runs(lab, "lab", "power-cycle", "host1", *options)
        lab.until_attested(BACK_S, count=3)
    assert {name for name, pid in lab.pids().items() if pid != before[name]} >= {"host1-agent", "host1-guests"}
    assert enrolled(lab) == keys
    assert {kind for kind, _ in alarms(lab)[known:]} <= {"HostRebooted", "GuestRebooted"}
    assert tracebacks(lab) == []


def test_a_guest_that_restarts_disturbs_no_other(lab: RunningLab) -> None:
    """It is away, not attested any more, and then attested again with the same keys; the others do not notice."""
    keys, away = enrolled(lab), guest(lab, "alice-vm1")
    with Eye(lab) as eye:
        runs(lab, "provider", "guest", "stop", away)
        lab.until("not attested", lambda: not lab.guests()[away]["attested"], 30)
        runs(lab, "provider", "guest", "start", away)
        lab.until_attested(BACK_S, count=3)
    others = [guest(lab, name) for name in ("alice-vm2", "bob-vm1")]
    assert [other for other in others if eye.saw(other, lambda look: not look.attested)] == []
    assert (enrolled(lab), tracebacks(lab)) == (keys, [])


def test_a_copied_guest_does_not_run(lab: RunningLab) -> None:
    """A second domain with the state of another one's vTPM is refused by its host; the first one stays attested."""
    keys, original, copy = enrolled(lab), guest(lab, "alice-vm1"), str(uuid.uuid4())
    host = load(lab.state / "site.yml", SiteSettings).hosts["host1"]

    def manager(op: str, **members: object) -> dict[str, object]:
        return asyncio.run(ask(host.guest_manager, {"op": op, "uuid": copy, **members}, deadline_s=60))

    with Eye(lab) as eye:
        manager("define", name="copy", scenario="guest-good")
        shutil.copytree(host.guests / original / "tpm", host.guests / copy / "tpm", dirs_exist_ok=True)
        with pytest.raises(LocalRefusal, match=original):
            manager("start")
        lab.until_attested(BACK_S, count=3)
        manager("undefine")
    assert not eye.saw(original, lambda look: not look.attested)
    assert (enrolled(lab), tracebacks(lab)) == (keys, [])


def test_nobody_takes_the_port_of_a_service_that_is_away(lab: RunningLab) -> None:
    """The supervisor holds it while the service is being started again; a client that comes meanwhile is served."""
    services = {service["name"]: service for service in lab.json("lab", "status")["services"]}
    address = urlsplit(services["provider-verifier"]["url"])
    lab.kill("provider-verifier")
    tries = []
    while True:
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tries.append(other.connect_ex((str(address.hostname), int(address.port or 0))))
        with socket.socket() as other, contextlib.suppress(OSError):
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind((str(address.hostname), int(address.port or 0)))
            pytest.fail("somebody else got the port")
        if lab.pid("provider-verifier") not in (None, services["provider-verifier"]["pid"]):
            break
    assert set(tries) == {0}
    lab.until_attested(count=3)


def test_another_program_on_the_port_of_a_guest_agent(lab: RunningLab) -> None:
    """The agent says which port and tries again; when it is free the guest is attested again, without any command."""
    keys, away = enrolled(lab), guest(lab, "bob-vm1")
    port = json.loads((lab.state / "lab.json").read_text())["ports"]["agent-bob-vm1"]
    with Eye(lab) as eye:
        runs(lab, "provider", "guest", "stop", away)
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind(("127.0.0.1", port))
            other.listen()
            said = lab.run("provider", "guest", "start", away)
            assert "Traceback" not in said.stderr
            logs = list((lab.state / "log").glob("*.log"))
            refused = f"port {port}: Address already in use"
            lab.until("said so", lambda: any(refused in log.read_text() for log in logs), 60)
            lab.until("not attested", lambda: not lab.guests()[away]["attested"], 30)
        lab.until_attested(BACK_S, count=3)
    assert not eye.saw(guest(lab, "alice-vm1"), lambda look: not look.attested)
    assert (enrolled(lab), tracebacks(lab)) == (keys, [])
