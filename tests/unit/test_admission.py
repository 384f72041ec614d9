"""Admission: who may ask what, by one fresh snapshot."""

from __future__ import annotations

import asyncio
import uuid

import pytest

from harness.errors import AccessDenied, HarnessError, NotYourGuest, SelectionNotAllowed, StoreError
from harness.provider.admission import MISS_S, REFRESH_S, STALE_S, Admission, GuestRecord, Snapshot
from harness.values import HostId, PcrSelection
from tests.support.manual_clock import ManualClock
from tests.support.pendings import agent, allow

HOST, OTHER_HOST = HostId(uuid.UUID(int=1)), HostId(uuid.UUID(int=2))
URL = "https://host-1"
RECORDS = Snapshot(
    tenants={"alice": "CA of alice", "bob": "CA of bob"},
    hosts={HOST: URL},
    allowlists={("alice", HOST): allow(range(8)), ("bob", OTHER_HOST): allow(range(8))},
    guests={agent(1): GuestRecord(tenant="alice", host_id=HOST), agent(2): GuestRecord(tenant="bob", host_id=HOST)},
)


class Database:
    """Gives its records, fails, or hangs; counts how often it is read."""

    def __init__(self, records: Snapshot = RECORDS) -> None:
        self.records = records
        self.reads = 0
        self.fault: HarnessError | None = None

    async def load(self) -> Snapshot:
        self.reads += 1
        if self.fault is not None:
            raise self.fault
        return self.records


class Desk:
    """An admission with its database and clock."""

    def __init__(self, records: Snapshot = RECORDS) -> None:
        self.clock = ManualClock()
        self.database = Database(records)
        self.seen: list[Snapshot] = []
        self.admission = Admission(self.database.load, changed=self.seen.append, clock=self.clock)


async def test_an_owner_with_an_allowlist_is_admitted() -> None:
    """The request goes to the guest's host, with the tenant's allowlist there."""
    admitted = await Desk().admission.admit_guest("alice", agent(1), allow([0, 7]))
    assert (admitted.host_id, admitted.url, admitted.allowlist) == (HOST, URL, allow(range(8)))


async def test_a_tenant_with_an_allowlist_may_ask_host_only() -> None:
    """No guest is needed on that host."""
    assert (await Desk().admission.admit_host("alice", HOST, allow([0]))).url == URL


async def test_a_foreign_guest_and_an_unknown_one_get_the_same_answer() -> None:
    """There is no oracle: class and text are equal."""
    refusals = []
    for agent_id in (agent(2), agent(99)):
        with pytest.raises(NotYourGuest) as caught:
            await Desk().admission.admit_guest("alice", agent_id, allow([0]))
        refusals.append(caught.value.detail)
    assert refusals[0] == refusals[1]


@pytest.mark.parametrize(
    ("tenant", "host_id", "selection", "error"),
    [
        pytest.param("alice", HOST, allow([8]), SelectionNotAllowed, id="pcr-outside-the-allowlist"),
        pytest.param("alice", OTHER_HOST, allow([0]), AccessDenied, id="unknown-host"),
        pytest.param("bob", HOST, allow([0]), AccessDenied, id="no-allowlist-there"),
        pytest.param("bob", OTHER_HOST, allow([0]), AccessDenied, id="allowlist-for-a-host-that-is-not-there"),
        pytest.param("mallory", HOST, allow([0]), AccessDenied, id="unknown-tenant"),
        pytest.param("mallory", HOST, PcrSelection(), AccessDenied, id="unknown-tenant-enrolling"),
    ],
)
async def test_host_only_refusals(
    tenant: str, host_id: HostId, selection: PcrSelection, error: type[HarnessError]
) -> None:
    """Each is typed; an unknown host and one without allowlist are not told apart."""
    with pytest.raises(error):
        await Desk().admission.admit_host(tenant, host_id, selection)


async def test_an_owner_without_an_allowlist_sees_no_pcr() -> None:
    """Owning a guest on a host does not by itself show the host's PCRs."""
    with pytest.raises(SelectionNotAllowed):
        await Desk().admission.admit_guest("bob", agent(2), allow([0]))


async def test_what_was_added_just_now_is_found() -> None:
    """A miss reads the database again, without waiting for the next refresh."""
    desk = Desk(Snapshot())
    with pytest.raises(NotYourGuest):
        await desk.admission.admit_guest("alice", agent(1), allow([0]))
    desk.database.records = RECORDS
    desk.clock.now_s += MISS_S
    await desk.admission.admit_guest("alice", agent(1), allow([0]))
    assert desk.seen[-1] is RECORDS


async def test_misses_do_not_flood_the_database() -> None:
    """However many unknown guests are asked for, it is read once in a while."""
    desk = Desk()
    for number in range(50):
        with pytest.raises(NotYourGuest):
            await desk.admission.admit_guest("alice", agent(100 + number), allow([0]))
    assert desk.database.reads == 1


async def test_hits_do_not_read_the_database() -> None:
    """A snapshot serves until it is refreshed in the background."""
    desk = Desk()
    for _ in range(50):
        await desk.admission.admit_host("alice", HOST, allow([0]))
    assert desk.database.reads == 1


async def test_a_removed_tenant_is_refused_after_the_next_refresh() -> None:
    """The background refresh takes rights away as well."""
    desk = Desk()
    await desk.admission.admit_host("alice", HOST)
    desk.database.records = Snapshot(hosts={HOST: URL})
    desk.clock.now_s += REFRESH_S
    await desk.admission.refresh(REFRESH_S)
    with pytest.raises(AccessDenied):
        await desk.admission.admit_host("alice", HOST)


async def test_a_database_that_cannot_be_read_admits_nobody() -> None:
    """A snapshot serves for a short while, then everybody is refused: rights may have changed."""
    desk = Desk()
    await desk.admission.admit_host("alice", HOST)
    desk.database.fault = StoreError("disk full")
    await desk.admission.admit_host("alice", HOST)
    desk.clock.now_s += STALE_S + 1
    with pytest.raises(StoreError):
        await desk.admission.admit_host("alice", HOST)


async def test_the_background_refresh_survives_a_fault() -> None:
    """It tries again; a fault does not end it."""
    desk = Desk()
    desk.database.fault = StoreError("locked")
    task = asyncio.create_task(desk.admission.run())
    for _ in range(20):
        await asyncio.sleep(0)
    desk.database.fault = None
    for _ in range(20):
        await asyncio.sleep(0)
    task.cancel()
    assert desk.seen
    await asyncio.gather(task, return_exceptions=True)


def test_a_tenant_is_told_of_its_own_hosts_only() -> None:
    """Hosts on which it has an allowlist, and that are there."""
    assert RECORDS.hosts_of("alice") == [HOST]
    assert RECORDS.hosts_of("bob") == []


async def test_a_list_of_hosts_is_fresh() -> None:
    """A host that has just been announced is in it."""
    desk = Desk(Snapshot())
    assert await desk.admission.hosts_of("alice") == []
    desk.database.records = RECORDS
    desk.clock.now_s += MISS_S
    assert await desk.admission.hosts_of("alice") == [HOST]
