"""Which guests run on this host, and with which vTPM: the residency that a batch is sealed with.

The guest manager (libvirt, or the lab's for process guests) reports every change of a domain; the host agent keeps a
cache of it and never asks at sealing. At each start, before the guest runs, it reads the EK from a copy of the vTPM's
state: the running vTPM belongs to the guest, and the state could have been exchanged since its manufacture.

Invariants:
    1. A guest runs here when its domain is defined, persistent, running, not paused, not migrating, and the EK that was
       read at its last start is the journal's.
    2. While the cache is not complete nothing is said about any guest: NotReady, not GuestNotHere.
    3. Nothing here waits for the guest manager but the task that follows it.

Owner: `GuestCache.follow` changes the domains; `GuestResidency.starting` and the CA change the EKs.

Spec: DESIGN 3.1 (runs here), 3.6.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from harness import events
from harness.errors import GuestNotHere, MalformedMessage, NotReady, PeerUnreachable
from harness.messages import parse_json
from harness.provider.journal import Journal
from harness.values import AgentId, parse_agent_id

_LINE_LIMIT = 1 << 20
_CONNECT_S = 5.0
_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.05, 2.0
RUNNING, SHUTOFF = "running", "shutoff"


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain:
    """A domain as the guest manager reports it.

    Args:
        agent_id: its UUID.
        state: ``shutoff``, ``starting``, ``running``, ``paused`` or ``migrating``.
        persistent: False for a transient domain.
    """

    agent_id: AgentId
    state: str
    persistent: bool


class GuestSource(Protocol):
    """Reports domains: first all of them, then each change, until the connection breaks."""

    def watch(self) -> AsyncIterator[Mapping[AgentId, Domain] | tuple[AgentId, Domain | None]]:
        """All domains first; then (id, domain), with None for one that is gone. Raises PeerUnreachable at the end."""


class SocketGuestSource:
    """The guest manager's UNIX socket: ``{"op": "watch"}``, then one JSON object per line.

    Args:
        path: of the socket.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    async def watch(self) -> AsyncIterator[Mapping[AgentId, Domain] | tuple[AgentId, Domain | None]]:
        """See `GuestSource`.

        *Cancellation:* the connection is closed.
        """
        try:
            async with asyncio.timeout(_CONNECT_S):
                reader, writer = await asyncio.open_unix_connection(self._path, limit=_LINE_LIMIT)
        except (OSError, TimeoutError) as error:
            raise PeerUnreachable(f"the guest manager at {self._path} cannot be reached: {error}") from error
        try:
            writer.write(b'{"op": "watch"}\n')
            while line := await reader.readline():
                yield _report(line)
        except (OSError, ValueError) as error:  # ValueError: a line above the limit
            raise PeerUnreachable(f"the connection to the guest manager broke: {error}") from error
        finally:
            writer.close()
        raise PeerUnreachable("the guest manager closed the connection")


def _report(line: bytes) -> Mapping[AgentId, Domain] | tuple[AgentId, Domain | None]:
    try:
        match parse_json(line, limit=_LINE_LIMIT):
            case {"domains": list(entries)}:
                domains = [_domain(entry) for entry in entries]
                return {domain.agent_id: domain for domain in domains}
            case {"domain": entry, "event": str(event)}:
                domain = _domain(entry)
                return domain.agent_id, None if event == "undefined" else domain
    except MalformedMessage as error:
        raise PeerUnreachable(f"the guest manager's report is malformed: {error.detail}") from error
    raise PeerUnreachable("the guest manager's report is neither a list nor a change")


def _domain(entry: object) -> Domain:
    match entry:
        case {"uuid": str(uuid_text), "state": str(state), "persistent": bool(persistent)}:
            return Domain(agent_id=parse_agent_id(uuid_text), state=state, persistent=persistent)
    raise MalformedMessage("a domain must have uuid, state and persistent")


class GuestCache:
    """Domains of this host, from reports.

    Args:
        source: of the reports.
        rng: jitter of the pauses between two connections.
    """

    def __init__(self, source: GuestSource, *, rng: random.Random | None = None) -> None:
        self._source = source
        self._rng = rng or random.SystemRandom()
        self._domains: dict[AgentId, Domain] | None = None
        self._changed = asyncio.Event()

    async def follow(self) -> None:
        """Follows the guest manager for ever; connects anew when it must.

        *Cancellation:* the cache says NotReady from then on.
        """
        delay_s = _FIRST_DELAY_S
        try:
            while True:
                try:
                    async for report in self._source.watch():
                        self._take(report)
                        delay_s = _FIRST_DELAY_S
                except PeerUnreachable as error:
                    if self._domains is not None:
                        events.emit("guest_manager_lost", level="warning", detail=error.detail)
                self._domains = None
                await asyncio.sleep(delay_s * self._rng.uniform(0.5, 1.0))
                delay_s = min(2 * delay_s, _LONGEST_DELAY_S)
        finally:
            self._domains = None

    def _take(self, report: Mapping[AgentId, Domain] | tuple[AgentId, Domain | None]) -> None:
        if isinstance(report, tuple):
            agent_id, domain = report
            if self._domains is None:
                raise PeerUnreachable("the guest manager reported a change before the list")
            if domain is None:
                self._domains.pop(agent_id, None)
            else:
                self._domains[agent_id] = domain
        else:
            self._domains = dict(report)
        self._changed.set()
        self._changed = asyncio.Event()

    async def changed(self) -> None:
        """Waits for the next report; no deadline, for a task that passes them on.

        *Cancellation:* nothing is lost; the next call waits for the next report.
        """
        await self._changed.wait()

    def domain(self, agent_id: AgentId) -> Domain | None:
        """Domain of a guest; None when it is not defined here.

        Raises:
            NotReady: the cache is not complete.
        """
        return self.domains().get(agent_id)

    def domains(self) -> Mapping[AgentId, Domain]:
        """All domains.

        Raises:
            NotReady: the cache is not complete.
        """
        if self._domains is None:
            raise NotReady("it is not known yet which guests run here", retry_after_s=1.0)
        return self._domains

    def check_manufacturing(self, agent_id: AgentId) -> None:
        """Checks that a vTPM may be manufactured for this guest now.

        Raises:
            NotReady: the cache is not complete.
            GuestNotHere: not defined here, transient, or not shut off.
        """
        domain = self.domain(agent_id)
        if domain is None:
            raise GuestNotHere(f"domain {agent_id} is not defined on this host")
        if not domain.persistent or domain.state not in {SHUTOFF, "starting"}:
            raise GuestNotHere(f"domain {agent_id} is transient or runs already: no vTPM is manufactured for it")


class EkReader(Protocol):
    """Reads a vTPM's EK from its state; `scratch.read_ek` runs a scratch swtpm on a copy."""

    async def __call__(self, state_dir: Path) -> bytes:
        """SHA-256 of the SubjectPublicKeyInfo of the RSA-2048 EK, template L-1."""


class GuestResidency:
    """Says with which vTPM a guest runs here; the batcher asks it once per batch.

    Args:
        cache: domains.
        journal: certified EKs.
        read_ek: reads the EK of a state.
    """

    def __init__(self, cache: GuestCache, journal: Journal, read_ek: EkReader) -> None:
        self._cache = cache
        self._journal = journal
        self._read_ek = read_ek

    async def check(self, agent_ids: Collection[AgentId]) -> Mapping[AgentId, bytes | GuestNotHere | NotReady]:
        """For each guest the SHA-256 of its vTPM EK's SubjectPublicKeyInfo, or why it gets no leaf.

        *Cancellation:* nothing has changed.
        """
        certified, seen = await self._journal.rsa_eks(), await self._journal.seen()
        return {agent_id: self._one(agent_id, certified.get(agent_id), seen.get(agent_id)) for agent_id in agent_ids}

    def _one(self, agent_id: AgentId, certified: bytes | None, seen: bytes | None) -> bytes | GuestNotHere | NotReady:
        try:
            domain = self._cache.domain(agent_id)
        except NotReady as error:
            return error
        if domain is None or not domain.persistent or domain.state != RUNNING:
            return GuestNotHere("this guest does not run on this host now")
        if certified is None or seen is None or certified != seen:
            return GuestNotHere("the vTPM that runs under this UUID is not the one that this host certified")
        return certified

    async def starting(self, agent_id: AgentId, state_dir: Path) -> bool:
        """Reads the EK of a guest that is about to start, from a copy of its vTPM's state.

        Args:
            agent_id: the guest.
            state_dir: where its vTPM's state is.

        Returns:
            Whether it is the EK that this host certified. A guest with another one may run; it is not resident.

        Raises:
            MalformedMessage: there is no vTPM state.
            SimulationError, TpmError: the state cannot be read.

        *Cancellation:* the record of the last start stays.
        """
        state = state_dir / "tpm2-00.permall"
        try:
            status = await asyncio.to_thread(os.stat, state)
        except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
            raise MalformedMessage(f"{state}: no vTPM state: {error}") from error
        digest = await self._read_ek(state_dir)
        await self._journal.saw(agent_id, state, status, digest)
        certified = (await self._journal.rsa_eks()).get(agent_id)
        if certified != digest:
            events.emit("foreign_vtpm", level="warning", agent_id=str(agent_id))
        return certified == digest

    async def report(self) -> list[dict[str, str]]:
        """State and EK of every domain, for the provider's registrar.

        Raises:
            NotReady: the cache is not complete.
        """
        seen = await self._journal.seen()
        return [
            {"agent_id": str(agent_id), "state": domain.state, "vtpm_ek": seen.get(agent_id, b"").hex()}
            for agent_id, domain in self._cache.domains().items()
        ]
