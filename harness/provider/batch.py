"""Open pools and sealed batches: who may share a quote, and what the batch signs. Pure; no task, clock or TPM.

Invariants:
    1. At each moment the union of a pool's selections lies inside the allowlist of every one of its members, so that
       every member may be handed every PCR that the quote covers.
    2. A waiter is in at most one pool, and a sealed batch never changes.
    3. A sealed batch's leaves are in random order and filled up with random leaf hashes to a power of two of at least
       16: size and index tell a member little about the others. No verifier depends on either.
    4. Where a pool is larger than what is taken from it, tenants take turns, and a pool that was served waits behind
       every pool that has not been served since.

Owner: `batcher.Batcher` changes pools; a `SealedBatch` is read by the quoter.

Spec: DESIGN 3.2 (leaf, filling), 3.4 (pools), 4 (order, fairness).
"""

from __future__ import annotations

import random
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

from harness import merkle, protocol
from harness.merkle import InclusionProof
from harness.protocol import QuoteRequest
from harness.values import AgentId, HashAlg, HostId, PcrSelection, PcrValues

SMALLEST_TREE = 16
_FILLING_SIZE = 32  # random bytes behind each leaf hash that belongs to nobody


class Tree(Protocol):
    """What a batch needs of a tree."""

    @property
    def size(self) -> int:
        """Number of leaves."""

    @property
    def root(self) -> bytes:
        """Root hash (RFC 9162, 2.1.1)."""

    def proofs(self) -> Sequence[InclusionProof]:
        """Inclusion proof of each leaf, in the order of the leaves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeBuilder:
    """A way to build the tree.

    Args:
        name: as in the settings (``rfc9162``, ``merklelib``).
        build: tree over these leaf hashes.
        limit: largest number of leaves that it may be given.
    """

    name: str
    build: Callable[[Sequence[bytes]], Tree]
    limit: int


RFC9162 = TreeBuilder(name="rfc9162", build=merkle.MerkleTree, limit=1 << 20)
"""The project's own tree; 2^20 is what a tenant accepts (DESIGN 3.5, check 3)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingQuote:
    """A request that was admitted and waits for a quote.

    Args:
        request: what the tenant asked, as fields.
        tenant: whose request it is.
        requester: SHA-256 of the client certificate's public key (DESIGN 3.2), from the connection.
        allowlist: the PCRs that this tenant may see on this host.
        wait_s: seconds from its arrival at the batcher in which an answer is of use; a tenant gives up after 30
            (DESIGN 3.5, check 1).
    """

    request: QuoteRequest
    tenant: str
    requester: bytes
    allowlist: PcrSelection
    wait_s: float = 30.0

    def __post_init__(self) -> None:
        if len(self.requester) != 32:
            raise ValueError("requester must be a SHA-256 digest")

    @property
    def agent_id(self) -> AgentId | None:
        """The guest of a guest round."""
        return self.request.agent_id

    def leaf_hash(self, vtpm_ek: bytes | None) -> bytes:
        """This request's leaf hash.

        Args:
            vtpm_ek: SHA-256 of the public key of the guest's vTPM EK as this host knows it; None for a host-only round.
        """
        return merkle.leaf_hash(protocol.leaf_data(self.request, requester=self.requester, vtpm_ek=vtpm_ek))


@dataclass(slots=True, kw_only=True, eq=False)
class Waiter:
    """A pending quote in a pool; ``arrived_s`` is monotonic time."""

    pending: PendingQuote
    arrived_s: float


@dataclass(slots=True, eq=False)
class Pool:
    """Waiters that may share one quote. An empty pool is thrown away by its owner, never reused."""

    _tenants: OrderedDict[str, OrderedDict[Waiter, None]] = field(default_factory=OrderedDict)
    # Counted, not recomputed: neither many masks nor many cancelled requests make the next `admits` slow.
    _asked: Counter[tuple[HashAlg, int]] = field(default_factory=Counter)
    _allowlists: Counter[PcrSelection] = field(default_factory=Counter)
    _served_s: float = float("-inf")

    def __len__(self) -> int:
        return self._allowlists.total()

    def admits(self, pending: PendingQuote) -> bool:
        """Whether the union with this request lies inside the allowlist of every member and of the request."""
        union = self.selection.union(pending.request.selection)
        return union.within(pending.allowlist) and all(union.within(allowlist) for allowlist in self._allowlists)

    @property
    def selection(self) -> PcrSelection:
        """Union of the members' selections."""
        return _selection_of(self._asked)

    def add(self, waiter: Waiter) -> None:
        """Puts a waiter that `admits` accepts at the end of its tenant's queue."""
        self._tenants.setdefault(waiter.pending.tenant, OrderedDict())[waiter] = None
        self._asked.update(waiter.pending.request.selection)
        self._allowlists[waiter.pending.allowlist] += 1

    def discard(self, waiter: Waiter) -> None:
        """Takes a waiter out, if it is in this pool."""
        queue = self._tenants.get(waiter.pending.tenant)
        if queue is None or waiter not in queue:
            return
        del queue[waiter]
        if not queue:
            del self._tenants[waiter.pending.tenant]
        self._asked -= Counter(waiter.pending.request.selection)  # drops what nobody asks any more
        self._allowlists -= Counter([waiter.pending.allowlist])

    def take(self, limit: int, now_s: float) -> list[Waiter]:
        """Takes up to ``limit`` waiters out: one of each tenant in turn, each tenant's oldest first."""
        taken: list[Waiter] = []
        while self._tenants and len(taken) < limit:
            tenant, queue = next(iter(self._tenants.items()))
            waiter = next(iter(queue))
            self._tenants.move_to_end(tenant)
            self.discard(waiter)
            taken.append(waiter)
        self._served_s = now_s
        return taken

    @property
    def waiting_since_s(self) -> float:
        """When its oldest waiter came, or when the pool was last served if that is later."""
        return max(self._served_s, min(next(iter(queue)).arrived_s for queue in self._tenants.values()))


def _selection_of(pcrs: Iterable[tuple[HashAlg, int]]) -> PcrSelection:
    lists: dict[HashAlg, list[int]] = {}
    for bank, pcr in pcrs:
        lists.setdefault(bank, []).append(pcr)
    return PcrSelection.from_lists(lists)


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedBatch:
    """What one quote signs: the tree over its members' leaves and the union of their selections.

    Args:
        id: names the batch in answers and events; random, tells nothing.
        tree: over members' and filling leaves.
        selection: union of the members' selections.
        sealed_at: UTC.
    """

    id: str
    tree: Tree
    selection: PcrSelection
    sealed_at: datetime
    _indices: Mapping[Waiter, int] = field(repr=False)

    @property
    def members(self) -> tuple[Waiter, ...]:
        """Those whose request is a leaf."""
        return tuple(self._indices)

    def proofs(self) -> dict[Waiter, InclusionProof]:
        """Each member's inclusion proof."""
        proofs = self.tree.proofs()
        return {waiter: proofs[index] for waiter, index in self._indices.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Quote:
    """A TPM's quote with the values that it signs.

    Args:
        host_id: whose TPM made it.
        attest: TPMS_ATTEST exactly as signed.
        signature: TPMT_SIGNATURE.
        pcrs: exactly the signed selection; they hash to the signed digest.
        tpm_quotes: how many TPM2_Quote it took (more than one after a race with a PCR extend).
    """

    host_id: HostId
    attest: bytes
    signature: bytes
    pcrs: PcrValues
    tpm_quotes: int = 1


def seal(
    members: Mapping[Waiter, bytes | None], *, builder: TreeBuilder, rng: random.Random, sealed_at: datetime
) -> SealedBatch:
    """Seals a batch.

    Two requests with the same leaf (a client that uses its nonce twice) share it.

    Args:
        members: waiters of one pool, each with the ``vtpm_ek`` of its guest, or None for a host-only round.
        builder: builds the tree.
        rng: a source that nobody can predict, such as `random.SystemRandom`.
        sealed_at: UTC.

    Raises:
        ValueError: no members.
    """
    if not members:
        raise ValueError("a batch needs a member")
    leaf_of = {waiter: waiter.pending.leaf_hash(vtpm_ek) for waiter, vtpm_ek in members.items()}
    leaves = list(dict.fromkeys(leaf_of.values()))
    filled = max(SMALLEST_TREE, 1 << (len(leaves) - 1).bit_length())
    leaves += [merkle.leaf_hash(rng.randbytes(_FILLING_SIZE)) for _ in range(filled - len(leaves))]
    rng.shuffle(leaves)
    position = {leaf: index for index, leaf in enumerate(leaves)}
    asked = {waiter.pending.request.selection for waiter in members}
    return SealedBatch(
        id=rng.randbytes(8).hex(),
        tree=builder.build(leaves),
        selection=_selection_of(pcr for selection in asked for pcr in selection),
        sealed_at=sealed_at,
        _indices={waiter: position[leaf] for waiter, leaf in leaf_of.items()},
    )
