"""`harness tenant guest show`: the sentence, the chain, and what to do; the object for programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness import cli_guest_view
from harness.errors import HostRebooted
from tests.support.cli_operators import (
    AGENT_ID,
    ATTESTED,
    FAILED,
    GUEST,
    POLICIES,
    Operator,
    alice,
)


def test_show_says_first_how_it_stands(lab: Path, operator: Operator, capsys: pytest.CaptureFixture[str]) -> None:
    """The first line is the verdict, with layer, check and error; the next one what to type."""
    operator.guest_now = {
        **GUEST,
        "attestation": {**FAILED, "state": "INVALID_QUOTE", "failed_check": 10, "error": HostRebooted.__name__},
    }
    assert alice(lab, "guest", "show", "web1") == 1
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert first == (
        "web1 is NOT attested: INVALID_QUOTE, host evidence failed check 10 (HostRebooted): it does not run here"
    )
    assert "harness tenant guest resume web1 --accept-reboot --reason TEXT" in second


def test_show_draws_the_chain_from_root_to_ak(
    lab: Path, operator: Operator, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each link is one step deeper, with a short fingerprint; --json has the complete one."""
    chain = [{"what": what, "name": "n", "sha256": what[0] * 64} for what in ("vendor root", "host EK", "guest AK")]
    operator.guest_now = {**GUEST, "chain": chain, "attestation": ATTESTED}
    assert alice(lab, "guest", "show", "web1") == 0
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.endswith("  n")]
    assert lines == [f"vendor root {'v' * 16}  n", f"  └ host EK {'h' * 16}  n", f"    └ guest AK {'g' * 16}  n"]
    assert alice(lab, "guest", "show", "web1", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["chain"], shown["guest"]["agent_id"]) == (chain, AGENT_ID)
    assert (shown["attestation"], shown["policy"]) == (ATTESTED, POLICIES)


@pytest.mark.parametrize(
    ("guest", "said"),
    [
        (
            {"attestation": {**ATTESTED, "next_round_at": 62.0}},
            "x is attested: last success 10 s ago; next round in 2 s",
        ),
        ({"attestation": ATTESTED}, "x is attested: last success 10 s ago"),
        ({"state": "stated", "attestation": ATTESTED}, "x is NOT attested: it is stated and has not registered"),
        (
            {"state": "stated", "refused": {"error": "KeyChanged", "detail": "other"}, "attestation": None},
            "x is NOT attested: its registration was refused, KeyChanged: other",
        ),
        ({"attestation": None}, "x is NOT attested: it has registered and is not under attestation"),
        (
            {"attestation": {**ATTESTED, "attested": False}},
            "x is NOT attested: GET_QUOTE, last success 10 s ago",
        ),
        (
            {"attestation": {**ATTESTED, "attested": False, "last_successful_attestation": None}},
            "x is NOT attested: GET_QUOTE, no verdict yet",
        ),
    ],
)
def test_the_lead_sentence_of_each_standing(guest: dict[str, object], said: str) -> None:
    """Attested only while the verifier says so and the keys are pinned; else the reason follows."""
    assert cli_guest_view.lead(cli_guest_view.whole({**GUEST, **guest}, None), "x", 60.0) == said


@pytest.mark.parametrize(
    ("guest", "step"),
    [
        ({"state": "stated", "attestation": None}, "harness provider guest start web1"),
        ({"attestation": None}, "harness tenant guest add web1"),
        ({"state": "stated", "refused": {"error": "KeyChanged"}}, "harness tenant guest re-enrol web1"),
        ({"attestation": {**FAILED, "error": "ReferenceValueMismatch"}}, "harness tenant policy show web1"),
        ({"attestation": {**FAILED, "error": "PeerUnreachable"}}, "harness tenant guest resume web1"),
        ({"attestation": {**FAILED, "state": "TENANT_FAILED", "error": None}}, "harness lab logs"),
        ({"attestation": {**FAILED, "state": "INVALID_QUOTE", "error": "WrongHost"}}, "guest resume web1"),
    ],
)
def test_each_standing_has_its_way_back(guest: dict[str, object], step: str) -> None:
    """A guest that nobody attests now comes with the command that its operator types next."""
    said = cli_guest_view.what_to_do(cli_guest_view.whole({**GUEST, **guest}, None), "web1")
    assert said is not None
    assert step in said


@pytest.mark.parametrize(
    ("session", "said"),
    [
        (ATTESTED, "no payload; 3 rounds accepted"),
        ({**ATTESTED, "state": "PROVIDE_V", "attestation_count": 1}, "payload not released; 1 round accepted"),
        ({**ATTESTED, "payload_released": True}, "payload released; 3 rounds accepted"),
        ({**FAILED, "attestation_count": 0}, "payload not released; 0 rounds accepted"),
    ],
    ids=["none", "on its way", "released", "refused"],
)
def test_a_payload_is_spoken_of_where_there_is_one(
    lab: Path, operator: Operator, session: dict[str, object], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A guest that is attested and gets nothing has no payload; of one that is refused nobody can tell."""
    operator.guest_now = {**GUEST, "attestation": session}
    alice(lab, "guest", "show", "web1")
    assert said in capsys.readouterr().out.splitlines()


def test_a_verifier_that_goes_on_by_itself_needs_nobody() -> None:
    """While the session is active there is nothing to type."""
    shown = cli_guest_view.whole({**GUEST, "attestation": {**ATTESTED, "attested": False}}, None)
    assert cli_guest_view.what_to_do(shown, "web1") is None
