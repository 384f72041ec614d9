"""All sessions of a verifier: adding, loading after a restart, resuming, deleting, and calls that meet."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from harness.attest import owner_qualified_name
from harness.errors import Conflict, MalformedMessage, NotFound, NotYourGuest
from harness.store import Store, open_store
from harness.tenant.agent_request import Snapshot
from harness.tenant.agents import Agents
from harness.tenant.ports import GuestPort, ProviderPort
from harness.tenant.states import State
from harness.tenant.tables import SCHEMA, Base
from harness.tenant.verifier_store import VerifierStore
from harness.values import AgentId
from tests.support.enrolment_parties import SoftVtpm
from tests.support.manual_time import settle
from tests.support.tenant_wire import AGENT, REQUESTER, Wire

OTHER = AgentId(uuid.UUID(int=3 << 64))
WAIT_S = 10.0


class FakePeers:
    """Hands out the wire's parties; the registrar knows one guest."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.released: list[GuestPort] = []
        self.gate = asyncio.Event()
        self.gate.set()
        host = wire.provider.tpm
        self.known = Snapshot(
            host_id=wire.provider.host_id,
            guest_ek=SoftVtpm().ek.marshal(),
            guest_ak=wire.guest.tpm.ak.marshal(),
            mtls_cert="pem",
            host_ak=host.ak.marshal(),
            host_ak_qualified_name=owner_qualified_name(host.ak),
            host_baseline=host.baseline,
            host_enrolled_at=1.0,
        )

    def guest(self, url: str, mtls_cert: str) -> GuestPort:
        assert (url, mtls_cert) == ("https://127.0.0.1:9002", "pem")
        return self.wire.guest

    def provider(self, url: str | None) -> ProviderPort:
        return self.wire.provider

    async def snapshot(self, agent_id: AgentId) -> Snapshot:
        await self.gate.wait()
        if agent_id != AGENT:
            raise NotFound("not registered")
        return self.known

    async def release(self, guest: GuestPort) -> None:
        self.released.append(guest)


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Store]:
    store = await open_store(f"sqlite+aiosqlite:///{tmp_path}/a.db", Base.metadata, component="tenant", version=SCHEMA)
    try:
        yield store
    finally:
        await store.close()


@asynccontextmanager
async def verifier(database: Store, peers: FakePeers) -> AsyncIterator[Agents]:
    """Agents of one run of the service; their tasks end with the block."""
    try:
        async with asyncio.TaskGroup() as group:
            store = VerifierStore(database, lambda: 0.0)
            agents = Agents(store, peers, peers.wire.time, requester=REQUESTER, group=group)
            await agents.load()
            yield agents
            raise _Stop  # noqa: TRY301 - a task group ends its tasks by an exception
    except* _Stop:
        pass


class _Stop(Exception):
    """Ends a run of the service."""


def body(wire: Wire, **changes: Any) -> dict[str, Any]:
    guest, host = wire.guest.tpm, wire.provider.tpm
    return {
        "cloudagent_ip": "127.0.0.1",
        "cloudagent_port": 9002,
        "provider_verifier": "https://provider",
        "need_provider_quote": False,
        "guest_mask": "0x11",
        "host_mask": "0x11",
        "guest_policy": {"sha256": {"0": [guest.pcrs[0].hex()]}},
        "host_policy": {"sha256": {"4": [host.pcrs[4].hex()]}},
    } | changes


async def until(agents: Agents, agent_id: AgentId, **expected: Any) -> dict[str, object]:
    """The agent's view, once it shows what is expected."""
    async with asyncio.timeout(WAIT_S):
        while True:
            view = agents.view(agent_id)
            if expected.items() <= view.items():
                return view
            await asyncio.sleep(0.005)


async def test_an_added_agent_is_attested(database: Store) -> None:
    """POST, snapshot, plan, session: the view says so, in Keylime's members and ours."""
    peers = FakePeers(Wire())
    async with verifier(database, peers) as agents:
        await agents.add(AGENT, body(peers.wire))
        view = await until(agents, AGENT, attested=True)
        assert (view["operational_state"], view["state"], view["attestation_count"]) == (3, "GET_QUOTE", 1)
        assert agents.ids() == [AGENT]
        with pytest.raises(Conflict):
            await agents.add(AGENT, body(peers.wire))


async def test_an_agent_that_is_not_registered_is_not_added(database: Store) -> None:
    """The registrar's answer is the caller's answer; nothing is stored."""
    async with verifier(database, FakePeers(Wire())) as agents:
        with pytest.raises(NotFound):
            await agents.add(OTHER, body(Wire()))
        assert agents.ids() == []


async def test_a_policy_wider_than_its_mask_is_refused_when_added(database: Store) -> None:
    """DESIGN 3.8: refused at once, not at the first round."""
    peers = FakePeers(Wire())
    async with verifier(database, peers) as agents:
        with pytest.raises(MalformedMessage, match="guest_policy"):
            await agents.add(AGENT, body(peers.wire, guest_mask="0x2"))
        assert agents.ids() == []
        await agents.add(AGENT, body(peers.wire))


async def test_two_adds_that_meet_make_one_session(database: Store) -> None:
    """While the registrar is asked, a second POST of the same agent is a conflict."""
    peers = FakePeers(Wire())
    peers.gate.clear()
    async with verifier(database, peers) as agents:
        first = asyncio.create_task(agents.add(AGENT, body(peers.wire)))
        await settle()
        with pytest.raises(Conflict):
            await agents.add(AGENT, body(peers.wire))
        peers.gate.set()
        await first
        assert agents.ids() == [AGENT]


async def test_a_deleted_agent_is_gone_for_good(database: Store) -> None:
    """Its task has ended, its connections are closed, and a restart does not bring it back; it can be added anew."""
    peers = FakePeers(Wire())
    async with verifier(database, peers) as agents:
        await agents.add(AGENT, body(peers.wire))
        await until(agents, AGENT, attested=True)
        await agents.delete(AGENT)
        assert peers.released == [peers.wire.guest]
        for call in (agents.view, agents.resume):
            with pytest.raises(NotFound):
                call(AGENT)
        with pytest.raises(NotFound):
            await agents.delete(AGENT)
    async with verifier(database, peers) as agents:
        assert agents.ids() == []
        await agents.add(AGENT, body(peers.wire))


async def test_a_restarted_verifier_goes_on(database: Store) -> None:
    """Rounds are counted on; the same keys and policies are believed, without asking the registrar."""
    peers = FakePeers(Wire())
    async with verifier(database, peers) as agents:
        await agents.add(AGENT, body(peers.wire))
        await until(agents, AGENT, attested=True)
    peers.gate.clear()
    async with verifier(database, peers) as agents:
        assert (await until(agents, AGENT, attestation_count=2))["attested"]


async def test_a_failure_survives_a_restart_and_is_left_by_resume_only(database: Store) -> None:
    """INVALID_QUOTE before the restart, INVALID_QUOTE after it; resume starts anew."""
    peers = FakePeers(Wire())
    honest = peers.wire.guest.tpm.pcrs[0]
    asked = body(peers.wire)
    async with verifier(database, peers) as agents:
        peers.wire.guest.tpm.pcrs[0] = bytes(32)
        await agents.add(AGENT, asked)
        await until(agents, AGENT, state="INVALID_QUOTE", failed_check=9, layer="guest")
    peers.wire.guest.tpm.pcrs[0] = honest
    async with verifier(database, peers) as agents:
        view = await until(agents, AGENT, state="INVALID_QUOTE", error="ReferenceValueMismatch")
        assert not view["attested"]
        agents.resume(AGENT)
        await until(agents, AGENT, attested=True, error=None)
        with pytest.raises(Conflict):
            agents.resume(AGENT)


async def test_a_row_that_cannot_be_read_keeps_no_other_agent_from_being_attested(database: Store) -> None:
    """One bad row is logged and left out."""
    peers = FakePeers(Wire())
    async with verifier(database, peers) as agents:
        await agents.add(AGENT, body(peers.wire))
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
        await agents.add(AGENT, body(peers.wire))
        view = await until(agents, AGENT, operational_state=State.FAILED.value)
        assert (view["error"], view["detail"], view["layer"]) == ("NotYourGuest", "no", "guest")
