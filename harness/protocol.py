from __future__ import annotations
import hashlib, uuid
from dataclasses import dataclass
from harness.values import *
@dataclass(frozen=True, slots=True, kw_only=True)
class QuoteRequest:
    nonce: Nonce
    bank: HashAlg
    mask: int
    agent_id: AgentId | None = None
    binding: bytes | None = None
    @property
    def selection(self) -> PcrSelection: return PcrSelection.of(self.bank, self.mask)
def s(x: bytes) -> bytes: return len(x).to_bytes(2,"big")+x
def leaf_data(r: QuoteRequest, *, requester: bytes, vtpm_ek: bytes | None) -> bytes:
    return b"kvm-deep-attestation/v1/leaf"+s(r.nonce.value)+s(r.selection.marshal())+s(requester)+s(r.agent_id.bytes if r.agent_id else b"")+s(vtpm_ek or b"")+s(r.binding or b"")
def qualifying_data(n: int, root: bytes) -> bytes: return hashlib.sha256(b"kvm-deep-attestation/v1/root"+n.to_bytes(8,"big")+root).digest()
def host_id_of(n: bytes) -> HostId: return HostId(uuid.UUID(bytes=hashlib.sha256(n).digest()[:16],version=4))
