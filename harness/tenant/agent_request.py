"""From the POST that adds an agent, and the registrar's snapshot, to the plan of its session.

Invariants:
    1. Unknown members, wrong types and values out of range are refused before anything is asked or stored.
    2. A plan is made from the request and the snapshot alone, so that a restarted verifier makes the same plan again.
    3. V is not part of the stored request.

Spec: DESIGN 3.8; Keylime ``POST /v2.x/agents/{agent_id}`` (names of ``cloudagent_ip``, ``cloudagent_port``, ``v``).
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from harness.attest import parse_public
from harness.errors import KeyChanged, MalformedMessage
from harness.tenant.payload import SHARE_SIZE
from harness.tenant.plan import HostKeys, Plan, Timing
from harness.tenant.policy import parse_policy
from harness.values import AgentId, ClockBaseline, HashAlg, HostId, PcrSelection, parse_mask

GUEST_BANK = HashAlg.SHA256
"""Keylime's agent API names no bank; agents quote sha256."""

PolicyJson = dict[str, dict[str, list[str]]]


class AddAgent(BaseModel):
    """Body of the POST, without V. See `Timing` for the intervals."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    cloudagent_ip: str = Field(max_length=253)
    cloudagent_port: int = Field(ge=1, le=65535)
    need_provider_quote: bool = True
    provider_verifier: str | None = Field(default=None, max_length=2048)
    provider_quote_interval: int = 1
    guest_mask: str
    host_mask: str = "0x1"
    hash_alg: str = "sha256"
    guest_policy: PolicyJson
    host_policy: PolicyJson = Field(default_factory=dict)
    allow_reboots: bool = False
    quote_interval_s: float = Field(default=2.0, strict=False)
    round_deadline_s: float = Field(default=60.0, strict=False)
    clock_unsafe_limit_s: float = Field(default=120.0, strict=False)

    @field_validator("cloudagent_ip")
    @classmethod
    def _address(cls, text: str) -> str:
        try:
            ipaddress.ip_address(text)
        except ValueError:
            if not all(part and part.replace("-", "").isalnum() and part.isascii() for part in text.split(".")):
                raise ValueError("is neither an IP address nor a host name") from None
        return text

    @model_validator(mode="after")
    def _provider(self) -> AddAgent:
        if self.need_provider_quote and not (self.provider_verifier or "").startswith("https://"):
            raise ValueError("provider_verifier must be an https URL when need_provider_quote is true")
        return self

    @property
    def guest_url(self) -> str:
        """Base URL of the guest agent."""
        host = f"[{self.cloudagent_ip}]" if ":" in self.cloudagent_ip else self.cloudagent_ip
        return f"https://{host}:{self.cloudagent_port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What the registrar had pinned when the agent was added; of later changes only the guest's contact is followed.

    Args:
        host_id: the host that the guest is enrolled under.
        guest_ek, guest_ak: the guest's keys, TPM2B_PUBLIC.
        mtls_cert: the guest agent's certificate, PEM.
        host_ak, host_ak_qualified_name: the host's pinned AK.
        host_baseline, host_enrolled_at: the clock of its enrolment, and when that was.
        ip, port: where the guest agent registered that it is reached; None in rows of the first version.
    """

    host_id: HostId
    guest_ek: bytes
    guest_ak: bytes
    mtls_cert: str
    host_ak: bytes
    host_ak_qualified_name: bytes
    host_baseline: ClockBaseline
    host_enrolled_at: float
    ip: str | None = None
    port: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Contact:
    """Where a guest agent is reached, as it registered last, and with which keys.

    Args:
        guest_ek, guest_ak: TPM2B_PUBLIC.
        mtls_cert: PEM.
        ip, port: None when it gave none.
    """

    guest_ek: bytes
    guest_ak: bytes
    mtls_cert: str
    ip: str | None
    port: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedRequest:
    """A valid POST: the agent, and V apart."""

    agent: AddAgent
    v: bytes | None = field(repr=False)


def parse_add_agent(body: object) -> ParsedRequest:
    """Request from the JSON body.

    Raises:
        MalformedMessage: names the member that is wrong.
    """
    if not isinstance(body, dict):
        raise MalformedMessage("the body must be a JSON object")
    members = dict(body)
    v = _share(members.pop("v", None))
    return ParsedRequest(agent=_validated(members), v=v)


def with_policies(agent: AddAgent, policies: Mapping[str, object]) -> AddAgent:
    """The same agent with other reference values.

    Args:
        agent: as it was added.
        policies: ``guest_policy``, ``host_policy`` or both, from a request.

    Raises:
        MalformedMessage: names the member that is wrong.
    """
    return _validated({**agent.model_dump(), **policies})


def follow(agent: AddAgent, snapshot: Snapshot, contact: Contact) -> tuple[AddAgent, Snapshot] | None:
    """Agent and snapshot with the contact that the guest registered since; None when it registered no other one.

    An address that the operator gave when adding the agent stays until the guest registers another one than then.

    Raises:
        KeyChanged: it is not the guest that was added.
        MalformedMessage: an address that is none.
    """
    if (contact.guest_ek, contact.guest_ak) != (snapshot.guest_ek, snapshot.guest_ak):
        raise KeyChanged("the guest was enrolled with other keys since it was added; delete the agent and add it again")
    known = (snapshot.ip or agent.cloudagent_ip, snapshot.port or agent.cloudagent_port)
    now = (contact.ip or known[0], contact.port or known[1])
    if now == known and contact.mtls_cert == snapshot.mtls_cert:
        return None
    if now != known:
        agent = _validated({**agent.model_dump(), "cloudagent_ip": now[0], "cloudagent_port": now[1]})
    return agent, replace(snapshot, mtls_cert=contact.mtls_cert, ip=now[0], port=now[1])


def _validated(members: Mapping[str, object]) -> AddAgent:
    try:
        return AddAgent.model_validate(members)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "body"
        raise MalformedMessage(f"{where}: {first['msg']}") from None


def make_plan(agent_id: AgentId, agent: AddAgent, snapshot: Snapshot, *, v: bytes | None, requester: bytes) -> Plan:
    """Plan of the session.

    Args:
        agent_id: the guest.
        agent: the request.
        snapshot: pinned keys.
        v: half of the payload key, or None.
        requester: SHA-256 of the SubjectPublicKeyInfo of our client certificate.

    Raises:
        MalformedMessage: mask, bank, policy or interval that cannot be used; a policy wider than its mask.
    """
    host = None
    if agent.need_provider_quote:
        host = HostKeys(
            host_id=snapshot.host_id,
            ak=parse_public(snapshot.host_ak),
            ak_qualified_name=snapshot.host_ak_qualified_name,
            vtpm_ek=parse_public(snapshot.guest_ek).spki_digest(),
        )
    return Plan(
        agent_id=agent_id,
        guest_ak=parse_public(snapshot.guest_ak),
        guest_policy=parse_policy(agent.guest_policy),
        guest_selection=PcrSelection.of(GUEST_BANK, parse_mask(agent.guest_mask)),
        host=host,
        bank=HashAlg.parse(agent.hash_alg),
        host_mask=parse_mask(agent.host_mask),
        host_policy=parse_policy(agent.host_policy),
        requester=requester,
        allow_reboots=agent.allow_reboots,
        v=v,
        timing=Timing(
            quote_interval_s=agent.quote_interval_s,
            round_deadline_s=agent.round_deadline_s,
            clock_unsafe_limit_s=agent.clock_unsafe_limit_s,
            provider_quote_interval=agent.provider_quote_interval,
        ),
    )


def _share(text: object) -> bytes | None:
    if text is None:
        return None
    try:
        share = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
    except (binascii.Error, ValueError):
        share = b""
    if len(share) != SHARE_SIZE:
        raise MalformedMessage(f"v must be base64 of {SHARE_SIZE} bytes")
    return share
