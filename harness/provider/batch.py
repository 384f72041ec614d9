"""Waiting requests and sealed batches: what a batch signs, and what each member is given. Pure; no task, clock or TPM.

Invariants:
    1. A sealed batch never changes.
    2. A sealed batch's leaves are in random order and filled up with random leaf hashes to a power of two of at least
       16: size and index tell a member little about the others. No verifier depends on either.
    3. All members of a batch are given one `SharedAnswer` object, so that it is encoded and sent once.

Owner: `batcher.Batcher` has the waiters; a `SealedBatch` is read by the quoter.

Spec: DESIGN 3.2 (leaf, filling), 3.3, 4.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Protocol

from harness import merkle, protocol
from harness.errors import HarnessError
from harness.merkle import InclusionProof
from harness.protocol import QuoteRequest
from harness.values import AgentId, HashAlg, HostId, PcrSelection, PcrValues

if TYPE_CHECKING:
    from harness.provider.pools import Pool

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

    def paths(self) -> Sequence[tuple[bytes, ...]]:
        """Siblings from leaf to root of each leaf (RFC 9162, 2.1.3.1), in the order of the leaves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeBuilder:
    """A way to build the tree.

    Args:
        name: as in the settings (``rfc9162``, ``merklelib``).
        build: tree over these leaf hashes.
        limit: largest number of leaves that it may be given.
        cost: what it costs, in a sentence for the log; empty where it costs nothing worth a warning.
    """

    name: str
    build: Callable[[Sequence[bytes]], Tree]
    limit: int
    cost: str = ""


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


class Waiter:
    """A pending quote that waits, from its arrival until an outcome is delivered or its caller gives up.

    Args:
        pending: the request.
        arrived_s: monotonic time.
        due_s: monotonic time from which an answer is of no use.
        kind: as `pools.kind_of` gives it.
        deliver: takes the outcome; None when nobody waits (any more).
    """

    __slots__ = ("_after", "_before", "_leaf_hash", "arrived_s", "deliver", "due_s", "kind", "pending", "pool")

    def __init__(
        self,
        *,
        pending: PendingQuote,
        arrived_s: float,
        due_s: float = float("inf"),
        kind: int = 0,
        deliver: Deliver | None = None,
    ) -> None:
        self.pending = pending
        self.arrived_s = arrived_s
        self.due_s = due_s
        self.kind = kind
        self.deliver = deliver
        self.pool: Pool | None = None
        # As much as is known now, so that the TPM waits for no more than it must when the batch is sealed.
        self._before, self._after = protocol.leaf_ends(pending.request, requester=pending.requester)
        self._leaf_hash = self._hash(b"") if pending.agent_id is None else None

    def leaf_hash(self, vtpm_ek: bytes | None) -> bytes:
        """This request's leaf hash.

        Args:
            vtpm_ek: SHA-256 of the public key of the guest's vTPM EK as this host knows it; None for a host-only round.

        Raises:
            ValueError: a guest without ``vtpm_ek``, or the reverse.
        """
        if (self._leaf_hash is None) != (vtpm_ek is not None):
            raise ValueError("vtpm_ek is present exactly when agent_id is")
        return self._leaf_hash or self._hash(vtpm_ek or b"")

    def _hash(self, vtpm_ek: bytes) -> bytes:
        return merkle.leaf_hash(self._before + protocol.tpm2b(vtpm_ek) + self._after)


class SealedBatch:
    """What one quote signs: the tree over its members' leaves and the union of their selections.

    Args:
        batch_id: names the batch in answers and events; random, tells nothing.
        tree: over members' and filling leaves.
        selection: union of the members' selections.
        sealed_at: UTC.
        indices: each member's leaf index.
    """

    __slots__ = ("_indices", "_paths", "id", "sealed_at", "selection", "tree")

    def __init__(
        self, batch_id: str, tree: Tree, selection: PcrSelection, sealed_at: datetime, indices: Mapping[Waiter, int]
    ) -> None:
        self.id = batch_id
        self.tree = tree
        self.selection = selection
        self.sealed_at = sealed_at
        self._indices = indices
        self._paths: Sequence[tuple[bytes, ...]] | None = None

    @property
    def members(self) -> tuple[Waiter, ...]:
        """Those whose request is a leaf."""
        return tuple(self._indices)

    def paths(self) -> Sequence[tuple[bytes, ...]]:
        """The tree's paths; made on the first call, which is best while the TPM works."""
        if self._paths is None:
            self._paths = self.tree.paths()
        return self._paths

    def proof(self, member: Waiter) -> InclusionProof:
        """Inclusion proof of one member."""
        index = self._indices[member]
        return InclusionProof(leaf_index=index, tree_size=self.tree.size, hashes=self.paths()[index])

    def proofs(self) -> dict[Waiter, InclusionProof]:
        """Each member's inclusion proof."""
        return {member: self.proof(member) for member in self._indices}


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


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedAnswer:
    """What all members of a batch are given alike; one object per batch.

    Args:
        batch_id: names the batch.
        sealed_at: UTC.
        quote: what the TPM signed.
    """

    batch_id: str
    sealed_at: datetime
    quote: Quote


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What one waiter is given."""

    shared: SharedAnswer
    proof: InclusionProof


Outcome = Answer | HarnessError
Deliver = Callable[[Outcome], None]
"""Takes the outcome of one request, from the event loop; is quick, and does not raise."""


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
    leaf_of = {waiter: waiter.leaf_hash(vtpm_ek) for waiter, vtpm_ek in members.items()}
    distinct = dict.fromkeys(leaf_of.values())
    filled = max(SMALLEST_TREE, 1 << (len(distinct) - 1).bit_length())
    leaves = [*distinct, *_filling(filled - len(distinct), rng)]
    order = _permutation(filled, rng)
    index_of = dict(zip(distinct, order, strict=False))
    placed = leaves[:]
    for index, leaf in zip(order, leaves, strict=True):
        placed[index] = leaf
    return SealedBatch(
        batch_id=rng.randbytes(8).hex(),
        tree=builder.build(placed),
        selection=_selection_of(waiter.pending.request for waiter in members),
        sealed_at=sealed_at,
        indices={waiter: index_of[leaf] for waiter, leaf in leaf_of.items()},
    )


def _filling(count: int, rng: random.Random) -> list[bytes]:
    drawn = rng.randbytes(count * _FILLING_SIZE)
    return [merkle.leaf_hash(drawn[at : at + _FILLING_SIZE]) for at in range(0, len(drawn), _FILLING_SIZE)]


def _permutation(size: int, rng: random.Random) -> list[int]:
    """Random order of 0 to size - 1, by random keys: one draw, where a shuffle asks the system once for each."""
    keys = struct.unpack(f"{size}Q", rng.randbytes(8 * size))
    return sorted(range(size), key=keys.__getitem__)


def _selection_of(requests: Iterable[QuoteRequest]) -> PcrSelection:
    masks: dict[HashAlg, int] = {}
    for bank, mask in {(request.bank, request.mask) for request in requests}:
        masks[bank] = masks.get(bank, 0) | mask
    return PcrSelection(tuple(masks.items()))
