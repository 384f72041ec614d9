"""What a lab shall consist of: tenants, guests, the chip below them, and what a hostile party changes.

A tamper case is a change of the plan: another image, another vTPM, a hostile provider in the path. Product code has no
switch for any of them.

Spec: DESIGN 6 (labs); docs/threat-model.md lists the cases with the check that refuses each.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace

from harness.errors import ConfigError
from harness.values import AgentId

DEFAULT_CHIP = "ifx-slb9670"
_NAMES = ("alice", "bob", "carol", "dave", "erin", "frank", "grace", "heidi")
_LIMIT = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestPlan:
    """One guest.

    Args:
        agent_id: its UUID.
        name: for people.
        tenant: who owns it.
        scenario: what it boots (``harness/sim/scenarios``).
        foreign_vtpm: its vTPM is manufactured with another CA than the host's.
        decoy: after its registration another vTPM takes its place on the host, and its own runs elsewhere.
    """

    agent_id: AgentId
    name: str
    tenant: str
    scenario: str = "guest-good"
    foreign_vtpm: bool = False
    decoy: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LabPlan:
    """A lab with one host.

    Args:
        tenants: their names.
        guests: all guests of all tenants.
        chip: latency profile of the hardware TPM.
        host_scenario: what the host boots.
        hostile: what the provider in the tenants' path does to host rounds; None: an honest provider verifier.
        allow_reboots: the tenants' policy on host reboots.
    """

    tenants: tuple[str, ...]
    guests: tuple[GuestPlan, ...]
    chip: str = DEFAULT_CHIP
    host_scenario: str = "good"
    hostile: str | None = None
    allow_reboots: bool = True


def plan(*, tenants: int, guests: int, chip: str = DEFAULT_CHIP) -> LabPlan:
    """Honest lab.

    Args:
        tenants: number of tenants, 1 to 8.
        guests: guests of each tenant, 1 to 64.
        chip: latency profile of the hardware TPM.

    Raises:
        ConfigError: a number out of range.
    """
    if not 1 <= tenants <= len(_NAMES):
        raise ConfigError(f"--tenants {tenants}: a lab has 1 to {len(_NAMES)} tenants")
    if not 1 <= guests <= _LIMIT:
        raise ConfigError(f"--guests {guests}: a tenant has 1 to {_LIMIT} guests")
    names = _NAMES[:tenants]
    made = tuple(
        GuestPlan(agent_id=AgentId(uuid.uuid4()), name=f"{tenant}-vm{number}", tenant=tenant)
        for tenant in names
        for number in range(1, guests + 1)
    )
    return LabPlan(tenants=names, guests=made, chip=chip)


@dataclass(frozen=True, slots=True, kw_only=True)
class TamperCase:
    """One way to cheat, and who must notice.

    Args:
        what: one line for people.
        refused_by: layer and check that must refuse it.
        change: the plan with the tampering in it.
    """

    what: str
    refused_by: str
    change: Callable[[LabPlan], LabPlan]


def _first_guest(**changes: object) -> Callable[[LabPlan], LabPlan]:
    def change(honest: LabPlan) -> LabPlan:
        first, *rest = honest.guests
        return replace(honest, guests=(replace(first, **changes), *rest))  # type: ignore[arg-type]

    return change


def _whole_lab(**changes: object) -> Callable[[LabPlan], LabPlan]:
    return lambda honest: replace(honest, **changes)  # type: ignore[arg-type]


TAMPER_CASES = {
    "host-kernel": TamperCase(
        what="the host booted another kernel",
        refused_by="host evidence, check 9",
        change=_whole_lab(host_scenario="tampered-kernel"),
    ),
    "guest-kernel": TamperCase(
        what="one guest booted another kernel",
        refused_by="guest evidence, check 9",
        change=_first_guest(scenario="guest-tampered-kernel"),
    ),
    "swap-vtpm": TamperCase(
        what="a vTPM made elsewhere registers",
        refused_by="enrolment, CertificateRefused",
        change=_first_guest(foreign_vtpm=True),
    ),
    "decoy": TamperCase(
        what="another vTPM runs under the guest's UUID on the good host",
        refused_by="host agent, GuestNotHere",
        change=_first_guest(decoy=True),
    ),
    "wrong-ak": TamperCase(
        what="the provider answers with another TPM's quote",
        refused_by="host evidence, check 6",
        change=_whole_lab(hostile="wrong-ak"),
    ),
    "replay": TamperCase(
        what="the provider plays back a recorded answer",
        refused_by="host evidence, check 5",
        change=_whole_lab(hostile="replay"),
    ),
    "strip": TamperCase(
        what="the provider answers a guest round with a host-only leaf",
        refused_by="host evidence, check 5",
        change=_whole_lab(hostile="strip"),
    ),
    "reboot": TamperCase(
        what="the host was reset between guest quote and host quote",
        refused_by="host evidence, check 10",
        change=_whole_lab(hostile="reboot", allow_reboots=False),
    ),
}
"""Name on the command line, and the case."""


def tampered(honest: LabPlan, case: str) -> LabPlan:
    """Plan with one tamper case in it.

    Raises:
        ConfigError: no such case.
    """
    if case not in TAMPER_CASES:
        raise ConfigError(f"--tamper {case}: not one of {', '.join(TAMPER_CASES)}")
    return TAMPER_CASES[case].change(honest)
