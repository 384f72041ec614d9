"""What a session is about: whom to ask, what to believe, how often, and how patiently. Frozen for its whole life.

Invariants:
    1. The keys are one snapshot, taken from the registrar when the agent was added (CVE-2022-1053): never re-read.
    2. Each policy names at least one PCR, and only PCRs that its mask asks for; otherwise there is no plan.
    3. A plan that needs a provider quote has the host's keys, and V is not released under it without the host's
       evidence. A plan without a host (``need_provider_quote`` false) releases V on the guest's evidence alone: the
       tenant's choice.

Spec: DESIGN 3.5 (9), 3.8.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from harness.attest import Public
from harness.errors import MalformedMessage
from harness.tenant.policy import Policy
from harness.values import AgentId, HashAlg, HostId, PcrSelection

_INTERVAL_JITTER = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class HostKeys:
    """The host's side of the snapshot.

    Args:
        host_id: the host that the guest is enrolled under.
        ak: its pinned attestation key.
        ak_qualified_name: pinned qualified signer.
        vtpm_ek: SHA-256 of the SubjectPublicKeyInfo of the vTPM's EK that we pinned for the guest.
    """

    host_id: HostId
    ak: Public
    ak_qualified_name: bytes
    vtpm_ek: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Intervals and bounds of a session, in seconds where not said otherwise.

    Args:
        quote_interval_s: wait between two rounds, less up to a tenth of it at random: guests whose answers came with
            one batch do not ask in step for ever.
        round_deadline_s: longest time from the guest nonce to the host's answer.
        attempt_deadline_s: longest time of one question, from the creation of its nonce (DESIGN 3.5).
        clock_unsafe_limit_s: how long a TPM clock may stay "not safe" before the session fails.
        provider_quote_interval: rounds between two host quotes; 1 is each.
        transport_patience_s: how long a peer may be away, or rounds may not end in time, before the session fails.
        round_restarts: restarts of one round because counters changed.
        absent_retries: retries of one question after 404.
        backoff_first_s: first wait; each further one is twice as long.
        backoff_longest_s: longest wait that we choose ourselves.
        absent_first_s, absent_longest_s: the same after 404: a guest that is being restarted is given time.
        retry_after_longest_s: longest Retry-After that we follow; a peer that asks for more has failed.
    """

    quote_interval_s: float = 2.0
    round_deadline_s: float = 60.0
    attempt_deadline_s: float = 30.0
    clock_unsafe_limit_s: float = 120.0
    provider_quote_interval: int = 1
    transport_patience_s: float = 600.0
    round_restarts: int = 8
    absent_retries: int = 3
    backoff_first_s: float = 0.5
    backoff_longest_s: float = 10.0
    absent_first_s: float = 6.0
    absent_longest_s: float = 24.0
    retry_after_longest_s: float = 300.0

    def __post_init__(self) -> None:
        if not (0 < self.quote_interval_s <= 86_400 and 0 < self.round_deadline_s <= 3_600):
            raise MalformedMessage("quote_interval_s must be in (0, 86400], round_deadline_s in (0, 3600]")
        if not (0 <= self.clock_unsafe_limit_s <= 86_400 and 1 <= self.provider_quote_interval <= 1_000_000):
            raise MalformedMessage(
                "clock_unsafe_limit_s must be in [0, 86400], provider_quote_interval in 1 to 1000000"
            )

    def wait_between_rounds_s(self, jitter: float) -> float:
        """Seconds from a round to the next.

        Args:
            jitter: a random number in [0, 1).
        """
        return self.quote_interval_s * (1 - _INTERVAL_JITTER * jitter)

    @property
    def attested_for_s(self) -> float:
        """How long a success counts: three intervals (DESIGN 3.8)."""
        return 3 * self.quote_interval_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One agent, as it was added.

    Args:
        agent_id: the guest.
        guest_ak: its pinned attestation key.
        guest_policy, guest_selection: reference values of the guest, and what we ask for.
        bank, host_mask, host_policy: what we ask of the host, and its reference values.
        host: the host's keys; None exactly when no provider quote is needed.
        requester: SHA-256 of the SubjectPublicKeyInfo of our own client certificate.
        allow_reboots: whether a reset of guest or host is reported instead of refused.
        v: our half of the payload key; None when the agent has no payload.
        timing: intervals and bounds.

    Raises:
        MalformedMessage: a policy that is empty or wider than its mask.
    """

    agent_id: AgentId
    guest_ak: Public
    guest_policy: Policy
    guest_selection: PcrSelection
    host: HostKeys | None
    bank: HashAlg
    host_mask: int
    host_policy: Policy
    requester: bytes
    allow_reboots: bool
    v: bytes | None = field(repr=False)
    timing: Timing

    def __post_init__(self) -> None:
        _covers(self.guest_policy, self.guest_selection, "guest")
        if self.host is not None:
            _covers(self.host_policy, PcrSelection.of(self.bank, self.host_mask), "host")


def _covers(policy: Policy, asked: PcrSelection, layer: str) -> None:
    if not policy.selection.banks:
        raise MalformedMessage(f"{layer}_policy names no PCR")
    if not policy.selection.within(asked):
        raise MalformedMessage(f"{layer}_policy names a PCR that {layer}_mask does not ask for")
