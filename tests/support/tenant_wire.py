"""The two parties that a session talks to, in memory: a guest agent and a provider with real keys and soft TPMs.

Each can be told to fail, to hang, or to change its next answer; each checks its caller.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from harness import protocol
from harness.attest import owner_qualified_name
from harness.errors import HarnessError
from harness.keylime_wire import GuestEvidence
from harness.merkle import MerkleTree, leaf_hash
from harness.messages import encode_proof, encode_shared
from harness.protocol import QuoteRequest
from harness.tenant.payload import unwrap_share
from harness.tenant.plan import HostKeys, Plan, Timing
from harness.tenant.policy import Policy
from harness.tenant.ports import Alarm, Chance, GuestAnswer, Ports, Progress, Reboot
from harness.tenant.round import same_counters
from harness.values import AgentId, ClockBaseline, HashAlg, PcrSelection, mask_of
from tests.support.manual_time import ManualTime
from tests.support.soft_tpm import public_of, sized

AGENT = AgentId(uuid.UUID("d432fbb3-d2f1-4a97-9ef7-75bd81c00000"))
REQUESTER = hashlib.sha256(b"requester").digest()
VTPM_EK = hashlib.sha256(b"vtpm ek").digest()
SHA256 = HashAlg.SHA256
Step = HarnessError | Callable[[Any], Any] | None


class SoftTpm:
    """A TPM with a P-256 AK whose counters, clock and PCRs a test sets."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.ak = public_of(self.key)
        self.pcrs = {pcr: hashlib.sha256(bytes([pcr])).digest() for pcr in range(24)}
        self.clock, self.resets, self.restarts, self.safe, self.firmware = 1000, 7, 3, True, 0x20260101

    @property
    def baseline(self) -> ClockBaseline:
        return ClockBaseline(
            clock=self.clock,
            reset_count=self.resets,
            restart_count=self.restarts,
            firmware_version=self.firmware,
        )

    def reboot(self) -> None:
        self.resets += 1

    def quote(self, extra_data: bytes, mask: int) -> tuple[bytes, bytes, dict[HashAlg, dict[int, bytes]]]:
        self.clock += 5
        selection = PcrSelection.of(SHA256, mask)
        values = {SHA256: {pcr: self.pcrs[pcr] for _, pcr in selection}}
        digest = hashlib.sha256(b"".join(values[SHA256].values())).digest()
        attest = (
            bytes.fromhex("ff5443478018")
            + sized(owner_qualified_name(self.ak))
            + sized(extra_data)
            + self.clock.to_bytes(8, "big")
            + self.resets.to_bytes(4, "big")
            + self.restarts.to_bytes(4, "big")
            + bytes([self.safe])
            + self.firmware.to_bytes(8, "big")
            + selection.marshal()
            + sized(digest)
        )
        r, s = decode_dss_signature(self.key.sign(attest, ec.ECDSA(hashes.SHA256())))
        return attest, bytes.fromhex("0018000b") + sized(r.to_bytes(32, "big")) + sized(s.to_bytes(32, "big")), values


class _Scripted:
    """Steps to take instead of, or on, the next answers; a gate that holds answers back."""

    def __init__(self) -> None:
        self.script: list[Step] = []
        self.asked: list[Any] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.on_ask: Callable[[], Awaitable[None]] | None = None

    async def _answer(self, question: object, make: Callable[[], Any]) -> Any:
        assert question not in self.asked, "a nonce was used twice"
        self.asked.append(question)
        answer = make()
        step = self.script.pop(0) if self.script else None
        if self.on_ask is not None:
            await self.on_ask()
        await self.gate.wait()
        if isinstance(step, HarnessError):
            raise step
        return answer if step is None else step(answer)


class FakeGuest(_Scripted):
    """A guest agent; ``received`` are the halves V that it was handed."""

    def __init__(self, tpm: SoftTpm) -> None:
        super().__init__()
        self.tpm = tpm
        self.v_script: list[HarnessError | None] = []
        self.received: list[bytes] = []
        self.restart()

    def restart(self) -> None:
        """A new agent process: a new NK, and PCR 16 says so."""
        self._nk = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self.pem = self._nk.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        self.tpm.pcrs[16] = hashlib.sha256(bytes(32) + hashlib.sha256(self.pem).digest()).digest()

    async def quote(self, nonce: str, selection: PcrSelection) -> GuestAnswer:
        assert len(nonce) == 20
        assert nonce.isalnum()
        assert nonce.isascii()

        def make() -> GuestAnswer:
            attest, signature, pcrs = self.tpm.quote(nonce.encode(), selection.mask(SHA256) | 1 << 16)
            evidence = GuestEvidence(attest=attest, signature=signature, pcrs=pcrs)
            return GuestAnswer(evidence=evidence, transport_key_pem=self.pem)

        answer = await self._answer(nonce, make)
        assert isinstance(answer, GuestAnswer)
        return answer

    async def provide_v(self, wrapped: bytes) -> None:
        step = self.v_script.pop(0) if self.v_script else None
        if step is not None:
            raise step
        self.received.append(unwrap_share(wrapped, self._nk))


class FakeProvider(_Scripted):
    """A provider verifier with one host; ``waits_s`` is how long each answer would have been of use."""

    def __init__(self, tpm: SoftTpm) -> None:
        super().__init__()
        self.tpm = tpm
        self.host_id = protocol.host_id_of(b"\x00\x0b" + hashlib.sha256(tpm.ak.name).digest())
        self.waits_s: list[float] = []

    async def quote(self, request: QuoteRequest, *, wait_s: float) -> object:
        self.waits_s.append(wait_s)
        return await self._answer(request.nonce, lambda: self._results(request))

    def _results(self, request: QuoteRequest) -> dict[str, object]:
        leaf = leaf_hash(protocol.leaf_data(request, requester=REQUESTER, vtpm_ek=VTPM_EK))
        tree = MerkleTree([leaf, *(leaf_hash(secrets.token_bytes(32)) for _ in range(15))])
        attest, signature, pcrs = self.tpm.quote(protocol.qualifying_data(tree.size, tree.root), request.mask)
        shared = encode_shared(
            host_id=self.host_id,
            attest=attest,
            signature=signature,
            pcrs=pcrs,
            batch_id="b",
            sealed_at="2026-01-01T00:00:00Z",
        )
        return shared | {"proof": encode_proof(tree.proof(0))}


class MemoryRecords:
    """The tenant's records, in memory; refuses to lower a clock. With a ``fault`` nothing can be written; with a
    ``save_fault`` no progress.
    """

    def __init__(self) -> None:
        self.baselines: dict[bytes, ClockBaseline] = {}
        self.saved: list[Progress] = []
        self.alarms: list[Alarm] = []
        self.fault: HarnessError | None = None
        self.save_fault: HarnessError | None = None
        self.gate = asyncio.Event()
        self.gate.set()

    async def baseline(self, ak_name: bytes) -> ClockBaseline | None:
        return self.baselines.get(ak_name)

    async def raise_clock(self, ak_name: bytes, seen: ClockBaseline) -> None:
        known = self.baselines.get(ak_name)
        if known is None or (same_counters(known, seen) and seen.clock > known.clock):
            self.baselines[ak_name] = seen

    async def settle(self) -> None:
        self._works()

    async def replace_baseline(self, reboot: Reboot, alarm: Alarm) -> bool:
        self._works()
        self.alarms.append(alarm)
        if not same_counters(self.baselines.get(reboot.ak_name), reboot.old):
            return False
        self.baselines[reboot.ak_name] = reboot.new
        return True

    async def save(self, agent_id: AgentId, progress: Progress, alarm: Alarm | None = None) -> None:
        await self.gate.wait()
        self._works()
        if self.save_fault is not None:
            raise self.save_fault
        self.saved.append(progress)
        if alarm is not None:
            self.alarms.append(alarm)

    def _works(self) -> None:
        if self.fault is not None:
            raise self.fault


class Wire:
    """A guest, its host, the tenant's records and a clock, with a plan that the honest parties satisfy.

    ``jitter`` is what all waits draw: with 0, intervals are whole and back-offs as short as they can be.
    """

    def __init__(self, *, jitter: float = 0.0, **changes: Any) -> None:
        self.time = ManualTime()
        self.guest = FakeGuest(SoftTpm())
        self.provider = FakeProvider(SoftTpm())
        self.records = MemoryRecords()
        self.records.baselines[self.provider.tpm.ak.name] = self.provider.tpm.baseline
        self.ports = Ports(
            guest=self.guest,
            provider=self.provider,
            records=self.records,
            clock=self.time,
            chance=Chance(jitter=lambda: jitter),
        )
        self.v = secrets.token_bytes(32)
        self.plan = replace(self._honest_plan(), **changes)

    def _honest_plan(self) -> Plan:
        guest, host = self.guest.tpm, self.provider.tpm
        return Plan(
            agent_id=AGENT,
            guest_ak=guest.ak,
            guest_policy=Policy.of(SHA256, {pcr: guest.pcrs[pcr] for pcr in (0, 4)}),
            guest_selection=PcrSelection.of(SHA256, mask_of({0, 4, 7})),
            host=HostKeys(
                host_id=self.provider.host_id,
                ak=host.ak,
                ak_qualified_name=owner_qualified_name(host.ak),
                vtpm_ek=VTPM_EK,
            ),
            bank=SHA256,
            host_mask=mask_of({0, 4}),
            host_policy=Policy.of(SHA256, {pcr: host.pcrs[pcr] for pcr in (0, 4)}),
            requester=REQUESTER,
            allow_reboots=False,
            v=self.v,
            timing=Timing(),
        )

    @property
    def host_baseline(self) -> ClockBaseline:
        return self.records.baselines[self.provider.tpm.ak.name]
