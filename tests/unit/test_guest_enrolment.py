"""Registration of guests: whose vTPM it must be, what is immutable, and that no failure touches an active record."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from harness.attest import owner_qualified_name
from harness.audit import AuditEntry
from harness.credential import keylime_auth_tag
from harness.errors import (
    CertificateRefused,
    ChallengeFailed,
    CloneSuspected,
    Conflict,
    HarnessError,
    KeyChanged,
    MalformedMessage,
    NotFound,
    UnacceptableKey,
)
from harness.store import open_store
from harness.tenant.enrolment import EnrolledHost
from harness.tenant.guest_enrolment import GuestEnroller
from harness.tenant.registrar_store import GuestKeys, RegistrarStore
from harness.tenant.tables import SCHEMA, Base
from harness.values import AgentId, ClockBaseline, HostId
from tests.support.enrolment_parties import NOW, PLATFORM_USE, SoftHost, SoftVtpm, Vendor, changed_attributes, der

AGENT, OTHER = AgentId(uuid.UUID(int=1 << 64)), AgentId(uuid.UUID(int=2 << 64))
REQUESTER = hashlib.sha256(b"registrar").digest()
ACT = AuditEntry(at=3.0, who="alice/tenant-operator/op", action="act", subject="x", reason="because")


def enrolled(host: SoftHost, **changes: Any) -> EnrolledHost:
    honest = EnrolledHost(
        host_id=host.host_id,
        url="https://provider",
        ek=host.ek,
        ek_certificate=b"certificate",
        ek_chain=(der(host.vendor.issuing), der(host.vendor.root)),
        ak=host.ak,
        ak_qualified_name=owner_qualified_name(host.ak),
        ca=host.ca,
        ca_certificate=host.ca_certificate,
        baseline=host.baseline,
        enrolled_at=1.0,
    )
    return replace(honest, **changes)


class Registry:
    """A registrar's store with one host, on which AGENT is stated; a vTPM that the host's CA key certified."""

    def __init__(self, store: RegistrarStore) -> None:
        self.store = store
        self.time = 0.0
        self.enroller = GuestEnroller(store, monotonic=lambda: self.time, now=lambda: NOW)
        self.host = SoftHost(Vendor(), REQUESTER)
        self.vtpm = SoftVtpm()

    def keys(self, agent_id: AgentId = AGENT, **changes: Any) -> GuestKeys:
        return self.vtpm.keys(self.vtpm.certified(agent_id, self.host.ca_key, **changes))

    async def register(self, keys: GuestKeys, *, vtpm: SoftVtpm | None = None, agent_id: AgentId = AGENT) -> None:
        """A whole registration, answered by the vTPM."""
        blob = await self.enroller.register(agent_id, keys)
        secret = (vtpm or self.vtpm).activate(blob)
        await self.enroller.activate(agent_id, keylime_auth_tag(secret, str(agent_id)))


@pytest.fixture
async def registry(store_url: str) -> AsyncIterator[Registry]:
    store = await open_store(store_url, Base.metadata, component="tenant", version=SCHEMA)
    try:
        made = Registry(RegistrarStore(store))
        await made.store.pin_host(enrolled(made.host), ACT)
        await made.store.state_guest(AGENT, made.host.host_id, ACT)
        yield made
    finally:
        await store.close()


async def test_an_honest_guest_becomes_active(registry: Registry) -> None:
    """Stated, registered, activated: keys and contact are pinned."""
    keys = registry.keys()
    await registry.register(keys)
    record = await registry.store.guest(AGENT)
    assert record.keys == keys
    assert record.registrations == 1


async def test_a_guest_that_nobody_stated_is_not_found(registry: Registry) -> None:
    """The operator's word comes first."""
    with pytest.raises(NotFound):
        await registry.enroller.register(OTHER, registry.keys(OTHER))


def _foreign_ca(registry: Registry) -> GuestKeys:
    return registry.vtpm.keys(registry.vtpm.certified(AGENT, SoftHost(Vendor(), REQUESTER).ca_key))


def _another_key(registry: Registry) -> GuestKeys:
    return replace(registry.keys(), ek_certificate=SoftVtpm().certified(AGENT, registry.host.ca_key))


def _signed_by_the_vtpms_own_key(registry: Registry) -> GuestKeys:
    return registry.vtpm.keys(registry.vtpm.certified(AGENT, registry.vtpm.ak_key))


LIES: list[tuple[str, type[HarnessError], Any]] = [
    ("another host's CA key", CertificateRefused, _foreign_ca),
    ("certificate of another EK", CertificateRefused, _another_key),
    ("signed by itself", CertificateRefused, _signed_by_the_vtpms_own_key),
    ("platform certificate", CertificateRefused, lambda r: r.keys(use=PLATFORM_USE)),
    ("no extended key usage", CertificateRefused, lambda r: r.keys(use=None)),
    ("a CA certificate", CertificateRefused, lambda r: r.keys(ca=True)),
    ("no key usage", CertificateRefused, lambda r: r.keys(usage=False)),
    ("expired", CertificateRefused, lambda r: r.keys(end=NOW - timedelta(hours=1))),
    ("not valid yet", CertificateRefused, lambda r: r.keys(begin=NOW + timedelta(hours=1))),
    ("another agent_id", CertificateRefused, lambda r: r.keys(OTHER)),
    ("no agent_id", CertificateRefused, lambda r: r.keys(uris=())),
    ("a second agent_id", CertificateRefused, lambda r: r.keys(uris=(f"urn:uuid:{AGENT}", f"urn:uuid:{OTHER}"))),
    ("upper-case agent_id", CertificateRefused, lambda r: r.keys(uris=(f"urn:uuid:{AGENT}".upper(),))),
    ("not DER", CertificateRefused, lambda r: replace(r.keys(), ek_certificate=b"\x30\x03\x02\x01\x00")),
    ("AK not restricted", UnacceptableKey, lambda r: _ak(r, 1 << 16)),
    ("AK not fixedTPM", UnacceptableKey, lambda r: _ak(r, 1 << 1)),
    ("EK in place of AK", UnacceptableKey, lambda r: replace(r.keys(), ak=r.vtpm.ek.marshal())),
    ("AK in place of EK", UnacceptableKey, lambda r: replace(r.keys(), ek=r.vtpm.ak.marshal())),
    ("EK cut short", MalformedMessage, lambda r: replace(r.keys(), ek=r.vtpm.ek.marshal()[:-3])),
    ("the host's AK", CloneSuspected, lambda r: replace(r.keys(), ak=r.host.ak.marshal())),
]


def _ak(registry: Registry, flip: int) -> GuestKeys:
    return replace(registry.keys(), ak=changed_attributes(registry.vtpm.ak, flip=flip))


@pytest.mark.parametrize(("lie", "error", "keys"), LIES, ids=[lie for lie, _, _ in LIES])
async def test_one_lie_of_a_guest_is_refused(
    registry: Registry, lie: str, error: type[HarnessError], keys: Any
) -> None:
    """Each change of an honest registration is one named error, and no challenge is made."""
    with pytest.raises(error):
        await registry.enroller.register(AGENT, keys(registry))
    with pytest.raises(ChallengeFailed):
        await registry.enroller.activate(AGENT, "00" * 48)
    assert (await registry.store.guest(AGENT)).keys is None


async def test_a_wrong_answer_burns_the_challenge_only(registry: Registry) -> None:
    """After a wrong tag the right one comes too late; a new registration succeeds."""
    blob = await registry.enroller.register(AGENT, registry.keys())
    tag = keylime_auth_tag(registry.vtpm.activate(blob), str(AGENT))
    with pytest.raises(ChallengeFailed) as wrong:
        await registry.enroller.activate(AGENT, "0" * len(tag))
    with pytest.raises(ChallengeFailed) as repeated:
        await registry.enroller.activate(AGENT, tag)
    assert wrong.value.detail == repeated.value.detail
    await registry.register(registry.keys())


async def test_a_late_answer_is_refused(registry: Registry) -> None:
    """60 seconds."""
    blob = await registry.enroller.register(AGENT, registry.keys())
    registry.time = 60.5
    with pytest.raises(ChallengeFailed):
        await registry.enroller.activate(AGENT, keylime_auth_tag(registry.vtpm.activate(blob), str(AGENT)))


async def test_a_challenge_is_for_this_ak_in_this_tpm(registry: Registry) -> None:
    """A vTPM cannot open a challenge that was made for its EK and another AK."""
    stranger = SoftVtpm()
    blob = await registry.enroller.register(AGENT, replace(registry.keys(), ak=stranger.ak.marshal()))
    with pytest.raises(ValueError, match="integrity"):
        registry.vtpm.activate(blob)


@pytest.mark.parametrize("answer", ["", "0" * 96, "ü"])
async def test_nothing_touches_an_active_record(registry: Registry, answer: str) -> None:
    """A repeated POST and a wrong auth_tag leave an active guest active, with the same keys."""
    keys = registry.keys()
    await registry.register(keys)
    await registry.enroller.register(AGENT, replace(keys, ip="192.0.2.1"))
    assert (await registry.store.guest(AGENT)).keys == keys
    with pytest.raises(ChallengeFailed):
        await registry.enroller.activate(AGENT, answer)
    assert (await registry.store.guest(AGENT)).keys == keys


async def test_a_repeated_registration_renews_certificate_and_contact(registry: Registry) -> None:
    """The same vTPM, proven again, may show another mtls_cert and address."""
    await registry.register(registry.keys())
    renewed = replace(registry.keys(), mtls_cert="new", ip="192.0.2.1", port=1)
    await registry.register(renewed)
    record = await registry.store.guest(AGENT)
    assert record.keys == renewed
    assert record.registrations == 2


async def test_another_vtpm_under_the_same_id_is_a_changed_key(registry: Registry) -> None:
    """Even with a certificate of the right CA key: immutable until removed."""
    await registry.register(registry.keys())
    other = SoftVtpm()
    with pytest.raises(KeyChanged):
        await registry.enroller.register(AGENT, other.keys(other.certified(AGENT, registry.host.ca_key)))
    changed_ak = replace(registry.keys(), ak=other.ak.marshal())
    with pytest.raises(KeyChanged):
        await registry.enroller.register(AGENT, changed_ak)
    await registry.store.remove_guest(AGENT, ACT)
    await registry.store.state_guest(AGENT, registry.host.host_id, ACT)
    await registry.register(other.keys(other.certified(AGENT, registry.host.ca_key)), vtpm=other)


async def test_one_key_under_two_ids_is_a_clone(registry: Registry) -> None:
    """Neither the EK nor the AK of an active guest serves a second one."""
    await registry.register(registry.keys())
    await registry.store.state_guest(OTHER, registry.host.host_id, ACT)
    with pytest.raises(CloneSuspected):
        await registry.enroller.register(OTHER, registry.keys(OTHER))
    other = SoftVtpm()
    same_ak = replace(other.keys(other.certified(OTHER, registry.host.ca_key)), ak=registry.vtpm.ak.marshal())
    with pytest.raises(CloneSuspected):
        await registry.enroller.register(OTHER, same_ak)


async def test_two_guests_that_register_the_same_keys_at_once_do_not_both_win(registry: Registry) -> None:
    """Both have open challenges for one vTPM; the second activation is refused."""
    await registry.store.state_guest(OTHER, registry.host.host_id, ACT)
    blobs = {
        agent_id: await registry.enroller.register(agent_id, registry.keys(agent_id)) for agent_id in (AGENT, OTHER)
    }
    tags = {agent_id: keylime_auth_tag(registry.vtpm.activate(blob), str(agent_id)) for agent_id, blob in blobs.items()}
    await registry.enroller.activate(AGENT, tags[AGENT])
    with pytest.raises(CloneSuspected):
        await registry.enroller.activate(OTHER, tags[OTHER])
    assert (await registry.store.guest(OTHER)).keys is None


async def test_a_removed_guest_cannot_finish_its_registration(registry: Registry) -> None:
    """The operator removed it between POST and PUT."""
    blob = await registry.enroller.register(AGENT, registry.keys())
    await registry.store.remove_guest(AGENT, ACT)
    with pytest.raises(NotFound):
        await registry.enroller.activate(AGENT, keylime_auth_tag(registry.vtpm.activate(blob), str(AGENT)))


# --- what is pinned ---------------------------------------------------------------------------------------------


async def test_a_host_with_other_keys_is_a_changed_key(registry: Registry) -> None:
    """The same host_id with another AK or CA key: refused, and the pinned record stays."""
    before = await registry.store.host(registry.host.host_id)
    other = SoftHost(registry.host.vendor, REQUESTER)
    for changes in ({"ak": other.ak}, {"ca": other.ca}, {"ek": other.ek}):
        with pytest.raises(KeyChanged):
            await registry.store.pin_host(enrolled(registry.host, **changes), ACT)
    assert await registry.store.host(registry.host.host_id) == before


async def test_enrolling_a_host_again_renews_its_baseline(registry: Registry) -> None:
    """An act of the operator, with all keys the same: the new certification's clock is the baseline."""
    baseline = ClockBaseline(clock=1, reset_count=2, restart_count=3, firmware_version=(1 << 64) - 1)
    pinned = await registry.store.pin_host(enrolled(registry.host, baseline=baseline, enrolled_at=2.0), ACT)
    assert (pinned.baseline, pinned.enrolled_at) == (baseline, 2.0)
    assert (await registry.store.hosts())[0].baseline == baseline


@pytest.mark.parametrize("role", ["ek", "ak", "ca"])
async def test_a_key_of_one_host_serves_no_other(registry: Registry, role: str) -> None:
    """Uniqueness over hosts, whatever the role."""
    other = SoftHost(registry.host.vendor, REQUESTER)
    with pytest.raises(CloneSuspected):
        await registry.store.pin_host(enrolled(other, **{role: getattr(registry.host, role)}), ACT)
    with pytest.raises(NotFound):
        await registry.store.host(other.host_id)


async def test_a_guests_key_is_no_hosts_key(registry: Registry) -> None:
    """Uniqueness over guests and hosts: a guest's AK is not accepted as a host's."""
    await registry.register(registry.keys())
    other = SoftHost(registry.host.vendor, REQUESTER)
    with pytest.raises(CloneSuspected):
        await registry.store.pin_host(enrolled(other, ak=registry.vtpm.ak), ACT)


async def test_a_host_with_guests_is_not_removed(registry: Registry) -> None:
    """Guests first; afterwards its keys are free again."""
    with pytest.raises(Conflict):
        await registry.store.remove_host(registry.host.host_id, ACT)
    await registry.store.remove_guest(AGENT, ACT)
    await registry.store.remove_host(registry.host.host_id, ACT)
    assert await registry.store.hosts() == []
    await registry.store.pin_host(enrolled(registry.host), ACT)


async def test_a_guest_does_not_move_between_hosts(registry: Registry) -> None:
    """Stating it on another host is refused; repeating the same statement changes nothing."""
    other = SoftHost(registry.host.vendor, REQUESTER)
    await registry.store.pin_host(enrolled(other), ACT)
    with pytest.raises(Conflict):
        await registry.store.state_guest(AGENT, other.host_id, ACT)
    with pytest.raises(NotFound):
        await registry.store.state_guest(OTHER, HostId(uuid.uuid4()), ACT)
    assert (await registry.store.state_guest(AGENT, registry.host.host_id, ACT)).host_id == registry.host.host_id
    assert [record.agent_id for record in await registry.store.guests()] == [AGENT]
