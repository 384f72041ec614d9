"""The operator's ways back: resume, an accepted reboot, other reference values; each audited, none half done."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from harness.errors import Conflict, MalformedMessage, NotYourGuest, StoreError
from harness.store import Store
from harness.tenant.agents import Agents
from harness.tenant.alarms_store import AlarmStore
from tests.support.manual_time import settle
from tests.support.tenant_wire import AGENT, Wire
from tests.support.verifier_peers import ACT, WAIT_S, FakePeers, body, opened, until, verifier


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Store]:
    async with opened(tmp_path) as store:
        yield store


async def audited(database: Store) -> list[tuple[str, str, str, str]]:
    """The trail after the entry of the one that added the agent."""
    added, *entries = await AlarmStore(database).audit()
    assert (added.action, added.subject) == ("agent-add", str(AGENT))
    return [(entry.action, entry.subject, entry.who, entry.reason) for entry in entries]


def entry(action: str) -> tuple[str, str, str, str]:
    return (action, str(AGENT), ACT.who, ACT.reason)


async def test_an_agent_that_is_added_is_audited_in_the_same_transaction(
    database: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who, what and why; an add that cannot be recorded does not happen."""
    peers = FakePeers(Wire())
    async with verifier(database, peers) as agents:
        with monkeypatch.context() as patch:
            patch.setattr("harness.audit_store.record", failing)
            with pytest.raises(StoreError):
                await agents.add(AGENT, body(peers.wire), ACT)
        assert agents.ids() == []
        await agents.add(AGENT, body(peers.wire), ACT)
    entries = await AlarmStore(database).audit()
    assert [(each.action, each.subject, each.who, each.reason) for each in entries] == [entry("agent-add")]


async def test_a_resume_is_audited_before_it_is_in_force(database: Store) -> None:
    """Who, what and why; the session starts anew, and survives a kill right after as one that goes on."""
    peers = FakePeers(Wire())
    peers.wire.guest.script = [NotYourGuest("no")]
    async with verifier(database, peers) as agents:
        await agents.add(AGENT, body(peers.wire), ACT)
        await until(agents, AGENT, state="FAILED")
        await agents.resume(AGENT, ACT)
        await until(agents, AGENT, attested=True)
        with pytest.raises(Conflict):
            await agents.resume(AGENT, ACT)
    assert await audited(database) == [entry("resume")]


async def test_a_resume_that_cannot_be_recorded_does_not_happen(
    database: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database fails: the operator is told, the session stays stopped, and there is no entry."""
    peers = FakePeers(Wire())
    peers.wire.guest.script = [NotYourGuest("no")]
    async with verifier(database, peers) as agents:
        await agents.add(AGENT, body(peers.wire), ACT)
        await until(agents, AGENT, state="FAILED")
        with monkeypatch.context() as patch:
            patch.setattr("harness.audit_store.record", failing)
            with pytest.raises(StoreError):
                await agents.resume(AGENT, ACT)
        await settle()
        assert agents.view(AGENT)["state"] == "FAILED"
        await agents.resume(AGENT, ACT)
        await until(agents, AGENT, attested=True)


def failing(*_: object) -> None:
    raise StoreError("disk full")


async def test_a_refused_reboot_is_accepted_by_the_operator(database: Store) -> None:
    """Resume alone does not help: the counters are refused again; accepted, they are the baseline and rounds go on."""
    peers = FakePeers(Wire())
    time = peers.wire.time
    async with verifier(database, peers) as agents:
        await agents.add(AGENT, body(peers.wire), ACT)
        await until(agents, AGENT, attested=True)
        peers.wire.guest.tpm.reboot()
        await time.advance(2.0)
        await until(agents, AGENT, state="INVALID_QUOTE", error="HostRebooted")
        await agents.resume(AGENT, ACT)
        await until(agents, AGENT, state="INVALID_QUOTE", error="HostRebooted")
        await agents.resume(AGENT, ACT, accept_reboot=True)
        await until(agents, AGENT, attested=True, error=None)
    assert await audited(database) == [entry("resume")] * 2


async def test_a_refused_reboot_is_still_known_after_a_restart(database: Store) -> None:
    """The operator accepts it the next day, in another process."""
    peers = FakePeers(Wire())
    async with verifier(database, peers) as agents:
        await agents.add(AGENT, body(peers.wire), ACT)
        await until(agents, AGENT, attested=True)
        peers.wire.guest.tpm.reboot()
        await peers.wire.time.advance(2.0)
        await until(agents, AGENT, state="INVALID_QUOTE")
    async with verifier(database, peers) as agents:
        await agents.resume(AGENT, ACT, accept_reboot=True)
        await until(agents, AGENT, attested=True)


async def test_without_a_refused_reboot_there_is_none_to_accept(database: Store) -> None:
    """Stopped for another reason: 409, and it stays stopped; a session that runs: 409 as well."""
    peers = FakePeers(Wire())
    peers.wire.guest.script = [NotYourGuest("no")]
    async with verifier(database, peers) as agents:
        await agents.add(AGENT, body(peers.wire), ACT)
        await until(agents, AGENT, state="FAILED")
        with pytest.raises(Conflict, match="reboot"):
            await agents.resume(AGENT, ACT, accept_reboot=True)
        assert agents.view(AGENT)["state"] == "FAILED"
        await agents.resume(AGENT, ACT)
        await until(agents, AGENT, attested=True)
        with pytest.raises(Conflict):
            await agents.resume(AGENT, ACT, accept_reboot=True)
    assert await audited(database) == [entry("resume")]


# --- reference values ---------------------------------------------------------------------------------------------


def policy(value: bytes) -> dict[str, Any]:
    return {"guest_policy": {"sha256": {"0": [value.hex()]}}}


async def test_new_values_are_captured_set_and_believed_after_resume(database: Store) -> None:
    """An updated kernel stops the session; what was seen becomes the policy; stopped it stays until it is resumed."""
    peers = FakePeers(Wire())
    async with verifier(database, peers) as agents:
        await agents.add(AGENT, body(peers.wire), ACT)
        await until(agents, AGENT, attested=True)
        peers.wire.guest.tpm.pcrs[0] = bytes(range(32))
        await peers.wire.time.advance(2.0)
        await until(agents, AGENT, state="INVALID_QUOTE", failed_check=9)
        seen: Any = agents.policy(AGENT)["seen"]
        assert seen["host"] is None
        assert seen["guest"]["pcrs"] == {
            "sha256": {"0": bytes(range(32)).hex(), "4": peers.wire.guest.tpm.pcrs[4].hex()}
        }
        captured = bytes.fromhex(seen["guest"]["pcrs"]["sha256"]["0"])
        await agents.set_policy(AGENT, policy(captured), ACT)
        await settle()
        assert agents.view(AGENT)["state"] == "INVALID_QUOTE"
        assert agents.policy(AGENT)["guest_policy"] == policy(captured)["guest_policy"]
        await agents.resume(AGENT, ACT)
        await until(agents, AGENT, attested=True)
    assert await audited(database) == [entry("policy-set"), entry("resume")]


async def test_a_running_session_is_judged_by_the_new_values_at_once(database: Store) -> None:
    """The last success was one under the earlier values: it does not count, and the next round fails check 9."""
    peers = FakePeers(Wire())
    async with verifier(database, peers) as agents:
        await agents.add(AGENT, body(peers.wire), ACT)
        await until(agents, AGENT, attested=True)
        await agents.set_policy(AGENT, policy(bytes(32)), ACT)
        view = agents.view(AGENT)
        assert (view["attested"], view["last_successful_attestation"]) == (False, None)
        await until(agents, AGENT, state="INVALID_QUOTE", failed_check=9)


async def test_a_round_under_the_earlier_values_does_not_count(database: Store) -> None:
    """The guest's answer is on its way when the values change: it is not appraised, by neither values."""
    peers = FakePeers(Wire())
    async with verifier(database, peers) as agents:
        await agents.add(AGENT, body(peers.wire), ACT)
        await until(agents, AGENT, attested=True)
        peers.wire.guest.gate.clear()
        await peers.wire.time.advance(2.0)
        asked = len(peers.wire.guest.asked)
        await agents.set_policy(AGENT, policy(bytes(32)), ACT)
        peers.wire.guest.gate.set()
        view = await until(agents, AGENT, state="INVALID_QUOTE", failed_check=9)
        assert view["attestation_count"] == 1
        assert len(peers.wire.guest.asked) == asked + 1


async def test_new_values_survive_a_restart(database: Store) -> None:
    """They are stored before they are in force; nobody is attested by a success under the earlier ones."""
    peers = FakePeers(Wire())
    async with verifier(database, peers) as agents:
        await agents.add(AGENT, body(peers.wire), ACT)
        await until(agents, AGENT, attested=True)
        peers.wire.guest.gate.clear()
        await agents.set_policy(AGENT, policy(bytes(32)), ACT)
    async with verifier(database, peers) as agents:
        assert agents.policy(AGENT)["guest_policy"] == policy(bytes(32))["guest_policy"]
        await peers.wire.time.advance(2.0)
        assert not agents.view(AGENT)["attested"]


@pytest.mark.parametrize(
    "policies",
    [
        {"guest_policy": {"sha256": {"7": ["00" * 32]}}},
        {"guest_policy": {"sha256": {}}},
        {"guest_policy": {"sha256": {"0": ["xx"]}}},
        {"guest_policy": {}},
        {"guest_policy": []},
        {"host_policy": {"md5": {"0": ["00"]}}},
    ],
)
async def test_values_that_cannot_be_judged_by_are_refused_as_at_the_add(
    database: Store, policies: dict[str, Any]
) -> None:
    """Wider than the mask, empty, or no digests: refused; the session goes on under the earlier ones, unaudited."""
    peers = FakePeers(Wire())
    async with verifier(database, peers) as agents:
        await agents.add(AGENT, body(peers.wire), ACT)
        before = await until(agents, AGENT, attested=True)
        earlier = agents.policy(AGENT)["guest_policy"]
        with pytest.raises(MalformedMessage):
            await agents.set_policy(AGENT, policies, ACT)
        assert agents.policy(AGENT)["guest_policy"] == earlier
        assert agents.view(AGENT)["last_successful_attestation"] == before["last_successful_attestation"]
    assert await audited(database) == []


@pytest.mark.parametrize("act", ["set_policy", "delete"])
async def test_an_act_that_cannot_be_stored_leaves_the_session_as_it_was(
    database: Store, monkeypatch: pytest.MonkeyPatch, act: str
) -> None:
    """The database fails: the operator is told, and rounds go on under the earlier values."""
    peers = FakePeers(Wire())
    async with verifier(database, peers) as agents:
        await agents.add(AGENT, body(peers.wire), ACT)
        await until(agents, AGENT, attested=True)
        with monkeypatch.context() as patch:
            patch.setattr("harness.audit_store.record", failing)
            with pytest.raises(StoreError):
                await _do(agents, act)
        await until(agents, AGENT, attested=True)
        rounds: Any = agents.view(AGENT)["attestation_count"]
        async with asyncio.timeout(WAIT_S):
            while agents.view(AGENT)["attestation_count"] <= rounds:  # its pause begins when the round before is stored
                await peers.wire.time.advance(1.0)
                await asyncio.sleep(0.005)
    assert await audited(database) == []


async def _do(agents: Agents, act: str) -> None:
    if act == "delete":
        await agents.delete(AGENT, ACT)
    else:
        await agents.set_policy(AGENT, policy(bytes(32)), ACT)


async def test_acts_that_meet_do_not_mix(database: Store) -> None:
    """While one is being stored, another on the same agent is a conflict; a caller who leaves stops nothing half."""
    peers = FakePeers(Wire())
    async with verifier(database, peers) as agents:
        await agents.add(AGENT, body(peers.wire), ACT)
        await until(agents, AGENT, attested=True)
        first = asyncio.create_task(agents.set_policy(AGENT, policy(bytes(32)), ACT))
        await asyncio.sleep(0)
        for act in ("set_policy", "delete"):
            with pytest.raises(Conflict):
                await _do(agents, act)
        first.cancel()
        await asyncio.wait({first})
        await until(agents, AGENT, state="INVALID_QUOTE", failed_check=9)
        assert agents.policy(AGENT)["guest_policy"] == policy(bytes(32))["guest_policy"]
    assert await audited(database) == [entry("policy-set")]


# --- findings that wait for the database --------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [True, False], ids=["act is stored", "act fails"])
@pytest.mark.parametrize("act", ["set_policy", "delete"])
async def test_an_act_loses_no_alarm_that_waits_for_the_database(
    database: Store, monkeypatch: pytest.MonkeyPatch, act: str, stored: bool
) -> None:
    """A finding cannot be stored, and an act ends its session: its alarm is raised once, whatever comes of the act."""
    peers = FakePeers(Wire())
    async with verifier(database, peers) as agents:
        await agents.add(AGENT, body(peers.wire), ACT)
        await until(agents, AGENT, attested=True)
        peers.wire.guest.tpm.pcrs[0] = bytes(32)
        with monkeypatch.context() as patch:
            tried = asyncio.Event()

            def locked(*_: object) -> None:
                tried.set()
                raise StoreError("locked")

            patch.setattr("harness.tenant.rounds_store.put_clocks", locked)
            await peers.wire.time.advance(2.0)
            async with asyncio.timeout(WAIT_S):
                await tried.wait()
            await settle()
        assert await AlarmStore(database).alarms() == []
        if stored:
            await _do(agents, act)
        else:
            with monkeypatch.context() as patch:
                patch.setattr("harness.audit_store.record", failing)
                with pytest.raises(StoreError):
                    await _do(agents, act)
            assert agents.view(AGENT)["state"] == "INVALID_QUOTE"
        async with asyncio.timeout(WAIT_S):
            while not await AlarmStore(database).alarms():
                await peers.wire.time.advance(1.0)
        await peers.wire.time.advance(600)
        await settle()
        assert [record.alarm.kind for record in await AlarmStore(database).alarms()] == ["ReferenceValueMismatch"]
    left = [] if act == "delete" and stored else ["INVALID_QUOTE"]
    async with verifier(database, peers) as agents:
        assert [agents.view(each)["state"] for each in agents.ids()] == left
