"""Which guests run on this host, and with which vTPM: the residency that a batch is sealed with.

At each start, before the guest runs, the host agent reads the EK from a copy of the vTPM's state: the running vTPM
belongs to the guest, and the state could have been exchanged since its manufacture.

Invariants:
    1. A guest runs here when its domain is defined, persistent, running, not paused, not migrating, and the EK that was
       read at the start of this very run is the journal's.
    2. The EK of a guest that runs is not read again: whoever starts another vTPM under its UUID cannot show the
       genuine state afterwards.
    3. A start whose state could not be read leaves the guest without an EK, not with that of an earlier start.
    4. Where the guest manager gives its starts ids, an EK holds for the start that it was read for and for no other,
       across restarts of either side and lost connections.
    5. A vTPM whose EK is certified for another guest does not start here: one of the two is a clone.

Owner: `GuestResidency.starting` changes what was seen; the CA, through the journal, what is certified.

Spec: DESIGN 3.1 (runs here), 3.6.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Protocol

from harness import events
from harness.errors import CloneSuspected, GuestNotHere, MalformedMessage, NotReady
from harness.provider.guests import RUNNING, GuestCache
from harness.provider.journal import Journal, Seen
from harness.swtpm import STATE_FILE
from harness.values import AgentId


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
        self._read_in: dict[AgentId, int] = {}

    async def check(self, agent_ids: Collection[AgentId]) -> Mapping[AgentId, bytes | GuestNotHere | NotReady]:
        """For each guest the SHA-256 of its vTPM EK's SubjectPublicKeyInfo, or why it gets no leaf.

        *Cancellation:* nothing has changed.
        """
        certified, seen = await self._journal.residents(agent_ids)
        return {agent_id: self._one(agent_id, certified.get(agent_id), seen.get(agent_id)) for agent_id in agent_ids}

    def _one(self, agent_id: AgentId, certified: bytes | None, seen: Seen | None) -> bytes | GuestNotHere | NotReady:
        try:
            domain = self._cache.domain(agent_id)
        except NotReady as error:
            return error
        if domain is None or not domain.persistent or domain.state != RUNNING:
            return GuestNotHere("this guest does not run on this host now")
        # Guests that run when the host agent starts are in run 0: what was seen before the restart holds.
        ours = self._read_in.get(agent_id, 0) == self._cache.run_of(agent_id)
        if seen is None or not ours or (domain.run is not None and domain.run != seen.run):
            return GuestNotHere("nobody has looked at the vTPM that this guest was started with")
        if certified is None or certified != seen.ek:
            return GuestNotHere("the vTPM that runs under this UUID is not the one that this host certified")
        return certified

    async def starting(self, agent_id: AgentId, state_dir: Path, *, run: str | None = None) -> bool:
        """Reads the EK of a guest that is about to start, from a copy of its vTPM's state.

        Args:
            agent_id: the guest.
            state_dir: where its vTPM's state is.
            run: the guest manager's id of this start, if it gives any.

        Returns:
            Whether it is the EK that this host certified. A guest with another one may run; it is not resident.

        Raises:
            GuestNotHere, NotReady: the domain is not known as defined and not running.
            MalformedMessage: there is no vTPM state.
            CloneSuspected: the EK is certified for another guest.
            SimulationError, TpmError: the state cannot be read.

        *Cancellation:* the guest has no EK until its next start.
        """
        number = await self._cache.off(agent_id)
        await self._journal.unsee(agent_id)
        state = state_dir / STATE_FILE
        try:
            status = await asyncio.to_thread(os.stat, state)
        except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
            raise MalformedMessage(f"{state}: no vTPM state: {error}") from error
        digest = await self._read_ek(state_dir)
        await self._cache.off(agent_id)  # it was not started meanwhile, perhaps with another vTPM
        certified = await self._journal.rsa_eks()
        owner = next((other for other, ek in certified.items() if ek == digest and other != agent_id), None)
        if owner is not None:
            events.emit("clone_suspected", level="error", agent_id=str(agent_id), owner=str(owner))
            raise CloneSuspected(f"the vTPM of guest {agent_id} holds the EK that is certified for guest {owner}")
        await self._journal.saw(agent_id, state, status, digest, run)
        self._read_in[agent_id] = number
        if certified.get(agent_id) != digest:
            events.emit("foreign_vtpm", level="warning", agent_id=str(agent_id))
        return certified.get(agent_id) == digest

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
