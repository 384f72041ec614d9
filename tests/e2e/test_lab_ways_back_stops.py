"""Sessions that failed, each for a real cause, and the commands with which they go on; a receiver is told."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.support.ways_back import WHY, WaysBack, raises, ways_back

pytestmark = [pytest.mark.needs_swtpm, pytest.mark.timeout(900)]

PATIENCE_S = 3.0
TOPOLOGY = """\
hosts: {host1: {chip: swtpm}}
tenants:
  alice: {quote_interval_s: 1, guests: {vm1: }}
  bob: {quote_interval_s: 1, guests: {vm2: }}
"""


class Receiver(http.server.ThreadingHTTPServer):
    """Keeps the alarms that it is told."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.told: list[dict[str, Any]] = []


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Receiver)
        self.server.told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing is logged."""


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    """A receiver of alice's alarms."""
    with Receiver() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join(10)


@pytest.fixture(scope="module")
def lab(receiver: Receiver) -> Iterator[WaysBack]:
    """A lab whose tenant alice has little patience and a receiver; tests leave all guests attested."""
    with ways_back(TOPOLOGY) as running:
        settings = running.state / "t" / "alice" / "verifier.yml"
        changed = yaml.safe_load(settings.read_text())
        changed["transport_patience_s"] = PATIENCE_S
        changed["notify"] = [{"url": f"http://127.0.0.1:{receiver.server_port}/alarms"}]
        settings.write_text(yaml.safe_dump(changed))
        running.do("lab", "restart", "alice-verifier")
        running.attested()
        yield running


@raises("SelectionNotAllowed")
def test_an_allowlist_that_was_taken_away(lab: WaysBack) -> None:
    """403 fails the session at once; a wider allowlist and a resume bring the guest back; the other tenant goes on."""
    since = time.time()
    lab.act("provider", "tenant", "allow", "alice", "--pcrs", "0-3")
    lab.stopped("vm1", state="FAILED", error="SelectionNotAllowed")
    lab.attested("vm2")
    lab.advised("vm1", "alice", "harness tenant guest resume vm1")
    lab.act("provider", "tenant", "allow", "alice", "--pcrs", "0-15")
    lab.resumed("vm1", "alice")
    lab.settled("SelectionNotAllowed")
    assert lab.acts(None, since) == {"allowlist-set"}


@raises("PeerUnreachable", "HostRebooted")
def test_a_guest_that_is_away_for_longer_than_the_patience(lab: WaysBack) -> None:
    """Its session fails when the verifier's patience is over, and goes on after start and resume."""
    lab.do("provider", "guest", "stop", "vm1")
    lab.stopped("vm1", state="FAILED", error="PeerUnreachable")
    lab.attested("vm2")
    lab.do("provider", "guest", "start", "vm1")
    lab.resumed("vm1", "alice")
    lab.settled("PeerUnreachable", "HostRebooted")


@raises("PeerUnreachable")
def test_a_host_whose_agent_is_away_for_longer_than_the_patience(lab: WaysBack) -> None:
    """The agent does not start without its authValues; with the file from the backup it does, and the guest goes on."""
    file, backup = lab.state / "h" / "host1" / "agent" / "auth.json", lab.folder / "auth.json"
    file.rename(backup)
    lab.kill("host1-agent")
    lab.stopped("vm1", state="FAILED", error="PeerUnreachable")
    assert "restore that file from a backup" in lab.do("lab", "logs", "host1-agent").stdout
    backup.rename(file)
    lab.do("lab", "restart", "host1-agent")
    lab.attested("vm2")
    lab.resumed("vm1", "alice")
    lab.settled("PeerUnreachable")


def test_the_receiver_was_told_each_alarm_once(lab: WaysBack, receiver: Receiver) -> None:
    """What it got is what the operator's list has: the same alarms, each once, in the same order."""
    listed = json.loads(lab.do("tenant", "alarms", "--all", "--tenant", "alice", "--json").stdout)
    kept = [(int(alarm["id"][1:]), alarm["kind"], alarm["agent_id"]) for alarm in listed if alarm["id"][0] == "v"]
    assert kept
    lab.until("all alarms told", lambda: len(receiver.told) >= len(kept))
    assert [(one["id"], one["kind"], one["agent_id"]) for one in receiver.told] == kept
    assert {(alarm["acknowledged_by"], alarm["reason"]) for alarm in listed} == {
        ("alice/tenant-operator/operator", WHY),
    }
