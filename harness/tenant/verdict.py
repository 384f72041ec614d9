"""What goes into an appraisal and what comes out: our request, what we trust, and the verdict.

Invariants:
    1. A verdict is a value of its own, never a bare bool; accepted evidence is another type than received evidence.
    2. What is trusted is complete: a field without a default must be stated, and an absent policy accepts nothing.

Spec: DESIGN 3.5 (verdict, baseline); RFC 9334 (appraisal).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from harness import protocol
from harness.attest import Public
from harness.tenant.policy import Policy
from harness.values import ClockBaseline, HostId, PcrSelection, PcrValues


@dataclass(frozen=True, slots=True, kw_only=True)
class SentRequest:
    """What we asked, and what the provider's side puts into our leaf besides: both as *we* know them.

    Args:
        request: as sent.
        requester: SHA-256 of our own certificate's SubjectPublicKeyInfo.
        vtpm_ek: SHA-256 of the SubjectPublicKeyInfo of the EK that we pinned for the guest; None for host-only.
    """

    request: protocol.QuoteRequest
    requester: bytes
    vtpm_ek: bytes | None


@dataclass(frozen=True, slots=True, kw_only=True)
class HostTrust:
    """What is pinned and expected of a host. Without a policy nothing is accepted.

    Args:
        host_id: the host that the guest is enrolled under.
        ak: its pinned AK.
        ak_qualified_name: its pinned qualified name.
        policy: reference values.
        baseline: what was stored for this AK when our nonce was created; None: nothing yet.
    """

    host_id: HostId
    ak: Public
    ak_qualified_name: bytes
    policy: Policy | None
    baseline: ClockBaseline | None


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestTrust:
    """What is pinned and expected of a guest.

    Args:
        ak: its pinned AK.
        policy: reference values.
        baseline: as for a host.
        transport_key_pem: PEM text of the transport key that the evidence must vouch for through PCR 16; None where
            none is used.
    """

    ak: Public
    policy: Policy | None
    baseline: ClockBaseline | None
    transport_key_pem: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class AppraisedEvidence:
    """Evidence that passed every check.

    Args:
        baseline: clock and counters to store (`advance`).
        values: all values that were signed.
        unjudged: requested PCRs that the policy does not name.
    """

    baseline: ClockBaseline
    values: PcrValues = field(repr=False)
    unjudged: PcrSelection


@dataclass(frozen=True, slots=True)
class Accepted:
    """Verdict: believed."""

    evidence: AppraisedEvidence


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """Verdict: not believed.

    Args:
        check: number of the failed check.
        error: name of the error class.
        detail: one sentence.
        new_baseline: for HostRebooted, the counters that the believable but rejected evidence shows; else None.
        proven: the signed PCR values, where checks 4 to 8 held and a later one failed; else None.
    """

    check: int
    error: str
    detail: str
    new_baseline: ClockBaseline | None = None
    proven: PcrValues | None = field(default=None, repr=False)


Verdict = Accepted | Rejected


def advance(stored: ClockBaseline | None, seen: ClockBaseline) -> ClockBaseline:
    """Baseline to store after acceptance: the clock is raised, never lowered; other counters are left alone.

    Args:
        stored: what is stored now, perhaps newer than what the evidence was held against.
        seen: of the accepted evidence.
    """
    if stored is None:
        return seen
    same_run = (stored.reset_count, stored.restart_count) == (seen.reset_count, seen.restart_count)
    return seen if same_run and seen.clock > stored.clock else stored
