"""Certificates of a running lab expire: refused in one sentence, renewed through the file, and nothing is restarted."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness.config import SiteSettings, load
from harness.pki import Authority, load_certificate, load_key, now
from harness.tls import certificate_requester, role_and_name
from tests.support.lab_faults import Eye, alarms, enrolled, tracebacks
from tests.support.processes import left_by
from tests.support.running_lab import RunningLab, running_lab

pytestmark = [pytest.mark.needs_swtpm, pytest.mark.timeout(900)]

SHORT_S = 20.0
"""Long enough for all connections to be made anew with it."""


@pytest.fixture(scope="module")
def lab() -> Iterator[RunningLab]:
    """A lab that is up; every test leaves it attested with certificates of a year."""
    with running_lab() as running:
        yield running
    assert left_by(running.state) == {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Party:
    """Whose certificate expires.

    Args:
        authority: that signed it.
        pattern: of its file, below the lab's folder.
        again: service that is restarted, so that the connections are made with the short certificate.
        hurt: tenants whose guests are not attested meanwhile.
    """

    authority: str
    pattern: str
    again: str
    hurt: frozenset[str]

    def path(self, lab: RunningLab) -> Path:
        """Its file; for a guest agent that of alice's first."""
        if "{guest}" not in self.pattern:
            return lab.state / self.pattern
        guest = load(lab.state / "site.yml", SiteSettings).tenants["alice"].guests["alice-vm1"]
        return lab.state / self.pattern.format(guest=guest)


ALICE, BOTH = frozenset({"alice"}), frozenset({"alice", "bob"})
PARTIES = {
    "tenant verifier": Party(
        authority="alice", pattern="pki/alice/tenant-verifier-alice.pem", again="alice-verifier", hurt=ALICE
    ),
    "provider verifier": Party(
        authority="provider",
        pattern="pki/provider/provider-verifier-verifier.pem",
        again="provider-verifier",
        hurt=BOTH,
    ),
    "host agent": Party(
        authority="provider", pattern="pki/provider/host-agent-host1.pem", again="host1-agent", hurt=BOTH
    ),
    "guest agent": Party(
        authority="alice", pattern="h/host1/guests/{guest}/image/agent.pem", again="alice-verifier", hurt=ALICE
    ),
}


def reissue(lab: RunningLab, party: Party, days: float) -> bytes:
    """Puts a certificate in the file's place, on the same key; returns its requester."""
    path = party.path(lab)
    role, name = role_and_name(load_certificate(path))
    issued = Authority.load(lab.state / "pki" / party.authority).issue(
        role, name, key=load_key(path.with_suffix(".key")), days=days
    )
    half = path.with_suffix(".half")
    issued.write(half.parent, half.name)
    (half.parent / f"{half.name}.pem").replace(path)
    (half.parent / f"{half.name}.key").unlink()
    return certificate_requester(issued.certificate)


def until_expired(party: Party, lab: RunningLab) -> None:
    """Waits until the certificate in the file has expired."""
    while now() <= load_certificate(party.path(lab)).not_valid_after_utc:
        time.sleep(0.1)


@pytest.mark.parametrize("who", PARTIES)
def test_an_expired_certificate_is_renewed_without_a_restart(lab: RunningLab, who: str) -> None:
    """Whoever depends on it says that it has expired, the others go on; the renewed file brings all back."""
    party, keys = PARTIES[who], enrolled(lab)
    requester = certificate_requester(load_certificate(party.path(lab)))
    hurt = {agent_id for agent_id, row in lab.guests().items() if row["tenant"] in party.hurt}
    if who == "guest agent":
        hurt = {str(party.path(lab).parent.parent.name)}
    with Eye(lab) as eye:
        assert reissue(lab, party, SHORT_S / 86400) == requester
        assert lab.run("lab", "restart", party.again).returncode == 0
        before = lab.pids()
        until_expired(party, lab)
        since = time.time()
        lab.until("refused for it", lambda: all(sees_expiry(lab, agent_id) for agent_id in hurt), 60)
        others = set(keys) & lab.guests().keys() - hurt
        assert [agent_id for agent_id in others if eye.saw(agent_id, lambda look: not look.attested, since)] == []
        assert reissue(lab, party, 365) == requester
        lab.until_attested(count=3)
    assert (lab.pids(), enrolled(lab)) == (before, keys)
    assert (alarms(lab), tracebacks(lab)) == ([], [])


def sees_expiry(lab: RunningLab, agent_id: str) -> bool:
    """Whether a guest is not attested, and an expired certificate is said to be why."""
    tenant = next(name for name, one in load(lab.state / "site.yml", SiteSettings).tenants.items()
                  if agent_id in map(str, one.guests.values()))  # fmt: skip
    done = lab.run("tenant", "guest", "show", agent_id, "--tenant", tenant, "--json")
    return ('"attested": false' in done.stdout and "expired" in done.stdout) or "expired" in done.stderr
