"""Merkle tree hashing and inclusion proofs.

A proof is an index, a tree size and the siblings from leaf to root. On which side a sibling stands follows from the two
numbers; it is never sent, and never believed.

Invariants:
    1. Leaves and nodes are hashed with different prefixes: no node can be read as a leaf.
    2. A proof with the wrong number of siblings for its index and size is refused, not shortened.

Spec: RFC 9162, 2.1.1 (tree), 2.1.3.1 (proof) and 2.1.3.2 (verification); DESIGN 3.2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from harness.errors import InclusionProofInvalid

MAX_TREE_SIZE = 1 << 20
"""Largest tree a verifier accepts (DESIGN 3.5, check 3)."""
HASH_SIZE = 32


def leaf_hash(data: bytes) -> bytes:
    """SHA-256(0x00 ‖ data), 32 bytes."""
    return hashlib.sha256(b"\x00" + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """SHA-256(0x01 ‖ left ‖ right), 32 bytes."""
    return hashlib.sha256(b"\x01" + left + right).digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class InclusionProof:
    """Where a leaf stands and how to get from it to the root; received or made, not yet believed.

    Args:
        leaf_index: 0 is the first leaf.
        tree_size: number of leaves.
        hashes: siblings from leaf to root, 32 bytes each.
    """

    leaf_index: int
    tree_size: int
    hashes: tuple[bytes, ...]


class MerkleTree:
    """Tree over a fixed list of leaf hashes, built once.

    Args:
        leaf_hashes: 1 to 2^20 leaf hashes of 32 bytes; equal ones are kept, each at its index.

    Raises:
        ValueError: no leaf, too many leaves, or a hash of another length.
    """

    def __init__(self, leaf_hashes: Sequence[bytes]) -> None:
        if not 1 <= len(leaf_hashes) <= MAX_TREE_SIZE:
            raise ValueError(f"a tree has 1 to {MAX_TREE_SIZE} leaves, not {len(leaf_hashes)}")
        if any(len(leaf) != HASH_SIZE for leaf in leaf_hashes):
            raise ValueError(f"a leaf hash has {HASH_SIZE} bytes")
        # Level by level; an odd last node is promoted, which gives the same tree as the RFC's recursive definition.
        sha256 = hashlib.sha256  # `node_hash` in line: a call per node is a third of the time
        self._levels = [list(leaf_hashes)]
        while len(level := self._levels[-1]) > 1:
            pairs = zip(level[::2], level[1::2], strict=False)
            above = [sha256(b"\x01" + left + right).digest() for left, right in pairs]
            if len(level) % 2:
                above.append(level[-1])
            self._levels.append(above)

    @property
    def size(self) -> int:
        """Number of leaves."""
        return len(self._levels[0])

    @property
    def root(self) -> bytes:
        """Root hash, 32 bytes."""
        return self._levels[-1][0]

    def proof(self, leaf_index: int) -> InclusionProof:
        """Inclusion proof of one leaf.

        Raises:
            IndexError: no such leaf.
        """
        if not 0 <= leaf_index < self.size:
            raise IndexError(f"leaf {leaf_index} of a tree of {self.size}")
        hashes = []
        index = leaf_index
        for level in self._levels[:-1]:
            sibling = index ^ 1
            if sibling < len(level):  # a promoted node has none
                hashes.append(level[sibling])
            index >>= 1
        return InclusionProof(leaf_index=leaf_index, tree_size=self.size, hashes=tuple(hashes))

    def paths(self) -> list[tuple[bytes, ...]]:
        """Siblings from leaf to root of all leaves, in their order; made in one pass from the root down."""
        paths: list[tuple[bytes, ...]] = [()]
        for level in reversed(self._levels[:-1]):
            below: list[tuple[bytes, ...]] = []
            for path, left, right in zip(paths, level[::2], level[1::2], strict=False):
                below += ((right, *path), (left, *path))
            if len(level) % 2:
                below.append(paths[-1])  # a promoted node has no sibling
            paths = below
        return paths

    def proofs(self) -> list[InclusionProof]:
        """Inclusion proofs of all leaves, in their order."""
        size = self.size
        return [
            InclusionProof(leaf_index=index, tree_size=size, hashes=path) for index, path in enumerate(self.paths())
        ]


def root_from_proof(leaf: bytes, proof: InclusionProof) -> bytes:
    """Root hash that a proof leads to; the caller compares it with what was signed.

    Args:
        leaf: leaf hash, computed by the caller from its own request.
        proof: as received.

    Raises:
        InclusionProofInvalid: size outside 1 to 2^20, index not below it, or the wrong number of siblings.
    """
    if not 1 <= proof.tree_size <= MAX_TREE_SIZE:
        raise InclusionProofInvalid(f"tree size {proof.tree_size} is not in 1 to {MAX_TREE_SIZE}")
    if not 0 <= proof.leaf_index < proof.tree_size:
        raise InclusionProofInvalid(f"leaf index {proof.leaf_index} is not below the tree size {proof.tree_size}")
    index, last, node = proof.leaf_index, proof.tree_size - 1, leaf  # RFC 9162, 2.1.3.2: fn, sn, r
    for sibling in proof.hashes:
        if last == 0:
            raise InclusionProofInvalid("the inclusion path goes on beyond the root")
        if index & 1 or index == last:
            node = node_hash(sibling, node)
            while not index & 1 and index:
                index, last = index >> 1, last >> 1
        else:
            node = node_hash(node, sibling)
        index, last = index >> 1, last >> 1
    if last != 0:
        raise InclusionProofInvalid("the inclusion path ends below the root")
    return node
