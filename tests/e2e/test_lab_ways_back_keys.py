"""The ways back when keys are not those that were enrolled: lost, made anew, copied, foreign, or rolled back."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Iterator

import pytest

from harness.attacks import foreign_ca
from harness.config import GuestAgentSettings, TlsSettings, load
from harness.errors import CloneSuspected, UnacceptableKey
from harness.peer import PeerClient
from harness.provider.keys import AK_HANDLES, CA_HANDLE
from tests.support import forge
from tests.support.ways_back import WaysBack, raises, ways_back

pytestmark = [pytest.mark.needs_swtpm, pytest.mark.timeout(900)]

TOPOLOGY = """\
hosts: {host1: {chip: swtpm}}
tenants:
  alice: {quote_interval_s: 1, guests: {vm1: , vm2: }}
"""
UNRESTRICTED = forge.AK_ATTRIBUTES & ~0x00010000
ADMITTED_AS_BEFORE = ("--interval", "1", "--allow-reboots", "--tenant", "alice")


@pytest.fixture(scope="module")
def lab() -> Iterator[WaysBack]:
    """A lab with one tenant and two guests; tests leave both attested."""
    with ways_back(TOPOLOGY) as running:
        yield running


@raises("GuestNotHere", "KeyChanged")
def test_a_guest_whose_vtpm_was_made_anew(lab: WaysBack) -> None:
    """Released in the journal the guest gets no leaf (404, four times); its new vTPM is refused until re-enrolled."""
    since = time.time()
    lab.act("provider", "guest", "release", "vm1")
    lab.stopped("vm1", state="FAILED", error="GuestNotHere")
    lab.attested("vm2")
    lab.new_vtpm("vm1", "alice")
    lab.until("KeyChanged", lambda: "KeyChanged" in lab.alarms("alice"))
    told = lab.do("tenant", "alarms", "--tenant", "alice", code=1)
    assert "harness tenant guest re-enrol vm1" in told.stderr
    lab.act("tenant", "guest", "re-enrol", "vm1", "--tenant", "alice")
    lab.settled("GuestNotHere", "KeyChanged")
    assert lab.acts("alice", since) == {"guest-re-enrol", "agent-remove", "alarm-acknowledge"}
    assert lab.acts(None, since) == {"vtpm-release", "guest-remove"}


@raises("CertificateRefused", perhaps=("KeyChanged",))
def test_a_vtpm_that_another_ca_certified(lab: WaysBack) -> None:
    """The tenant refuses it while the host's tool is somebody else's; made by the host's own tool it is re-enrolled."""
    tool = lab.state / "h" / "host1" / "localca"
    honest = tool.read_text()
    interpreter = honest.splitlines()[1].split()[1]
    tool.write_text(f'#!/bin/sh\nexec {interpreter} {foreign_ca.__file__} "$@"\n')
    lab.act("provider", "guest", "release", "vm2")
    lab.new_vtpm("vm2", "alice")
    lab.until("CertificateRefused", lambda: "CertificateRefused" in lab.alarms("alice"))
    lab.see("vm2 not attested", lambda shown: not shown["vm2"]["attested"])
    tool.write_text(honest)
    lab.new_vtpm("vm2", "alice")
    lab.act("tenant", "guest", "re-enrol", "vm2", "--tenant", "alice")
    kinds = lab.alarms("alice")
    lab.settled(*kinds)
    assert "CertificateRefused" in kinds


@raises("CloneSuspected", "UnacceptableKey", perhaps=("HostRebooted", "KeyChanged"))
def test_a_guest_that_claims_another_guests_key(lab: WaysBack) -> None:
    """A copied vTPM does not start; another guest's AK, and one that is none, are refused; the guest itself is not."""
    vm1, vm2 = (lab.state / "h" / "host1" / "guests" / lab.ids[name] for name in ("vm1", "vm2"))
    keys = _registered(lab)
    lab.do("provider", "guest", "stop", "vm2")
    (vm2 / "tpm").rename(lab.folder / "own")
    shutil.copytree(vm1 / "tpm", vm2 / "tpm")
    refused = lab.run("provider", "guest", "start", "vm2")
    assert (refused.returncode != 0, "is certified for guest" in refused.stderr) == (True, True), refused.stderr
    lab.do("provider", "guest", "stop", "vm2")  # its start would be tried again
    shutil.rmtree(vm2 / "tpm")
    (lab.folder / "own").rename(vm2 / "tpm")

    lab.act("tenant", "guest", "remove", "vm2", "--tenant", "alice")
    stated = lab.run("tenant", "guest", "add", "vm2", "--wait", "1", *ADMITTED_AS_BEFORE)
    assert "has not registered within" in stated.stderr
    agent = load(vm2 / "image" / "agent.yml", GuestAgentSettings)
    mine, other = keys[lab.ids["vm2"]], keys[lab.ids["vm1"]]
    unrestricted = forge.ecc_key(attributes=UNRESTRICTED).marshalled
    for ak, error in ((other[2], CloneSuspected), (unrestricted, UnacceptableKey)):
        with pytest.raises(error):
            asyncio.run(_register(agent.tls, agent.registrars[0], lab.ids["vm2"], (mine[0], mine[1], ak)))
    assert {"CloneSuspected", "UnacceptableKey"} <= set(lab.alarms("alice"))
    assert "vm2 --reason" in lab.do("tenant", "alarms", "--tenant", "alice", code=1).stderr

    lab.act("tenant", "guest", "remove", "vm2", "--tenant", "alice")
    lab.do("provider", "guest", "start", "vm2")
    lab.do("tenant", "guest", "add", "vm2", *ADMITTED_AS_BEFORE)
    kinds = lab.alarms("alice")
    lab.settled(*kinds)


@raises("ClockWentBack", "HostRebooted", perhaps=("KeyChanged",))
def test_a_vtpm_whose_state_was_rolled_back(lab: WaysBack) -> None:
    """Equal counters with a lower clock stop the guest; with a new vTPM it begins anew."""
    state, snapshot = lab.state / "h" / "host1" / "guests" / lab.ids["vm1"] / "tpm", lab.folder / "snapshot"
    lab.do("provider", "guest", "stop", "vm1")
    shutil.copytree(state, snapshot)
    lab.do("provider", "guest", "start", "vm1")
    began = lab.guests()[lab.ids["vm1"]]["attestations"]
    lab.see("ten rounds", lambda shown: shown["vm1"]["attested"] and shown["vm1"]["attestations"] >= began + 10)
    lab.do("provider", "guest", "stop", "vm1")
    shutil.rmtree(state)
    snapshot.rename(state)
    lab.do("provider", "guest", "start", "vm1")
    lab.stopped("vm1", check=10, error="ClockWentBack")
    lab.advised("vm1", "alice", "harness tenant guest re-enrol vm1")
    lab.act("provider", "guest", "release", "vm1")
    lab.new_vtpm("vm1", "alice")
    lab.act("tenant", "guest", "re-enrol", "vm1", "--tenant", "alice")
    lab.settled(*lab.alarms("alice"))


@raises("QuoteSignatureInvalid", "KeyChanged", perhaps=("CertificateRefused",))
def test_a_host_whose_keys_were_lost(lab: WaysBack) -> None:
    """Made anew as the agent says, they are refused until the host is re-enrolled; then its guests' vTPMs follow.

    An agent that meets the new CA key with its old certificate is refused, if it asks before its vTPM is made anew.
    """
    (lab.state / "h" / "host1" / "agent" / "auth.json").unlink()
    lab.kill("host1-agent")
    lab.until("the way out", lambda: "tpm2_evictcontrol" in lab.run("lab", "logs", "host1-agent").stdout, 60)
    for handle in (AK_HANDLES["rsa2048"], CA_HANDLE):
        lab.until("a key removed", lambda handle=handle: _evicted(lab, handle))
    lab.do("lab", "restart", "host1-agent")
    lab.stopped("vm1", "vm2", check=6, error="QuoteSignatureInvalid")
    refused = lab.do("tenant", "host", "add", "--tenant", "alice", code=1)
    assert "other keys than those pinned" in refused.stderr
    told = lab.do("tenant", "alarms", "--tenant", "alice", code=1)
    host_id = lab.json("lab", "status")["hosts"][0]["host_id"]
    assert f"harness tenant host re-enrol {host_id}" in told.stderr
    lab.act("tenant", "host", "re-enrol", host_id, "--tenant", "alice")
    for guest in ("vm1", "vm2"):
        lab.act("provider", "guest", "release", guest)
        lab.new_vtpm(guest, "alice")
        lab.act("tenant", "guest", "re-enrol", guest, "--tenant", "alice")
    kinds = lab.alarms("alice")
    lab.settled(*kinds)
    assert {"QuoteSignatureInvalid", "KeyChanged"} <= set(kinds)


def _evicted(lab: WaysBack, handle: int) -> bool:
    """Removes a persistent key with tpm2-tools; an agent that starts over may have the TPM just then."""
    device = f"swtpm:path={lab.state / 'h' / 'host1' / 't'}"
    command = ["tpm2_evictcontrol", "-Q", "-T", device, "-c", f"{handle:#x}"]
    done = subprocess.run(command, check=False, timeout=240, stdin=subprocess.DEVNULL, capture_output=True)
    return done.returncode == 0


Keys = tuple[bytes, bytes, bytes]


def _registered(lab: WaysBack) -> dict[str, Keys]:
    """EK, its certificate and AK of each guest, as a guest knows its own."""
    with contextlib.closing(sqlite3.connect(lab.state / "t" / "alice" / "registrar.db", timeout=30)) as database:
        rows = database.execute("SELECT agent_id, ek, ek_certificate, ak FROM guests").fetchall()
    return {agent_id: (ek, certificate, ak) for agent_id, ek, certificate, ak in rows}


async def _register(tls: TlsSettings, registrar: str, agent_id: str, keys: Keys) -> None:
    """What a guest's owner can send in place of its agent."""
    names = ("ek_tpm", "ekcert", "aik_tpm")
    body = {name: base64.b64encode(key).decode() for name, key in zip(names, keys, strict=True)}
    own = {"mtls_cert": tls.certificate.read_text(), "ip": "127.0.0.1", "port": 9}
    async with PeerClient(tls, registrar) as peer:
        await peer.post(f"/v2.1/agents/{agent_id}", {**body, **own})
