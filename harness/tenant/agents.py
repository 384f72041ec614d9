"""All agents under attestation: adds, loads, resumes, changes and deletes their sessions, one task each.

Invariants:
    1. An agent is stored before its task starts, and its task has ended before it is forgotten.
    2. A plan is complete before anything is stored: keys, policies and intervals were checked.
    3. One agent's session cannot end another's: sessions end by cancellation only.
    4. An operator's act is stored, with its audit entry, before it is in force.
    5. A round under earlier reference values never counts for later ones: its session has ended before they are
       stored, and no success is carried over.
    6. An alarm that a session raised and could not store outlives it: it is stored with the act that ends the session,
       or by the session that follows.

Owner: the verifier's event loop; tasks belong to the TaskGroup that is handed in.

Spec: DESIGN 3.8.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from harness import events
from harness.attest import parse_public
from harness.audit import AuditEntry
from harness.errors import Conflict, HarnessError, NotFound
from harness.tenant.agent_request import (
    AddAgent,
    Contact,
    ParsedRequest,
    Snapshot,
    follow,
    make_plan,
    parse_add_agent,
    with_policies,
)
from harness.tenant.agent_view import agent_view, policy_view
from harness.tenant.bookkeeping import finished
from harness.tenant.followed_guest import FollowedGuest
from harness.tenant.plan import Plan
from harness.tenant.ports import Clock, GuestPort, Ports, Progress, ProviderPort, Told, nobody_is_told
from harness.tenant.session import Session
from harness.tenant.snapshots import decode_snapshot, encode_snapshot
from harness.tenant.states import Event, State, transition
from harness.tenant.verifier_store import StoredAgent, VerifierStore
from harness.values import AgentId

_LONGEST_START_S = 10.0
"""Sessions of a verifier that starts begin within one interval, and within this time at most."""


class Peers(Protocol):
    """Connections of sessions to their peers."""

    def guest(self, url: str, mtls_cert: str) -> GuestPort:
        """The guest agent at this URL, with this certificate. Raises MalformedMessage where it is none."""

    def provider(self, url: str | None) -> ProviderPort:
        """The provider verifier at this URL."""

    async def snapshot(self, agent_id: AgentId) -> Snapshot:
        """What the registrar has pinned now."""

    async def contact(self, agent_id: AgentId) -> Contact:
        """Where the guest is reached, as the registrar knows it now."""

    async def release(self, guest: GuestPort) -> None:
        """Closes a guest's connections."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Act:
    """Who does something, and why."""

    who: str
    reason: str


@dataclass(slots=True)
class _Running:
    agent: AddAgent
    snapshot: Snapshot
    guest: FollowedGuest
    session: Session
    task: asyncio.Task[None]


class Agents:
    """The sessions of one verifier.

    Args:
        store: agents and baselines.
        peers: connections.
        clock: time for all sessions.
        requester: SHA-256 of the SubjectPublicKeyInfo of our client certificate.
        group: where session tasks live.
        patience_s: how long a peer may be away before a session fails.
        told: of each event of each session.
    """

    def __init__(
        self,
        store: VerifierStore,
        peers: Peers,
        clock: Clock,
        *,
        requester: bytes,
        group: asyncio.TaskGroup,
        patience_s: float = 600.0,
        told: Told = nobody_is_told,
    ) -> None:
        self._store = store
        self._peers = peers
        self._clock = clock
        self._requester = requester
        self._group = group
        self._patience_s = patience_s
        self._told = told
        self._running: dict[AgentId, _Running] = {}
        self._changing: set[AgentId] = set()

    async def load(self) -> None:
        """Starts a session for every stored agent."""
        for stored in await self._store.load():
            try:
                agent = AddAgent.model_validate_json(stored.request)
                self._start(stored, agent, decode_snapshot(stored.snapshot), start_within_s=_LONGEST_START_S)
            except (HarnessError, ValueError) as error:  # one bad row must not keep the others from being attested
                events.emit("agent_not_loaded", level="error", agent_id=str(stored.agent_id), detail=str(error))

    async def add(self, agent_id: AgentId, body: object, act: Act) -> None:
        """Adds an agent and starts its session.

        Args:
            agent_id: the agent.
            body: of the request, without the reason.
            act: whose will it is.

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
            await self._add(agent_id, request, self._entry("agent-add", agent_id, act))
        finally:
            self._changing.discard(agent_id)

    async def _add(self, agent_id: AgentId, request: ParsedRequest, entry: AuditEntry) -> None:
        snapshot = await self._peers.snapshot(agent_id)
        self._plan(agent_id, request.agent, snapshot, v=request.v)
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
        await self._store.add(stored, entry)
        self._start(stored, request.agent, snapshot)

    async def resume(self, agent_id: AgentId, act: Act, *, accept_reboot: bool = False) -> None:
        """Lets a stopped session start anew.

        Args:
            agent_id: the agent.
            act: whose will it is.
            accept_reboot: the counters that check 10 refused become the baseline of their key.

        Raises:
            NotFound: no such agent.
            Conflict: it is not stopped, or being changed by another call; no reboot was refused, or it was overtaken.
            StoreError: nothing has changed.

        *Cancellation:* the session was resumed, or nothing was stored.
        """
        session = self._find(agent_id).session
        self._claim(agent_id)
        try:
            await finished(self._resume(session, self._entry("resume", agent_id, act), accept_reboot=accept_reboot))
        finally:
            self._changing.discard(agent_id)

    async def _resume(self, session: Session, entry: AuditEntry, *, accept_reboot: bool) -> None:
        progress, reboot = session.resumed(), session.progress.refused_reboot
        if not accept_reboot:
            await self._store.resume(session.plan.agent_id, progress, entry)
        elif reboot is None:
            raise Conflict(f"agent {session.plan.agent_id} did not stop for a reboot; resume without accepting one")
        else:
            await self._store.accept_reboot(session.plan.agent_id, progress, entry, reboot)
        session.resume()

    async def set_policy(self, agent_id: AgentId, policies: Mapping[str, object], act: Act) -> None:
        """Gives an agent other reference values, in force from its next round on; a stopped session stays stopped.

        The session ends and a new one takes its place. What it had reached stays, except for the time of its last
        success, which was one under the earlier values.

        Args:
            agent_id: the agent.
            policies: ``guest_policy``, ``host_policy`` or both.
            act: whose will it is.

        Raises:
            NotFound: no such agent.
            MalformedMessage: no policy, or one wider than its mask.
            Conflict: it is being changed by another call.
            StoreError: the earlier values are still in force.

        *Cancellation:* the values were changed, or nothing was.
        """
        running = self._find(agent_id)
        self._claim(agent_id)
        try:
            agent = with_policies(running.agent, policies)
            plan = self._plan(agent_id, agent, running.snapshot, v=running.session.plan.v)
            await finished(self._replace(running, agent, plan, self._entry("policy-set", agent_id, act)))
        finally:
            self._changing.discard(agent_id)

    async def _replace(self, running: _Running, agent: AddAgent, plan: Plan, entry: AuditEntry) -> None:
        running.task.cancel()
        await asyncio.wait({running.task})
        earlier = running.session
        try:
            # a guest that moved while its session ended has changed the request, too
            agent = agent.model_copy(
                update={name: getattr(running.agent, name) for name in ("cloudagent_ip", "cloudagent_port")}
            )
            progress = replace(earlier.progress, last_success=None)
            await self._store.set_policy(plan.agent_id, agent.model_dump_json(), progress, entry, earlier.alarm)
        except BaseException:
            self._restore(running)
            raise
        running.agent = agent
        running.session, running.task = self._run(running.guest, agent, plan, progress)

    def _restore(self, running: _Running) -> None:
        """Starts a session that has ended again, as it was."""
        earlier = running.session
        plan, progress = earlier.plan, earlier.progress
        running.session, running.task = self._run(running.guest, running.agent, plan, progress, after=earlier)

    async def delete(self, agent_id: AgentId, act: Act) -> None:
        """Ends a session and forgets the agent.

        Raises:
            NotFound: no such agent.
            Conflict: it is being changed by another call.
            StoreError: the agent is still there, and its session goes on.

        *Cancellation:* the agent was deleted, or nothing has changed.
        """
        running = self._find(agent_id)
        self._claim(agent_id)
        try:
            await finished(self._delete(running, self._entry("agent-remove", agent_id, act)))
        finally:
            self._changing.discard(agent_id)

    async def _delete(self, running: _Running, entry: AuditEntry) -> None:
        session = running.session
        running.task.cancel()
        await asyncio.wait({running.task})
        try:
            await self._store.remove(session.plan.agent_id, entry, session.alarm)
        except BaseException:
            self._restore(running)
            raise
        session.delete()
        del self._running[session.plan.agent_id]
        await self._peers.release(running.guest.client)

    def states(self) -> Counter[State]:
        """How many agents are in which state."""
        return Counter(running.session.state for running in self._running.values())

    def attested(self) -> int:
        """How many agents are attested now."""
        return sum(running.session.attested() for running in self._running.values())

    def ids(self) -> list[AgentId]:
        """All agents."""
        return list(self._running)

    def view(self, agent_id: AgentId) -> dict[str, object]:
        """An agent for operators: Keylime's members, and ours.

        Raises:
            NotFound: no such agent.
        """
        running = self._find(agent_id)
        return agent_view(running.agent, running.session)

    def policy(self, agent_id: AgentId) -> dict[str, object]:
        """Reference values of an agent, and the values that were seen.

        Raises:
            NotFound: no such agent.
        """
        running = self._find(agent_id)
        return policy_view(running.agent, running.session)

    # --- helpers ------------------------------------------------------------------------------------------

    def _start(self, stored: StoredAgent, agent: AddAgent, snapshot: Snapshot, *, start_within_s: float = 0.0) -> None:
        agent_id = stored.agent_id
        plan = self._plan(agent_id, agent, snapshot, v=stored.v)
        client = self._peers.guest(agent.guest_url, snapshot.mtls_cert)
        guest = FollowedGuest(agent_id, client, lambda: self._look(agent_id), self._clock)
        within_s = min(start_within_s, plan.timing.quote_interval_s)
        session, task = self._run(guest, agent, plan, stored.progress, start_within_s=within_s)
        self._running[agent_id] = _Running(agent, snapshot, guest, session, task)

    def _run(
        self,
        guest: FollowedGuest,
        agent: AddAgent,
        plan: Plan,
        progress: Progress,
        *,
        start_within_s: float = 0.0,
        after: Session | None = None,
    ) -> tuple[Session, asyncio.Task[None]]:
        ports = Ports(
            guest=guest,
            provider=self._peers.provider(agent.provider_verifier),
            records=self._store,
            clock=self._clock,
            told=self._told,
        )
        session = Session(plan, ports, progress, start_within_s=start_within_s, after=after)
        return session, self._group.create_task(session.run(), name=f"session {plan.agent_id}")

    async def _look(self, agent_id: AgentId) -> None:
        """See `FollowedGuest`: follows the guest to the contact that it registered since."""
        running = self._find(agent_id)
        followed = follow(running.agent, running.snapshot, await self._peers.contact(agent_id))
        if followed is None:
            return
        agent, snapshot = followed
        client = self._peers.guest(agent.guest_url, snapshot.mtls_cert)
        try:
            await self._store.moved(agent_id, agent.model_dump_json(), encode_snapshot(snapshot))
        except BaseException:
            await self._peers.release(client)
            raise
        running.agent, running.snapshot = agent, snapshot
        left = running.guest.switch(client)
        events.emit("guest_moved", agent_id=str(agent_id), url=agent.guest_url)
        await self._peers.release(left)

    def _plan(self, agent_id: AgentId, agent: AddAgent, snapshot: Snapshot, *, v: bytes | None) -> Plan:
        plan = make_plan(agent_id, agent, snapshot, v=v, requester=self._requester)
        return replace(plan, timing=replace(plan.timing, transport_patience_s=self._patience_s))

    def _entry(self, action: str, agent_id: AgentId, act: Act) -> AuditEntry:
        return AuditEntry(at=self._clock.now(), who=act.who, action=action, subject=str(agent_id), reason=act.reason)

    def _find(self, agent_id: AgentId) -> _Running:
        if agent_id not in self._running:
            raise NotFound(f"agent {agent_id} is not under attestation here")
        return self._running[agent_id]

    def _claim(self, agent_id: AgentId) -> None:
        if agent_id in self._changing:
            raise Conflict(f"agent {agent_id} is being changed by another call")
        self._changing.add(agent_id)
