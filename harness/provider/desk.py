"""What a host agent does with the orders of the stream: quotes through the batcher, enrolment through the keys.

Invariants:
    1. Between two batches the TPM works on at most one order of enrolment: a flood of challenges cannot keep quotes
       waiting for longer than one such command.
    2. Orders of enrolment that wait are bounded.

Owner: the host agent.

Spec: DESIGN 3.1 (banks), 3.6 (enrolment); docs/protocol.md, stream.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Mapping

from harness.errors import MalformedMessage, PoolFull
from harness.provider.batch import Deliver, PendingQuote, Waiter
from harness.provider.batcher import Batcher
from harness.provider.keys import HostKeys
from harness.provider.stream import ActivateOrder, CertifyOrder, IdentityOrder, Order

_ENROLMENTS = 64  # waiting or in work


class Desk:
    """Carries out orders.

    Args:
        keys: the host's keys.
        batcher: running.
        ca_certificate: self-signed certificate of the vTPM CA key, DER.
    """

    def __init__(self, keys: HostKeys, batcher: Batcher, ca_certificate: bytes) -> None:
        self._keys = keys
        self._batcher = batcher
        self._ca_certificate = ca_certificate
        self._enrolling = asyncio.Lock()
        self._enrolments = 0

    def enter(self, pending: PendingQuote, deliver: Deliver) -> Waiter:
        """Lets a request for a quote wait; see `Batcher.enter`.

        Raises:
            MalformedMessage: its bank is not allocated in this TPM.
            HarnessError: what `Batcher.enter` raises.
        """
        bank = pending.request.bank
        if bank not in self._keys.identity.banks:
            raise MalformedMessage(f"bank {bank.text} is not allocated in this host's TPM")
        return self._batcher.enter(pending, deliver)

    def leave(self, waiter: Waiter) -> None:
        """Takes a request back; see `Batcher.leave`."""
        self._batcher.leave(waiter)

    async def enrol(self, order: Order) -> Mapping[str, object]:
        """Answer to an order of enrolment.

        Raises:
            ChallengeFailed: the credential is not for this host.
            PoolFull: too many orders of enrolment wait.
            TpmError: the TPM did not do it.

        *Cancellation:* a TPM command that was sent is carried out, and its result is dropped.
        """
        if isinstance(order, IdentityOrder):
            return self._identity()
        if self._enrolments >= _ENROLMENTS:
            raise PoolFull("too many enrolments wait on this host")
        self._enrolments += 1
        try:
            async with self._enrolling:
                return await self._use_tpm(order)
        finally:
            self._enrolments -= 1

    async def _use_tpm(self, order: Order) -> Mapping[str, object]:
        match order:
            case ActivateOrder(credential=credential, requester=requester):
                return {"answer": (await self._keys.activate(credential, requester)).hex()}
            case CertifyOrder(nonce=nonce):
                attest, signature = await self._keys.certify_ca(nonce.value)
                return {"attest": _text(attest), "signature": _text(signature)}
        raise MalformedMessage("this order is not one of enrolment")

    def _identity(self) -> Mapping[str, object]:
        identity = self._keys.identity
        return {
            "host_id": str(identity.host_id),
            "ek": _text(identity.ek.marshal()),
            "ek_certificates": [_text(certificate) for certificate in identity.ek_certificates],
            "ak": _text(identity.ak.marshal()),
            "ca": _text(identity.ca.marshal()),
            "ca_certificate": _text(self._ca_certificate),
            "banks": sorted(bank.text for bank in identity.banks),
        }


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
