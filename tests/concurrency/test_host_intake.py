"""Many hosts at once: one after the other, in time, and none keeps the others out."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from harness.audit import AuditEntry
from harness.enrolment_metrics import HOST, Enrolments
from harness.errors import ChallengeFailed, HarnessError, NotReady, ShareExhausted, UnacceptableKey
from harness.metrics import Metrics
from harness.store import Store, open_store
from harness.tenant.alarms_store import AlarmStore
from harness.tenant.challenges import PER_MINUTE, Challenges
from harness.tenant.enrolment import HostEnroller, HostIdentity
from harness.tenant.enrolment_alarms import EnrolmentAlarms
from harness.tenant.host_intake import HostIntake
from harness.tenant.registrar_store import RegistrarStore
from harness.tenant.tables import SCHEMA, Base
from harness.values import HostId
from tests.support.enrolment_parties import NOW, SoftHost, Vendor
from tests.support.figures import figures

REQUESTER = hashlib.sha256(b"registrar").digest()
URL = "https://provider"
HOSTS = 12


class Provider:
    """A provider with twelve hosts that takes a tenant's enrolments one at a time; a test makes it refuse."""

    def __init__(self) -> None:
        vendor = Vendor()
        self.by_id = {host.host_id: host for host in (SoftHost(vendor, REQUESTER) for _ in range(HOSTS))}
        self.in_work = 0
        self.refusals: dict[HostId, list[HarnessError]] = {}
        self.asked: list[HostId] = []

    @property
    def ids(self) -> list[HostId]:
        return sorted(self.by_id)

    async def hosts(self) -> list[HostId]:
        return self.ids

    async def identity(self, host_id: HostId) -> HostIdentity:
        self.asked.append(host_id)
        return await self.by_id[host_id].identity(host_id)

    async def activate(self, host_id: HostId, credential: bytes) -> bytes:
        if self.in_work:
            raise ShareExhausted("one at a time")
        self.in_work += 1
        try:
            if refusals := self.refusals.get(host_id):
                raise refusals.pop(0)
            return await self.by_id[host_id].activate(host_id, credential)
        finally:
            self.in_work -= 1

    async def certify(self, host_id: HostId, nonce: bytes) -> tuple[bytes, bytes]:
        return await self.by_id[host_id].certify(host_id, nonce)


class Site:
    """The registrar's side, on a clock that moves when somebody sleeps."""

    def __init__(self, database: Store) -> None:
        self.provider = Provider()
        self.store, self.alarms = RegistrarStore(database), AlarmStore(database)
        self.time = 0.0
        enroller = HostEnroller(
            [next(iter(self.provider.by_id.values())).vendor.root],
            REQUESTER,
            Challenges(lambda: self.time),
            now=lambda: NOW,
        )
        alarms = EnrolmentAlarms(self.alarms, now=lambda: 1.0)
        self.metrics = Metrics("tenant-registrar")
        self.intake = HostIntake(
            self.store,
            enroller,
            alarms,
            self._connect,
            sleep=self._sleep,
            counted=Enrolments(self.metrics, HOST),
        )

    @asynccontextmanager
    async def _connect(self, url: str) -> AsyncIterator[Provider]:
        assert url == URL
        yield self.provider

    async def _sleep(self, seconds: float) -> None:
        self.time += seconds

    def enrolments(self, **labels: str) -> float:
        return figures(self.metrics).sum("harness_enrolments_total", kind="host", **labels)

    async def add(self, named: HostId | None = None) -> list[HostId]:
        return [host.host_id for host in await self.intake.add(URL, named, entry)]

    async def pinned(self) -> list[HostId]:
        return [host.host_id for host in await self.store.hosts()]


def entry(host_id: HostId) -> AuditEntry:
    return AuditEntry(at=1.0, who="op", action="host-add", subject=str(host_id), reason="r")


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    url = f"sqlite+aiosqlite:///{tmp_path}/t.db"
    database = await open_store(url, Base.metadata, component="tenant", version=SCHEMA)
    try:
        yield Site(database)
    finally:
        await database.close()


async def test_twelve_hosts_are_enrolled_with_one_call(site: Site) -> None:
    """Six in the first minute, six in the second; each is in the audit trail once."""
    assert await site.add() == site.provider.ids
    assert await site.pinned() == site.provider.ids
    assert site.time == pytest.approx(60.0 * (HOSTS // PER_MINUTE - 1), abs=1.0)
    assert site.enrolments(outcome="enrolled") == site.enrolments() == HOSTS
    assert sorted(entry.subject for entry in await site.alarms.audit()) == [str(each) for each in site.provider.ids]


async def test_a_provider_that_says_later_is_asked_again_when_it_said(site: Site) -> None:
    """Its share of enrolments is used up; nothing of it is an alarm or a failed challenge."""
    site.provider.refusals[site.provider.ids[3]] = [ShareExhausted("six in work", retry_after_s=7.0)] * 2
    assert await site.add() == site.provider.ids
    assert await site.alarms.alarms() == []
    assert site.enrolments(outcome="enrolled") == site.enrolments() == HOSTS


async def test_a_host_that_is_refused_keeps_no_other_out(site: Site) -> None:
    """Eleven are enrolled; the call says why one was not, and a repeated call takes it first."""
    bad = site.provider.ids[0]
    host = site.provider.by_id[bad]
    site.provider.by_id[bad].identity_changes = {"ak": host.ca.marshal()}
    with pytest.raises(UnacceptableKey):
        await site.add()
    assert await site.pinned() == [each for each in site.provider.ids if each != bad]
    assert [(record.alarm.kind, record.alarm.host_id) for record in await site.alarms.alarms()] == [
        ("UnacceptableKey", str(bad))
    ]
    assert site.enrolments(outcome="refused", reason="UnacceptableKey") == 1
    assert site.enrolments(outcome="enrolled") == HOSTS - 1
    host.identity_changes = {}
    site.provider.asked.clear()
    assert await site.add() == site.provider.ids
    assert site.provider.asked[0] == bad


@pytest.mark.parametrize("refusal", [NotReady("this host is not connected now"), ChallengeFailed()])
async def test_a_host_that_is_off_is_not_waited_for(site: Site, refusal: HarnessError) -> None:
    """Only the share of enrolments is: the others are enrolled, and no alarm is raised."""
    off = site.provider.ids[5]
    site.provider.refusals[off] = [refusal]
    with pytest.raises(type(refusal)):
        await site.add()
    assert await site.pinned() == [each for each in site.provider.ids if each != off]
    assert await site.alarms.alarms() == []
    assert site.enrolments(outcome="refused", reason=type(refusal).__name__) == 1
    assert await site.add(off) == [off]
    assert site.enrolments(outcome="enrolled") == HOSTS
