"""`harness lab` as a person uses it: up, status, changes of lab.yml, down, and up with everything still there."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.lab_folder import short_name
from tests.support import design_client
from tests.support.processes import left_by, processes_of
from tests.support.running_lab import TOPOLOGY, RunningLab, running_lab

pytestmark = [pytest.mark.needs_swtpm, pytest.mark.timeout(900)]

OTHER_SETTINGS = """\
hosts: {host1: {chip: swtpm}}
tenants:
  alice: {quote_interval_s: 1, payload: secret, guests: {alice-vm1: , alice-vm2: }}
  bob:
    quote_interval_s: 2
    allow_reboots: false
    allowlist: {sha256: [0, 1, 2, 3, 4, 5, 6, 7, 14]}
    guests: {bob-vm1: }
"""
WITH_CAROL = """\
hosts: {host1: {chip: swtpm}}
tenants:
  alice: {quote_interval_s: 1, payload: secret, guests: {alice-vm1: }}
  bob: {quote_interval_s: 1, guests: {bob-vm1: }}
  carol: {quote_interval_s: 1, allowlist: {sha256: [0, 1, 2, 3, 4, 5, 6, 7, 14]}, guests: {carol-vm1: }}
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[RunningLab]:
    """A lab that is up; tests leave it so."""
    with running_lab() as running:
        yield running


def test_a_second_up_changes_nothing(lab: RunningLab) -> None:
    """The same processes go on, nobody enrols again, and the answer says so."""
    before = lab.pids(), lab.pinned()
    shown = lab.up()
    assert not shown["changed"]
    assert (lab.pids(), lab.pinned()) == before


def test_the_status_has_exactly_the_documented_members(lab: RunningLab) -> None:
    """Any other client finds what it needs, with absolute paths."""
    shown = lab.json("lab", "status")
    assert set(shown) == {"services", "tenants", "hosts"}
    assert {frozenset(service) for service in shown["services"]} == {frozenset({"name", "pid", "url", "state_dir"})}
    assert {frozenset(host) for host in shown["hosts"]} == {frozenset({"host_id", "tpm_socket", "chip"})}
    assert {frozenset(tenant) for tenant in shown["tenants"]} == {
        frozenset(
            {"name", "client_cert", "client_key", "ca", "provider_verifier", "host_id", "guests"},
        )
    }
    assert [(tenant["name"], len(tenant["guests"])) for tenant in shown["tenants"]] == [("alice", 2), ("bob", 1)]
    paths = [tenant[name] for tenant in shown["tenants"] for name in ("client_cert", "client_key", "ca")]
    paths += [service["state_dir"] for service in shown["services"]] + [host["tpm_socket"] for host in shown["hosts"]]
    assert all(Path(path).is_absolute() and Path(path).exists() for path in paths)
    assert all(service["pid"] and Path(f"/proc/{service['pid']}").exists() for service in shown["services"])


def test_a_client_written_from_the_design_gets_and_verifies_a_quote(lab: RunningLab) -> None:
    """``status --json`` and docs/design.md are enough; the client imports nothing of the harness."""
    status = lab.run("lab", "status", "--json").stdout
    command = [sys.executable, "-I", str(Path(design_client.__file__))]
    done = subprocess.run(command, input=status, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["verified"] is True
    assert "harness" not in [line.split()[1] for line in _imports(Path(design_client.__file__))]


def test_a_quote_for_another_tenant_does_not_verify(lab: RunningLab) -> None:
    """The test's own client can refuse: bob's certificate in the leaf does not fit a quote that alice asked for."""
    alice, bob = lab.json("lab", "status")["tenants"]
    assert design_client.quote(alice)["verified"] is True
    asked_by = design_client.requester_of
    try:
        design_client.requester_of = lambda certificate: asked_by(bob["client_cert"])
        with pytest.raises(design_client.Refused, match="check 5"):
            design_client.quote(alice)
    finally:
        design_client.requester_of = asked_by


def test_a_second_supervisor_is_refused(lab: RunningLab) -> None:
    """The folder's lock keeps it out with one sentence, and the lab goes on."""
    before = lab.pids()
    command = [sys.executable, "-m", "harness.lab_supervisor", str(lab.state), str(lab.folder / "lab.yml")]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 2
    assert "another supervisor runs the lab" in json.loads(done.stdout)["detail"]
    assert lab.pids() == before


def test_a_restart_on_request(lab: RunningLab) -> None:
    """The command returns with the new process; an unknown service is refused by name."""
    before = lab.pid("alice-verifier")
    done = lab.run("lab", "restart", "alice-verifier")
    assert (done.returncode, lab.pid("alice-verifier") == before) == (0, False), done.stderr
    assert str(lab.pid("alice-verifier")) in done.stdout
    refused = lab.run("lab", "restart", "nosuch")
    assert (refused.returncode, "no service nosuch" in refused.stderr) == (2, True), refused.stderr


def test_the_logs_are_shown_in_order(lab: RunningLab) -> None:
    """All processes together, oldest first; one alone; events as they are; an unknown one is refused."""
    events = [json.loads(line) for line in lab.run("lab", "logs", "--json", "-n", "1000").stdout.splitlines()]
    order = [event["event"] for event in events if event.get("name", "host1-agent") == "host1-agent"]
    assert order.index("service_started") < order.index("announced")  # from two logs
    assert {"ready", "service_started"} <= {event["event"] for event in events}
    alone = lab.run("lab", "logs", "host1-agent").stdout.splitlines()
    assert alone
    assert all("host1-agent" in line for line in alone)
    assert lab.run("lab", "logs", "nosuch").returncode == 2


def test_the_topology_is_followed_while_the_lab_runs(lab: RunningLab) -> None:
    """A tenant and its guest come, a guest goes, the others are not disturbed; and back again."""
    before, kept = lab.pids(), {guest for guest, row in lab.guests().items() if row["tenant"] == "bob"}
    lab.write(WITH_CAROL)
    shown = lab.up()
    assert (shown["changed"], shown["removed"]) == (True, ["guest alice-vm2"])
    assert {guest["name"] for guest in shown["guests"]} == {"alice-vm1", "bob-vm1", "carol-vm1"}
    after = lab.pids()
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {"carol-registrar", "carol-verifier"}
    lab.write(TOPOLOGY)
    again = lab.up()
    assert set(again["removed"]) == {"guest carol-vm1", "tenant carol"}
    assert lab.pids().keys() == before.keys()
    assert kept == {guest for guest, row in lab.guests().items() if row["tenant"] == "bob"}


def test_changed_settings_are_brought_into_force(lab: RunningLab) -> None:
    """How guests are attested and what a tenant may see follow lab.yml; who is not concerned is not disturbed."""
    before, alice = lab.pids(), lab.attestations()["alice-vm1"]["attestation_count"]
    lab.write(OTHER_SETTINGS)
    assert lab.up()["changed"]
    views = lab.attestations()
    assert (views["bob-vm1"]["allow_reboots"], views["bob-vm1"]["quote_interval_s"]) == (False, 2.0)
    assert (views["alice-vm1"]["allow_reboots"], views["alice-vm1"]["attestation_count"] >= alice) == (True, True)
    tenants = json.loads(lab.run("provider", "tenant", "list", "--json").stdout)
    seen = {row["name"]: row for row in tenants}
    assert "15" not in json.dumps(seen["bob"])
    assert not lab.up()["changed"]
    lab.write(TOPOLOGY)
    shown = lab.up()
    assert (shown["changed"], sorted(shown["remarks"])) == (
        True,
        ["tenant bob: another allowlist is in force", "tenant bob: its guests are attested as it says now"],
    )
    assert lab.attestations()["bob-vm1"]["allow_reboots"]
    assert lab.pids() == before


def test_a_guest_with_a_stated_uuid_comes_and_goes(lab: RunningLab) -> None:
    """It has that UUID; with another one it is another guest; when it is gone its tenant can go too."""
    first, second = "6f1d2c3b-4a59-4e6f-8a7b-0c1d2e3f4a5b", "6f1d2c3b-4a59-4e6f-8a7b-0c1d2e3f4a5c"
    for stated in (first, second):
        lab.write(TOPOLOGY + f"  carol: {{quote_interval_s: 1, guests: {{carol-vm1: {{agent_id: {stated}}}}}}}\n")
        lab.up()
        assert lab.json("lab", "status")["tenants"][-1]["guests"] == [stated]
    lab.write(TOPOLOGY)
    assert set(lab.up()["removed"]) == {"guest carol-vm1", "tenant carol"}


def test_what_a_guest_boots_is_not_changed_behind_its_back(lab: RunningLab) -> None:
    """A vTPM is not thrown away for a word in a file: the sentence says what to do instead."""
    lab.write(TOPOLOGY.replace("bob-vm1: ", "bob-vm1: {scenario: guest-tampered-kernel}"))
    done = lab.run("lab", "up")
    lab.write(TOPOLOGY)
    assert (done.returncode, "made anew: remove it" in done.stderr) == (2, True), done.stderr


def test_an_unusable_topology_changes_nothing(lab: RunningLab) -> None:
    """File and key are named, the exit code is 2, and the lab goes on."""
    before = lab.pids()
    lab.write("hosts: {host1: {chip: abacus}}\n")
    done = lab.run("lab", "up")
    lab.write(TOPOLOGY)
    assert (done.returncode, lab.pids()) == (2, before)
    assert f"{lab.folder}/lab.yml: hosts.host1.chip: " in done.stderr
    assert "Traceback" not in done.stderr


def test_state_survives_down_and_up(lab: RunningLab) -> None:
    """Down leaves no process, no socket and no lock; up goes on with the same keys and without a new enrolment."""
    before, rows = lab.pinned(), lab.guests()
    assert lab.run("lab", "down").returncode == 0
    assert left_by(lab.state) == {}
    assert [path for path in lab.state.rglob("*") if path.is_socket()] == []
    down = lab.run("lab", "status", "--json")
    assert (down.returncode, down.stdout) == (1, "")
    assert "harness lab up" in down.stderr
    again = lab.run("lab", "down")
    assert (again.returncode, "was down already" in again.stdout) == (0, True)
    assert lab.up()["changed"]
    lab.until_attested(count=3)
    assert lab.pinned() == before
    assert all(lab.guests()[guest]["attestations"] > row["attestations"] for guest, row in rows.items())


def test_a_killed_supervisor_takes_everything_along(lab: RunningLab) -> None:
    """No service outlives it, the lab is down, and up brings everything back."""
    before = lab.pinned()
    supervisor = lab.supervisor()["pid"]
    os.kill(supervisor, signal.SIGKILL)
    assert left_by(lab.state) == {}
    assert lab.run("lab", "status").returncode == 1
    lab.up()
    lab.until_attested(count=3)
    assert lab.pinned() == before


def test_an_interrupted_up_is_completed_by_the_next_one() -> None:
    """Ctrl-C in the middle leaves a lab that the next up brings to its end."""
    with tempfile.TemporaryDirectory(prefix="hl") as name:
        lab = RunningLab(Path(name))
        command = [sys.executable, "-m", "harness", "lab", "up", "--lab", str(lab.folder / "lab.yml")]
        try:
            with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as up:
                lab.until("a guest", lambda: list(lab.state.glob("h/*/guests/*/domain.json")), 60)
                up.send_signal(signal.SIGINT)
                _, said = up.communicate(timeout=240)
            assert (up.returncode, "Traceback" in said) == (130, False), said
            lab.up()
        finally:
            lab.run("lab", "down")


def test_a_fresh_lab_has_other_keys_and_a_deep_folder_works() -> None:
    """In a folder whose path is too long for sockets; --fresh forgets everything, down removes the short name."""
    with tempfile.TemporaryDirectory(prefix="hl") as name:
        folder = Path(name) / ("d" * 70)
        folder.mkdir()
        lab = RunningLab(folder, "hosts: {h1: {chip: swtpm}, h2: {chip: swtpm, ak: ecc256}}\ntenants:\n  alice:\n    "
                                 "guests: {vm1: {host: h1}, vm2: {host: h2}}\n")  # fmt: skip
        try:
            lab.up()
            before = {host["host_id"] for host in lab.json("lab", "status")["hosts"]}
            assert len(before) == 2
            assert short_name(lab.state).readlink() == lab.state
            lab.up("--fresh")
            assert not before & {host["host_id"] for host in lab.json("lab", "status")["hosts"]}
        finally:
            lab.run("lab", "down")
        assert left_by(lab.state) == {}
        assert not short_name(lab.state).is_symlink()


def test_a_lab_whose_folder_is_removed_ends() -> None:
    """No command would reach it any more: the supervisor ends every process, and says so in nobody's way."""
    with tempfile.TemporaryDirectory(prefix="hl") as name:
        lab = RunningLab(Path(name), "hosts: {h: {chip: swtpm}}")
        lab.up()
        supervisor = lab.supervisor()["pid"]
        assert supervisor in processes_of(lab.state)
        shutil.rmtree(lab.state)
        assert left_by(lab.state) == {}
        lab.up()
        assert lab.run("lab", "down").returncode == 0


def test_a_port_that_is_taken_is_one_sentence() -> None:
    """Another program on a service's port: nothing is started, and the sentence names service and port."""
    with tempfile.TemporaryDirectory(prefix="hl") as name:
        lab = RunningLab(Path(name))
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            lab.state.mkdir()
            record = {"ports": {"alice-verifier": port}, "guests": {}, "hosts": {}}
            (lab.state / "lab.json").write_text(json.dumps(record))
            done = lab.run("lab", "up")
            assert done.returncode == 2
            assert f"port {port} of alice-verifier is taken by another program" in done.stderr
            assert left_by(lab.state) == {}


def test_a_folder_with_something_else_in_it_is_not_wiped() -> None:
    """--fresh removes a lab and never somebody's own file."""
    with tempfile.TemporaryDirectory(prefix="hl") as name:
        lab = RunningLab(Path(name))
        lab.state.mkdir()
        (lab.state / "thesis.tex").write_text("two years of work")
        done = lab.run("lab", "up", "--fresh")
        assert (done.returncode, "holds thesis.tex" in done.stderr) == (2, True), done.stderr
        assert (lab.state / "thesis.tex").read_text() == "two years of work"


def test_an_example_is_written_once(tmp_path: Path) -> None:
    """`lab init` writes a lab.yml that is one, and leaves one that is there alone."""
    command = [sys.executable, "-m", "harness", "lab", "init"]
    first = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert (first.returncode, (tmp_path / "lab.yml").read_text()[:7]) == (0, "# A lab"), first.stderr
    (tmp_path / "lab.yml").write_text("mine")
    second = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert (second.returncode, (tmp_path / "lab.yml").read_text()) == (2, "mine")
    assert "exists" in second.stderr


def _imports(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line.startswith(("import ", "from "))]
