"""``harness lab up``: from a topology file to a lab that runs and whose guests are attested.

Invariants:
    1. What runs as the topology says is left alone; what it says no more is removed, in the order that loses nothing.
    2. One tenant's or guest's refusal keeps no other from being attested; neither does a service of theirs that cannot
       run.

Owner: the command line.

Spec: DESIGN 6.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import config, console
from harness.errors import ConfigError, EnrolmentError, HarnessError
from harness.lab_control import LabControl
from harness.lab_names import SITE_FILE
from harness.lab_onboarding import Onboarding
from harness.lab_outcome import LAB, GuestOutcome
from harness.lab_plan import GuestPlan, LabPlan, plan_of, settings_of
from harness.lab_ready import Broken, check_provider, concerned
from harness.lab_record import LabRecord
from harness.lab_replacement import FILE as REPLACING
from harness.lab_site import LabSite
from harness.lab_topology import Topology, load_topology
from harness.sim.control import ask as ask_hardware

_REASON = "no longer in the lab's topology"


@dataclass(frozen=True, slots=True, kw_only=True)
class UpResult:
    """What ``up`` came to.

    Args:
        folder: of the lab.
        changed: whether anything was started, added or removed.
        removed: what was removed.
        remarks: what else was changed, and what is not as the topology says, one sentence each.
        outcomes: one per guest.
        seconds: that it took.
    """

    folder: Path
    changed: bool
    removed: Sequence[str]
    remarks: Sequence[str]
    outcomes: Sequence[GuestOutcome]
    seconds: float

    @property
    def attested(self) -> bool:
        """Whether every guest is attested."""
        return all(outcome.accepted for outcome in self.outcomes)

    def as_json(self) -> dict[str, object]:
        """The one object of ``harness lab up --json``."""
        return {
            "attested": self.attested,
            "changed": self.changed,
            "removed": list(self.removed),
            "remarks": list(self.remarks),
            "guests": [
                {**outcome.as_json(), "name": outcome.name, "attested": outcome.accepted, "detail": outcome.detail}
                for outcome in self.outcomes
            ],
            "folder": str(self.folder),
            "seconds": self.seconds,
        }


async def up(topology: Path, *, fresh: bool) -> UpResult:
    """Starts a lab, or brings a running one to what its topology says now.

    Args:
        topology: absolute path of ``lab.yml``.
        fresh: end the lab that is there, remove its state, and start anew.

    Raises:
        ConfigError: the topology or the folder cannot be used, a port is taken, or a service refused.
        HarnessError: a service of the provider did not come up.

    *Cancellation:* the lab goes on with what was started; `up` again completes it.
    """
    began = time.monotonic()
    stated = load_topology(topology)
    control = LabControl(stated.folder_beside(topology))
    if fresh:
        with console.progress("ending the lab that was there"):
            await control.down()
            control.wipe()
    record = LabRecord(control.folder)
    change = _change(topology, stated, record) if control.folder.is_dir() else _Change()
    changed = started = await control.status() is None
    with console.progress("starting hardware TPMs and services" if started else "asking the services how they are"):
        if started:
            await control.start(topology)
        check_provider(await control.broken_services())
    removed = await _remove(control, plan_of(stated, record), change)
    if not started:
        with console.progress("bringing the services to what the topology says"):
            changed = await control.apply(topology)
    broken = await control.broken_services()
    check_provider(broken)
    files = LabSite.open(control.folder, plan_of(stated, record))  # guests that left have new UUIDs
    for guest in files.plan.guests:
        record.note_guest(guest.name, guest.agent_id)
    async with Onboarding(files, files.site()) as operators:
        outcomes, admitted = await _attest(operators, files.plan, broken, change, anew=changed)
    record.note_hosts({name: str(host_id) for name, host_id in operators.host_ids.items()})
    if all(outcome.layer != LAB for outcome in outcomes):
        record.note_applied(settings_of(files.plan))  # else the next `up` completes it
    return UpResult(
        folder=control.folder,
        changed=changed or admitted or bool(removed) or bool(change.other_allowlist),
        removed=removed,
        remarks=[*change.remarks, *await _remarks(files)],
        outcomes=outcomes,
        seconds=round(time.monotonic() - began, 1),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Change:
    """What a topology says otherwise than when it was applied last: names of tenants, and of guests."""

    other_allowlist: frozenset[str] = frozenset()
    other_order: frozenset[str] = frozenset()
    made_anew: frozenset[str] = frozenset()

    @property
    def remarks(self) -> list[str]:
        """What was brought into force, for people."""
        return [
            *(f"tenant {name}: another allowlist is in force" for name in sorted(self.other_allowlist)),
            *(f"tenant {name}: its guests are attested as it says now" for name in sorted(self.other_order)),
            *(f"guest {name}: was made anew" for name in sorted(self.made_anew)),
        ]


async def _remarks(files: LabSite) -> list[str]:
    """What is not as the topology says, and what leads there."""
    found = []
    for host in files.plan.hosts:
        if (files.folder / "h" / host.name / REPLACING).exists():
            found.append(
                f"host {host.name}: the replacement of its TPM is not complete;"
                f" `harness lab replace-tpm {host.name} --reason TEXT` goes on with it"
            )
        with contextlib.suppress(HarnessError):  # a host that is away is told otherwise
            status = await ask_hardware(files.host(host.name).hardware_control, {"op": "status"})
            if status["scenario"] != (wanted := Path(host.scenario).stem):
                found.append(
                    f"host {host.name}: booted {status['scenario']}, and the topology says {wanted};"
                    f" `harness lab power-cycle {host.name} --scenario {host.scenario}` boots that"
                )
    return found


def _change(topology: Path, stated: Topology, record: LabRecord) -> _Change:
    applied = record.applied()
    if not applied:
        return _Change()
    now = settings_of(plan_of(stated, record))
    tenants = {name: (applied["tenants"].get(name), wanted) for name, wanted in now["tenants"].items()}
    guests = {name: (applied["guests"].get(name), wanted) for name, wanted in now["guests"].items()}
    anew = {
        name
        for name, (was, wanted) in guests.items()
        if was is not None and (was["agent_id"], was["host"]) != (wanted["agent_id"], wanted["host"])
    }
    for name, (was, wanted) in guests.items():
        if was is not None and name not in anew and was["scenario"] != wanted["scenario"]:
            raise ConfigError(
                f"{topology}: guest {name} was made to boot {was['scenario']}; to boot {wanted['scenario']} it is to be"
                " made anew: remove it, `harness lab up`, and add it again"
            )
    return _Change(
        other_allowlist=frozenset(
            name for name, (was, wanted) in tenants.items() if was and was["allowlist"] != wanted["allowlist"]
        ),
        other_order=frozenset(
            name for name, (was, wanted) in tenants.items() if was and was["order"] != wanted["order"]
        ),
        made_anew=frozenset(anew),
    )


async def _remove(control: LabControl, plan: LabPlan, change: _Change) -> list[str]:
    """Removes what the plan has no more, while the services of those who leave still run; says what it was."""
    site = config.load(control.folder / SITE_FILE, config.SiteSettings)
    async with Onboarding(LabSite.open(control.folder, plan), site) as operators:
        return await operators.remove(_REASON, made_anew=change.made_anew)


async def _attest(
    operators: Onboarding, plan: LabPlan, broken: Broken, change: _Change, *, anew: bool
) -> tuple[list[GuestOutcome], bool]:
    """Verdicts on all guests, and whether one of them was put under attestation just now."""
    hosts, refused = concerned(plan, broken)
    with console.progress("onboarding tenants and hosts"):
        await operators.onboard(away=hosts.keys(), other_allowlist=change.other_allowlist)
    with console.progress("tenants enrol the hosts"):
        tenants = [tenant.name for tenant in plan.tenants if tenant.name not in refused]
        refusals = await asyncio.gather(*(_enrol(operators, tenant) for tenant in tenants))
    refused |= {tenant: error for tenant, error in zip(tenants, refusals, strict=True) if error is not None}
    with console.progress(f"starting and attesting {len(plan.guests)} guests"):
        done = await asyncio.gather(
            *(
                _guest(
                    operators,
                    guest,
                    hosts.get(guest.host) or refused.get(guest.tenant),
                    anew=anew,
                    admit_anew=guest.tenant in change.other_order,
                )
                for guest in plan.guests
            )
        )
    return [outcome for outcome, _ in done], any(admitted for _, admitted in done)


async def _enrol(operators: Onboarding, tenant: str) -> HarnessError | None:
    try:
        await operators.enrol(tenant)
    except HarnessError as error:
        return error
    return None


async def _guest(
    operators: Onboarding, guest: GuestPlan, refused: HarnessError | None, *, anew: bool, admit_anew: bool
) -> tuple[GuestOutcome, bool]:
    if refused is not None:
        return GuestOutcome.not_enrolled(guest, refused), False
    try:
        image = await operators.start_guest(guest)
        contact = await operators.registered(guest, image, admit_anew=admit_anew)
        await operators.admit(guest, contact)
        outcome = await operators.verdict(guest, contact, anew=anew and contact is None)
        return outcome, contact is not None and not isinstance(contact, EnrolmentError)
    except HarnessError as error:
        return GuestOutcome.not_enrolled(guest, error), True
