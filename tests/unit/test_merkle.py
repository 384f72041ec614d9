"""Merkle trees by RFC 9162, and proofs that somebody bent."""

from __future__ import annotations

import hashlib
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import InclusionProofInvalid
from harness.merkle import MAX_TREE_SIZE, InclusionProof, MerkleTree, leaf_hash, node_hash, root_from_proof
from harness.provider.merklelib_tree import MerklelibTree


def leaves_of(size: int) -> list[bytes]:
    """Different leaf hashes."""
    return [leaf_hash(place.to_bytes(4, "big")) for place in range(size)]


def mth(leaves: list[bytes]) -> bytes:
    """RFC 9162, 2.1.1, word for word: split at the largest power of two below n."""
    if len(leaves) == 1:
        return leaves[0]
    split = 1 << (len(leaves) - 1).bit_length() - 1
    return hashlib.sha256(b"\x01" + mth(leaves[:split]) + mth(leaves[split:])).digest()


def path(index: int, leaves: list[bytes]) -> list[bytes]:
    """RFC 9162, 2.1.3.1, word for word."""
    if len(leaves) == 1:
        return []
    split = 1 << (len(leaves) - 1).bit_length() - 1
    if index < split:
        return [*path(index, leaves[:split]), mth(leaves[split:])]
    return [*path(index - split, leaves[split:]), mth(leaves[:split])]


def bent(proof: InclusionProof, **changes: object) -> InclusionProof:
    """The proof with other parts."""
    parts = {"leaf_index": proof.leaf_index, "tree_size": proof.tree_size, "hashes": proof.hashes}
    return InclusionProof(**{**parts, **changes})  # type: ignore[arg-type]


def test_leaves_and_nodes_are_hashed_apart() -> None:
    """The bytes of an inner node, taken as leaf data, have another hash."""
    left, right = leaves_of(2)
    assert leaf_hash(b"") == hashlib.sha256(b"\x00").digest()
    assert leaf_hash(b"\x01" + left + right) != node_hash(left, right) != leaf_hash(left + right)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100, 255, 257])
def test_root_and_proofs_are_those_of_the_rfc(size: int) -> None:
    """The level-by-level tree is the recursive one of RFC 9162, and every proof leads to its root."""
    leaves = leaves_of(size)
    tree = MerkleTree(leaves)
    assert (tree.size, tree.root) == (size, mth(leaves))
    proofs = list(tree.proofs())
    assert [list(proof.hashes) for proof in proofs] == [path(index, leaves) for index in range(size)]
    assert {root_from_proof(leaf, proof) for leaf, proof in zip(leaves, proofs, strict=True)} == {tree.root}


def test_roots_are_those_of_merklelib() -> None:
    """An implementation by others gives the same root for 1 to 300 leaves."""
    leaves = leaves_of(300)
    for size in range(1, 301):
        assert MerklelibTree(leaves[:size]).root == MerkleTree(leaves[:size]).root


def test_equal_leaves_keep_their_places() -> None:
    """Two equal requests are two leaves, each with its own proof."""
    tree = MerkleTree([leaf_hash(b"x"), leaf_hash(b"y"), leaf_hash(b"x")])
    assert tree.size == 3
    assert tree.proof(0) != tree.proof(2)
    assert root_from_proof(leaf_hash(b"x"), tree.proof(2)) == root_from_proof(leaf_hash(b"x"), tree.proof(0))


@pytest.mark.parametrize(
    "leaves", [[], [bytes(31)], [bytes(32), bytes(33)]], ids=["no-leaf", "short-leaf", "one-long-leaf"]
)
def test_what_is_no_leaf_hash_makes_no_tree(leaves: list[bytes]) -> None:
    """A tree needs at least one leaf, and leaves are hashes."""
    with pytest.raises(ValueError, match=r"leaf|leaves"):
        MerkleTree(leaves)


@pytest.mark.parametrize("index", [-1, 7, 8])
def test_there_is_no_proof_of_a_leaf_that_is_not_there(index: int) -> None:
    """Python's negative index is not a leaf's place."""
    with pytest.raises(IndexError):
        MerkleTree(leaves_of(7)).proof(index)


TREE = MerkleTree(leaves_of(7))
LAST = TREE.proof(6)  # rises alone once: its path is shorter than the others'
MIDDLE = TREE.proof(3)


@pytest.mark.parametrize(
    "proof",
    [
        pytest.param(bent(MIDDLE, tree_size=0), id="empty-tree"),
        pytest.param(bent(MIDDLE, tree_size=0, leaf_index=0, hashes=()), id="nothing-at-all"),
        pytest.param(bent(MIDDLE, tree_size=MAX_TREE_SIZE + 1), id="tree-too-large"),
        pytest.param(bent(MIDDLE, leaf_index=7), id="index-is-the-size"),
        pytest.param(bent(MIDDLE, leaf_index=3 + 8), id="index-bits-beyond-the-path"),
        pytest.param(bent(MIDDLE, leaf_index=-1), id="negative-index"),
        pytest.param(bent(MIDDLE, leaf_index=3 - 8), id="negative-index-with-equal-bits"),
        pytest.param(bent(MIDDLE, hashes=()), id="no-path"),
        pytest.param(bent(MIDDLE, hashes=MIDDLE.hashes[:-1]), id="path-too-short"),
        pytest.param(bent(MIDDLE, hashes=MIDDLE.hashes[1:]), id="inner-node-as-leaf"),
        pytest.param(bent(MIDDLE, hashes=(*MIDDLE.hashes, bytes(32))), id="path-too-long"),
        pytest.param(bent(MIDDLE, tree_size=4), id="smaller-tree"),
        pytest.param(bent(MIDDLE, tree_size=9), id="larger-tree"),
        pytest.param(bent(LAST, hashes=(*LAST.hashes, bytes(32))), id="risen-leaf-path-too-long"),
        pytest.param(bent(LAST, leaf_index=5), id="risen-leaf-at-another-place"),
        pytest.param(bent(LAST, tree_size=8), id="risen-leaf-in-a-full-tree"),
        pytest.param(InclusionProof(leaf_index=0, tree_size=1, hashes=(bytes(32),)), id="one-leaf-with-a-path"),
    ],
)
def test_a_path_of_the_wrong_length_leads_nowhere(proof: InclusionProof) -> None:
    """Index, size and number of siblings belong together; there is no root for anything else."""
    with pytest.raises(InclusionProofInvalid):
        root_from_proof(leaves_of(7)[proof.leaf_index % 7], proof)


def test_the_largest_tree_is_provable() -> None:
    """2^20 leaves are allowed, with 20 siblings."""
    largest = InclusionProof(leaf_index=MAX_TREE_SIZE - 1, tree_size=MAX_TREE_SIZE, hashes=(bytes(32),) * 20)
    assert len(root_from_proof(bytes(32), largest)) == 32


@given(st.data(), st.integers(1, 200))
def test_no_other_leaf_or_sibling_leads_to_the_root(data: st.DataObject, size: int) -> None:
    """Changing one bit of the leaf or of any sibling changes the root that follows."""
    leaves = leaves_of(size)
    tree = MerkleTree(leaves)
    proof = tree.proof(data.draw(st.integers(0, size - 1)))
    chain = [leaves[proof.leaf_index], *proof.hashes]
    place, bit = data.draw(st.integers(0, len(chain) - 1)), data.draw(st.integers(0, 255))
    flipped = bytearray(chain[place])
    flipped[bit // 8] ^= 1 << bit % 8
    chain[place] = bytes(flipped)
    assert root_from_proof(chain[0], bent(proof, hashes=tuple(chain[1:]))) != tree.root


@given(st.integers(1, 200), st.data())
def test_a_proof_is_good_at_its_own_place_only(size: int, data: st.DataObject) -> None:
    """With another index the proof leads to another root or to none."""
    leaves = leaves_of(size)
    tree = MerkleTree(leaves)
    own, other = data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, size + 300))
    if own == other:
        return
    try:
        root = root_from_proof(leaves[own], bent(tree.proof(own), leaf_index=other))
    except InclusionProofInvalid:
        return
    assert root != tree.root


def test_an_inner_node_is_no_leaf_in_any_smaller_tree(rng: random.Random) -> None:
    """A shortened path is refused under the true size; under a smaller one the signed size differs (DESIGN 3.2)."""
    leaves = leaves_of(64)
    tree = MerkleTree(leaves)
    place = rng.randrange(64)
    proof = tree.proof(place)
    pair = leaves[place - 1 : place + 1] if place & 1 else leaves[place : place + 2]
    inner = InclusionProof(leaf_index=place >> 1, tree_size=64, hashes=proof.hashes[1:])
    with pytest.raises(InclusionProofInvalid):
        root_from_proof(node_hash(*pair), inner)
    assert root_from_proof(node_hash(*pair), bent(inner, tree_size=32)) == tree.root
