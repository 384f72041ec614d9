"""The host agent's journal: which vTPM keys were certified for which guest, and which EK each guest last ran with.

Invariants:
    1. One key of each kind per guest, and one guest per key, until the operator releases them (an act that stays in
       the journal and in the host's audit trail).
    2. `record` commits before the certificate leaves: a certificate that exists is in the journal.
    3. It knows keys of vTPMs, and not which CA key certified them: when the host's TPM is replaced, entries stay until
       each guest is released and its vTPM manufactured anew. Until then its tenant refuses the old certificate.

Owner: the host agent.

Spec: DESIGN 3.6 (vTPM manufacture), 3.1 (runs here).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import delete, select

from harness import audit_store
from harness.audit import AuditEntry
from harness.audit_store import Trail
from harness.errors import CloneSuspected, Conflict, NotFound
from harness.provider.tables import HostAuditRow, IssuedCertificate, SeenVtpm
from harness.store import Store
from harness.values import AgentId, parse_agent_id

RSA_EK, ECC_EK, PLATFORM = "rsa-ek", "ecc-ek", "platform"
# Columns, not rows: making an object of each row would be most of what a batch waits for.
_CERTIFIED = select(IssuedCertificate.agent_id, IssuedCertificate.spki_digest).where(
    IssuedCertificate.kind == RSA_EK, IssuedCertificate.released_at.is_(None)
)
_SEEN = select(SeenVtpm.agent_id, SeenVtpm.spki_digest, SeenVtpm.run)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What a guest was last started with: SHA-256 of its EK's SubjectPublicKeyInfo, and the start's id, if any."""

    ek: bytes
    run: str | None


class Journal(Trail):
    """The journal of one host.

    Args:
        store: the host agent's database.
        now: seconds since the epoch.
    """

    def __init__(self, store: Store, *, now: Callable[[], float] = time.time) -> None:
        super().__init__(store, HostAuditRow)
        self._now = now

    async def record(self, agent_id: AgentId, kind: str, spki_digest: bytes, serial: int) -> None:
        """Records a key that is about to be certified.

        Args:
            agent_id: the guest.
            kind: `RSA_EK`, `ECC_EK` or `PLATFORM`.
            spki_digest: SHA-256 of the key's SubjectPublicKeyInfo.
            serial: of the certificate.

        Raises:
            Conflict: the guest has a certified key of this kind already.
            CloneSuspected: the key is certified for another guest.

        *Cancellation:* recorded or not.
        """
        issued = IssuedCertificate
        async with self._store.begin() as session:
            # For this guest the key may be there: the platform certificate is for the RSA EK too. A released one counts
            # for all others: its certificate is still valid.
            other = await session.scalar(
                select(issued.agent_id).where(issued.spki_digest == spki_digest, issued.agent_id != str(agent_id))
            )
            if other is not None:
                raise CloneSuspected(f"this vTPM key is in the journal for guest {other}")
            mine = await session.scalar(
                select(issued.id).where(
                    issued.agent_id == str(agent_id), issued.kind == kind, issued.released_at.is_(None)
                )
            )
            if mine is not None:
                raise Conflict(
                    f"guest {agent_id} has a certified {kind} already; an operator must release it first "
                    "(harness provider guest release)"
                )
            session.add(
                issued(
                    agent_id=str(agent_id),
                    kind=kind,
                    spki_digest=spki_digest,
                    serial=f"{serial:x}",
                    issued_at=self._now(),
                )
            )

    async def release(self, agent_id: AgentId, reason: str, *, who: str) -> None:
        """Releases all keys of a guest, so that a new vTPM can be manufactured for it.

        From then on a vTPM that still runs under its UUID is not the certified one: it gets no leaf.

        Args:
            agent_id: the guest.
            reason: why, in the operator's words.
            who: the operator.

        Raises:
            NotFound: nothing is in the journal for this guest.

        *Cancellation:* released or not.
        """
        async with self._store.begin() as session:
            rows = await session.scalars(
                select(IssuedCertificate).where(
                    IssuedCertificate.agent_id == str(agent_id), IssuedCertificate.released_at.is_(None)
                )
            )
            found = list(rows)
            if not found:
                raise NotFound(f"the journal holds no vTPM of guest {agent_id}")
            at = self._now()
            for row in found:
                row.released_at, row.reason = at, reason
            entry = AuditEntry(at=at, who=who, action="vtpm-release", subject=str(agent_id), reason=reason)
            audit_store.record(session, HostAuditRow, entry)

    async def rsa_eks(self) -> dict[AgentId, bytes]:
        """SHA-256 of the SubjectPublicKeyInfo of every guest's certified RSA EK."""
        async with self._store.begin() as session:
            return {parse_agent_id(text): ek for text, ek in await session.execute(_CERTIFIED)}

    async def saw(
        self, agent_id: AgentId, state: Path, status: os.stat_result, spki_digest: bytes, run: str | None = None
    ) -> None:
        """Records the EK that a copy of a guest's vTPM state holds, with device and inode of the state file.

        Args:
            agent_id: the guest.
            state: the state file.
            status: of it.
            spki_digest: SHA-256 of the EK's SubjectPublicKeyInfo.
            run: the guest manager's id of the start that this was read for, if it has any.

        *Cancellation:* recorded or not.
        """
        async with self._store.begin() as session:
            await session.merge(
                SeenVtpm(
                    agent_id=str(agent_id),
                    state_dir=str(state.parent),
                    device=str(status.st_dev),
                    inode=str(status.st_ino),
                    spki_digest=spki_digest,
                    seen_at=self._now(),
                    run=run,
                )
            )

    async def unsee(self, agent_id: AgentId) -> None:
        """Forgets the EK that a guest last ran with: another start is on its way.

        *Cancellation:* forgotten or not.
        """
        async with self._store.begin() as session:
            await session.execute(delete(SeenVtpm).where(SeenVtpm.agent_id == str(agent_id)))

    async def seen(self) -> dict[AgentId, bytes]:
        """EK that each guest last ran with."""
        return {agent_id: seen.ek for agent_id, seen in (await self.seen_in_runs()).items()}

    async def seen_in_runs(self) -> dict[AgentId, Seen]:
        """EK that each guest last ran with, and the run that it was read for."""
        async with self._store.begin() as session:
            return {parse_agent_id(text): Seen(ek=ek, run=run) for text, ek, run in await session.execute(_SEEN)}

    async def residents(self, agent_ids: Collection[AgentId]) -> tuple[dict[AgentId, bytes], dict[AgentId, Seen]]:
        """`rsa_eks` and `seen_in_runs` of one moment, for the guests of a batch, which waits for it."""
        async with self._store.begin() as session:
            certified = {row.agent_id: row.spki_digest for row in await session.execute(_CERTIFIED)}
            seen = {row.agent_id: row for row in await session.execute(_SEEN)}
        texts = {agent_id: str(agent_id) for agent_id in agent_ids}
        found = {agent_id: seen[text] for agent_id, text in texts.items() if text in seen}
        return (
            {agent_id: certified[text] for agent_id, text in texts.items() if text in certified},
            {agent_id: Seen(ek=row.spki_digest, run=row.run) for agent_id, row in found.items()},
        )
