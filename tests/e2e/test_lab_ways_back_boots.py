"""The operators' ways back from other kernels, reboots and power cuts, of host and guest, typed in a real lab."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
import time
from collections.abc import Callable, Iterator

import pytest

from harness.config import SiteSettings, load
from harness.peer import PeerClient
from tests.support.ways_back import WHY, WaysBack, raises, ways_back

pytestmark = [pytest.mark.needs_swtpm, pytest.mark.timeout(900)]

TOPOLOGY = """\
hosts: {host1: {chip: swtpm}}
tenants:
  alice: {quote_interval_s: 1, allow_reboots: false, guests: {vm1: {scenario: vm1.yml}}}
  bob: {quote_interval_s: 1, guests: {vm2: }}
"""
_CUTS = 20
INSTALLED = "description: as installed\nbased_on: guest-good\n"
UPDATED = INSTALLED + 'replace: [{label: kernel, text: "guest kernel 6.1.0-2"}]\n'


@pytest.fixture(scope="module")
def lab() -> Iterator[WaysBack]:
    """A lab whose tenant alice allows no reboots and whose tenant bob does; tests leave all guests attested."""
    with ways_back(TOPOLOGY, {"vm1.yml": INSTALLED}) as running:
        yield running


def _set(lab: WaysBack, tenant: str, layer: str, policy: str) -> None:
    """New reference values for all guests of a tenant, which go on with them."""
    lab.act("tenant", "policy", "set", "--all", f"--{layer}-policy", policy, "--resume", "--tenant", tenant)


def _accept_reboot(lab: WaysBack) -> None:
    """Alice's guest has stopped at a reboot; her operator knows of it."""
    lab.stopped("vm1", check=10, error="HostRebooted")
    lab.act("tenant", "guest", "resume", "vm1", "--accept-reboot", "--tenant", "alice")


@raises("ReferenceValueMismatch", "HostRebooted")
def test_a_host_that_boots_another_kernel(lab: WaysBack) -> None:
    """Check 9 stops both tenants; captured values are set for all guests; the reboot is accepted where it has to be."""
    since = time.time()
    lab.of_host({"op": "power_cycle", "scenario": "updated-kernel"})
    lab.stopped("vm1", "vm2", check=9, error="ReferenceValueMismatch")
    lab.advised("vm1", "alice", "harness tenant policy show vm1")
    for tenant, guest in (("alice", "vm1"), ("bob", "vm2")):
        lab.do("tenant", "policy", "show", guest, "--layer", "host", "--tenant", tenant, code=1)
        lab.do("tenant", "policy", "capture", guest, "--layer", "host", "--out", f"{tenant}.json", "--tenant", tenant)
        _set(lab, tenant, "host", f"{tenant}.json")
    _accept_reboot(lab)
    lab.settled("ReferenceValueMismatch", "HostRebooted")
    assert lab.acts("alice", since) == {"policy-set", "resume", "alarm-acknowledge"}


@raises("ReferenceValueMismatch", "HostRebooted")
def test_a_host_that_boots_its_old_kernel_again(lab: WaysBack) -> None:
    """The way back is the same one: the values that were captured do not hold any more, the lab's own ones do."""
    lab.of_host({"op": "power_cycle", "scenario": "good"})
    lab.stopped("vm1", "vm2", check=9, error="ReferenceValueMismatch")
    for tenant in ("alice", "bob"):
        _set(lab, tenant, "host", f".lab/t/{tenant}/host-policy.json")
    _accept_reboot(lab)
    lab.settled("ReferenceValueMismatch", "HostRebooted")


@raises("ReferenceValueMismatch", "HostRebooted")
def test_a_guest_that_boots_another_kernel(lab: WaysBack) -> None:
    """Only this guest stops; its layer's values are captured and set, there and back; its reboots are accepted."""
    (lab.folder / "vm1.yml").write_text(UPDATED)
    _restart(lab, "vm1")
    lab.stopped("vm1", check=9, error="ReferenceValueMismatch")
    lab.attested("vm2")
    lab.do("tenant", "policy", "capture", "vm1", "--layer", "guest", "--out", "vm1.json", "--tenant", "alice")
    _set(lab, "alice", "guest", "vm1.json")
    _accept_reboot(lab)
    lab.attested("vm1")
    (lab.folder / "vm1.yml").write_text(INSTALLED)
    _restart(lab, "vm1")
    lab.stopped("vm1", check=9, error="ReferenceValueMismatch")
    _set(lab, "alice", "guest", ".lab/t/alice/guest-policy.json")
    _accept_reboot(lab)
    lab.settled("ReferenceValueMismatch", "HostRebooted")


@raises("HostRebooted")
def test_a_host_that_reboots(lab: WaysBack) -> None:
    """Alice's guest stops at check 10 and stays so after a plain resume; bob's goes on by itself, with an alarm."""
    lab.of_host({"op": "power_cycle"})
    lab.stopped("vm1", check=10, error="HostRebooted")
    lab.attested("vm2")
    lab.advised("vm1", "alice", "harness tenant guest resume vm1 --accept-reboot")
    since = time.time()
    lab.act("tenant", "guest", "resume", "vm1", "--tenant", "alice")
    lab.until("a verdict after the resume", lambda: lab.verdicts("vm1", "alice")[-1]["at"] > since)
    _accept_reboot(lab)
    lab.settled("HostRebooted")
    lab.act("tenant", "guest", "resume", "vm1", "--accept-reboot", "--tenant", "alice", code=1)


@raises("HostRebooted")
def test_a_guest_that_reboots(lab: WaysBack) -> None:
    """The same one layer higher: both guests are restarted, only alice's waits for its operator."""
    for guest in ("vm1", "vm2"):
        _restart(lab, guest)
    _accept_reboot(lab)
    lab.settled("HostRebooted")


def _power_cut(lab: WaysBack, seen: Callable[[], bool]) -> None:
    """Cuts the power until something is seen of it: an unsafe clock may be safe again before anybody has asked."""
    for _ in range(_CUTS):
        since = time.time()
        lab.of_host({"op": "power_cycle", "orderly": False})
        lab.until("bob's guest as it is after the cut", lambda since=since: seen() or _attested_since(lab, since))
        if seen():
            return
        _accept_reboot(lab)
        lab.attested()
    raise AssertionError(f"not seen after {_CUTS} power cuts\n{lab.tail()}")


def _attested_since(lab: WaysBack, since: float) -> bool:
    verdicts = lab.verdicts("vm2", "bob")
    reboot = [verdict["at"] for verdict in verdicts if verdict["error"] == "HostRebooted" and verdict["at"] > since]
    return bool(reboot) and any(verdict["accepted"] and verdict["at"] > reboot[0] for verdict in verdicts)


@raises("HostRebooted")
def test_a_power_cut(lab: WaysBack) -> None:
    """The clock is not safe for a while: that is tried again until it is, and no operator is needed for it."""
    _power_cut(lab, lambda: "ClockNotSafe" in lab.errors("vm2", "bob"))
    _accept_reboot(lab)
    lab.settled("HostRebooted")


@raises("ClockNotSafe", "HostRebooted")
def test_a_clock_that_is_not_safe_for_longer_than_the_order_allows(lab: WaysBack) -> None:
    """The session fails with the finding; once the clock is safe a plain resume is enough."""
    asyncio.run(_order_again(lab, "bob", "vm2", clock_unsafe_limit_s=0.1))
    lab.attested("vm2")
    _power_cut(lab, lambda: lab.guests()[lab.ids["vm2"]]["state"] == "FAILED")
    lab.stopped("vm2", state="FAILED", check=10, error="ClockNotSafe")
    lab.advised("vm2", "bob", "once it is safe again: `harness tenant guest resume vm2")
    _accept_reboot(lab)
    lab.resumed("vm2", "bob")
    lab.settled("ClockNotSafe", "HostRebooted")


async def _order_again(lab: WaysBack, tenant: str, guest: str, **changes: object) -> None:
    """What a tenant does over the REST API where the command line has no option: the same order with a change."""
    with contextlib.closing(sqlite3.connect(lab.state / "t" / tenant / "verifier.db", timeout=30)) as database:
        (text,) = database.execute("SELECT request FROM agents WHERE agent_id = ?", (lab.ids[guest],)).fetchone()
    site = load(lab.state / "site.yml", SiteSettings).tenants[tenant]
    path = f"/v2.1/agents/{lab.ids[guest]}"
    async with PeerClient(site.operator, site.verifier) as verifier:
        await verifier.delete(path)
        await verifier.post(path, {**json.loads(text), **changes})


def _restart(lab: WaysBack, guest: str) -> None:
    lab.do("provider", "guest", "stop", guest)
    lab.do("provider", "guest", "start", guest)


def test_the_trails_say_who_and_why(lab: WaysBack) -> None:
    """Each act of these tests is in the trail of its tenant, by its operator, with the reason that was typed."""
    for tenant in ("alice", "bob"):
        entries = [entry for entry in lab.trail(tenant) if entry["action"] in {"policy-set", "resume"}]
        assert {(entry["who"], entry["reason"]) for entry in entries} == {(f"{tenant}/tenant-operator/operator", WHY)}
