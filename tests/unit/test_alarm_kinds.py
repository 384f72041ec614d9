"""Each kind of alarm that the code can raise is raised in a real lab, and left by the operator's commands there."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from harness import errors
from harness.errors import AppraisalError
from harness.tenant.enrolment_alarms import _ALARMS
from harness.tenant.states import Event
from harness.wire_errors import _FROM_PEER

MODULES = sorted(path.stem for path in (Path(__file__).parents[1] / "e2e").glob("test_lab_ways_back_*.py"))
OF_OUR_SIDE = {"PeerUnreachable", "DeadlineExceeded", "PeerRefusedUs"}
"""Failures of a question that no peer names."""
RESTARTS = {Event.ROUND_EXPIRED.name, Event.BASELINE_CHANGED.name}
"""Rounds that were begun anew too often."""
NOT_IN_A_LAB = {
    "BindingMismatch": "a session binds the host's quote to the very evidence that it appraised; offline appraisal can",
    "UntrustedKey": "what is pinned is acceptable, and a TPM signs with the qualified name of the key that signs",
    "ROUND_EXPIRED": "rounds that take longer than a minute each, for ten minutes, while every question is answered",
    "BASELINE_CHANGED": "nine resets of a host in nine rounds, each between the guest's evidence and the host's",
}
"""Kinds that need more than a lab can do in minutes, or that nobody can cause."""


def _raised() -> set[str]:
    found: set[str] = set()
    for name in MODULES:
        module = importlib.import_module(f"tests.e2e.{name}")
        found |= {kind for each in vars(module).values() for kind in getattr(each, "alarm_kinds", ())}
    return found


def _possible() -> set[str]:
    findings = {kind.__name__ for kind in AppraisalError.__subclasses__()}
    return findings | {kind.__name__ for kind in _ALARMS} | set(_FROM_PEER) | OF_OUR_SIDE | RESTARTS


@pytest.mark.parametrize("kind", sorted(_possible()))
def test_a_kind_is_raised_in_a_lab(kind: str) -> None:
    """By one of the tests of the operators' ways back; or it is said why it is not."""
    assert (kind in _raised()) != (kind in NOT_IN_A_LAB)


def test_what_the_tests_raise_can_be_raised() -> None:
    """No test declares a kind that the code does not know."""
    assert _raised() <= _possible()


def test_findings_have_no_kinds_below_them() -> None:
    """A class below a finding would be a kind of its own, and missing here."""
    assert not [kind for kind in AppraisalError.__subclasses__() if kind.__subclasses__()]
    assert all(hasattr(errors, kind) for kind in _possible() - RESTARTS)
