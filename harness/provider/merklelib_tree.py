"""Tree builder on merklelib 1.0, the library that the project's first plan named. It builds; it must never verify.

Selected with ``tree: merklelib``, to reproduce that plan and as an oracle for roots. Its own verification accepts
inner nodes as leaves; its proofs have neither index nor size, so both are added here.

Invariants:
    1. Root and paths are those of RFC 9162 for the same leaf hashes.
    2. No two leaves are equal: merklelib finds leaves by hash, and would give both the proof of the later one.

Owner: whoever built it; read only.

Spec: RFC 9162, 2.1.1 and 2.1.3; DESIGN 4.
"""

from __future__ import annotations

import collections.abc
import types
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from harness.errors import ConfigError
from harness.merkle import node_hash
from harness.provider.batch import TreeBuilder

LIMIT = 4096
"""Leaves; beyond that the time to build it (16 ms here) starts to show beside that of a TPM quote."""


class MerklelibTree:
    """A tree over leaf hashes.

    Args:
        leaf_hashes: distinct, in the order of the leaves, at least one.

    Raises:
        ConfigError: merklelib is not installed.
        ValueError: no leaves, or two equal ones.
    """

    def __init__(self, leaf_hashes: Sequence[bytes]) -> None:
        if not leaf_hashes or len(set(leaf_hashes)) != len(leaf_hashes):
            raise ValueError("merklelib needs distinct leaves")
        self._leaf_hashes = tuple(leaf_hashes)
        self._tree = _build(leaf_hashes)

    @property
    def size(self) -> int:
        """Number of leaves."""
        return len(self._leaf_hashes)

    @property
    def root(self) -> bytes:
        """Root hash."""
        return bytes.fromhex(self._tree.merkle_root)

    def paths(self) -> list[tuple[bytes, ...]]:
        """Siblings from leaf to root of each leaf, in the order of the leaves."""
        return [
            tuple(bytes.fromhex(node) for node in self._tree.get_proof(leaf).hex_nodes) for leaf in self._leaf_hashes
        ]


MERKLELIB = TreeBuilder(
    name="merklelib",
    build=MerklelibTree,
    limit=LIMIT,
    cost=f"it takes several times as long as rfc9162 for the same tree, and a batch ends at {LIMIT} requests",
)


def _build(leaf_hashes: Sequence[bytes]) -> Any:
    try:
        import merklelib
        import merklelib.merkle
    except ImportError as error:
        raise ConfigError("tree: merklelib is not installed (extra `merklelib`)") from error

    # merklelib 1.0 asks for collections.Iterable, which Python 3.10 removed; only its own view of the module is mended.
    merklelib.merkle.collections = types.SimpleNamespace(Iterable=collections.abc.Iterable, OrderedDict=OrderedDict)

    class LeafHashes(merklelib.Hasher):  # type: ignore[misc]
        def hash_leaf(self, data: bytes) -> bytes:
            return data  # the leaf is hashed already

        def hash_children(self, left: bytes, right: bytes) -> bytes:
            return node_hash(left, right)

    return merklelib.MerkleTree(list(leaf_hashes), LeafHashes())
