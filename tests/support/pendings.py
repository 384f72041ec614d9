"""Builds admitted requests."""

from __future__ import annotations

import hashlib
import itertools
import uuid
from collections.abc import Iterable

from harness.protocol import QuoteRequest
from harness.provider.batch import PendingQuote
from harness.values import AgentId, HashAlg, Nonce, PcrSelection, mask_of

_serial = itertools.count(1)


def requester_of_tenant(tenant: str) -> bytes:
    """What stands for the public key of this tenant's client certificate."""
    return hashlib.sha256(tenant.encode()).digest()


def agent(number: int) -> AgentId:
    """Some guest."""
    return AgentId(uuid.UUID(int=(1 << 127) + number))


def allow(pcrs: Iterable[int], bank: HashAlg = HashAlg.SHA256) -> PcrSelection:
    """Allowlist in one bank."""
    return PcrSelection.of(bank, mask_of(pcrs))


def a_request(
    tenant: str = "alice",
    pcrs: Iterable[int] = (0, 7),
    *,
    allowlist: PcrSelection | None = None,
    agent_id: AgentId | None = None,
    bank: HashAlg = HashAlg.SHA256,
    nonce: bytes | None = None,
    wait_s: float = 30.0,
) -> PendingQuote:
    """An admitted request; its nonce is new unless given."""
    request = QuoteRequest(
        nonce=Nonce(nonce or hashlib.sha256(b"nonce %d" % next(_serial)).digest()),
        bank=bank,
        mask=mask_of(pcrs),
        agent_id=agent_id,
        binding=None if agent_id is None else hashlib.sha256(agent_id.bytes).digest(),
    )
    return PendingQuote(
        request=request,
        tenant=tenant,
        requester=requester_of_tenant(tenant),
        allowlist=allow(range(16), bank) if allowlist is None else allowlist,
        wait_s=wait_s,
    )
