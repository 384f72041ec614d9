"""Half-written files of a lab that is down: named in one sentence, nobody else is hurt, and the whole file heals it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from harness.config import SiteSettings, load
from tests.support.lab_faults import enrolled, tracebacks
from tests.support.processes import left_by
from tests.support.running_lab import RunningLab, running_lab

pytestmark = [pytest.mark.needs_swtpm, pytest.mark.timeout(900)]

TOPOLOGY = """\
hosts: {host1: {chip: swtpm}, host2: {chip: swtpm}}
tenants:
  alice: {quote_interval_s: 1, guests: {alice-vm1: {host: host1}}}
  bob: {quote_interval_s: 1, guests: {bob-vm1: {host: host2}, b2: {host: host2}, b3: {host: host2}, b4: {host: host2}}}
"""
GUESTS = 5
WRITTEN_ANEW = (
    "site.yml",
    "p/registrar.yml",
    "p/verifier.yml",
    "h/host1/hardware.yml",
    "h/host1/agent.yml",
    "h/host1/manager.yml",
    "h/host1/localca",
    "h/host1/localca.conf",
    "t/alice/registrar.yml",
    "t/alice/verifier.yml",
    "t/alice/guest-policy.json",
    "t/alice/host-policy.json",
)
"""What `lab up` makes from lab.yml, each time."""
ENDS_UP = (
    "lab.json",
    "pki/alice/ca.pem",
    "pki/provider/ca.key",
    "pki/alice/tenant-operator-operator.key",
    "vendor/root.pem",
    "vendor/issuing.key",
)
"""What everybody needs, or the commands themselves."""
PROVIDERS = "pki/provider/provider-verifier-verifier.key"
HURT = {
    "pki/alice/tenant-verifier-alice.pem": {"alice-vm1"},
    "h/host1/agent/auth.json": {"alice-vm1"},
    "h/host1/tpm/tpm2-00.permall": {"alice-vm1"},
}
"""Files of one party, and the guests that are not attested without them."""
OF_GUESTS = {
    "b2": "domain.json",
    "b3": "image/agent.key",
    "b4": "image/agent.yml",
    "alice-vm1": "tpm/tpm2-00.permall",
}
"""A file of each of these guests, all half-written at once."""


@pytest.fixture(scope="module")
def lab() -> Iterator[RunningLab]:
    """A lab that is down; every test leaves it so, with its files whole."""
    with running_lab(TOPOLOGY) as running:
        running.until_attested(count=GUESTS)
        down(running)
        yield running
    assert left_by(running.state) == {}


@contextlib.contextmanager
def halved(paths: Sequence[Path]) -> Iterator[None]:
    """Files that a machine without power left half-written; whole again at the end."""
    whole = {path: path.read_bytes() for path in paths}
    try:
        for path, data in whole.items():
            with path.open("r+b") as file:
                file.truncate(len(data) // 2)
        yield
    finally:
        for path, data in whole.items():
            path.write_bytes(data)


def down(lab: RunningLab) -> None:
    """Ends the lab; nothing of it is left."""
    done = lab.run("lab", "down")
    assert done.returncode == 0, done.stderr
    assert left_by(lab.state) == {}


def guests(lab: RunningLab, code: int) -> dict[str, dict[str, object]]:
    """What an `up` says of each guest."""
    done = lab.run("lab", "up", "--json")
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
    return {guest["name"]: guest for guest in json.loads(done.stdout)["guests"]}


def test_what_follows_from_the_topology_is_written_anew(lab: RunningLab) -> None:
    """Settings and policies are made from lab.yml each time: half of one is no loss."""
    with halved([lab.state / name for name in WRITTEN_ANEW]):
        assert all(guest["attested"] for guest in guests(lab, 0).values())
        down(lab)


@pytest.mark.parametrize("name", ENDS_UP)
def test_half_of_what_everybody_needs_is_refused_at_once(lab: RunningLab, name: str) -> None:
    """One sentence with the file's name, and nothing is left running."""
    with halved([lab.state / name]):
        done = lab.run("lab", "up")
        assert done.returncode == 2, done.stderr
        assert f"{lab.state}/{name}" in done.stderr
        assert "Traceback" not in done.stderr
        down(lab)


def test_a_service_of_the_provider_that_cannot_start_is_told_by_up(lab: RunningLab) -> None:
    """In its own words; when the file is whole the supervisor starts it, and all are attested."""
    with halved([lab.state / PROVIDERS]):
        done = lab.run("lab", "up")
        assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
        assert PROVIDERS in done.stderr
    lab.until_attested(count=GUESTS)
    down(lab)


@pytest.mark.parametrize("name", HURT)
def test_half_a_file_of_one_party_hurts_nobody_else(lab: RunningLab, name: str) -> None:
    """Its guests are not attested, and told why; all others are; the whole file heals it while the lab runs."""
    with halved([lab.state / name]):
        shown = guests(lab, 1)
        assert {guest for guest, row in shown.items() if not row["attested"]} == HURT[name]
        assert all(name in str(shown[guest]["detail"]) for guest in HURT[name]), shown
    lab.until_attested(count=GUESTS)
    down(lab)


def test_half_a_file_of_some_guests_hurts_no_other(lab: RunningLab) -> None:
    """They are not attested, and their host says which file; the others are; whole files heal it.

    A guest manager reads definitions when it starts; everything else is tried again by itself.
    """
    ids = load(lab.state / "site.yml", SiteSettings)
    folders = {
        name: next((lab.state / "h").glob(f"*/guests/{agent_id}"))
        for tenant in ids.tenants.values()
        for name, agent_id in tenant.guests.items()
    }
    paths = {guest: folders[guest] / name for guest, name in OF_GUESTS.items()}
    with halved(list(paths.values())):
        shown = guests(lab, 1)
        assert {guest for guest, row in shown.items() if not row["attested"]} == paths.keys()
        said = "".join(path.read_text() for path in (lab.state / "log").glob("*.log"))
        for guest, path in paths.items():
            assert str(path) in str(shown[guest]["detail"]) + said, guest
    done = lab.run("lab", "restart", "host2-guests")
    assert done.returncode == 0, done.stderr
    assert all(guest["attested"] for guest in guests(lab, 0).values())
    down(lab)


def test_nothing_was_lost(lab: RunningLab) -> None:
    """After all that the lab comes up with the keys that it had, and no process raised what it did not catch."""
    lab.up()
    assert len(enrolled(lab)) == 2 * 2 + GUESTS
    assert tracebacks(lab) == []
    down(lab)
