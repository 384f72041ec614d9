"""`harness tenant alarms` and `harness tenant audit`: of all tenants and of one, what to do, and acknowledging."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harness import cli_site
from harness.errors import Conflict, PeerUnreachable
from tests.support.cli_operators import (
    AGENT_ID,
    ALARM,
    ATTESTED,
    ENTRY,
    FAILED,
    GUEST,
    HOST_ID,
    Operator,
    alice,
    run,
)

WHY = ["--reason", "ticket 4711"]


@pytest.mark.parametrize("words", [["alarms"], ["alarms", "list"]], ids=" ".join)
def test_alarms_that_wait_are_a_finding(
    lab: Path, operator: Operator, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """An alarm is shown with what to do about it and how it is acknowledged; the code is 1."""
    operator.answers["alarms"] = [ALARM]
    assert alice(lab, *words) == 1
    out, err = capsys.readouterr()
    assert {"r12", "KeyChanged", HOST_ID} <= set(out.split())
    assert f"harness tenant host re-enrol {HOST_ID}" in err
    assert "harness tenant alarms ack r12" in err


def test_acknowledged_alarms_are_no_finding(lab: Path, operator: Operator, capsys: pytest.CaptureFixture[str]) -> None:
    """`--all` shows who acknowledged what and why; the code is 0."""
    operator.answers["alarms"] = [{**ALARM, "acknowledged_at": 1.0, "acknowledged_by": "alice/x", "reason": "known"}]
    assert alice(lab, "alarms", "list", "--all") == 0
    assert operator.asked == [("alarms", True)]
    assert "acknowledged by alice/x: known" in capsys.readouterr().out


def test_no_alarms_are_a_success(lab: Path, operator: Operator, capsys: pytest.CaptureFixture[str]) -> None:
    """Programs get an empty list."""
    assert alice(lab, "alarms", "--json") == 0
    assert json.loads(capsys.readouterr().out) == []


def test_several_alarms_are_acknowledged_once_each(lab: Path, operator: Operator) -> None:
    """`ack` takes several ids; one that is repeated counts once."""
    assert alice(lab, "alarms", "ack", "r12", "v7", "r12", *WHY) == 0
    assert operator.acts("acknowledge") == [("acknowledge", "r12", "ticket 4711"), ("acknowledge", "v7", "ticket 4711")]


def test_all_acknowledges_what_is_listed(lab: Path, operator: Operator, capsys: pytest.CaptureFixture[str]) -> None:
    """`--all` is for all tenants, says which alarms they were, and leaves alone what somebody else acknowledged."""
    operator.answers["alarms"] = [ALARM, {**ALARM, "id": "v7"}]
    operator.refusals["acknowledge"] = Conflict("it was acknowledged before")
    assert everybody(lab, "alarms", "ack", "--all", *WHY) == 0
    assert [act[1] for act in operator.acts("acknowledge")] == ["r12", "v7", "r12", "v7"]
    assert capsys.readouterr().out == "alice: r12, v7 acknowledged\nbob: r12, v7 acknowledged\n"


@pytest.mark.parametrize("words", [[], ["r12", "--all"]], ids=["neither", "both"])
def test_ids_and_all_exclude_each_other(lab: Path, operator: Operator, words: list[str]) -> None:
    """What is to be acknowledged is stated, once; else nothing is."""
    assert alice(lab, "alarms", "ack", *words, *WHY) == 2
    assert operator.asked == []


@pytest.mark.parametrize("number", ["12", "x7", "v0", "v", "v-1", "v7x"])
def test_what_is_no_alarm_is_unusable_input(lab: Path, operator: Operator, number: str) -> None:
    """An id of another form ends with 2, and no other alarm of the command is acknowledged."""
    assert alice(lab, "alarms", "ack", "r1", number, *WHY) == 2
    assert operator.asked == []


def test_options_before_the_command_are_not_ignored(lab: Path, operator: Operator) -> None:
    """`alarms --tenant bob ack` must not acknowledge an alarm of the tenant from the environment."""
    assert alice(lab, "alarms", "--tenant", "bob", "ack", "v7", *WHY) == 2
    assert operator.asked == []


def everybody(lab: Path, *words: str) -> int:
    """Exit code of a tenant command that names no tenant."""
    return run("tenant", *words, "--lab", str(lab))


def test_without_a_tenant_the_alarms_of_all_are_listed(
    lab: Path, operator: Operator, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each row, object and command says whose it is; what any tenant has not acknowledged is a finding."""
    operator.answers["alarms"] = [ALARM]
    assert everybody(lab, "alarms") == 1
    out, err = capsys.readouterr()
    assert [line.split()[:2] for line in out.splitlines()] == [["tenant", "id"], ["alice", "r12"], ["bob", "r12"]]
    for name in ("alice", "bob"):
        assert f"`harness tenant alarms ack r12 --reason TEXT --tenant {name}`" in err
        assert f"harness tenant host re-enrol {HOST_ID} --reason TEXT --tenant {name}`" in err
    assert everybody(lab, "alarms", "list", "--json") == 1
    assert [alarm["tenant"] for alarm in json.loads(capsys.readouterr().out)] == ["alice", "bob"]


@pytest.mark.parametrize("words", [["alarms"], ["audit"]], ids=" ".join)
def test_a_tenant_that_does_not_answer_is_named_and_is_no_success(
    lab: Path,
    operator: Operator,
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The others are shown; when nobody answers, the error is the answer."""
    away = PeerUnreachable("it is away")
    monkeypatch.setattr(cli_site, "as_tenants", lambda _tenants, _act: {"alice": [], "bob": away})
    assert everybody(lab, *words) == 2
    out, err = capsys.readouterr()
    assert out
    assert "of bob cannot be read: it is away" in err
    monkeypatch.setattr(cli_site, "as_tenants", lambda _tenants, _act: {"alice": away, "bob": away})
    assert everybody(lab, *words) == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("session", "said"),
    [
        (ATTESTED, "the reboot was accepted and web1 goes on"),
        ({**FAILED, "error": "HostRebooted"}, "harness tenant guest resume web1 --accept-reboot"),
    ],
    ids=["goes on", "stopped"],
)
def test_a_reboot_that_was_accepted_is_only_to_be_acknowledged(
    lab: Path, operator: Operator, session: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command that accepts a reboot is suggested only for a guest that has stopped for it."""
    operator.guest_now = {**GUEST, "attestation": session}
    operator.answers["alarms"] = [{**ALARM, "kind": "HostRebooted", "agent_id": AGENT_ID}]
    assert alice(lab, "alarms") == 1
    err = capsys.readouterr().err
    assert said in err
    assert ("--accept-reboot" in err) == (session is not ATTESTED)


def test_the_audit_trail_of_all_tenants_says_whose_it_is(
    lab: Path, operator: Operator, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --tenant each row begins with the tenant."""
    operator.answers["audit"] = [{**ENTRY, "subject": AGENT_ID, "reason": "x"}]
    assert everybody(lab, "audit") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["tenant", "alice", "bob"]


def test_the_audit_trail_is_shown(lab: Path, operator: Operator, capsys: pytest.CaptureFixture[str]) -> None:
    """Who did what to whom and why; programs get the members."""
    operator.answers["audit"] = [{**ENTRY, "subject": AGENT_ID, "reason": "firmware update"}]
    assert alice(lab, "audit") == 0
    row = capsys.readouterr().out.splitlines()[1]
    assert {"alice/tenant-operator/operator", "resume", AGENT_ID, "firmware"} <= set(row.split())
    assert alice(lab, "audit", "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["service"] == "verifier"
