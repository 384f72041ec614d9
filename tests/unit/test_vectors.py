"""This implementation and the one that computed `tests/vectors` agree."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from harness import protocol
from harness.errors import ConfigError
from harness.merkle import MerkleTree, leaf_hash, root_from_proof
from harness.messages import encode_proof
from harness.tenant.offline import appraise_files
from harness.values import HashAlg, Nonce, parse_agent_id, parse_mask
from tests.support import vectors

TREES = vectors.load("tree.json")
CASES = vectors.load("appraisal.json")


def leaf_of(request: dict[str, str]) -> bytes:
    """Leaf data of a request as the file states it."""
    binding, vtpm_ek = request.get("binding"), request.get("vtpm_ek")
    fields = protocol.QuoteRequest(
        nonce=Nonce.parse(request["nonce"]),
        bank=HashAlg.parse(request["hash_alg"]),
        mask=parse_mask(request["mask"]),
        agent_id=parse_agent_id(request["agent_id"]) if "agent_id" in request else None,
        binding=None if binding is None else bytes.fromhex(binding),
    )
    return protocol.leaf_data(
        fields,
        requester=bytes.fromhex(request.get("requester", "")),
        vtpm_ek=None if vtpm_ek is None else bytes.fromhex(vtpm_ek),
    )


@pytest.mark.parametrize("tree", TREES, ids=lambda tree: f"{tree['tree_size']}-leaves")
def test_tree_and_qualifying_data_are_the_stated_ones(tree: dict[str, Any]) -> None:
    """Leaf data, leaf hashes, root, proofs and both forms of the qualifying data follow from the requests."""
    assert leaf_of(tree["requests"][0]).hex() == tree["leaf_data_of_first"]
    leaves = [leaf_hash(leaf_of(request)) for request in tree["requests"]]
    assert [leaf.hex() for leaf in leaves] == tree["leaf_hashes"]
    made = MerkleTree(leaves)
    assert (made.size, made.root.hex()) == (tree["tree_size"], tree["root_hash"])
    assert [encode_proof(proof) for proof in made.proofs()] == tree["proofs"]
    assert all(root_from_proof(leaf, proof) == made.root for leaf, proof in zip(leaves, made.proofs(), strict=True))
    qualifying = protocol.qualifying_data(made.size, made.root)
    assert qualifying.hex() == tree["qualifying"]
    assert protocol.qualifying_text(qualifying).decode() == tree["qualifying_text"]


@pytest.mark.parametrize("tree", TREES, ids=lambda tree: f"{tree['tree_size']}-leaves")
def test_the_binding_is_the_stated_one(tree: dict[str, Any]) -> None:
    """A binding follows from the guest AK's Name and the guest's attest."""
    example = tree["binding_example"]
    made = protocol.guest_binding(bytes.fromhex(example["ak_name"]), base64.b64decode(example["attest"]))
    assert made.hex() == example["binding"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case["name"]))
def test_saved_evidence_has_the_stated_verdict(case: dict[str, Any], tmp_path: Path) -> None:
    """Accepted, rejected by the stated check, or unusable request or trust."""
    paths = vectors.save(tmp_path, **{name: case[name] for name in ("request", "response", "trust")})
    expected = case["expect"]
    if expected == {"exit": 2}:
        with pytest.raises(ConfigError):
            appraise_files(**paths)
        return
    verdict, code = appraise_files(**paths)
    assert {name: verdict[name] for name in expected} == expected
    assert code == (0 if expected["accepted"] else 1)
