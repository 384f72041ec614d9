"""`harness provider`: hosts, guests, released vTPMs and the audit trail: what is asked, shown and refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from harness import lab_site, unix_client
from harness.errors import Conflict, LocalRefusal, NotFound, PeerUnreachable
from tests.support.cli_operators import (
    AGENT_ID,
    GUEST,
    HOST,
    HOST_ID,
    OTHER_AGENT_ID,
    OTHER_HOST_ID,
    Operator,
    run,
)

WHY = ["--reason", "ticket 4711"]


class Sockets:
    """Local services that write down what they are asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, object]]] = []
        self.answer: dict[str, object] = {}
        self.refusal: Exception | None = None

    async def ask(self, path: Path, request: Mapping[str, object], *, deadline_s: float) -> dict[str, object]:
        """In place of `unix_client.ask`."""
        assert 0 < deadline_s < 600
        self.asked.append((path.name, dict(request)))
        if self.refusal is not None:
            raise self.refusal
        return self.answer


@pytest.fixture
def sockets(monkeypatch: pytest.MonkeyPatch) -> Sockets:
    """Local services instead of sockets."""
    fake = Sockets()
    monkeypatch.setattr(unix_client, "ask", fake.ask)
    return fake


def provider(lab: Path, *words: str) -> int:
    """Exit code of a command of the provider's operator."""
    return run("provider", *words, "--lab", str(lab))


# --- hosts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("typed", [HOST_ID, HOST_ID[:5], "host1"])
def test_a_host_is_removed_by_id_prefix_or_name(lab: Path, operator: Operator, typed: str) -> None:
    """The registrar gets the complete id and the reason."""
    assert provider(lab, "host", "remove", typed, *WHY) == 0
    assert operator.acts("remove_host") == [("remove_host", HOST_ID, "ticket 4711")]


def test_a_host_with_guests_stays(lab: Path, operator: Operator, capsys: pytest.CaptureFixture[str]) -> None:
    """The registrar's conflict ends with 1 and its own sentence."""
    operator.refusals["remove_host"] = Conflict("guests are defined on it")
    assert provider(lab, "host", "remove", HOST_ID, *WHY) == 1
    assert "harness: guests are defined on it" in capsys.readouterr().err


def test_a_host_is_replaced_by_what_its_agent_announces(
    lab: Path, operator: Operator, capsys: pytest.CaptureFixture[str]
) -> None:
    """The list shows the other TPM's id, and `replace` takes the beginnings of both."""
    operator.answers["hosts"] = [{**HOST, "name": "host1", "replacement": OTHER_HOST_ID}]
    assert provider(lab, "host", "list") == 0
    assert f"announces another TPM: {OTHER_HOST_ID}" in capsys.readouterr().out
    assert provider(lab, "host", "replace", HOST_ID[:4], OTHER_HOST_ID[:4], *WHY) == 0
    assert operator.acts("replace_host") == [("replace_host", HOST_ID, OTHER_HOST_ID, "ticket 4711")]


@pytest.mark.parametrize("typed", [OTHER_HOST_ID, OTHER_HOST_ID[:5], "host2"])
def test_a_guest_is_put_on_another_host(lab: Path, operator: Operator, typed: str) -> None:
    """The registrar gets both complete ids and the reason; the guest's own host is not asked for anything."""
    operator.answers["hosts"] = [
        {**HOST, "name": "host1", "replacement": None},
        {**HOST, "host_id": OTHER_HOST_ID, "name": "host2", "replacement": None},
    ]
    assert provider(lab, "guest", "move", "web1", "--host", typed, *WHY) == 0
    assert operator.acts("move_guest") == [("move_guest", AGENT_ID, OTHER_HOST_ID, "ticket 4711")]


@pytest.mark.parametrize(
    "words",
    [
        ["host", "remove", HOST_ID],
        ["host", "replace", HOST_ID, OTHER_HOST_ID],
        ["guest", "release", AGENT_ID],
        ["guest", "move", AGENT_ID, "--host", OTHER_HOST_ID],
    ],
    ids=" ".join,
)
def test_acts_on_hosts_and_their_journals_need_a_reason(lab: Path, operator: Operator, words: list[str]) -> None:
    """Without one the command ends with 2 and nobody is asked."""
    assert provider(lab, *words) == 2
    assert operator.asked == []


@pytest.mark.parametrize("reason", [None, "contract ended"])
def test_tenants_come_and_go_with_or_without_a_reason(lab: Path, operator: Operator, reason: str | None) -> None:
    """`tenant add`, `allow` and `remove` hand on the reason that was given, and no other."""
    (lab / "ca.pem").write_text("PEM")
    why = [] if reason is None else ["--reason", reason]
    assert provider(lab, "tenant", "add", "carol", "--ca", str(lab / "ca.pem"), *why) == 0
    assert provider(lab, "tenant", "allow", "carol", *why) == 0
    assert provider(lab, "tenant", "remove", "carol", *why) == 0
    assert [call[-1] for call in operator.asked if call[0] != "hosts"] == [reason] * 3


# --- guests -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("typed", [AGENT_ID, AGENT_ID[:6], "web1"])
@pytest.mark.parametrize("order", ["start", "stop"])
def test_orders_reach_the_guests_own_host(
    lab: Path, operator: Operator, sockets: Sockets, typed: str, order: str
) -> None:
    """A guest is found by id, the beginning of it, or name; its host's manager gets the order."""
    assert provider(lab, "guest", order, typed) == 0
    assert sockets.asked == [("g", {"op": order, "uuid": AGENT_ID})]


def test_an_ambiguous_guest_gets_no_order(lab: Path, operator: Operator, sockets: Sockets) -> None:
    """Two guests of one name, or one beginning, end with 2."""
    guest = {**GUEST, "name": "web1", "tenant": "alice"}
    operator.answers["guests"] = [guest, {**guest, "agent_id": OTHER_AGENT_ID}]
    assert provider(lab, "guest", "start", "web1") == 2
    assert provider(lab, "guest", "start", AGENT_ID[:4]) == 2
    assert sockets.asked == []


def test_an_unknown_complete_id_gets_no_order(lab: Path, operator: Operator, sockets: Sockets) -> None:
    """A UUID that the registrar does not know is unusable input."""
    assert provider(lab, "guest", "start", OTHER_AGENT_ID) == 2
    assert sockets.asked == []


def test_a_vtpm_is_released_on_its_host(lab: Path, operator: Operator, sockets: Sockets) -> None:
    """`release` goes to the host agent's local socket, with the reason."""
    assert provider(lab, "guest", "release", "web1", *WHY) == 0
    assert sockets.asked == [("l", {"op": "release", "agent_id": AGENT_ID, "reason": "ticket 4711"})]


def test_a_vtpm_of_a_guest_that_is_gone_is_released_by_id_and_host(
    lab: Path, operator: Operator, sockets: Sockets
) -> None:
    """With a complete id and a host the registrar is not asked: it may have forgotten the guest."""
    assert provider(lab, "guest", "release", OTHER_AGENT_ID, "--host", "host1", *WHY) == 0
    assert operator.asked == []
    assert sockets.asked[0][1]["agent_id"] == OTHER_AGENT_ID


@pytest.mark.parametrize(("error", "code"), [("NotFound", 2), ("Conflict", 1), ("AccessDenied", 1)])
def test_what_the_host_agent_refuses_has_the_code_of_its_error(
    lab: Path, operator: Operator, sockets: Sockets, error: str, code: int
) -> None:
    """An unknown guest is unusable input; a state or a user that forbids it is a finding."""
    sockets.refusal = LocalRefusal("refused", error=error)
    assert provider(lab, "guest", "release", AGENT_ID, *WHY) == code


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--scenario", "nosuch"], "--scenario nosuch: scenarios: 'nosuch' is not one of"),
        (["--scenario", "/none.yml"], "--scenario /none.yml: /none.yml: cannot be read"),
        (["--host", "host9"], "--host host9: this lab has host1"),
    ],
)
def test_a_guest_that_cannot_be_is_not_defined(
    lab: Path, operator: Operator, sockets: Sockets, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    """What it shall boot, and where, is judged before anything is recorded."""
    assert provider(lab, "guest", "define", "web2", "--tenant", "alice", *words) == 2
    assert said in capsys.readouterr().err
    assert (operator.asked, sockets.asked) == ([], [])


def test_a_name_is_given_once(
    lab: Path, operator: Operator, sockets: Sockets, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second guest of one name is refused; the first one is named."""
    assert provider(lab, "guest", "define", "web1", "--tenant", "alice") == 2
    assert f"web1 is the name of guest {AGENT_ID} already" in capsys.readouterr().err
    assert operator.acts("define_guest") == []


def test_a_guest_is_defined_with_its_image(
    lab: Path,
    operator: Operator,
    sockets: Sockets,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The registrar learns whose it is, and the manager gets the image and what it boots."""
    monkeypatch.setattr(lab_site, "write_image", lambda _site, _plan, _host: lab / "agent.yml")
    words = ["guest", "define", "web2", "--tenant", "alice", "--uuid", OTHER_AGENT_ID, "--json"]
    assert provider(lab, *words) == 0
    assert operator.acts("define_guest") == [("define_guest", OTHER_AGENT_ID, "alice", HOST_ID, "web2")]
    ((socket, order),) = sockets.asked
    assert (socket, order["op"], order["scenario"], order["autostart"]) == ("g", "define", "guest-good", True)
    assert json.loads(capsys.readouterr().out)["agent_id"] == OTHER_AGENT_ID


def test_a_removed_guest_is_undefined_first(lab: Path, operator: Operator, sockets: Sockets) -> None:
    """The registrar forgets it after its vTPM is destroyed."""
    assert provider(lab, "guest", "remove", "web1", *WHY) == 0
    assert sockets.asked == [("g", {"op": "undefine", "uuid": AGENT_ID})]
    assert operator.acts("remove_guest") == [("remove_guest", AGENT_ID, "ticket 4711")]


# --- audit ------------------------------------------------------------------------------------------------


def test_the_trail_is_the_registrars_and_the_hosts(
    lab: Path, operator: Operator, sockets: Sockets, capsys: pytest.CaptureFixture[str]
) -> None:
    """Entries of both are shown in the order of time, with where they are kept."""
    entry: dict[str, Any] = {"who": "uid 0", "action": "vtpm-release", "subject": AGENT_ID, "reason": "x"}
    operator.answers["audit"] = [{**entry, "at": 2.0, "action": "tenant-add"}]
    sockets.answer = {"entries": [{**entry, "at": 1.0}]}
    assert provider(lab, "audit", "--json") == 0
    found = [(each["service"], each["action"]) for each in json.loads(capsys.readouterr().out)]
    assert found == [("host1", "vtpm-release"), ("registrar", "tenant-add")]


def test_a_host_that_does_not_answer_is_named(
    lab: Path, operator: Operator, sockets: Sockets, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rest of the trail is shown, and the code is 1."""
    operator.answers["audit"] = [{"at": 2.0, "who": "x", "action": "tenant-add", "subject": "carol", "reason": "y"}]
    sockets.refusal = PeerUnreachable("/l: no such file")
    assert provider(lab, "audit") == 1
    out, err = capsys.readouterr()
    assert "carol" in out
    assert "the audit trail of host1 cannot be read: /l: no such file" in err


def test_an_unknown_tenant_is_unusable_input(lab: Path, operator: Operator) -> None:
    """A tenant that the registrar does not know (404) ends with 2."""
    operator.refusal = NotFound("no tenant mallory")
    assert provider(lab, "tenant", "remove", "mallory") == 2
