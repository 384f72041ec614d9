"""Pinned keys that an operator replaces: in one transaction with the audit entry, and with nothing left of the old."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from harness.audit import AuditEntry
from harness.credential import keylime_auth_tag
from harness.errors import CloneSuspected, Conflict, KeyChanged, NotFound
from harness.store import Store, open_store
from harness.tenant.alarms_store import AlarmStore
from harness.tenant.chain import chain_of
from harness.tenant.guest_enrolment import GuestEnroller
from harness.tenant.registrar_store import RegistrarStore
from harness.tenant.tables import SCHEMA, Base, Host
from harness.values import AgentId, ClockBaseline, HostId
from tests.support.enrolment_parties import NOW, SoftHost, SoftVtpm, Vendor, der
from tests.unit.test_guest_enrolment import enrolled

AGENT, OTHER = AgentId(uuid.UUID(int=1 << 64)), AgentId(uuid.UUID(int=2 << 64))
REQUESTER = hashlib.sha256(b"registrar").digest()


def act(action: str, subject: object = "x") -> AuditEntry:
    return AuditEntry(at=3.0, who="alice/tenant-operator/op", action=action, subject=str(subject), reason="because")


@dataclass(slots=True, kw_only=True)
class Registry:
    """A host and one active guest on it; the audit trail holds the host's enrolment."""

    database: Store
    store: RegistrarStore
    enroller: GuestEnroller
    host: SoftHost
    vtpm: SoftVtpm

    @property
    def host_id(self) -> HostId:
        return self.host.host_id

    async def register(self, vtpm: SoftVtpm, ca: SoftHost, agent_id: AgentId = AGENT) -> None:
        """A whole registration of a vTPM that this host's CA key certified."""
        blob = await self.enroller.register(agent_id, vtpm.keys(vtpm.certified(agent_id, ca.ca_key)))
        await self.enroller.activate(agent_id, keylime_auth_tag(vtpm.activate(blob), str(agent_id)))

    async def actions(self) -> list[str]:
        return [entry.action for entry in await AlarmStore(self.database).audit()]


@pytest.fixture
async def registry(tmp_path: Path) -> AsyncIterator[Registry]:
    url = f"sqlite+aiosqlite:///{tmp_path}/t.db"
    database = await open_store(url, Base.metadata, component="tenant", version=SCHEMA)
    try:
        store = RegistrarStore(database)
        made = Registry(
            database=database,
            store=store,
            enroller=GuestEnroller(store, now=lambda: NOW),
            host=SoftHost(Vendor(), REQUESTER),
            vtpm=SoftVtpm(),
        )
        await store.pin_host(enrolled(made.host), act("host-add"))
        await store.state_guest(AGENT, made.host_id, act("guest-state"))
        await made.register(made.vtpm, made.host)
        yield made
    finally:
        await database.close()


# --- hosts ------------------------------------------------------------------------------------------------


async def test_a_new_ak_replaces_the_pinned_one_and_guests_stay(registry: Registry) -> None:
    """The CA key is the same, so that the guests' certificates hold; baseline and time are the new enrolment's."""
    other = SoftHost(registry.host.vendor, REQUESTER)
    baseline = ClockBaseline(clock=1, reset_count=2, restart_count=3, firmware_version=4)
    new = enrolled(registry.host, ak=other.ak, baseline=baseline, enrolled_at=7.0)
    replaced, stated = await registry.store.replace_host(new, act("host-re-enrol"))
    assert (replaced.ak, replaced.baseline, replaced.enrolled_at) == (other.ak.marshal(), baseline, 7.0)
    assert await registry.store.host(registry.host_id) == replaced
    assert stated == []
    assert (await registry.store.guest(AGENT)).keys is not None
    assert await registry.actions() == ["host-add", "guest-state", "host-re-enrol"]


async def test_with_a_new_ca_key_the_guests_have_to_register_again(registry: Registry) -> None:
    """What the old CA key certified is refused from then on; a vTPM of the new one registers, with free names."""
    other = SoftHost(registry.host.vendor, REQUESTER)
    _, stated = await registry.store.replace_host(enrolled(registry.host, ca=other.ca), act("host-re-enrol"))
    assert stated == [AGENT]
    assert (await registry.store.guest(AGENT)).keys is None
    await registry.register(registry.vtpm, other)
    assert (await registry.store.guest(AGENT)).registrations == 2


async def test_the_replaced_keys_are_free(registry: Registry) -> None:
    """Nothing of the old AK is left that could refuse it to another host; the new one is taken."""
    old, other = registry.host, SoftHost(registry.host.vendor, REQUESTER)
    await registry.store.replace_host(enrolled(old, ak=other.ak), act("host-re-enrol"))
    third = SoftHost(old.vendor, REQUESTER)
    with pytest.raises(CloneSuspected):
        await registry.store.pin_host(enrolled(third, ak=other.ak), act("host-add"))
    await registry.store.pin_host(enrolled(third, ak=old.ak), act("host-add"))


@pytest.mark.parametrize("whose", ["a guest's", "another host's", "its own CA key"])
async def test_a_refused_replacement_leaves_the_old_keys(registry: Registry, whose: str) -> None:
    """An AK that is pinned elsewhere or in another role: nothing changes, and nothing is in the audit trail."""
    third = SoftHost(registry.host.vendor, REQUESTER)
    await registry.store.pin_host(enrolled(third), act("host-add"))
    before = await registry.store.host(registry.host_id)
    ak = {"a guest's": registry.vtpm.ak, "another host's": third.ak, "its own CA key": third.ca}[whose]
    with pytest.raises(CloneSuspected):
        await registry.store.replace_host(enrolled(registry.host, ak=ak), act("host-re-enrol"))
    assert await registry.store.host(registry.host_id) == before
    assert (await registry.store.guest(AGENT)).keys is not None
    assert await registry.actions() == ["host-add", "guest-state", "host-add"]
    await registry.store.replace_host(enrolled(registry.host), act("host-re-enrol"))


async def test_a_host_that_is_not_enrolled_is_not_replaced(registry: Registry) -> None:
    """Re-enrolling is for pinned hosts."""
    with pytest.raises(NotFound):
        await registry.store.replace_host(enrolled(SoftHost(Vendor(), REQUESTER)), act("host-re-enrol"))


async def test_a_guest_that_was_challenged_under_the_old_ca_key_is_not_pinned(registry: Registry) -> None:
    """Its certificate was checked with a CA key that is not the host's any more."""
    await registry.store.state_guest(OTHER, registry.host_id, act("guest-state"))
    vtpm, other = SoftVtpm(), SoftHost(registry.host.vendor, REQUESTER)
    blob = await registry.enroller.register(OTHER, vtpm.keys(vtpm.certified(OTHER, registry.host.ca_key)))
    await registry.store.replace_host(enrolled(registry.host, ca=other.ca), act("host-re-enrol"))
    with pytest.raises(Conflict):
        await registry.enroller.activate(OTHER, keylime_auth_tag(vtpm.activate(blob), str(OTHER)))
    assert (await registry.store.guest(OTHER)).keys is None


# --- guests -----------------------------------------------------------------------------------------------


async def test_a_guest_that_is_re_enrolled_may_come_with_another_vtpm(registry: Registry) -> None:
    """Its old keys are forgotten and free; before the operator's act they were a changed key."""
    other = SoftVtpm()
    with pytest.raises(KeyChanged, match="re-enrol"):
        await registry.register(other, registry.host)
    record = await registry.store.restate_guest(AGENT, None, act("guest-re-enrol", AGENT))
    assert (record.keys, record.host_id) == (None, registry.host_id)
    await registry.register(other, registry.host)
    await registry.store.state_guest(OTHER, registry.host_id, act("guest-state"))
    await registry.register(registry.vtpm, registry.host, OTHER)
    assert await registry.actions() == ["host-add", "guest-state", "guest-re-enrol", "guest-state"]


async def test_a_guest_is_re_enrolled_onto_another_host(registry: Registry) -> None:
    """The new host's CA key counts from then on, and the old host may be removed."""
    second = SoftHost(registry.host.vendor, REQUESTER)
    await registry.store.pin_host(enrolled(second), act("host-add"))
    with pytest.raises(Conflict, match="re-enrol"):
        await registry.store.state_guest(AGENT, second.host_id, act("guest-state"))
    await registry.store.restate_guest(AGENT, second.host_id, act("guest-re-enrol", AGENT))
    await registry.register(SoftVtpm(), second)
    await registry.store.remove_host(registry.host_id, act("host-remove", registry.host_id))
    assert (await registry.store.guest(AGENT)).host_id == second.host_id


@pytest.mark.parametrize(("agent_id", "host_id"), [(AGENT, HostId(uuid.uuid4())), (OTHER, None)])
async def test_nothing_is_forgotten_for_an_unknown_host_or_guest(
    registry: Registry, agent_id: AgentId, host_id: HostId | None
) -> None:
    """NotFound; the keys stay, and nothing is in the audit trail."""
    with pytest.raises(NotFound):
        await registry.store.restate_guest(agent_id, host_id, act("guest-re-enrol"))
    assert (await registry.store.guest(AGENT)).keys is not None
    assert await registry.actions() == ["host-add", "guest-state"]


async def test_a_stated_guest_is_audited_once(registry: Registry) -> None:
    """Stating it again where it is changes nothing and is no act; one that is refused is none either."""
    await registry.store.state_guest(AGENT, registry.host_id, act("guest-state", AGENT))
    assert await registry.actions() == ["host-add", "guest-state"]
    with pytest.raises(NotFound):
        await registry.store.state_guest(OTHER, SoftHost(Vendor(), REQUESTER).host_id, act("guest-state", OTHER))
    await registry.store.state_guest(OTHER, registry.host_id, act("guest-state", OTHER))
    entries = await AlarmStore(registry.database).audit()
    assert [entry.action for entry in entries] == ["host-add", "guest-state", "guest-state"]
    assert entries[-1].subject == str(OTHER)


async def test_removals_are_audited(registry: Registry) -> None:
    """With the entry that the caller gave."""
    await registry.store.remove_guest(AGENT, act("guest-remove", AGENT))
    await registry.store.remove_host(registry.host_id, act("host-remove", registry.host_id))
    entries = await AlarmStore(registry.database).audit()
    assert entries[2:] == [act("guest-remove", AGENT), act("host-remove", registry.host_id)]


# --- the chain for people ---------------------------------------------------------------------------------


async def chain(registry: Registry) -> list[dict[str, Any]]:
    keys = (await registry.store.guest(AGENT)).keys
    assert keys is not None
    return list(chain_of(AGENT, keys, await registry.store.host(registry.host_id)))


async def test_the_chain_leads_from_the_vendor_to_the_guests_ak(registry: Registry) -> None:
    """In this order, certificates by their bytes and keys by their Name."""
    host, vtpm = registry.host, registry.vtpm
    keys = (await registry.store.guest(AGENT)).keys
    assert keys is not None
    shown = [
        ("vendor root", der(host.vendor.root)),
        ("vendor issuer", der(host.vendor.issuing)),
        ("host EK certificate", b"certificate"),
        ("host EK", host.ek.name),
        ("host AK", host.ak.name),
        ("vTPM CA key", host.ca.name),
        ("guest EK certificate", keys.ek_certificate),
        ("guest EK", vtpm.ek.name),
        ("guest AK", vtpm.ak.name),
    ]
    links = await chain(registry)
    assert [(link["what"], link["sha256"]) for link in links] == [
        (what, hashlib.sha256(data).hexdigest()) for what, data in shown
    ]
    assert all(link["name"].isprintable() and link["name"] for link in links)


async def test_a_host_of_an_older_program_shows_that_its_issuers_were_not_recorded(registry: Registry) -> None:
    """The pinned certificate is the first link, and says so; enrolling the host again records them."""
    async with registry.database.begin() as session:
        row = await session.get(Host, str(registry.host_id))
        assert row is not None
        row.ek_chain = None
    [first, *_] = await chain(registry)
    assert first["what"] == "host EK certificate"
    assert "not recorded" in first["name"]
    await registry.store.pin_host(enrolled(registry.host), act("host-add"))
    assert [link["what"] for link in await chain(registry)][:2] == ["vendor root", "vendor issuer"]
