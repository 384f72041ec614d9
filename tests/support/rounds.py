"""Rounds that a test spoils in one place before they are signed, sent or appraised."""

from __future__ import annotations

import base64
import hashlib
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from harness import protocol
from harness.keylime_wire import GuestEvidence
from harness.merkle import MerkleTree, leaf_hash
from harness.messages import encode_proof, encode_shared
from harness.tenant.appraisal import (
    GuestTrust,
    HostTrust,
    Rejected,
    SentRequest,
    Verdict,
    appraise_guest,
    appraise_host,
)
from harness.tenant.policy import Policy
from harness.values import AgentId, ClockBaseline, HashAlg, HostId, Nonce, PcrSelection, mask_of, pcrs_in
from tests.support.forge import AttestFields, SoftKey, bits_of, ecc_key, owner_name, value_of

HOST = HostId(uuid.UUID("d3ad2578-0a39-8182-9a17-b89661470afd"))
AGENT = AgentId(uuid.UUID("a0bb03b7-39bb-4d7b-88e6-14a7e2004c8e"))
REQUESTED = (0, 4, 7, 14)
SIGNED = (0, 1, 2, 3, 4, 5, 6, 7, 14)
BASELINE = ClockBaseline(clock=900, reset_count=7, restart_count=3, firmware_version=0x20260101)
Selection = tuple[tuple[int, bytes], ...]


def selection_of(*banks: tuple[HashAlg, tuple[int, ...]]) -> Selection:
    """Signed selection with these PCRs."""
    return tuple((bank.value, bits_of(mask_of(pcrs))) for bank, pcrs in banks)


def digest_of(hash_alg: int, selection: Selection) -> bytes:
    """pcrDigest over the values of `value_of`; banks that do not exist count for nothing."""
    banks = {bank.value: bank for bank in HashAlg}
    values = (
        value_of(banks[alg], pcr)
        for alg, bits in selection
        if alg in banks
        for pcr in pcrs_in(int.from_bytes(bits[:3], "little"))
    )
    return HashAlg(hash_alg).digest(b"".join(values))


def values_of(selection: Selection) -> dict[HashAlg, dict[int, bytes]]:
    """Values of the banks that have a PCR in the selection."""
    given = ((HashAlg(alg), tuple(pcrs_in(int.from_bytes(bits, "little")))) for alg, bits in selection)
    return {bank: {pcr: value_of(bank, pcr) for pcr in pcrs} for bank, pcrs in given if pcrs}


HONEST_SELECTION = selection_of((HashAlg.SHA256, SIGNED))
TWO_BANKS = selection_of((HashAlg.SHA256, (0, 1)), (HashAlg.SHA384, (0, 4, 7)))
OWN = b"own"
"""Stands for the binding of the request itself."""


@dataclass(slots=True, kw_only=True)
class HostRound:
    """An honest host quote, leaf 3 of 7, in its parts. Change parts, then `verdict`.

    ``attest`` replaces fields before the quote is signed; ``edits`` change ``results`` as a provider could.
    """

    key: SoftKey = field(default_factory=ecc_key)
    bank: HashAlg = HashAlg.SHA256
    requested: tuple[int, ...] = REQUESTED
    selection: Selection = HONEST_SELECTION
    guest: tuple[bytes, bytes] | None = (b"\x00\x0b" + bytes(32), b"guest attest")
    requester: bytes = bytes(range(32))
    vtpm_ek: bytes = bytes(range(32, 64))
    place: tuple[int, int] = (3, 7)
    attest: dict[str, Any] = field(default_factory=dict)
    edits: list[Callable[[dict[str, Any]], object]] = field(default_factory=list)
    sent: dict[str, Any] = field(default_factory=dict)
    trust: dict[str, Any] = field(default_factory=dict)
    appraised_binding: bytes | None = OWN

    @property
    def binding(self) -> bytes | None:
        """Binding to the guest evidence."""
        return None if self.guest is None else protocol.guest_binding(*self.guest)

    def sent_request(self) -> SentRequest:
        """What the tenant sent; ``sent`` is not applied."""
        request = protocol.QuoteRequest(
            nonce=Nonce(bytes(range(100, 132))),
            bank=self.bank,
            mask=mask_of(self.requested),
            agent_id=AGENT if self.guest else None,
            binding=self.binding,
        )
        return SentRequest(request=request, requester=self.requester, vtpm_ek=self.vtpm_ek if self.guest else None)

    def host_trust(self) -> HostTrust:
        """What the tenant trusts; ``trust`` is applied."""
        policy = Policy.of(self.bank, {pcr: value_of(self.bank, pcr) for pcr in self.requested[:2]})
        honest = HostTrust(
            host_id=HOST,
            ak=self.key.public,
            ak_qualified_name=owner_name(self.key),
            policy=policy,
            baseline=BASELINE,
        )
        return replace(honest, **self.trust)

    def results(self) -> dict[str, Any]:
        """What the provider answers; ``attest`` and ``edits`` are applied."""
        sent = self.sent_request()
        data = protocol.leaf_data(sent.request, requester=sent.requester, vtpm_ek=sent.vtpm_ek)
        index, size = self.place
        leaves = [hashlib.sha256(bytes([place])).digest() for place in range(size)]
        leaves[index] = leaf_hash(data)
        tree = MerkleTree(leaves)
        honest = AttestFields(
            signer=owner_name(self.key),
            extra_data=protocol.qualifying_data(tree.size, tree.root),
            selection=self.selection,
            pcr_digest=digest_of(self.key.hash_alg, self.attest.get("selection", self.selection)),
        )
        attest = replace(honest, **self.attest).marshal()
        shared = encode_shared(
            host_id=HOST,
            attest=attest,
            signature=self.key.sign(attest),
            pcrs=values_of(self.selection),
            batch_id="b",
            sealed_at="2026-11-23T12:00:00Z",
        )
        results: dict[str, Any] = {**shared, "proof": encode_proof(tree.proof(index))}
        for edit in self.edits:
            edit(results)
        return results

    def verdict(self) -> Verdict:
        """The appraisal, with ``sent`` and ``trust`` applied."""
        sent = replace(self.sent_request(), **self.sent)
        binding = self.binding if self.appraised_binding is OWN else self.appraised_binding
        return appraise_host(self.results(), sent, self.host_trust(), guest_binding=binding)


def refused(verdict: Verdict) -> tuple[int, str]:
    """Check and error of a rejection."""
    assert isinstance(verdict, Rejected), "accepted"
    return verdict.check, verdict.error


def put(*path: str, value: object) -> Callable[[dict[str, Any]], object]:
    """Edit that sets one member."""

    def edit(results: dict[str, Any]) -> None:
        for name in path[:-1]:
            results = results[name]
        results[path[-1]] = value

    return edit


def drop(*path: str) -> Callable[[dict[str, Any]], object]:
    """Edit that removes one member."""

    def edit(results: dict[str, Any]) -> None:
        for name in path[:-1]:
            results = results[name]
        del results[path[-1]]

    return edit


def recode(name: str, change: Callable[[bytes], bytes]) -> Callable[[dict[str, Any]], object]:
    """Edit that changes the bytes of a base64 member."""

    def edit(results: dict[str, Any]) -> None:
        results[name] = base64.b64encode(change(base64.b64decode(results[name]))).decode()

    return edit


@dataclass(slots=True, kw_only=True)
class GuestRound:
    """An honest guest quote with a transport key, in its parts."""

    key: SoftKey = field(default_factory=ecc_key)
    nonce: bytes = b"Abcdefghij0123456789"
    pem: bytes = b"-----BEGIN PUBLIC KEY-----\n...\n-----END PUBLIC KEY-----\n"
    requested: tuple[int, ...] = (0, 7)
    signed: tuple[int, ...] = (0, 7, 16)
    attest: dict[str, Any] = field(default_factory=dict)
    values: dict[int, bytes] = field(default_factory=dict)
    trust: dict[str, Any] = field(default_factory=dict)

    def evidence(self) -> GuestEvidence:
        """What the guest agent answers. ``values`` replace PCR values before the quote, as an extend would."""
        values = {pcr: value_of(HashAlg.SHA256, pcr) for pcr in self.signed}
        if 16 in values:
            values[16] = hashlib.sha256(bytes(32) + hashlib.sha256(self.pem).digest()).digest()
        values |= self.values
        honest = AttestFields(
            signer=owner_name(self.key),
            extra_data=self.nonce,
            selection=selection_of((HashAlg.SHA256, self.signed)),
            pcr_digest=hashlib.sha256(b"".join(values[pcr] for pcr in self.signed)).digest(),
        )
        attest = replace(honest, **self.attest).marshal()
        return GuestEvidence(attest=attest, signature=self.key.sign(attest), pcrs={HashAlg.SHA256: values})

    def verdict(self) -> Verdict:
        """The appraisal, with ``trust`` applied."""
        policy = Policy.of(HashAlg.SHA256, {0: value_of(HashAlg.SHA256, 0)})
        honest = GuestTrust(ak=self.key.public, policy=policy, baseline=BASELINE, transport_key_pem=self.pem)
        requested = PcrSelection.of(HashAlg.SHA256, mask_of(self.requested))
        return appraise_guest(self.evidence(), b"Abcdefghij0123456789", replace(honest, **self.trust), requested)
