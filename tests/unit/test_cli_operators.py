"""`harness tenant` and `harness provider`: what they ask of the operators, what they print, and how they end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness import cli_show
from harness.errors import CertificateRefused, NotFound
from harness.lab_topology import EXAMPLE
from tests.support.cli_operators import (
    AGENT_ID,
    GUEST,
    HOST_ID,
    POLICY,
    Operator,
    alice,
    run,
)

# --- which lab, which tenant, which host ------------------------------------------------------------------


@pytest.mark.parametrize("words", [["tenant", "host", "list"], ["lab", "status"]], ids=" ".join)
def test_without_a_lab_the_way_to_one_is_said(
    operator: Operator,
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No --lab, no HARNESS_LAB and no lab.yml here is unusable input, and nothing is asked."""
    monkeypatch.chdir(tmp_path)
    assert run(*words) == 2
    assert "which lab? give its folder or lab.yml with --lab or HARNESS_LAB; `harness lab up` starts one" in (
        capsys.readouterr().err
    )
    assert operator.asked == []


def test_a_lab_that_was_never_started_is_named(
    tmp_path: Path, operator: Operator, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder without a site is unusable input; the sentence says how a lab is started."""
    assert run("tenant", "host", "list", "--lab", str(tmp_path)) == 2
    assert f"{tmp_path}: holds no lab that was started; `harness lab up` starts one" in capsys.readouterr().err


@pytest.mark.parametrize("stated", ["folder", "file", "folder of the file", "here"])
def test_a_lab_is_its_folder_or_its_topology_file(
    lab: Path, operator: Operator, stated: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--lab takes the lab's folder, its lab.yml or the folder of that; without it lab.yml is used when it is here."""
    home = lab / "home"
    home.mkdir()
    (home / "lab.yml").write_text(EXAMPLE + f"\nfolder: {lab}\n")
    monkeypatch.chdir(home if stated == "here" else lab)
    option = {"folder": lab, "file": home / "lab.yml", "folder of the file": home}.get(stated)
    words = ["tenant", "host", "list", "--tenant", "alice"]
    assert run(*words, *(["--lab", str(option)] if option else [])) == 0
    assert operator.asked == [("hosts",)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tenant", "host", "list"], "which tenant? give --tenant NAME or HARNESS_TENANT: alice, bob"),
        (["tenant", "host", "list", "--tenant", "mallory"], "--tenant mallory: this lab has alice, bob"),
        (["tenant", "host", "show", "x", "--tenant", "alice"], "no host x; `harness tenant host list` shows them all"),
        (["tenant", "guest", "show", AGENT_ID.upper(), "--tenant", "alice"], "no guest 6F1D2C3B"),
        (["tenant", "guest", "add", AGENT_ID, "--tenant", "alice", "--payload", "/none"], "--payload /none"),
        (["tenant", "guest", "add", AGENT_ID, "--tenant", "alice", "--host", "x"], "no host x"),
        (["provider", "tenant", "add", "carol", "--ca", "/none"], "--ca /none: cannot be read"),
        (["provider", "tenant", "allow", "alice", "--pcrs", "0-x"], "--pcrs 0-x: must be a list"),
        (["provider", "tenant", "allow", "alice", "--pcrs", "24"], "--pcrs 24: must be a list"),
        (["provider", "tenant", "allow", "alice", "--pcrs", "7-0"], "--pcrs 7-0: names no PCR"),
        (["provider", "tenant", "allow", "alice", "--bank", "sha1"], "--bank sha1"),
        (["provider", "tenant", "allow", "alice", "--host", "host9"], "--host host9: this lab has host1"),
        (["provider", "guest", "define", "web1", "--tenant", "mallory"], "--tenant mallory: this lab has alice, bob"),
        (["provider", "guest", "define", "web1", "--tenant", "alice", "--uuid", "x"], "--uuid must be a UUID"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_named_and_asks_nobody(
    lab: Path, operator: Operator, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    """An argument that cannot be used ends with 2 and a sentence that names it; nothing was changed anywhere."""
    assert run(*words, "--lab", str(lab)) == 2
    assert said in capsys.readouterr().err
    assert {asked[0] for asked in operator.asked} <= {"hosts", "stated"}


def test_the_environment_names_lab_and_tenant(lab: Path, operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    """HARNESS_LAB and HARNESS_TENANT stand for the options."""
    monkeypatch.setenv("HARNESS_LAB", str(lab))
    monkeypatch.setenv("HARNESS_TENANT", "bob")
    assert run("tenant", "host", "list") == 0
    assert operator.asked == [("hosts",)]


def test_a_policy_that_is_none_is_named_with_its_file(
    lab: Path, operator: Operator, capsys: pytest.CaptureFixture[str]
) -> None:
    """A policy file with another form ends with 2, and the file is named."""
    bad = lab / "bad.json"
    bad.write_text('{"sha1": {}}')
    assert alice(lab, "guest", "add", AGENT_ID, "--host-policy", str(bad)) == 2
    assert str(bad) in capsys.readouterr().err
    assert operator.asked == []


# --- what is asked ----------------------------------------------------------------------------------------


def test_a_host_is_enrolled_at_the_stated_or_the_sites_provider(lab: Path, operator: Operator) -> None:
    """Without a URL the site's provider verifier is used, else the stated one."""
    assert alice(lab, "host", "add") == 0
    assert alice(lab, "host", "add", "https://other") == 0
    assert operator.asked == [("add_host", "https://provider:2"), ("add_host", "https://other")]


def test_a_guest_is_stated_awaited_and_admitted(lab: Path, operator: Operator) -> None:
    """`guest add` takes the only enrolled host and the site's policies, and hands over the payload."""
    secret = lab / "secret"
    secret.write_bytes(b"secret")
    assert alice(lab, "guest", "add", AGENT_ID, "--payload", str(secret), "--wait", "5") == 0
    names = [asked[0] for asked in operator.asked]
    assert names == ["hosts", "state_guest", "registered", "admit"]
    assert [str(part) for part in operator.asked[1][1:]] == [AGENT_ID, HOST_ID]
    assert operator.asked[2][2] == 5
    order = operator.asked[3][2]
    assert (order.payload, order.provider_verifier) == (b"secret", "https://provider:2")
    assert order.host_policy.encode() == POLICY


def test_a_guest_without_host_quotes_has_no_provider(lab: Path, operator: Operator) -> None:
    """`--guest-only` asks for no quote of the host."""
    assert alice(lab, "guest", "add", AGENT_ID, "--guest-only", "--host", HOST_ID) == 0
    assert operator.asked[-1][2].provider_verifier is None


def test_a_refused_registration_is_a_finding(lab: Path, operator: Operator, capsys: pytest.CaptureFixture[str]) -> None:
    """What the registrar refuses ends with 1 and the registrar's own sentence."""
    operator.refusal = CertificateRefused("the vTPM's certificate is of another host's CA")
    assert alice(lab, "guest", "add", AGENT_ID, "--host", HOST_ID) == 1
    assert "harness: the vTPM's certificate is of another host's CA" in capsys.readouterr().err


@pytest.mark.parametrize(("attestation", "code"), [(None, 1), ({"attested": False}, 1), ({"attested": True}, 0)])
def test_show_tells_by_its_exit_code_whether_a_guest_is_attested(
    lab: Path, operator: Operator, attestation: object, code: int
) -> None:
    """`guest show` is 0 for a guest that is attested now, else 1."""
    operator.guest_now = {**GUEST, "attestation": attestation}
    assert alice(lab, "guest", "show", AGENT_ID) == code


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (["tenant", "host", "remove", HOST_ID, "--tenant", "alice"], "remove_host"),
        (["tenant", "guest", "remove", AGENT_ID, "--tenant", "alice"], "remove_guest"),
        (["tenant", "host", "show", HOST_ID, "--tenant", "alice"], "host"),
        (["tenant", "alarms", "--tenant", "alice"], "alarms"),
        (["provider", "tenant", "list"], "tenants"),
        (["provider", "tenant", "remove", "alice"], "remove_tenant"),
        (["provider", "guest", "list"], "guests"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_each_command_asks_for_one_thing(lab: Path, operator: Operator, words: list[str], asked: str) -> None:
    """A command makes the one call that it is named after."""
    assert run(*words, "--lab", str(lab)) == 0
    assert [call[0] for call in operator.asked] == [asked]


def test_what_a_tenant_may_see_is_read_as_a_list(lab: Path, operator: Operator) -> None:
    """`allow` reads single PCRs and ranges and asks for the host by its name."""
    assert run("provider", "tenant", "allow", "carol", "--pcrs", "0-2,14", "--bank", "sha384", "--lab", str(lab)) == 0
    name, host_id, allowlist = operator.asked[-1][1:4]
    assert (name, str(host_id)) == ("carol", HOST_ID)
    assert [(bank.text, mask) for bank, mask in allowlist.banks] == [("sha384", 0b100000000000111)]


def test_an_unknown_guest_is_unusable_input(lab: Path, operator: Operator, capsys: pytest.CaptureFixture[str]) -> None:
    """A guest that the provider does not know ends with 2 and the way to the list."""
    assert run("provider", "guest", "start", "nobody", "--lab", str(lab)) == 2
    assert "no guest nobody; `harness provider guest list` shows them all" in capsys.readouterr().err


def test_what_a_service_does_not_know_is_unusable_input(lab: Path, operator: Operator) -> None:
    """An id that was typed and does not exist is 2."""
    operator.refusal = NotFound("no host")
    assert alice(lab, "host", "show", HOST_ID) == 2


# --- what is printed --------------------------------------------------------------------------------------


def test_json_is_what_the_service_answered(lab: Path, operator: Operator, capsys: pytest.CaptureFixture[str]) -> None:
    """Programs get the service's own members."""
    assert alice(lab, "guest", "list", "--json") == 0
    (guest,) = json.loads(capsys.readouterr().out)
    assert guest["attestation"]["error"] == "GuestNotHere"


def test_tables_show_why_a_guest_was_refused(lab: Path, operator: Operator, capsys: pytest.CaptureFixture[str]) -> None:
    """People see state, payload and the error in one row."""
    assert alice(lab, "guest", "list") == 0
    row = capsys.readouterr().out.splitlines()[1]
    assert AGENT_ID in row
    assert {"FAILED", "no", "locked", "GuestNotHere"} <= set(row.split())


def test_allowlists_are_shown_as_they_are_given(
    lab: Path, operator: Operator, capsys: pytest.CaptureFixture[str]
) -> None:
    """PCRs in a row are a range, in the form that `allow --pcrs` takes."""
    operator.allowlist = [0, 1, 2, 7, 14, 15]
    assert run("provider", "tenant", "list", "--lab", str(lab)) == 0
    assert "sha256: 0-2,7,14-15" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "-"), (True, "yes"), (False, "no"), (0, "0"), ("x", "x")],
)
def test_values_are_shown_as_people_read_them(value: object, shown: str) -> None:
    """Nothing is a dash, truth is yes or no."""
    assert cli_show.text(value) == shown


def test_times_are_shown_in_utc() -> None:
    """A time is a date in UTC; what is no time is a dash."""
    assert cli_show.time(0) == "1970-01-01T00:00:00Z"
    assert cli_show.time(None) == cli_show.time(True) == "-"


def test_keys_are_cut_for_people_and_whole_for_programs(
    lab: Path, operator: Operator, capsys: pytest.CaptureFixture[str]
) -> None:
    """A key's hundreds of characters fill no terminal; --json has them all."""
    operator.answers["host"] = {"host_id": HOST_ID, "ek": "A" * 400}
    assert alice(lab, "host", "show", HOST_ID) == 0
    assert "A" * 16 + "… (400 characters, whole in --json)" in capsys.readouterr().out
    assert alice(lab, "host", "show", HOST_ID, "--json") == 0
    assert json.loads(capsys.readouterr().out)["ek"] == "A" * 400
