"""`harness tenant status`: all tenants, those that do not answer, watching; completion, and options judged at once."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from harness import cli_complete, cli_show, cli_site, cli_tenant_status, console
from harness.errors import CertificateExpired, NotFound, PeerUnreachable
from tests.support.cli_operators import (
    AGENT_ID,
    ATTESTED,
    FAILED,
    GUEST,
    OTHER_AGENT_ID,
    Operator,
    alice,
    make_lab,
    run,
)


@pytest.fixture
def operator(operator: Operator) -> Operator:
    """The operator, whose guest is attested."""
    operator.guest_now = {**GUEST, "attestation": ATTESTED}
    return operator


def status(lab: Path, *words: str) -> int:
    """Exit code of `harness tenant status`."""
    return run("tenant", "status", "--lab", str(lab), *words)


def test_all_tenants_are_shown_with_exactly_the_promised_members(
    lab: Path, operator: Operator, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --tenant every tenant of the lab is asked; the members are what other programs rely on."""
    assert status(lab, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert [guest["tenant"] for guest in shown["guests"]] == ["alice", "bob"]
    assert shown["guests"][0] == {
        "agent_id": AGENT_ID,
        "tenant": "alice",
        "state": "GET_QUOTE",
        "attested": True,
        "last_success": 50.0,
        "attestations": 3,
        "failed_check": None,
        "error": None,
    }


@pytest.mark.parametrize("by", ["option", "environment"])
def test_one_tenant_may_be_named(
    lab: Path, operator: Operator, by: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """--tenant and HARNESS_TENANT leave the other tenants alone."""
    if by == "environment":
        monkeypatch.setenv("HARNESS_TENANT", "bob")
    assert status(lab, "--json", *(["--tenant", "bob"] if by == "option" else [])) == 0
    assert [guest["tenant"] for guest in json.loads(capsys.readouterr().out)["guests"]] == ["bob"]
    assert status(lab, "--tenant", "mallory") == 2


@pytest.mark.parametrize(
    ("session", "error"),
    [(FAILED, "GuestNotHere"), (NotFound("x"), None), (PeerUnreachable("x"), "PeerUnreachable")],
    ids=["stopped", "not under attestation", "verifier away"],
)
def test_a_guest_that_is_not_attested_is_a_finding(
    lab: Path, operator: Operator, session: Any, error: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stopped guest, one that is only stated, and one whose verifier does not answer are listed and not attested."""
    if isinstance(session, Exception):
        operator.refusals["attestation"] = session
    else:
        operator.guest_now = {**GUEST, "attestation": session}
    assert status(lab, "--json", "--tenant", "alice") == 1
    (guest,) = json.loads(capsys.readouterr().out)["guests"]
    assert (guest["attested"], guest["error"]) == (False, error)
    assert (guest["state"] is None) == isinstance(session, Exception)


def test_a_guest_whose_keys_are_forgotten_is_not_attested(
    lab: Path, operator: Operator, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the registrar has pinned no more is not shown as attested, whatever the verifier still says."""
    operator.guest_now = {**GUEST, "state": "stated", "attestation": ATTESTED}
    assert status(lab, "--json") == 1
    assert not json.loads(capsys.readouterr().out)["guests"][0]["attested"]


def test_a_refused_registration_is_the_error(lab: Path, operator: Operator, capsys: pytest.CaptureFixture[str]) -> None:
    """A guest that cannot register shows what its registrar refused."""
    operator.guest_now = {**GUEST, "state": "stated", "refused": {"error": "KeyChanged", "detail": "x"}}
    operator.refusals["attestation"] = NotFound("x")
    assert status(lab, "--json") == 1
    assert json.loads(capsys.readouterr().out)["guests"][0]["error"] == "KeyChanged"


def test_a_tenant_that_does_not_answer_is_named_and_the_others_are_shown(
    lab: Path, operator: Operator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its guests cannot be listed: standard error says so, and the answer is not "all attested"."""
    answers = {"alice": PeerUnreachable("https://tenant:1 cannot be reached"), "bob": [{**as_shown(), "tenant": "bob"}]}
    monkeypatch.setattr(cli_site, "as_tenants", lambda _tenants, _act: answers)
    assert status(lab) == 1
    out, err = capsys.readouterr()
    assert "the guests of alice cannot be listed: https://tenant:1 cannot be reached" in err
    assert "web1" in out
    assert "1 of 1 guests are attested" in out


class Down:
    """A supervisor that is not there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    async def status(self) -> None:
        """It is down."""


def test_a_lab_that_is_down_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not one error per tenant and service; the exit code is that of services that do not answer."""
    lab = make_lab(tmp_path)
    (lab / "lab.json").touch()
    monkeypatch.setattr("harness.lab_control.LabControl", Down)
    monkeypatch.setattr(cli_site, "tenant_operator", away)
    said = f"harness: the lab in {lab} is down; `harness lab up` starts it\n"
    for code, words in ((1, ["status"]), (2, ["alarms"]), (2, ["guest", "list", "--tenant", "alice"])):
        assert run("tenant", *words, "--lab", str(lab)) == code
        assert capsys.readouterr() == ("", said)


@asynccontextmanager
async def away(_tenant: object) -> AsyncIterator[Operator]:
    """In place of a connection to services that do not answer."""
    fake = Operator()
    fake.refusal = PeerUnreachable("https://tenant:1 cannot be reached")
    yield fake


@pytest.mark.parametrize(
    ("failure", "error", "said"),
    [
        (PeerUnreachable("https://x cannot be reached"), "PeerUnreachable", "https://x cannot be reached"),
        (
            PeerUnreachable("https://x shows a certificate that is not accepted: certificate has expired"),
            "CertificateExpired",
            "renew it with `harness lab renew alice-verifier --reason TEXT`",
        ),
        (CertificateExpired("ours expired; renew it"), "CertificateExpired", "ours expired; renew it"),
    ],
    ids=["away", "its certificate", "our certificate"],
)
def test_of_a_verifier_that_does_not_answer_nothing_is_claimed(
    lab: Path, operator: Operator, failure: Exception, error: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last success is not "never" but unknown, and standard error says why."""
    operator.refusals["attestation"] = failure
    assert status(lab, "--tenant", "alice") == 1
    out, err = capsys.readouterr()
    assert out.splitlines()[1].split() == ["web1", "alice", "no", "-", "-", error]
    assert "the verifier of alice cannot be asked: " in err
    assert said in err


def test_the_layer_is_named(lab: Path, operator: Operator, capsys: pytest.CaptureFixture[str]) -> None:
    """Whether host or guest was refused is said to people; programs get the members that were promised."""
    operator.guest_now = {**GUEST, "attestation": {**FAILED, "failed_check": 9, "error": "ReferenceValueMismatch"}}
    assert status(lab, "--tenant", "alice") == 1
    assert "host, check 9: ReferenceValueMismatch" in capsys.readouterr().out


def as_shown(**changes: Any) -> dict[str, Any]:
    """A guest as `status` shows it."""
    return {
        "agent_id": AGENT_ID,
        "tenant": "alice",
        "state": "GET_QUOTE",
        "attested": True,
        "last_success": 88.0,
        "attestations": 3,
        "failed_check": None,
        "error": None,
        **changes,
    }


@pytest.mark.parametrize("no_color", [True, False])
def test_the_table_fits_80_columns_and_honours_no_color(
    no_color: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Long states and errors are broken into lines; colours are left out when they are not wanted."""
    from rich.console import Console

    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    else:
        monkeypatch.delenv("NO_COLOR", raising=False)
    guests = [
        as_shown(),
        as_shown(
            agent_id=OTHER_AGENT_ID, state="GET_PROVIDER_QUOTE_RETRY", attested=False, failed_check=9, error="X" * 40
        ),
    ]
    standing = cli_tenant_status.Standing(guests, {})
    out = Console(width=80, force_terminal=True, color_system="standard", highlight=False)
    monkeypatch.setattr(console, "console", lambda *_: out)
    with out.capture() as captured:
        out.print(cli_tenant_status.table(standing, {AGENT_ID: "web1"}, 100.0, boxed=True))
    text = captured.get()
    assert ("\x1b[32m" in text) is not no_color
    assert "12 s ago" in text
    assert "web1" in text
    assert OTHER_AGENT_ID not in text


def test_watching_prints_changes_only_and_ends_with_ctrl_c(
    lab: Path, operator: Operator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With --json each change is one line; Ctrl-C ends it with 0."""
    seen = [[as_shown()], [as_shown()], [as_shown(attestations=4)]]

    def ask(_tenants: object) -> cli_tenant_status.Standing:
        if not seen:
            raise KeyboardInterrupt
        return cli_tenant_status.Standing(seen.pop(0), {})

    monkeypatch.setattr(cli_tenant_status, "ask", ask)
    assert status(lab, "--watch", "--json", "--every", "0.001") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["guests"][0]["attestations"] for line in lines] == [3, 4]


def test_watching_ends_when_its_reader_has_gone(
    lab: Path, operator: Operator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A closed pipe is the end of watching, not an error."""

    def gone(_value: object) -> None:
        raise console.OutputGone("standard output cannot be written: Broken pipe")

    monkeypatch.setattr(console, "print_json", gone)
    assert status(lab, "--watch", "--json") == 0
    assert capsys.readouterr().err == ""


# --- options that are judged at once ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["guest", "add", AGENT_ID, "--interval", "0"],
        ["guest", "add", AGENT_ID, "--interval", "nan"],
        ["guest", "add", AGENT_ID, "--every", "0"],
        ["guest", "add", AGENT_ID, "--wait", "inf"],
        ["guest", "add", AGENT_ID, "--wait", "0"],
        ["guest", "add", AGENT_ID, "--wait", "-1"],
        ["guest", "show", AGENT_ID, "--wait", "inf"],
        ["guest", "show", AGENT_ID, "--wait", "-1"],
        ["guest", "re-enrol", AGENT_ID, "--reason", "x", "--wait", "0"],
        ["status", "--every", "0"],
        ["policy", "show", AGENT_ID, "--layer", "neither"],
    ],
    ids=" ".join,
)
def test_options_out_of_range_are_refused_before_anybody_is_asked(
    lab: Path, operator: Operator, words: list[str]
) -> None:
    """What cannot be waited for, or asked, is a usage error at once."""
    assert alice(lab, *words) == 2
    assert operator.asked == []


def test_waiting_for_nothing_is_allowed_where_it_has_a_meaning(lab: Path, operator: Operator) -> None:
    """`guest show --wait 0` shows the guest as it is."""
    assert alice(lab, "guest", "show", AGENT_ID, "--wait", "0") == 0


# --- completion -------------------------------------------------------------------------------------------


class Context:
    """What the shell has typed so far."""

    def __init__(self, lab: Path | None) -> None:
        self.params = {"lab": lab}


def test_completion_offers_what_the_site_knows(lab: Path) -> None:
    """Tenants, hosts, and guests by name or id, from files alone."""
    context: Any = Context(lab)
    assert cli_complete.tenants(context, "") == ["alice", "bob"]
    assert cli_complete.tenants(context, "b") == ["bob"]
    assert cli_complete.hosts(context, "h") == ["host1"]
    assert cli_complete.guests(context, "w") == ["web1"]
    assert cli_complete.guests(context, AGENT_ID[:3]) == [AGENT_ID]
    assert cli_complete.services("tenant-v") == ["tenant-verifier"]
    assert "guest-good" in cli_complete.scenarios("guest")
    assert cli_complete.lab_services(context, "host1-") == ["host1-agent", "host1-guests", "host1-tpm"]
    assert cli_complete.lab_services(context, "b") == ["bob-registrar", "bob-verifier"]
    assert cli_complete.lab_services(context, "p") == ["provider-registrar", "provider-verifier"]
    assert cli_complete.certified(context, "host1") == ["host1-agent"]
    assert cli_complete.certified(context, "agent-") == ["agent-web1"]
    assert cli_complete.certified(context, "alice-") == [
        "alice-client",
        "alice-operator",
        "alice-registrar",
        "alice-verifier",
    ]
    assert "provider-operator" in cli_complete.certified(context, "")
    assert cli_complete.logs(context, "") == []


def test_completion_without_a_lab_offers_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No lab, and a site that cannot be used, are no error of the shell."""
    monkeypatch.chdir(tmp_path)
    missing: Any = Context(None)
    (tmp_path / "site.yml").write_text("nonsense")
    broken: Any = Context(tmp_path)
    for context in (missing, broken):
        assert cli_complete.tenants(context, "") == cli_complete.guests(context, "") == []
        assert cli_complete.hosts(context, "") == []
        assert cli_complete.lab_services(context, "") == cli_complete.certified(context, "") == []
        assert cli_complete.logs(context, "") == []


# --- words for people -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "said"),
    [
        (None, "never"),
        (True, "never"),
        (1000.0, "0 s ago"),
        (1000.4, "0 s ago"),
        (988.0, "12 s ago"),
        (1000.0 - 119, "119 s ago"),
        (1000.0 - 600, "10 min ago"),
        (1000.0 - 7200, "2 h ago"),
        (1000.0 - 2 * 86_400, "2 d ago"),
        (1010.0, "in 10 s"),
    ],
)
def test_times_are_said_as_people_do(at: object, said: str) -> None:
    """Seconds, minutes, hours and days; a time to come is one."""
    assert cli_show.ago(at, 1000.0) == said


def test_short_ids_stay_different() -> None:
    """Ids are cut to eight characters, and to more where two would be equal; where there is room they are whole."""
    short = cli_show.shortener([AGENT_ID, OTHER_AGENT_ID], wide=False)
    assert (short(AGENT_ID), short(OTHER_AGENT_ID)) == (AGENT_ID[:10], OTHER_AGENT_ID[:10])
    assert cli_show.shortener([AGENT_ID], wide=False)(AGENT_ID) == AGENT_ID[:8]
    assert cli_show.shortener([AGENT_ID], wide=False)(None) == "-"
    assert cli_show.shortener([AGENT_ID, OTHER_AGENT_ID], wide=True)(AGENT_ID) == AGENT_ID
