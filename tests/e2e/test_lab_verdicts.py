"""What `harness lab up` says of guests that were under attestation before it: only what holds after its changes."""

from __future__ import annotations

import pytest

from tests.support.running_lab import RunningLab, running_lab

pytestmark = [pytest.mark.needs_swtpm, pytest.mark.timeout(900)]

_GOOD = """\
hosts: {host1: {chip: swtpm}}
tenants: {alice: {quote_interval_s: 2, guests: {alice-vm1: }}}
"""


def test_a_changed_lab_is_judged_by_what_it_is_now() -> None:
    """A host that boots another kernel is refused by the same `up` that booted it, not by a later look.

    A payload that is added for a guest under attestation is released to it: its order is another one.
    """
    with running_lab(_GOOD) as lab:
        _with_payload(lab)
        lab.write(_GOOD.replace("chip: swtpm", "chip: swtpm, scenario: tampered-kernel"))
        refused = lab.json("lab", "up", code=1)
        assert [guest["error"] for guest in refused["guests"]] == ["ReferenceValueMismatch"]


def _with_payload(lab: RunningLab) -> None:
    lab.write(_GOOD.replace("{quote_interval_s: 2", "{quote_interval_s: 2, payload: secret"))
    shown = lab.up()
    assert [(guest["attested"], guest["payload_released"]) for guest in shown["guests"]] == [(True, True)]


def test_a_lost_database_of_a_verifier_is_made_up_for() -> None:
    """After it is gone `up` admits the guests anew, with the agents that are just starting, and nobody enrols again."""
    with running_lab(_GOOD) as lab:
        pinned = lab.pinned()
        assert lab.run("lab", "down").returncode == 0
        for path in (lab.state / "t" / "alice").glob("verifier.db*"):
            path.unlink()
        assert [guest["attested"] for guest in lab.up()["guests"]] == [True]
        assert lab.pinned() == pinned
