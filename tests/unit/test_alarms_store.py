"""Alarms and audit entries of the tenant's services: seen by an operator once, with a reason, and never lost."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator

import pytest

from harness.audit import AuditEntry
from harness.errors import Conflict, NotFound
from harness.store import open_store
from harness.tenant.alarms_store import AlarmRecord, AlarmStore
from harness.tenant.ports import Alarm
from harness.tenant.tables import SCHEMA, Base
from harness.values import AgentId

AGENT = AgentId(uuid.UUID(int=1 << 64))
WHO = "alice/tenant-operator/op"
ALARMS = [Alarm(kind=f"k{n}", agent_id=AGENT if n else None, host_id="h", detail="d") for n in range(3)]


@pytest.fixture
async def store(store_url: str) -> AsyncIterator[AlarmStore]:
    database = await open_store(store_url, Base.metadata, component="tenant", version=SCHEMA)
    try:
        made = AlarmStore(database)
        for at, alarm in enumerate(ALARMS):
            await made.add(alarm, float(at))
        yield made
    finally:
        await database.close()


async def test_alarms_are_kept_in_their_order(store: AlarmStore) -> None:
    """Oldest first, the newest when there are too many."""
    assert [(record.at, record.alarm) for record in await store.alarms()] == list(enumerate(ALARMS))
    assert [record.alarm for record in await store.alarms(newest=2)] == ALARMS[1:]


async def test_an_acknowledged_alarm_leaves_the_list_and_is_kept(store: AlarmStore) -> None:
    """Who, when and why are in the alarm and in one audit entry; the other alarms stay open."""
    [_, second, _] = await store.alarms()
    done = await store.acknowledge(second.id, who=WHO, reason="a planned update", at=9.0)
    assert done == AlarmRecord(
        id=second.id,
        at=1.0,
        alarm=ALARMS[1],
        acknowledged_at=9.0,
        acknowledged_by=WHO,
        reason="a planned update",
    )
    assert [record.alarm for record in await store.alarms()] == [ALARMS[0], ALARMS[2]]
    assert (await store.alarms(everything=True))[1] == done
    entry = AuditEntry(
        at=9.0, who=WHO, action="alarm-acknowledge", subject=f"alarm {second.id}", reason="a planned update"
    )
    assert await store.audit() == [entry]


async def test_an_alarm_is_acknowledged_once(store: AlarmStore) -> None:
    """The second operator is told who was first; the record and the audit trail are the first one's."""
    [first, *_] = await store.alarms()
    await store.acknowledge(first.id, who=WHO, reason="seen", at=9.0)
    with pytest.raises(Conflict, match=WHO):
        await store.acknowledge(first.id, who="alice/tenant-operator/other", reason="mine", at=10.0)
    assert (await store.alarms(everything=True))[0].acknowledged_by == WHO
    assert [entry.reason for entry in await store.audit()] == ["seen"]


async def test_an_unknown_alarm_is_not_acknowledged(store: AlarmStore) -> None:
    """NotFound, and nothing in the audit trail."""
    with pytest.raises(NotFound):
        await store.acknowledge(77, who=WHO, reason="seen", at=9.0)
    assert await store.audit() == []


async def test_an_alarm_shows_all_members(store: AlarmStore) -> None:
    """The REST API's form."""
    record = (await store.alarms())[1].as_json()
    assert record == {
        "id": record["id"],
        "at": 1.0,
        "kind": "k1",
        "agent_id": str(AGENT),
        "host_id": "h",
        "detail": "d",
        "acknowledged_at": None,
        "acknowledged_by": None,
        "reason": None,
    }
