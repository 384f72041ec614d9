"""What a session remembers for the operator: why it stopped, the newest verdicts, and the PCR values seen.

Invariants:
    1. Values are kept only of evidence whose signature and digest held, and only of PCRs that were asked for.

Spec: docs/protocol.md (tenant verifier).
"""

from __future__ import annotations

from dataclasses import replace

from harness.tenant.plan import Plan
from harness.tenant.ports import PastVerdict, Progress, Seen
from harness.tenant.retries import GUEST
from harness.tenant.round import Finding
from harness.values import PcrSelection, PcrValues, pcrs_in

KEPT = 8


def accepted(progress: Progress, plan: Plan, layer: str, values: PcrValues, at: float) -> Progress:
    """Progress after evidence of a layer was accepted."""
    return _with(progress, PastVerdict(at=at, accepted=True, layer=layer), plan, values)


def rejected(progress: Progress, plan: Plan, finding: Finding, at: float) -> Progress:
    """Progress after evidence of a layer was rejected."""
    verdict = PastVerdict(at=at, accepted=False, layer=finding.layer, failed_check=finding.check, error=finding.error)
    return _with(progress, verdict, plan, finding.proven)


def stopped(progress: Progress, finding: Finding) -> Progress:
    """Progress of a session that stops: why."""
    return replace(
        progress,
        layer=finding.layer,
        failed_check=finding.check,
        error=finding.error,
        detail=finding.detail,
        refused_reboot=finding.reboot,
    )


def forgotten(progress: Progress) -> Progress:
    """Progress without what an operator knows by now: why the session stopped, and under which counters it accepted.

    From here on only the baseline counts that all guests of the host share.
    """
    return replace(
        progress, host_baseline=None, layer=None, failed_check=None, error=None, detail=None, refused_reboot=None
    )


def _with(progress: Progress, verdict: PastVerdict, plan: Plan, values: PcrValues | None) -> Progress:
    seen = progress.seen
    if values is not None:
        asked = plan.guest_selection if verdict.layer == GUEST else PcrSelection.of(plan.bank, plan.host_mask)
        seen = {**seen, verdict.layer: Seen(at=verdict.at, pcrs=_only(values, asked))}
    return replace(progress, verdicts=(*progress.verdicts, verdict)[-KEPT:], seen=seen)


def _only(values: PcrValues, asked: PcrSelection) -> PcrValues:
    return {bank: {pcr: values[bank][pcr] for pcr in pcrs_in(mask)} for bank, mask in asked.banks}
