"""How a guest shall be attested: what its operator orders, what the verifier is sent, and the order that is in force.

Invariants:
    1. An order that is read back from the verifier and given again attests the guest as before; nothing is guessed.

Owner: the tenant's operator.

Spec: DESIGN 3.8; docs/protocol.md (tenant verifier).
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.attest import Public
from harness.errors import MalformedMessage
from harness.tenant.agent_request import GUEST_BANK
from harness.tenant.policy import Policy, parse_policy
from harness.values import AgentId, HashAlg, PcrSelection, parse_mask

_FIRST_PCR = PcrSelection.of(HashAlg.SHA256, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestContact:
    """A guest that has registered: its pinned AK and where its agent is reached."""

    agent_id: AgentId
    ak: Public
    ip: str
    port: int
    mtls_cert: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """How a guest shall be attested.

    Args:
        guest_policy: reference values of the guest.
        host_policy: reference values of the host, in one bank.
        provider_verifier: where host quotes are asked for; None: none are needed.
        payload: what the guest gets when both layers were accepted; None: nothing.
        allow_reboots: whether a reset is reported instead of refused.
        quote_interval_s: seconds between two rounds.
        provider_quote_interval: rounds between two host quotes.
        guest_quoted: PCRs of the guest that are quoted, in one bank; None: those of its policy.
        host_quoted: PCRs of the host that are quoted, in one bank; None: those of its policy.
        round_deadline_s: seconds that a round may take; None: as long as the verifier lets it by default.
        clock_unsafe_limit_s: seconds for which a clock that is not safe is asked again; None: as above.
    """

    guest_policy: Policy
    host_policy: Policy
    provider_verifier: str | None
    payload: bytes | None = field(default=None, repr=False)
    allow_reboots: bool = False
    quote_interval_s: float = 2.0
    provider_quote_interval: int = 1
    guest_quoted: PcrSelection | None = None
    host_quoted: PcrSelection | None = None
    round_deadline_s: float | None = None
    clock_unsafe_limit_s: float | None = None


def order_in_force(view: Mapping[str, Any], policy: Mapping[str, Any], payload: bytes | None) -> Order:
    """How a guest is being attested, as an order that can be given again.

    Args:
        view: the verifier's answer about the guest.
        policy: its answer about the guest's reference values.
        payload: the secret, which nobody but the guest has kept.

    Raises:
        MalformedMessage: they do not say all of it.
    """
    try:
        return Order(
            guest_policy=parse_policy(policy["guest_policy"]),
            host_policy=parse_policy(policy["host_policy"]),
            provider_verifier=view["provider_verifier"] if view["need_provider_quote"] else None,
            payload=payload,
            allow_reboots=view.get("allow_reboots") is True,
            quote_interval_s=float(view["quote_interval_s"]),
            provider_quote_interval=int(view["provider_quote_interval"]),
            guest_quoted=PcrSelection.of(GUEST_BANK, parse_mask(view["guest_mask"])),
            host_quoted=PcrSelection.of(HashAlg.parse(view["hash_alg"]), parse_mask(view["host_mask"])),
            round_deadline_s=float(view["round_deadline_s"]),
            clock_unsafe_limit_s=float(view["clock_unsafe_limit_s"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise MalformedMessage(f"the verifier does not say how the guest is attested: {error}") from None


def request_of(contact: GuestContact, order: Order, v: bytes | None) -> dict[str, object]:
    """Body of the POST that puts a guest under attestation.

    Args:
        contact: the guest.
        order: how.
        v: the verifier's half of the payload's key; None: there is no payload.
    """
    request = {"cloudagent_ip": contact.ip, "cloudagent_port": contact.port, **terms_of(order)}
    return request if v is None else {**request, "v": base64.b64encode(v).decode()}


def terms_of(order: Order) -> dict[str, object]:
    """What an order says, without the payload, in the verifier's words; `order_in_force` reads it back."""
    quoted = (order.host_quoted or order.host_policy.selection).banks or _FIRST_PCR.banks
    bank, host_mask = quoted[0]
    guest_mask = (order.guest_quoted or order.guest_policy.selection).mask(GUEST_BANK)
    terms: dict[str, object] = {
        "need_provider_quote": order.provider_verifier is not None,
        "provider_verifier": order.provider_verifier,
        "provider_quote_interval": order.provider_quote_interval,
        "guest_mask": f"{guest_mask:#x}",
        "guest_policy": order.guest_policy.encode(),
        "host_mask": f"{host_mask:#x}",
        "hash_alg": bank.text,
        "host_policy": order.host_policy.encode(),
        "allow_reboots": order.allow_reboots,
        "quote_interval_s": order.quote_interval_s,
    }
    optional = {
        "round_deadline_s": order.round_deadline_s,
        "clock_unsafe_limit_s": order.clock_unsafe_limit_s,
    }
    return {**terms, **{name: value for name, value in optional.items() if value is not None}}
