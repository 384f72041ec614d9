"""All sessions of a verifier: adding, loading after a restart, resuming, deleting, and calls that meet."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import text

from harness.errors import Conflict, MalformedMessage, NotFound, NotYourGuest
from harness.store import Store
from harness.tenant.states import State
from tests.support.manual_time import settle
from tests.support.tenant_wire import AGENT, Wire
from tests.support.verifier_peers import ACT, OTHER, FakePeers, body, opened, until, verifier


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Store]:
    async with opened(tmp_path) as store:
        yield store


async def test_an_added_agent_is_attested(database: Store) -> None:
    """POST, snapshot, plan, session: the view says so, in Keylime's members and ours."""
    peers = FakePeers(Wire())
    async with verifier(database, peers) as agents:
        await agents.add(AGENT, body(peers.wire), ACT)
        view = await until(agents, AGENT, attested=True)
        assert (view["operational_state"], view["state"], view["attestation_count"]) == (3, "GET_QUOTE", 1)
        assert agents.ids() == [AGENT]
        with pytest.raises(Conflict):
            await agents.add(AGENT, body(peers.wire), ACT)


async def test_an_agent_that_is_not_registered_is_not_added(database: Store) -> None:
    """The registrar's answer is the caller's answer; nothing is stored."""
    async with verifier(database, FakePeers(Wire())) as agents:
        with pytest.raises(NotFound):
            await agents.add(OTHER, body(Wire()), ACT)
        assert agents.ids() == []


async def test_a_policy_wider_than_its_mask_is_refused_when_added(database: Store) -> None:
    """DESIGN 3.8: refused at once, not at the first round."""
    peers = FakePeers(Wire())
    async with verifier(database, peers) as agents:
        with pytest.raises(MalformedMessage, match="guest_policy"):
            await agents.add(AGENT, body(peers.wire, guest_mask="0x2"), ACT)
        assert agents.ids() == []
        await agents.add(AGENT, body(peers.wire), ACT)


async def test_two_adds_that_meet_make_one_session(database: Store) -> None:
    """While the registrar is asked, a second POST of the same agent is a conflict."""
    peers = FakePeers(Wire())
    peers.gate.clear()
    async with verifier(database, peers) as agents:
        first = asyncio.create_task(agents.add(AGENT, body(peers.wire), ACT))
        await settle()
        with pytest.raises(Conflict):
            await agents.add(AGENT, body(peers.wire), ACT)
        peers.gate.set()
        await first
        assert agents.ids() == [AGENT]


async def test_a_deleted_agent_is_gone_for_good(database: Store) -> None:
    """Its task has ended, its connections are closed, and a restart does not bring it back; it can be added anew."""
    peers = FakePeers(Wire())
    async with verifier(database, peers) as agents:
        await agents.add(AGENT, body(peers.wire), ACT)
        await until(agents, AGENT, attested=True)
        await agents.delete(AGENT, ACT)
        assert peers.released == [peers.wire.guest]
        for call in (agents.view, agents.policy):
            with pytest.raises(NotFound):
                call(AGENT)
        with pytest.raises(NotFound):
            await agents.resume(AGENT, ACT)
        with pytest.raises(NotFound):
            await agents.delete(AGENT, ACT)
    async with verifier(database, peers) as agents:
        assert agents.ids() == []
        await agents.add(AGENT, body(peers.wire), ACT)


async def test_a_restarted_verifier_goes_on(database: Store) -> None:
    """Rounds are counted on; the same keys and policies are believed, without asking the registrar."""
    peers = FakePeers(Wire())
    async with verifier(database, peers) as agents:
        await agents.add(AGENT, body(peers.wire), ACT)
        await until(agents, AGENT, attested=True)
    peers.gate.clear()
    async with verifier(database, peers) as agents:
        await peers.wire.time.advance(2.0)  # it starts within one interval, at random
        assert (await until(agents, AGENT, attestation_count=2))["attested"]


async def test_a_failure_survives_a_restart_and_is_left_by_resume_only(database: Store) -> None:
    """INVALID_QUOTE before the restart, INVALID_QUOTE after it; resume starts anew."""
    peers = FakePeers(Wire())
    honest = peers.wire.guest.tpm.pcrs[0]
    asked = body(peers.wire)
    async with verifier(database, peers) as agents:
        peers.wire.guest.tpm.pcrs[0] = bytes(32)
        await agents.add(AGENT, asked, ACT)
        await until(agents, AGENT, state="INVALID_QUOTE", failed_check=9, layer="guest")
    peers.wire.guest.tpm.pcrs[0] = honest
    async with verifier(database, peers) as agents:
        view = await until(agents, AGENT, state="INVALID_QUOTE", error="ReferenceValueMismatch")
        assert not view["attested"]
        await agents.resume(AGENT, ACT)
        await until(agents, AGENT, attested=True, error=None)
        with pytest.raises(Conflict):
            await agents.resume(AGENT, ACT)


async def test_a_row_that_cannot_be_read_keeps_no_other_agent_from_being_attested(database: Store) -> None:
    """One bad row is logged and left out."""
    peers = FakePeers(Wire())
    async with verifier(database, peers) as agents:
        await agents.add(AGENT, body(peers.wire), ACT)
    async with database.begin() as session:
        await session.execute(
            text("INSERT INTO agents SELECT :id, '{}', snapshot, v, state, progress, seen FROM agents"),
            {"id": str(OTHER)},
        )
    async with verifier(database, peers) as agents:
        assert agents.ids() == [AGENT]


async def test_one_agents_refusal_is_its_own(database: Store) -> None:
    """FAILED with the reason, while the service goes on."""
    peers = FakePeers(Wire())
    peers.wire.guest.script = [NotYourGuest("no")]
    async with verifier(database, peers) as agents:
        await agents.add(AGENT, body(peers.wire), ACT)
        view = await until(agents, AGENT, operational_state=State.FAILED.value)
        assert (view["error"], view["detail"], view["layer"]) == ("NotYourGuest", "no", "guest")
