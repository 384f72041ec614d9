"""`harness tenant`: resume, re-enrol, reference values: what is asked, shown and refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness import cli_names
from harness.errors import ConfigError, Conflict, NotFound, PeerRefusedUs
from tests.support.cli_operators import (
    AGENT_ID,
    ATTESTED,
    FAILED,
    GUEST,
    HOST_ID,
    OTHER_AGENT_ID,
    POLICY,
    Operator,
    alice,
)

WHY = ["--reason", "ticket 4711"]


@pytest.fixture
def policy(tmp_path: Path) -> str:
    """A policy file."""
    path = tmp_path / "new.json"
    path.write_text(json.dumps(POLICY))
    return str(path)


# --- how a guest is named ---------------------------------------------------------------------------------


@pytest.mark.parametrize("typed", [AGENT_ID, AGENT_ID[:8], "6", "web1"])
def test_a_guest_is_named_by_id_prefix_or_name(lab: Path, operator: Operator, typed: str) -> None:
    """The complete id, any unique beginning of it, and the name stand for the same guest."""
    assert alice(lab, "guest", "resume", typed, *WHY) == 0
    assert operator.acts("resume") == [("resume", AGENT_ID, "ticket 4711", False)]


def test_an_ambiguous_guest_is_refused(lab: Path, operator: Operator, capsys: pytest.CaptureFixture[str]) -> None:
    """A beginning that two ids share names both, ends with 2 and does nothing."""
    operator.answers["stated"] = [GUEST, {**GUEST, "agent_id": OTHER_AGENT_ID}]
    assert alice(lab, "guest", "remove", "6f1d") == 2
    err = capsys.readouterr().err
    assert AGENT_ID in err
    assert OTHER_AGENT_ID in err
    assert operator.acts("remove_guest") == []


def test_a_name_of_another_tenants_guest_is_not_known(lab: Path, operator: Operator) -> None:
    """Names count among the guests that the tenant has stated, wherever else they are defined."""
    operator.answers["stated"] = []
    assert alice(lab, "guest", "resume", "web1", *WHY) == 2
    assert operator.acts("resume") == []


def test_a_name_is_more_than_the_beginning_of_an_id() -> None:
    """A guest that is called like the beginning of another's id is the one that is meant."""
    known = {"abcd1", "xyz"}
    assert cli_names.pick("abcd", known, {"xyz": "abcd"}, what="guest", listing="list") == "xyz"
    with pytest.raises(ConfigError):
        cli_names.pick("", {"a", "b"}, {"a": "", "b": ""}, what="guest", listing="list")
    with pytest.raises(NotFound):
        cli_names.pick("", {"a"}, {}, what="guest", listing="list")


# --- resume -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["guest", "resume", AGENT_ID],
        ["guest", "re-enrol", AGENT_ID],
        ["host", "re-enrol", HOST_ID],
        ["policy", "set", AGENT_ID],
        ["alarms", "ack", "v1"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("reason", [[], ["--reason", " "], ["--reason", "x" * 501], ["--reason", "a\nb"]])
def test_acts_that_overrule_a_finding_need_a_reason(
    lab: Path, operator: Operator, words: list[str], reason: list[str]
) -> None:
    """Without a reason of one line the command ends with 2 before anybody is asked."""
    assert alice(lab, *words, *reason) == 2
    assert operator.asked == []


def test_a_reboot_is_accepted_only_when_asked_for(lab: Path, operator: Operator) -> None:
    """`--accept-reboot` goes to the verifier as such."""
    assert alice(lab, "guest", "resume", AGENT_ID, "--accept-reboot", *WHY) == 0
    assert operator.acts("resume") == [("resume", AGENT_ID, "ticket 4711", True)]


def test_what_was_done_is_said_with_the_next_step(
    lab: Path, operator: Operator, policy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`resume` and `policy set` name the guest and the command that shows what became of it."""
    step = "next: `harness tenant guest show web1 --wait 60 --tenant alice`"
    assert alice(lab, "guest", "resume", "web1", *WHY) == 0
    assert capsys.readouterr().out == f"web1: resumed, judged anew in the next round; {step}\n"
    assert alice(lab, "policy", "set", "web1", "--host-policy", policy, *WHY) == 0
    assert capsys.readouterr().out == f"web1: reference values replaced, in force from the next round on; {step}\n"
    operator.answers["guests"] = []
    assert alice(lab, "guest", "resume", "--all", *WHY) == 0
    assert capsys.readouterr().out == "no guest has stopped\n"


def test_a_guest_that_has_not_stopped_is_a_finding(lab: Path, operator: Operator) -> None:
    """The verifier's conflict ends with 1."""
    operator.refusal = Conflict("it is in state GET_QUOTE")
    assert alice(lab, "guest", "resume", AGENT_ID, *WHY) == 1


def test_all_resumes_the_stopped_ones_only(lab: Path, operator: Operator) -> None:
    """`--all` leaves guests alone that are attested or not yet under attestation."""
    operator.answers["guests"] = [
        {**GUEST, "attestation": ATTESTED},
        {**GUEST, "agent_id": OTHER_AGENT_ID},
        {**GUEST, "attestation": None},
    ]
    assert alice(lab, "guest", "resume", "--all", *WHY) == 0
    assert operator.acts("resume") == [("resume", OTHER_AGENT_ID, "ticket 4711")]


def test_one_reboot_of_a_host_is_accepted_once_for_all_its_guests(lab: Path, operator: Operator) -> None:
    """Where the first guest has made the counters the baseline the others are resumed without accepting anything."""
    operator.answers["guests"] = [GUEST]
    operator.answers["attestation"] = {**FAILED, "failed_check": 10}
    operator.refusals["resume"] = Conflict("no reboot was refused")
    assert alice(lab, "guest", "resume", "--all", "--accept-reboot", *WHY) == 1
    assert operator.acts("resume") == [("resume", AGENT_ID, "ticket 4711", True), ("resume", AGENT_ID, "ticket 4711")]


@pytest.mark.parametrize("command", [["guest", "resume"], ["policy", "set", "--host-policy", "none"]])
@pytest.mark.parametrize("whom", [[], [AGENT_ID, "--all"]])
def test_either_a_guest_or_all_is_given(lab: Path, operator: Operator, command: list[str], whom: list[str]) -> None:
    """Neither, or both, is a usage error."""
    assert alice(lab, *command, *whom, *WHY) == 2
    assert operator.asked == []


# --- hosts, removals --------------------------------------------------------------------------------------------


def test_a_host_is_re_enrolled_by_the_beginning_of_its_id(
    lab: Path, operator: Operator, capsys: pytest.CaptureFixture[str]
) -> None:
    """The registrar is told the complete id and the reason; people read a sentence."""
    assert alice(lab, "host", "re-enrol", HOST_ID[:6], *WHY) == 0
    assert operator.acts("re_enrol_host") == [("re_enrol_host", HOST_ID, "ticket 4711")]
    assert f"host {HOST_ID} is enrolled with the keys that it has now" in capsys.readouterr().out


@pytest.mark.parametrize(("what", "number"), [("host", HOST_ID), ("guest", AGENT_ID)])
def test_a_removal_may_carry_a_reason(lab: Path, operator: Operator, what: str, number: str) -> None:
    """With a reason it goes to the service; without one nothing is made up."""
    assert alice(lab, what, "remove", number, *WHY) == 0
    assert alice(lab, what, "remove", number) == 0
    assert operator.acts(f"remove_{what}") == [
        (f"remove_{what}", number, "ticket 4711"),
        (f"remove_{what}", number, None),
    ]


# --- reference values -------------------------------------------------------------------------------------


def test_what_differs_is_marked(lab: Path, operator: Operator, capsys: pytest.CaptureFixture[str]) -> None:
    """`policy show` puts what was proven beside what is allowed; a difference is marked and ends with 1."""
    assert alice(lab, "policy", "show", "web1") == 1
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.startswith("sha256:4")}
    assert rows["sha256:4"].endswith("differs")
    assert alice(lab, "policy", "show", "web1", "--layer", "guest") == 0
    assert "guest: nothing proven yet" in capsys.readouterr().out


def test_programs_get_complete_digests(lab: Path, operator: Operator, capsys: pytest.CaptureFixture[str]) -> None:
    """`--json` has policy, what was seen, and the differences."""
    assert alice(lab, "policy", "show", "web1", "--layer", "host", "--json") == 1
    shown = json.loads(capsys.readouterr().out)
    assert shown["host"]["policy"] == POLICY
    assert shown["host"]["differences"] == [{"bank": "sha256", "pcr": 4, "allowed": ["44" * 32], "seen": "55" * 32}]


def test_only_pcrs_of_the_policy_are_captured(
    lab: Path, operator: Operator, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was proven becomes a policy for the PCRs that the one in force names; the difference is told apart."""
    assert alice(lab, "policy", "capture", "web1", "--layer", "host") == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"sha256": {"0": ["00" * 32], "4": ["55" * 32]}}
    assert err.splitlines() == ["host sha256:4: 4444444444444444… -> 5555555555555555…"]


def test_nothing_proven_is_nothing_captured(lab: Path, operator: Operator, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a proven quote there is no policy to write."""
    assert alice(lab, "policy", "capture", "web1", "--layer", "guest", "--out", str(lab / "g.json")) == 2
    assert "nothing was proven yet" in capsys.readouterr().err
    assert not (lab / "g.json").exists()


def test_a_file_that_is_there_is_overwritten_only_by_force(lab: Path, operator: Operator) -> None:
    """`--out` keeps what is there; `--force` replaces it."""
    out = lab / "host.json"
    words = ["policy", "capture", "web1", "--layer", "host", "--out", str(out)]
    assert alice(lab, *words) == 0
    out.write_text("mine")
    assert alice(lab, *words) == 2
    assert out.read_text() == "mine"
    assert alice(lab, *words, "--force") == 0
    assert json.loads(out.read_text())["sha256"]["4"] == ["55" * 32]


def test_both_layers_go_into_a_folder(lab: Path, operator: Operator) -> None:
    """With both layers `--out` is a folder; a layer of which nothing was proven is left out."""
    assert alice(lab, "policy", "capture", "web1", "--out", str(lab / "new")) == 0
    assert [path.name for path in (lab / "new").iterdir()] == ["host-policy.json"]


def test_the_sites_own_files_are_written_on_request(lab: Path, operator: Operator) -> None:
    """`--site --force` makes what was proven the default of `guest add`; --site and --out exclude each other."""
    words = ["policy", "capture", "web1", "--layer", "host", "--site"]
    assert alice(lab, *words) == 2
    assert alice(lab, *words, "--out", "x") == 2
    assert alice(lab, *words, "--force") == 0
    assert json.loads((lab / "policy.json").read_text())["sha256"]["4"] == ["55" * 32]


def test_a_policy_is_set_and_the_guest_goes_on(lab: Path, operator: Operator, policy: str) -> None:
    """`policy set --resume` replaces the named layer, and resumes the guest that has stopped."""
    assert alice(lab, "policy", "set", "web1", "--host-policy", policy, "--resume", *WHY) == 0
    (call,) = operator.acts("set_policy")
    assert call[1:4] == (AGENT_ID, "ticket 4711", None)
    assert call[4].encode() == POLICY
    assert operator.acts("resume") == [("resume", AGENT_ID, "ticket 4711")]


def test_without_resume_a_stopped_guest_stays_stopped(lab: Path, operator: Operator, policy: str) -> None:
    """New reference values alone let nobody go on."""
    assert alice(lab, "policy", "set", "web1", "--guest-policy", policy, *WHY) == 0
    assert operator.acts("resume") == []


def test_all_guests_are_tried_and_the_refused_are_named(
    lab: Path, operator: Operator, policy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`policy set --all` concerns every guest under attestation; one that was refused is named and the code is 1."""
    operator.answers["guests"] = [GUEST, {**GUEST, "agent_id": OTHER_AGENT_ID}, {**GUEST, "attestation": None}]
    operator.refusals["set_policy"] = PeerRefusedUs("host_policy names a PCR", status=400)
    assert alice(lab, "policy", "set", "--all", "--host-policy", policy, *WHY) == 1
    assert [call[1] for call in operator.acts("set_policy")] == [AGENT_ID, OTHER_AGENT_ID]
    assert "web1: host_policy names a PCR" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [[], ["--host-policy", "/none"], ["--guest-policy", __file__]], ids=["none", "missing", "no policy"]
)
def test_a_policy_that_cannot_be_used_asks_nobody(lab: Path, operator: Operator, options: list[str]) -> None:
    """No file, a missing one, and one that is no policy end with 2."""
    assert alice(lab, "policy", "set", "web1", *options, *WHY) == 2
    assert operator.asked == []


def test_what_the_verifier_cannot_use_is_unusable_input(lab: Path, operator: Operator, policy: str) -> None:
    """A policy wider than the mask (400) ends with 2."""
    operator.refusals["set_policy"] = PeerRefusedUs("host_policy names a PCR", status=400)
    assert alice(lab, "policy", "set", "web1", "--host-policy", policy, *WHY) == 2
