"""What came of a lab's guests: one verdict each, in the words of the services."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness.errors import EnrolmentError, HarnessError
from harness.events import read_events
from harness.lab_plan import GuestPlan

ENROLMENT, LAB = "enrolment", "lab"


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestOutcome:
    """How one guest ended.

    Args:
        agent_id: the guest.
        name: for people.
        tenant: who owns it.
        state: operational state at its verifier; None when it was never admitted.
        layer: which layer was refused: guest, host or enrolment; lab: it did not come up; None when none was.
        failed_check: number of the failed check (DESIGN 3.5), where a check failed.
        error: name of the error.
        detail: its sentence.
        accepted: both layers were accepted, and the payload, where there is one, was released.
        payload_released: the verifier released V, or the guest holds the payload.
    """

    agent_id: str
    name: str
    tenant: str
    state: str | None
    layer: str | None
    failed_check: int | None
    error: str | None
    detail: str | None
    accepted: bool
    payload_released: bool

    @classmethod
    def not_enrolled(cls, guest: GuestPlan, error: HarnessError) -> GuestOutcome:
        """Outcome of a guest that the tenant's registrar refused, or that did not come as far as that."""
        return cls(
            agent_id=str(guest.agent_id),
            name=guest.name,
            tenant=guest.tenant,
            state=None,
            layer=ENROLMENT if isinstance(error, EnrolmentError) else LAB,
            failed_check=None,
            error=type(error).__name__,
            detail=error.detail,
            accepted=False,
            payload_released=False,
        )

    @classmethod
    def attested(
        cls, guest: GuestPlan, view: Mapping[str, Any], has_payload: bool, *, expected: bool = True
    ) -> GuestOutcome:
        """Outcome of a guest under attestation.

        Args:
            guest: of the plan.
            view: its verifier's answer.
            has_payload: whether the payload is in the guest.
            expected: whether there is a payload.
        """
        released = bool(view["payload_released"])
        return cls(
            agent_id=str(guest.agent_id),
            name=guest.name,
            tenant=guest.tenant,
            state=str(view["state"]),
            layer=view["layer"],
            failed_check=view["failed_check"],
            error=view["error"],
            detail=view["detail"],
            accepted=bool(view["attested"]) and (not expected or (released and has_payload)),
            payload_released=released or has_payload,
        )

    def as_json(self) -> dict[str, object]:
        """Members of ``harness demo --json``."""
        shown = ("agent_id", "tenant", "state", "layer", "failed_check", "error", "payload_released")
        members = asdict(self)
        return {name: members[name] for name in shown}


def batches_in(log: Path) -> list[dict[str, int]]:
    """Requests and TPM quotes of the batches in a host agent's log."""
    return [
        {"requests": event["requests"], "tpm_quotes": event["tpm_quotes"]}
        for event in read_events(log)
        if event["event"] == "batch" and event.get("tpm_quotes")
    ]
