"""`harness tenant guest re-enrol`: in which order, and that nothing is lost when it ends early."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from harness.errors import DeadlineExceeded, NotFound
from tests.support.cli_operators import (
    AGENT_ID,
    BEFORE,
    HOST_ID,
    POLICY,
    Operator,
    alice,
)

WHY = ["--reason", "ticket 4711"]


def kept(lab: Path) -> Path:
    """Where the former order of the guest is kept."""
    return lab / "t" / "alice" / "orders" / f"{AGENT_ID}.json"


def test_a_guest_is_re_enrolled_with_its_former_order(lab: Path, operator: Operator) -> None:
    """The attestation ends before the keys are forgotten, and begins anew after the registration; no file is left."""
    assert alice(lab, "guest", "re-enrol", "web1", "--host", HOST_ID, "--wait", "5", *WHY) == 0
    names = [call[0] for call in operator.asked]
    assert names == ["stated", "former_order", "end_attestation", "re_enrol_guest", "registered", "admit"]
    assert operator.acts("re_enrol_guest") == [("re_enrol_guest", AGENT_ID, "ticket 4711", HOST_ID)]
    assert operator.asked[-1][1:] == ("contact", BEFORE)
    assert not kept(lab).exists()


def test_a_guest_that_was_not_attested_gets_the_sites_policies(lab: Path, operator: Operator) -> None:
    """Nothing is to be kept when the verifier does not know it; the payload is handed over when it is given."""
    operator.refusals = {"former_order": NotFound("x"), "end_attestation": NotFound("x")}
    (lab / "secret").write_bytes(b"secret")
    assert alice(lab, "guest", "re-enrol", AGENT_ID, "--payload", str(lab / "secret"), *WHY) == 0
    order = operator.asked[-1][2]
    assert (order.payload, order.host_policy.encode()) == (b"secret", POLICY)


@pytest.mark.parametrize("where", ["end_attestation", "re_enrol_guest", "registered", "admit"])
@pytest.mark.parametrize("trouble", [DeadlineExceeded("too late"), KeyboardInterrupt()], ids=["late", "Ctrl-C"])
def test_a_guest_whose_re_enrolment_ended_early_is_added_as_before(
    lab: Path, operator: Operator, capsys: pytest.CaptureFixture[str], where: str, trouble: BaseException
) -> None:
    """Wherever it ended: the former order is in a private file, without the payload, until `guest add` has taken it."""
    (lab / "secret").write_bytes(b"secret")
    secret = ["--payload", str(lab / "secret")]
    operator.refusals[where] = trouble
    assert alice(lab, "guest", "re-enrol", AGENT_ID, *secret, *WHY) != 0
    assert kept(lab).stat().st_mode & 0o777 == 0o600
    assert "secret" not in kept(lab).read_text()
    assert operator.acts("re_enrol_guest") == [] or where != "end_attestation"
    operator.refusals.clear()
    assert alice(lab, "guest", "add", AGENT_ID, *secret) == 0
    assert operator.asked[-1] == ("admit", "contact", replace(BEFORE, payload=b"secret"))
    assert "as it was before" in capsys.readouterr().err
    assert not kept(lab).exists()


def test_a_re_enrolment_that_ended_early_may_be_given_again(lab: Path, operator: Operator) -> None:
    """Meanwhile the verifier knows nothing of the guest: what was kept is taken."""
    operator.refusals["registered"] = DeadlineExceeded("too late")
    assert alice(lab, "guest", "re-enrol", AGENT_ID, *WHY) != 0
    operator.refusals = {"former_order": NotFound("x"), "end_attestation": NotFound("x")}
    assert alice(lab, "guest", "re-enrol", AGENT_ID, *WHY) == 0
    assert operator.asked[-1] == ("admit", "contact", BEFORE)


def test_options_overrule_the_order_that_was_kept(lab: Path, operator: Operator) -> None:
    """Whoever says how a guest is attested gets that, and the kept order is gone then; so it is with a removal."""
    operator.refusals["registered"] = DeadlineExceeded("too late")
    assert alice(lab, "guest", "re-enrol", AGENT_ID, *WHY) != 0
    operator.refusals.clear()
    assert alice(lab, "guest", "add", AGENT_ID, "--interval", "7") == 0
    assert operator.asked[-1][2].quote_interval_s == 7.0
    assert not kept(lab).exists()
    operator.refusals["registered"] = DeadlineExceeded("too late")
    assert alice(lab, "guest", "re-enrol", AGENT_ID, *WHY) != 0
    assert alice(lab, "guest", "remove", AGENT_ID, *WHY) == 0
    assert not kept(lab).exists()


def test_a_kept_order_that_cannot_be_read_is_named(
    lab: Path, operator: Operator, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is guessed: the file is named, and nobody is put under attestation."""
    kept(lab).parent.mkdir(parents=True)
    kept(lab).write_text('{"guest_policy": 1}')
    assert alice(lab, "guest", "add", AGENT_ID) == 2
    assert str(kept(lab)) in capsys.readouterr().err.replace("\n", "")
    assert operator.acts("admit") == []
