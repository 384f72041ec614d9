"""All agents under attestation: adds, loads, resumes and deletes their sessions, one task each.

Invariants:
    1. An agent is stored before its task starts, and its task has ended before it is forgotten.
    2. A plan is complete before anything is stored: keys, policies and intervals were checked.
    3. One agent's session cannot end another's: sessions end by cancellation only.

Owner: the verifier's event loop; tasks belong to the TaskGroup that is handed in.

Spec: DESIGN 3.8.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Protocol

from harness import events
from harness.attest import parse_public
from harness.errors import Conflict, HarnessError, NotFound
from harness.tenant.agent_request import AddAgent, ParsedRequest, Snapshot, make_plan, parse_add_agent
from harness.tenant.ports import Clock, GuestPort, Ports, Progress, ProviderPort
from harness.tenant.session import Session
from harness.tenant.snapshots import decode_snapshot, encode_snapshot
from harness.tenant.states import Event, State, transition
from harness.tenant.verifier_store import StoredAgent, VerifierStore
from harness.values import AgentId


class Peers(Protocol):
    """Connections of sessions to their peers."""

    def guest(self, url: str, mtls_cert: str) -> GuestPort:
        """The guest agent at this URL, with exactly this certificate."""

    def provider(self, url: str | None) -> ProviderPort:
        """The provider verifier at this URL."""

    async def snapshot(self, agent_id: AgentId) -> Snapshot:
        """What the registrar has pinned now."""

    async def release(self, guest: GuestPort) -> None:
        """Closes a guest's connections."""


@dataclass(frozen=True, slots=True)
class _Running:
    agent: AddAgent
    session: Session
    guest: GuestPort
    task: asyncio.Task[None]


class Agents:
    """The sessions of one verifier.

    Args:
        store: agents and baselines.
        peers: connections.
        clock: time for all sessions.
        requester: SHA-256 of the SubjectPublicKeyInfo of our client certificate.
        group: where session tasks live.
    """

    def __init__(
        self, store: VerifierStore, peers: Peers, clock: Clock, *, requester: bytes, group: asyncio.TaskGroup
    ) -> None:
        self._store = store
        self._peers = peers
        self._clock = clock
        self._requester = requester
        self._group = group
        self._running: dict[AgentId, _Running] = {}
        self._changing: set[AgentId] = set()

    async def load(self) -> None:
        """Starts a session for every stored agent."""
        for stored in await self._store.load():
            try:
                agent = AddAgent.model_validate_json(stored.request)
                self._start(stored, agent, decode_snapshot(stored.snapshot))
            except (HarnessError, ValueError) as error:  # one bad row must not keep the others from being attested
                events.emit("agent_not_loaded", level="error", agent_id=str(stored.agent_id), detail=str(error))

    async def add(self, agent_id: AgentId, body: object) -> None:
        """Adds an agent and starts its session.

        Raises:
            MalformedMessage: a member of the body, or a policy wider than its mask.
            Conflict: the agent exists, or is being changed by another call.
            NotFound: the guest is not registered.
            HarnessError: the registrar does not answer.

        *Cancellation:* the agent was added, or nothing was stored.
        """
        request = parse_add_agent(body)
        if agent_id in self._running:
            raise Conflict(f"agent {agent_id} exists; delete it first")
        self._claim(agent_id)
        try:
            await self._add(agent_id, request)
        finally:
            self._changing.discard(agent_id)

    async def _add(self, agent_id: AgentId, request: ParsedRequest) -> None:
        snapshot = await self._peers.snapshot(agent_id)
        make_plan(agent_id, request.agent, snapshot, v=request.v, requester=self._requester)
        added = transition(State.REGISTERED, Event.ADD)
        stored = StoredAgent(
            agent_id=agent_id,
            request=request.agent.model_dump_json(),
            snapshot=encode_snapshot(snapshot),
            v=request.v,
            progress=Progress(state=transition(added.state, Event.STORED).state),
        )
        host_ak = parse_public(snapshot.host_ak).name
        await self._store.enrolled(host_ak, snapshot.host_baseline, snapshot.host_enrolled_at)
        await self._store.add(stored)
        self._start(stored, request.agent, snapshot)

    def resume(self, agent_id: AgentId) -> None:
        """Lets a stopped session start anew.

        Raises:
            NotFound: no such agent.
            Conflict: it is not stopped.
        """
        self._find(agent_id).session.resume()

    async def delete(self, agent_id: AgentId) -> None:
        """Ends a session and forgets the agent.

        Raises:
            NotFound: no such agent.
            Conflict: it is being changed by another call.

        *Cancellation:* the session has ended; the agent may still be stored, and comes back with the next start.
        """
        running = self._find(agent_id)
        self._claim(agent_id)
        try:
            running.task.cancel()
            await asyncio.wait({running.task})
            running.session.delete()
            await self._store.remove(agent_id)
            del self._running[agent_id]
            await self._peers.release(running.guest)
        finally:
            self._changing.discard(agent_id)

    def ids(self) -> list[AgentId]:
        """All agents."""
        return list(self._running)

    def view(self, agent_id: AgentId) -> dict[str, object]:
        """An agent for operators: Keylime's members, and ours.

        Raises:
            NotFound: no such agent.
        """
        running = self._find(agent_id)
        agent, session, progress = running.agent, running.session, running.session.progress
        host = session.plan.host
        return {
            "agent_id": str(agent_id),
            "operational_state": session.state.value,
            "state": session.state.name,
            "ip": agent.cloudagent_ip,
            "port": agent.cloudagent_port,
            "hash_alg": agent.hash_alg,
            "attested": session.attested(),
            "attestation_count": progress.rounds,
            "last_successful_attestation": progress.last_success,
            "payload_released": progress.v_released,
            "need_provider_quote": agent.need_provider_quote,
            "provider_verifier": agent.provider_verifier,
            "provider_quote_interval": agent.provider_quote_interval,
            "host_id": None if host is None else str(host.host_id),
            "layer": progress.layer,
            "failed_check": progress.failed_check,
            "error": progress.error,
            "detail": progress.detail,
        }

    def _start(self, stored: StoredAgent, agent: AddAgent, snapshot: Snapshot) -> None:
        plan = make_plan(stored.agent_id, agent, snapshot, v=stored.v, requester=self._requester)
        guest = self._peers.guest(agent.guest_url, snapshot.mtls_cert)
        ports = Ports(
            guest=guest,
            provider=self._peers.provider(agent.provider_verifier),
            records=self._store,
            clock=self._clock,
        )
        session = Session(plan, ports, stored.progress)
        task = self._group.create_task(session.run(), name=f"session {stored.agent_id}")
        self._running[stored.agent_id] = _Running(agent, session, guest, task)

    def _find(self, agent_id: AgentId) -> _Running:
        if agent_id not in self._running:
            raise NotFound(f"agent {agent_id} is not under attestation here")
        return self._running[agent_id]

    def _claim(self, agent_id: AgentId) -> None:
        if agent_id in self._changing:
            raise Conflict(f"agent {agent_id} is being changed by another call")
        self._changing.add(agent_id)
