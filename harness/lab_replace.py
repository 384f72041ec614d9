"""Replaces the hardware TPM of a lab's host, and does what every party's operator has to do then.

The host gets another id, and its vTPM CA another key: the provider moves guests and allowlists to the new id, guests
get new vTPMs, and each tenant enrols the host and its guests anew and forgets the old one. Tenants end the attestation
of the guests first and give the same order again, so that nobody is alarmed by what they do themselves.

Invariants:
    1. Each step may be done again: a replacement that was interrupted is completed by the next call, and the TPM is
       not replaced a second time (`lab_replacement`).
    2. A tenant trusts the new TPM after a complete enrolment only, and every party's audit trail has the reason.
    3. A guest is attested afterwards as it was before, by the order that was in force.

Owner: the command line.

Spec: docs/protocol.md (a host whose TPM was replaced); DESIGN 3.6.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from harness import config
from harness.errors import ConfigError, Conflict, EnrolmentError, LocalRefusal, NotFound, SimulationError
from harness.lab_control import LabControl
from harness.lab_hosts import domains
from harness.lab_names import SITE_FILE
from harness.lab_onboarding import Contact, Onboarding
from harness.lab_outcome import GuestOutcome
from harness.lab_plan import GuestPlan, plan_of
from harness.lab_record import LabRecord
from harness.lab_replacement import FILE, GuestNote, ReplacementNote, unfinished
from harness.lab_site import LabSite, write_image
from harness.lab_topology import load_topology
from harness.sim import guest_definitions
from harness.sim.control import ask as ask_hardware
from harness.tenant.order import Order, order_in_force
from harness.unix_client import ask
from harness.values import HostId, parse_agent_id, parse_host_id

_ANNOUNCED_S = 60.0
_GUEST_S = 120.0
_LOCAL_S = 30.0
_POLL_S = 0.2


class Replacement:
    """The replacement of one host's TPM.

    Args:
        control: of the lab, which is up.
        operators: of all parties.
        host: name of the host.
        reason: for the audit trails.
        say: told of each step, for people.
    """

    def __init__(
        self, control: LabControl, operators: Onboarding, *, host: str, reason: str, say: Callable[[str], None]
    ) -> None:
        self._control = control
        self._operators = operators
        self._host = host
        self._reason = reason
        self._say = say

    @property
    def _at(self) -> config.HostSite:
        return self._operators.site.hosts[self._host]

    @property
    def _control_socket(self) -> Path:
        return _socket(self._at.hardware_control)

    @property
    def _local_socket(self) -> Path:
        return _socket(self._at.local_socket)

    @property
    def _folder(self) -> Path:
        return self._at.guests.parent

    async def run(self) -> list[GuestOutcome]:
        """Replaces the TPM, or completes a replacement that was interrupted.

        Returns:
            How each guest stands that was under attestation, or that the topology wants to be.

        Raises:
            HarnessError: a party refused, or did not answer in time; call it again.

        *Cancellation:* call it again.
        """
        note = await asyncio.to_thread(unfinished, self._folder)
        if note is None:
            note = await self._begin()
            note.save(self._folder)
        else:
            self._say(f"going on with the replacement of host {note.old}")
        for agent_id, guest in note.missing.items():
            with contextlib.suppress(NotFound):
                operator = self._operators.tenants.get(guest.tenant)
                if operator is not None:
                    await operator.end_attestation(parse_agent_id(agent_id), self._reason)
        await self._replace_chip(note)
        await self._remove_guests(note)
        new = await self._move(parse_host_id(note.old))
        for tenant in self._operators.tenants:
            await self._enrol(tenant, note, new)
        back = [self._bring_back(agent_id, note) for agent_id in note.missing]
        done = await asyncio.gather(*back, return_exceptions=True)
        for failed in done:
            if isinstance(failed, BaseException):
                raise failed
        for tenant in self._operators.tenants:
            await self._forget(tenant, parse_host_id(note.old))
        record = LabRecord(self._control.folder)
        record.note_hosts({**record.host_ids(), self._host: str(new)})
        (self._folder / FILE).unlink(missing_ok=True)
        return [outcome for outcome in done if isinstance(outcome, GuestOutcome)]

    # --- before -------------------------------------------------------------------------------------------

    async def _begin(self) -> ReplacementNote:
        """Notes what is there, before anything is changed."""
        entry = await self._known()
        chips = int(str((await ask_hardware(self._control_socket, {"op": "status"}))["replaced"]))
        if entry.get("replacement"):
            self._say(f"the agent of {self._host} announces another TPM already: its replacement is completed")
            chips -= 1
        running = frozenset(str(each.get("uuid")) for each in await self._domains() if each.get("state") != "shutoff")
        guests = {
            str(guest["agent_id"]): await self._noted(guest, running)
            for guest in await self._operators.provider.guests()
            if guest["host_id"] == entry["host_id"]
        }
        return ReplacementNote(old=str(entry["host_id"]), chips=chips, guests=guests)

    async def _noted(self, entry: Mapping[str, Any], running: frozenset[str]) -> GuestNote:
        agent_id, tenant = parse_agent_id(str(entry["agent_id"])), str(entry["tenant"])
        folder = self._at.guests / str(agent_id)
        defined = (folder / guest_definitions.FILE).exists()
        operator = self._operators.tenants.get(tenant)
        attested = None
        if operator is not None:
            with contextlib.suppress(NotFound):
                attested = {"view": await operator.attestation(agent_id), "policy": await operator.policy(agent_id)}
        return GuestNote(
            running=str(agent_id) in running,
            name=str(entry["name"]),
            tenant=tenant,
            definition=dict(guest_definitions.load(folder)) if defined else None,
            stated=operator is not None and str(agent_id) in {each["agent_id"] for each in await operator.stated()},
            attested=attested,
        )

    # --- the provider -------------------------------------------------------------------------------------

    async def _replace_chip(self, note: ReplacementNote) -> None:
        status = await ask_hardware(self._control_socket, {"op": "status"})
        if int(str(status["replaced"])) > note.chips:
            return
        await self._control.replace_tpm(self._host, replaced=note.chips)
        self._say(f"{self._host} has another TPM; its agent has made new keys")

    async def _remove_guests(self, note: ReplacementNote) -> None:
        """Ends guests with vTPMs that the old TPM's CA key certified, before anybody is to believe them."""
        there = {str(domain.get("uuid")) for domain in await self._operators.patiently(self._domains)}
        for agent_id, guest in note.missing.items():
            if guest.definition is not None and agent_id in there:
                await ask(self._at.guest_manager, {"op": "undefine", "uuid": agent_id}, deadline_s=_GUEST_S)
                self._say(f"guest {guest.name}: its vTPM, which the old TPM vouched for, is destroyed")

    async def _domains(self) -> list[Mapping[str, Any]]:
        return await domains(self._at.guest_manager)

    async def _move(self, old: HostId) -> HostId:
        """Lets the provider's record of the host follow its agent; returns the new id."""
        until = time.monotonic() + _ANNOUNCED_S
        while time.monotonic() < until:
            entry = await self._operators.patiently(self._known)
            if entry["host_id"] != str(old):
                return parse_host_id(str(entry["host_id"]))
            if entry.get("replacement"):
                new = parse_host_id(str(entry["replacement"]))
                await self._operators.provider.replace_host(old, new, self._reason)
                self._say(f"provider: host {old} is host {new} from now on")
                return new
            await asyncio.sleep(_POLL_S)
        raise SimulationError(f"the agent of {self._host} has not announced its new TPM within {_ANNOUNCED_S:g} s")

    async def _known(self) -> Mapping[str, Any]:
        for entry in await self._operators.provider.hosts():
            if entry["name"] == self._host:
                return entry
        raise NotFound(f"host {self._host} has not announced itself")

    # --- the tenants --------------------------------------------------------------------------------------

    async def _enrol(self, name: str, note: ReplacementNote, new: HostId) -> None:
        """A tenant that knew the old host enrols the new one, and states its guests there."""
        operator = self._operators.tenants[name]
        pinned = {str(host["host_id"]) for host in await self._operators.patiently(operator.hosts)}
        guests = {agent_id: guest for agent_id, guest in note.missing.items() if guest.tenant == name and guest.stated}
        if str(new) not in pinned and (guests or note.old in pinned):
            url = f"{self._operators.site.tenants[name].provider_verifier}/v1/hosts/{new}"
            await self._operators.patiently(lambda: operator.add_host(url, self._reason))
            self._say(f"{name}: host {new} is enrolled")
        for agent_id in guests:
            await operator.re_enrol_guest(parse_agent_id(agent_id), self._reason, host_id=new)

    async def _forget(self, name: str, old: HostId) -> None:
        try:
            await self._operators.tenants[name].remove_host(old, self._reason)
        except NotFound:
            return
        except Conflict as error:  # a guest that the provider does not know of
            self._say(f"{name}: host {old} stays enrolled: {error.detail}")
        else:
            self._say(f"{name}: host {old} is forgotten")

    # --- the guests ---------------------------------------------------------------------------------------

    async def _bring_back(self, text: str, note: ReplacementNote) -> GuestOutcome | None:
        """Makes a guest anew, with another vTPM, and puts it under attestation as it was; None when it was not."""
        agent_id, guest = parse_agent_id(text), note.guests[text]
        plan = GuestPlan(agent_id=agent_id, name=guest.name, tenant=guest.tenant, host=self._host)
        contact: Contact = None
        if guest.definition is not None:
            await self._make_anew(plan, guest)
        order = self._order(plan, guest)
        if guest.running and order is not None:
            operator = self._operators.tenants[guest.tenant]
            try:
                contact = await operator.registered(agent_id, deadline_s=_GUEST_S)
                await operator.admit(contact, order)
            except EnrolmentError as error:
                contact = error
        elif order is not None:
            self._say(f"guest {guest.name}: is off; when it runs: harness tenant guest add, to attest it again")
        guest.done = True
        await asyncio.to_thread(note.save, self._folder)
        return None if contact is None else await self._operators.verdict(plan, contact)

    async def _make_anew(self, plan: GuestPlan, guest: GuestNote) -> None:
        definition = guest.definition or {}
        try:
            release = {"op": "release", "agent_id": str(plan.agent_id), "reason": self._reason}
            await ask(self._local_socket, release, deadline_s=_LOCAL_S)
        except LocalRefusal as refusal:
            if refusal.error != NotFound.__name__:  # it never had a vTPM, or is released already
                raise
        image = definition.get("agent_config")
        if isinstance(image, str) and Path(image).is_relative_to(self._at.guests / str(plan.agent_id)):
            await asyncio.to_thread(write_image, self._operators.site, plan, self._host)
        await ask(self._at.guest_manager, {"op": "define", **definition}, deadline_s=_LOCAL_S)
        if guest.running:
            start = {"op": "start", "uuid": str(plan.agent_id)}
            await ask(self._at.guest_manager, start, deadline_s=_GUEST_S)
            self._say(f"guest {guest.name}: runs with a vTPM that the new TPM vouches for")

    def _order(self, plan: GuestPlan, guest: GuestNote) -> Order | None:
        """How the guest is to be attested: as it was, or as the topology says; None: not at all."""
        if not guest.stated:
            return None
        planned = any(each.agent_id == plan.agent_id for each in self._operators.plan.guests)
        if guest.attested is None:
            return self._operators.order(plan) if planned else None
        payload = self._operators.order(plan).payload
        return order_in_force(guest.attested["view"], guest.attested["policy"], payload)


async def replace_tpm(control: LabControl, host: str, reason: str, say: Callable[[str], None]) -> list[GuestOutcome]:
    """Replaces the TPM of a host of a lab that is up, or completes a replacement that was interrupted.

    Args:
        control: of the lab.
        host: name of the host.
        reason: for the audit trails.
        say: told of each step, for people.

    Returns:
        How each guest stands that is under attestation again.

    Raises:
        ConfigError: the lab is down, or its files cannot be used.
        HarnessError: a party refused, or did not answer in time; call it again.

    *Cancellation:* call it again.
    """
    status = await control.status()
    if status is None:
        raise ConfigError(f"the lab in {control.folder} is down; `harness lab up` starts it")
    site = config.load(control.folder / SITE_FILE, config.SiteSettings)
    plan = plan_of(load_topology(Path(status["topology"])), LabRecord(control.folder))
    async with Onboarding(LabSite.open(control.folder, plan), site) as operators:
        return await Replacement(control, operators, host=host, reason=reason, say=say).run()


def _socket(path: Path | None) -> Path:
    if path is None:
        raise ConfigError(f"{SITE_FILE} does not say where the host's sockets are; `harness lab up` writes it")
    return path
