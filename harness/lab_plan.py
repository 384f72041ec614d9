"""What a lab shall consist of: hosts, tenants, guests, and what a hostile party changes.

A tamper case is a change of the plan: another image, another vTPM, a hostile provider in the path. Product code has no
switch for any of them.

Spec: DESIGN 6 (labs); docs/threat-model.md lists the cases with the check that refuses each.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from harness.errors import ConfigError
from harness.lab_record import LabRecord
from harness.lab_topology import (
    DEFAULT_CHIP,
    TenantTopology,
    Topology,
    allowlist_of,
    payload_of,
    policy_of,
)
from harness.tenant.policy import Policy
from harness.values import AgentId, PcrSelection, pcrs_in

DEMO_HOST = "host1"
DEMO_PAYLOAD = b"the tenant's secret, released after both layers were accepted\n"
_NAMES = ("alice", "bob", "carol", "dave", "erin", "frank", "grace", "heidi")
_LIMIT = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class HostPlan:
    """A host: its chip's latency profile, what it boots, the kind of its AK."""

    name: str
    chip: str = DEFAULT_CHIP
    scenario: str = "good"
    ak: str = "rsa2048"


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantPlan:
    """A tenant.

    Args:
        name: of the tenant.
        allowlist: what it may see of hosts.
        host_policy: its reference values for hosts.
        guest_policy: its reference values for its guests.
        allow_reboots: whether a reset is reported instead of refused.
        quote_interval_s: seconds between two rounds.
        provider_quote_interval: a host quote in every Nth round.
        payload: secret for each of its guests; None: nothing is released.
    """

    name: str
    allowlist: PcrSelection
    host_policy: Policy
    guest_policy: Policy
    allow_reboots: bool
    quote_interval_s: float
    provider_quote_interval: int
    payload: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestPlan:
    """One guest.

    Args:
        agent_id: its UUID.
        name: for people.
        tenant: who owns it.
        host: where it runs.
        scenario: what it boots (``harness/sim/scenarios``).
        foreign_vtpm: its vTPM is manufactured with another CA than the host's.
        decoy: after its registration another vTPM takes its place on the host, and its own runs elsewhere.
    """

    agent_id: AgentId
    name: str
    tenant: str
    host: str = DEMO_HOST
    scenario: str = "guest-good"
    foreign_vtpm: bool = False
    decoy: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LabPlan:
    """A lab.

    Args:
        hosts: all hosts of the provider.
        tenants: all tenants.
        guests: all guests of all tenants.
        hostile: what the provider in the tenants' path does to host rounds; None: an honest provider verifier.
    """

    hosts: tuple[HostPlan, ...]
    tenants: tuple[TenantPlan, ...]
    guests: tuple[GuestPlan, ...]
    hostile: str | None = None

    def tenant(self, name: str) -> TenantPlan:
        """The tenant of this name, which is one of the plan's."""
        return next(tenant for tenant in self.tenants if tenant.name == name)


def plan_of(topology: Topology, record: LabRecord) -> LabPlan:
    """Plan of the lab that a topology describes.

    Args:
        topology: as loaded (`load_topology` has looked at what it refers to).
        record: gives a guest without a stated UUID the one that it had before.

    Raises:
        ConfigError: something that it refers to cannot be used any more.
    """
    only = next(iter(topology.hosts))
    return LabPlan(
        hosts=tuple(
            HostPlan(name=name, chip=host.chip, scenario=host.scenario, ak=host.ak)
            for name, host in topology.hosts.items()
        ),
        tenants=tuple(_tenant(name, tenant) for name, tenant in topology.tenants.items()),
        guests=tuple(
            GuestPlan(
                agent_id=AgentId(guest.agent_id or record.agent_id(name)),
                name=name,
                tenant=tenant,
                host=guest.host or only,
                scenario=guest.scenario,
            )
            for tenant, of in topology.tenants.items()
            for name, guest in of.guests.items()
        ),
    )


def settings_of(plan: LabPlan) -> dict[str, Any]:
    """What a running lab can be brought to when its topology changes, as plain data without secrets."""
    return {
        "tenants": {
            tenant.name: {"allowlist": _lists(tenant.allowlist), "order": _digest(tenant)} for tenant in plan.tenants
        },
        "guests": {
            guest.name: {"agent_id": str(guest.agent_id), "host": guest.host, "scenario": guest.scenario}
            for guest in plan.guests
        },
    }


def _lists(allowlist: PcrSelection) -> dict[str, list[int]]:
    return {bank.text: list(pcrs_in(mask)) for bank, mask in allowlist.banks}


def _digest(tenant: TenantPlan) -> str:
    """SHA-256 of how a tenant's guests are attested; the payload goes in by its own digest."""
    payload = None if tenant.payload is None else hashlib.sha256(tenant.payload).hexdigest()
    order = [tenant.host_policy.encode(), tenant.guest_policy.encode(), tenant.allow_reboots, payload]
    order += [tenant.quote_interval_s, tenant.provider_quote_interval]
    return hashlib.sha256(json.dumps(order, sort_keys=True).encode()).hexdigest()


def _tenant(name: str, topology: TenantTopology) -> TenantPlan:
    return TenantPlan(
        name=name,
        allowlist=allowlist_of(topology),
        host_policy=policy_of(topology.host_policy),
        guest_policy=policy_of(topology.guest_policy),
        allow_reboots=topology.allow_reboots,
        quote_interval_s=topology.quote_interval_s,
        provider_quote_interval=topology.provider_quote_interval,
        payload=payload_of(topology),
    )


def plan(*, tenants: int, guests: int, chip: str = DEFAULT_CHIP) -> LabPlan:
    """Honest lab of one host, for the demo.

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
    like_any = _tenant("", TenantTopology())
    owners = tuple(replace(like_any, name=name, payload=DEMO_PAYLOAD) for name in names)
    return LabPlan(hosts=(HostPlan(name=DEMO_HOST, chip=chip),), tenants=owners, guests=made)


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


def _host_boots(scenario: str) -> Callable[[LabPlan], LabPlan]:
    return lambda honest: replace(honest, hosts=tuple(replace(host, scenario=scenario) for host in honest.hosts))


def _provider_plays(mode: str, *, allow_reboots: bool = True) -> Callable[[LabPlan], LabPlan]:
    def change(honest: LabPlan) -> LabPlan:
        strict = tuple(replace(tenant, allow_reboots=allow_reboots) for tenant in honest.tenants)
        return replace(honest, tenants=strict, hostile=mode)

    return change


TAMPER_CASES = {
    "host-kernel": TamperCase(
        what="the host booted another kernel",
        refused_by="host evidence, check 9",
        change=_host_boots("tampered-kernel"),
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
        change=_provider_plays("wrong-ak"),
    ),
    "replay": TamperCase(
        what="the provider plays back a recorded answer",
        refused_by="host evidence, check 5",
        change=_provider_plays("replay"),
    ),
    "strip": TamperCase(
        what="the provider answers a guest round with a host-only leaf",
        refused_by="host evidence, check 5",
        change=_provider_plays("strip"),
    ),
    "reboot": TamperCase(
        what="the host was reset between guest quote and host quote",
        refused_by="host evidence, check 10",
        change=_provider_plays("reboot", allow_reboots=False),
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
