"""What a tenant's operator does: enrol hosts, state guests, put them under attestation.

::

    await operator.add_host(url)
    await operator.state_guest(agent_id, host_id)
    contact = await operator.registered(agent_id, deadline_s=60)
    await operator.admit(contact, order)

Invariants:
    1. U goes only to a transport key that the guest's pinned AK vouches for.
    2. The payload's key is known here and in the guest only; the verifier gets V, the guest gets U.

Owner: the command line or the lab.

Spec: DESIGN 3.6, 3.8; Keylime's tenant (identity quote, ukey).
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import math
import secrets
import string
import time
from collections.abc import Mapping
from typing import Any

from harness import errors
from harness.attest import parse_public
from harness.config import TlsSettings
from harness.errors import ConfigError, DeadlineExceeded, HarnessError, MalformedMessage, NotFound
from harness.keylime_wire import parse_quote
from harness.peer import PeerClient
from harness.pki import Role
from harness.tenant.appraisal import verify_transport_key
from harness.tenant.client import AGENT_API, parse_pem
from harness.tenant.operator_acts import OperatorActs, list_of, object_of, reasoned
from harness.tenant.order import GuestContact, Order, order_in_force, request_of
from harness.tenant.payload import parse_transport_key, seal_payload, wrap_share
from harness.values import AgentId, HostId

_ENROL_S = 610.0
"""All hosts of a provider, six per minute: the registrar gives up first."""
_POLL_S = 0.05
_LONGEST_POLL_S = 1.0
_NONCE_SIZE = 20
_ALPHANUMERIC = string.ascii_letters + string.digits
_REFUSALS: dict[str, type[HarnessError]] = {
    "CertificateRefused": errors.CertificateRefused,
    "UnacceptableKey": errors.UnacceptableKey,
    "KeyChanged": errors.KeyChanged,
    "CloneSuspected": errors.CloneSuspected,
}


class TenantOperator(OperatorActs):
    """One tenant's operator.

    Args:
        registrar: the tenant's registrar.
        verifier: the tenant's verifier.
        tls: the operator's certificate; guests are reached with it.
    """

    def __init__(self, registrar: PeerClient, verifier: PeerClient, tls: TlsSettings) -> None:
        super().__init__(registrar, verifier)
        self._tls = tls

    # --- hosts --------------------------------------------------------------------------------------------

    async def add_host(self, url: str, reason: str | None = None) -> list[Mapping[str, Any]]:
        """Enrols the hosts behind a provider verifier, or the one that the URL names.

        Raises:
            HarnessError: an enrolment check failed, or somebody did not answer.

        *Cancellation:* hosts that were pinned stay pinned.
        """
        body = {"url": url, **({} if reason is None else {"reason": reason})}
        return list_of(await self._registrar.call("POST", "/v1/hosts", body=body, deadline_s=_ENROL_S), "hosts")

    async def hosts(self) -> list[Mapping[str, Any]]:
        """Enrolled hosts."""
        return list_of(await self._registrar.get("/v1/hosts"), "hosts")

    async def host(self, host_id: HostId) -> Mapping[str, Any]:
        """One enrolled host. Raises NotFound when it is not."""
        return object_of(await self._registrar.get(f"/v1/hosts/{host_id}"))

    async def remove_host(self, host_id: HostId, reason: str | None = None) -> None:
        """Forgets a host. Raises NotFound, or Conflict while guests are enrolled under it."""
        await self._registrar.call("DELETE", f"/v1/hosts/{host_id}", params=reasoned(reason))

    # --- guests -------------------------------------------------------------------------------------------

    async def state_guest(self, agent_id: AgentId, host_id: HostId) -> None:
        """Says on which host a guest belongs; it may register from then on.

        Raises:
            NotFound: the host is not enrolled.
            Conflict: the guest is stated on another host.
        """
        await self._registrar.post("/v1/guests", {"agent_id": str(agent_id), "host_id": str(host_id)})

    async def registered(self, agent_id: AgentId, *, deadline_s: float) -> GuestContact:
        """Waits until a stated guest has registered.

        Raises:
            EnrolmentError: the registrar refused it; the registrar's own error.
            DeadlineExceeded: it has not registered in time.
            ConfigError: a deadline that is none.

        *Cancellation:* nothing has changed.
        """
        if not 0 < deadline_s < math.inf:
            raise ConfigError(f"a guest is waited for some seconds, not {deadline_s:g}")
        until, wait_s = time.monotonic() + deadline_s, _POLL_S
        while True:
            guest = object_of(await self._registrar.get(f"/v1/guests/{agent_id}"))
            if guest.get("state") == "active":
                return await self._contact(agent_id)
            refused = guest.get("refused")
            if isinstance(refused, dict) and refused.get("error") in _REFUSALS:
                raise _REFUSALS[refused["error"]](str(refused.get("detail")))
            if time.monotonic() > until:
                raise DeadlineExceeded(f"guest {agent_id} has not registered within {deadline_s:g} s; is it running?")
            await asyncio.sleep(wait_s)
            wait_s = min(1.5 * wait_s, _LONGEST_POLL_S)

    async def admit(self, contact: GuestContact, order: Order) -> None:
        """Hands U to the guest and puts it under attestation.

        Raises:
            AppraisalError: the guest's AK does not vouch for its transport key.
            MalformedMessage: the order cannot be used.
            HarnessError: the guest or the verifier refused or did not answer.

        *Cancellation:* the guest may hold U; without V that is worth nothing.
        """
        v = None if order.payload is None else await self._hand_over(contact, order.payload)
        await self._verifier.post(f"/{AGENT_API}/agents/{contact.agent_id}", request_of(contact, order, v))

    async def stated(self) -> list[Mapping[str, Any]]:
        """All stated guests, as the registrar knows them."""
        return list_of(await self._registrar.get("/v1/guests"), "guests")

    async def guests(self) -> list[Mapping[str, Any]]:
        """All stated guests, with their attestation where there is one."""
        return await asyncio.gather(*(self._with_attestation(guest) for guest in await self.stated()))

    async def guest(self, agent_id: AgentId) -> Mapping[str, Any]:
        """One stated guest, with its attestation. Raises NotFound when it is not stated."""
        return await self._with_attestation(object_of(await self._registrar.get(f"/v1/guests/{agent_id}")))

    async def attestation(self, agent_id: AgentId) -> Mapping[str, Any]:
        """How a guest under attestation stands. Raises NotFound when it is not."""
        return object_of(await self._verifier.get(f"/{AGENT_API}/agents/{agent_id}"))

    async def former_order(self, agent_id: AgentId, payload: bytes | None = None) -> Order:
        """How a guest is being attested, as an order that can be given again.

        Args:
            agent_id: the guest.
            payload: the secret, which nobody but the guest has kept.

        Raises:
            NotFound: it is not under attestation.
            MalformedMessage: the verifier's answer cannot be used.
        """
        view, policy = await self.attestation(agent_id), await self.policy(agent_id)
        return order_in_force(view, policy, payload)

    async def end_attestation(self, agent_id: AgentId, reason: str | None = None) -> None:
        """Ends a guest's attestation; its keys stay pinned. Raises NotFound when it is not under attestation."""
        await self._verifier.call("DELETE", f"/{AGENT_API}/agents/{agent_id}", params=reasoned(reason))

    async def remove_guest(self, agent_id: AgentId, reason: str | None = None) -> None:
        """Ends a guest's attestation and forgets its keys. Raises NotFound when it is not stated."""
        with contextlib.suppress(NotFound):  # it was stated and never admitted
            await self.end_attestation(agent_id, reason)
        await self._registrar.call("DELETE", f"/v1/guests/{agent_id}", params=reasoned(reason))

    async def _with_attestation(self, guest: Mapping[str, Any]) -> Mapping[str, Any]:
        try:
            return {**guest, "attestation": await self.attestation(AgentId(guest["agent_id"]))}
        except NotFound:
            return {**guest, "attestation": None}

    async def _contact(self, agent_id: AgentId) -> GuestContact:
        match object_of(await self._registrar.get(f"/{AGENT_API}/agents/{agent_id}")):
            case {"aik_tpm": str(ak), "ip": str(ip), "port": int(port), "mtls_cert": str(certificate)}:
                public = parse_public(base64.b64decode(ak))
                return GuestContact(agent_id=agent_id, ak=public, ip=ip, port=port, mtls_cert=certificate)
        raise MalformedMessage(f"guest {agent_id} registered without address or certificate")

    async def _hand_over(self, contact: GuestContact, payload: bytes) -> bytes:
        sealed = seal_payload(payload, contact.agent_id)
        url = f"https://{contact.ip}:{contact.port}"
        async with PeerClient(self._tls, url, roles={Role.GUEST_AGENT}, pinned=parse_pem(contact.mtls_cert)) as guest:
            nonce = "".join(secrets.choice(_ALPHANUMERIC) for _ in range(_NONCE_SIZE))
            answer = object_of(await guest.get(f"/{AGENT_API}/quotes/identity", [("nonce", nonce)]))
            pem = str(answer.get("pubkey")).encode()
            verify_transport_key(parse_quote(str(answer.get("quote"))), nonce.encode(), contact.ak, pem)
            body = {
                "encrypted_key": _base64(wrap_share(sealed.u, parse_transport_key(pem))),
                "auth_tag": sealed.auth_tag,
                "payload": _base64(sealed.ciphertext),
            }
            await guest.post(f"/{AGENT_API}/keys/ukey", body)
        return sealed.v


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
