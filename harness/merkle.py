from __future__ import annotations
import hashlib
from dataclasses import dataclass
from collections.abc import Sequence
def leaf_hash(d: bytes) -> bytes: return hashlib.sha256(b"\0"+d).digest()
def node_hash(l: bytes,r: bytes) -> bytes: return hashlib.sha256(b"\1"+l+r).digest()
@dataclass(frozen=True, slots=True, kw_only=True)
class InclusionProof:
    leaf_index: int
    tree_size: int
    hashes: tuple[bytes, ...]
class MerkleTree:
    def __init__(self, leaf_hashes: Sequence[bytes]) -> None:
        self.levels=[list(leaf_hashes)]
        while len(self.levels[-1])>1:
            l=self.levels[-1]
            self.levels.append([node_hash(l[i],l[i+1]) if i+1<len(l) else l[i] for i in range(0,len(l),2)])
    @property
    def size(self) -> int: return len(self.levels[0])
    @property
    def root(self) -> bytes: return self.levels[-1][0]
    def proof(self, i: int) -> InclusionProof:
        n=i; h=[]
        for l in self.levels[:-1]:
            if n^1 < len(l): h.append(l[n^1])
            n>>=1
        return InclusionProof(leaf_index=i,tree_size=self.size,hashes=tuple(h))
    def proofs(self) -> list[InclusionProof]: return [self.proof(i) for i in range(self.size)]
def root_from_proof(leaf: bytes, p: InclusionProof) -> bytes:
    fn,sn,r=p.leaf_index,p.tree_size-1,leaf
    for h in p.hashes:
        assert sn
        if fn&1 or fn==sn:
            r=node_hash(h,r)
            while not fn&1 and fn: fn>>=1; sn>>=1
        else: r=node_hash(r,h)
        fn>>=1; sn>>=1
    assert sn==0
    return r
