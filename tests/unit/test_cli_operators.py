"""`harness tenant` and `harness provider`: what they ask of the operators, what they print, and how they end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from harness import cli, cli_exit, cli_show, cli_site, config
from harness.errors import CertificateRefused, NotFound

HOST_ID = "3c5d7a0e-1f0b-8a4c-9d2e-5b6f7a8c9d0e"
AGENT_ID = "6f1d2c3b-4a59-4e6f-8a7b-0c1d2e3f4a5b"
POLICY = {"sha256": {"0": ["00" * 32]}}
HOST = {"host_id": HOST_ID, "url": "https://provider", "enrolled_at": 0, "baseline": {"reset_count": 3}}
GUEST = {
    "agent_id": AGENT_ID,
    "host_id": HOST_ID,
    "state": "active",
    "refused": None,
    "attestation": {"state": "FAILED", "attested": False, "payload_released": False, "error": "GuestNotHere"},
}


class Operator:
    """An operator of either side that writes down what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.refusal: Exception | None = None
        self.guest_now: dict[str, Any] = GUEST
        self.allowlist = [0, 7]

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        answers: dict[str, Any] = {
            "hosts": [{**HOST, "name": "host1"}],
            "host": HOST,
            "add_host": [HOST],
            "guests": [{**self.guest_now, "name": "web1", "tenant": "alice", "registered": True}],
            "guest": self.guest_now,
            "alarms": [],
            "tenants": [{"name": "alice", "allowlists": {HOST_ID: {"sha256": self.allowlist}}}],
        }

        async def call(*arguments: Any, **named: Any) -> Any:
            self.asked.append((name, *arguments, *named.values()))
            if self.refusal is not None:
                raise self.refusal
            return answers.get(name)

        return call


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    """A folder that describes a lab with one host and two tenants."""
    policy = tmp_path / "policy.json"
    policy.write_text(json.dumps(POLICY))
    tls = config.TlsSettings(certificate=tmp_path / "c.pem", key=tmp_path / "k.pem", authorities={})
    tenant = config.TenantSite(
        registrar="https://tenant:1",
        verifier="https://tenant:2",
        provider_verifier="https://provider:2",
        operator=tls,
        guest_policy=policy,
        host_policy=policy,
    )
    host = config.HostSite(
        agent="https://host:1",
        guest_manager=tmp_path / "g",
        guests=tmp_path / "guests",
        hardware_control=tmp_path / "c",
        tpm_socket=tmp_path / "t",
    )
    provider = config.ProviderSite(registrar="https://provider:1", verifier="https://provider:2", operator=tls)
    site = config.SiteSettings(
        pki=tmp_path, provider=provider, hosts={"host1": host}, tenants={"alice": tenant, "bob": tenant}
    )
    config.dump(site, tmp_path / cli_site.SITE_FILE)
    return tmp_path


@pytest.fixture
def operator(monkeypatch: pytest.MonkeyPatch) -> Operator:
    """The operator that every command gets instead of connections."""
    fake = Operator()

    def act(_whose: object, act: Callable[[Any], Awaitable[Any]]) -> Any:
        async def run() -> Any:
            return await act(fake)

        return asyncio.run(run())

    monkeypatch.setattr(cli_site, "as_tenant", act)
    monkeypatch.setattr(cli_site, "as_provider", act)
    monkeypatch.delenv("HARNESS_TENANT", raising=False)
    monkeypatch.delenv("HARNESS_LAB", raising=False)
    return fake


def run(*words: str) -> int:
    """Exit code of a command line."""
    return cli_exit.guarded(lambda: cli.app(list(words), prog_name="harness"))


def alice(lab: Path, *words: str) -> int:
    """Exit code of a command of alice's operator."""
    return run("tenant", *words, "--lab", str(lab), "--tenant", "alice")


# --- which lab, which tenant, which host ------------------------------------------------------------------


def test_without_a_lab_the_way_to_one_is_said(operator: Operator, capsys: pytest.CaptureFixture[str]) -> None:
    """No --lab and no HARNESS_LAB is unusable input, and nothing is asked."""
    assert run("tenant", "host", "list") == 2
    assert "which lab? give its folder with --lab DIR or HARNESS_LAB" in capsys.readouterr().err
    assert operator.asked == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tenant", "host", "list"], "which tenant? give --tenant NAME or HARNESS_TENANT: alice, bob"),
        (["tenant", "host", "list", "--tenant", "mallory"], "--tenant mallory: this lab has alice, bob"),
        (["tenant", "host", "show", "x", "--tenant", "alice"], "HOST_ID must be a UUID"),
        (["tenant", "guest", "show", AGENT_ID.upper(), "--tenant", "alice"], "AGENT_ID must be a UUID"),
        (["tenant", "guest", "add", AGENT_ID, "--tenant", "alice", "--payload", "/none"], "--payload /none"),
        (["tenant", "guest", "add", AGENT_ID, "--tenant", "alice", "--host", "x"], "--host must be a UUID"),
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
    assert [asked for asked in operator.asked if asked[0] != "hosts"] == []


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
    name, host_id, allowlist = operator.asked[-1][1:]
    assert (name, str(host_id)) == ("carol", HOST_ID)
    assert [(bank.text, mask) for bank, mask in allowlist.banks] == [("sha384", 0b100000000000111)]


def test_an_unknown_guest_is_a_finding(lab: Path, operator: Operator, capsys: pytest.CaptureFixture[str]) -> None:
    """A guest that the provider does not know ends with 1 and the way to the list."""
    assert run("provider", "guest", "start", "nobody", "--lab", str(lab)) == 1
    assert "no guest nobody; `harness provider guest list` shows them all" in capsys.readouterr().err


def test_what_a_service_does_not_know_is_a_finding(lab: Path, operator: Operator) -> None:
    """A record that does not exist is 1, not an unusable input."""
    operator.refusal = NotFound("no host")
    assert alice(lab, "host", "show", HOST_ID) == 1


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
    assert cli_show.time(0) == "1970-01-01T00:00:00+00:00"
    assert cli_show.time(None) == cli_show.time(True) == "-"
