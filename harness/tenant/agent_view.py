"""An agent as its operator sees it: Keylime's members, and ours.

Invariants:
    1. What cannot be stored is shown as StoreError, never as a success.

Spec: docs/protocol.md (tenant verifier).
"""

from __future__ import annotations

from dataclasses import asdict

from harness.tenant.agent_request import AddAgent
from harness.tenant.progress_text import pcrs_as_json
from harness.tenant.session import Session
from harness.tenant.states import ACTIVE

LAYERS = ("guest", "host")


def agent_view(agent: AddAgent, session: Session) -> dict[str, object]:
    """Members of ``GET /v2.x/agents/{agent_id}``."""
    progress, plan = session.progress, session.plan
    return {
        "agent_id": str(plan.agent_id),
        "operational_state": session.state.value,
        "state": session.state.name,
        "ip": agent.cloudagent_ip,
        "port": agent.cloudagent_port,
        "hash_alg": agent.hash_alg,
        "attested": session.attested(),
        "attestation_count": progress.rounds,
        "last_successful_attestation": progress.last_success,
        "next_round_at": session.next_round_at(),
        "quote_interval_s": plan.timing.quote_interval_s,
        "round_deadline_s": plan.timing.round_deadline_s,
        "clock_unsafe_limit_s": plan.timing.clock_unsafe_limit_s,
        "guest_mask": agent.guest_mask,
        "host_mask": agent.host_mask,
        "allow_reboots": plan.allow_reboots,
        "payload_released": progress.v_released,
        "need_provider_quote": agent.need_provider_quote,
        "provider_verifier": agent.provider_verifier,
        "provider_quote_interval": agent.provider_quote_interval,
        "ak_name": plan.guest_ak.name.hex(),
        "host_id": None if plan.host is None else str(plan.host.host_id),
        "host_ak_name": None if plan.host is None else plan.host.ak.name.hex(),
        "last_verdicts": [asdict(verdict) for verdict in progress.verdicts],
        **_failure(session),
    }


def policy_view(agent: AddAgent, session: Session) -> dict[str, object]:
    """Members of ``GET /v2.x/agents/{agent_id}/policy``."""
    seen = session.progress.seen
    return {
        "guest_policy": agent.guest_policy,
        "host_policy": agent.host_policy,
        "seen": {
            layer: {"at": seen[layer].at, "pcrs": pcrs_as_json(seen[layer].pcrs)} if layer in seen else None
            for layer in LAYERS
        },
    }


def _failure(session: Session) -> dict[str, object]:
    progress, fault = session.progress, session.store_fault
    if fault is not None and (session.state in ACTIVE or progress.error is None):
        return {"layer": "verifier", "failed_check": None, "error": type(fault).__name__, "detail": fault.detail}
    if (trouble := session.trouble) is not None:
        return {
            "layer": trouble.layer,
            "failed_check": trouble.check,
            "error": trouble.error,
            "detail": trouble.detail,
        }
    return {
        "layer": progress.layer,
        "failed_check": progress.failed_check,
        "error": progress.error,
        "detail": progress.detail,
    }
