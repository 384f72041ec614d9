"""The verifier's store: baselines that only rise, progress that survives a kill, V that is gone once delivered."""

from __future__ import annotations

import secrets
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from harness.errors import Conflict, StoreError
from harness.store import Store, open_store
from harness.tenant.agent_request import Snapshot
from harness.tenant.alarms_store import AlarmStore
from harness.tenant.ports import Alarm, Progress
from harness.tenant.snapshots import decode_snapshot, encode_snapshot
from harness.tenant.states import ACTIVE, State
from harness.tenant.tables import SCHEMA, Base
from harness.tenant.verifier_store import StoredAgent, VerifierStore
from harness.values import AgentId, ClockBaseline, HostId

AGENT = AgentId(uuid.UUID(int=7 << 64))
AK = b"\x00\x0b" + bytes(32)
BASE = ClockBaseline(clock=100, reset_count=4_000_000_000, restart_count=1, firmware_version=(1 << 64) - 1)


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Store]:
    store = await open_store(f"sqlite+aiosqlite:///{tmp_path}/v.db", Base.metadata, component="tenant", version=SCHEMA)
    try:
        yield store
    finally:
        await store.close()


async def again(database: Store) -> VerifierStore:
    """What a restarted verifier finds."""
    records = VerifierStore(database, lambda: 9.0)
    await records.load()
    return records


def stored(state: State = State.SAVED, **changes: object) -> StoredAgent:
    progress = replace(Progress(state=state), **changes)  # type: ignore[arg-type]
    return StoredAgent(agent_id=AGENT, request="{}", snapshot="{}", v=secrets.token_bytes(32), progress=progress)


async def test_the_first_accepted_clock_is_the_baseline(database: Store) -> None:
    """A guest's AK has none before; it survives a restart with all 64 bits."""
    records = await again(database)
    assert await records.baseline(AK) is None
    await records.raise_clock(AK, BASE)
    assert await records.baseline(AK) == BASE
    assert await (await again(database)).baseline(AK) == BASE


@pytest.mark.parametrize(
    ("seen", "raised"),
    [
        (replace(BASE, clock=101), True),
        (replace(BASE, clock=100), False),
        (replace(BASE, clock=99), False),
        (replace(BASE, clock=101, reset_count=1), False),
        (replace(BASE, clock=101, restart_count=2), False),
        (replace(BASE, clock=101, firmware_version=1), False),
    ],
)
async def test_accepting_only_raises_the_clock(database: Store, seen: ClockBaseline, raised: bool) -> None:
    """Lower clocks and other counters leave the stored baseline alone."""
    records = await again(database)
    await records.raise_clock(AK, BASE)
    await records.raise_clock(AK, seen)
    assert await records.baseline(AK) == (seen if raised else BASE)
    assert await (await again(database)).baseline(AK) == (seen if raised else BASE)


async def test_a_reboot_is_stored_once(database: Store) -> None:
    """Two rounds saw the same old counters and different new ones: the first one stored stays."""
    records = await again(database)
    await records.raise_clock(AK, BASE)
    first, second = replace(BASE, reset_count=5, clock=1), replace(BASE, reset_count=6, clock=2)
    assert await records.replace_baseline(AK, old=BASE, new=first)
    assert not await records.replace_baseline(AK, old=BASE, new=second)
    assert await (await again(database)).baseline(AK) == first


async def test_a_later_enrolment_renews_the_baseline_and_an_earlier_one_does_not(database: Store) -> None:
    """Adding an agent with an old snapshot does not bring an old baseline back."""
    records = await again(database)
    await records.enrolled(AK, BASE, 10.0)
    await records.raise_clock(AK, replace(BASE, clock=500))
    await records.enrolled(AK, BASE, 10.0)
    assert await records.baseline(AK) == replace(BASE, clock=500)
    renewed = replace(BASE, reset_count=1)
    await records.enrolled(AK, renewed, 11.0)
    await (await again(database)).enrolled(AK, BASE, 10.0)
    assert await (await again(database)).baseline(AK) == renewed


async def test_progress_survives_a_restart(database: Store) -> None:
    """All members come back; the state of a stopped session too."""
    records = await again(database)
    agent = stored()
    await records.add(agent)
    progress = Progress(
        state=State.INVALID_QUOTE,
        rounds=3,
        last_success=5.5,
        host_baseline=BASE,
        layer="host",
        failed_check=9,
        error="ReferenceValueMismatch",
        detail="PCR 4",
    )
    await records.save(AGENT, progress)
    assert await VerifierStore(database, lambda: 0.0).load() == [replace(agent, progress=progress)]


@pytest.mark.parametrize("state", sorted(ACTIVE))
async def test_an_agent_that_was_active_comes_back_saved(database: Store, state: State) -> None:
    """A killed verifier forgets the round that was under way."""
    records = await again(database)
    await records.add(stored(state))
    [loaded] = await VerifierStore(database, lambda: 0.0).load()
    assert loaded.progress.state is State.SAVED


async def test_v_is_removed_with_its_delivery(database: Store) -> None:
    """The half of the key does not lie around longer than it must."""
    records = await again(database)
    agent = stored()
    await records.add(agent)
    await records.save(AGENT, replace(agent.progress, rounds=1))
    assert (await VerifierStore(database, lambda: 0.0).load())[0].v == agent.v
    await records.save(AGENT, replace(agent.progress, v_released=True))
    assert (await VerifierStore(database, lambda: 0.0).load())[0].v is None


async def test_v_is_in_no_repr() -> None:
    """Logs that print a record do not print V."""
    agent = stored()
    assert agent.v is not None
    assert repr(agent.v) not in repr(agent)


async def test_an_agent_is_added_once_and_removed(database: Store) -> None:
    """A second add is a conflict; a late save of a removed agent does not bring it back."""
    records = await again(database)
    await records.add(stored())
    with pytest.raises(Conflict):
        await records.add(stored())
    await records.remove(AGENT)
    await records.save(AGENT, Progress(state=State.FAILED))
    assert await VerifierStore(database, lambda: 0.0).load() == []


async def test_alarms_of_sessions_reach_the_operators_list(database: Store) -> None:
    """Verifier and registrar may share a database."""
    alarm = Alarm(kind="HostRebooted", agent_id=AGENT, host_id="h", detail="host: reset")
    await (await again(database)).alarm(alarm)
    [record] = await AlarmStore(database).alarms()
    assert (record.at, record.alarm) == (9.0, alarm)


def test_a_snapshot_is_stored_and_read_back() -> None:
    """A restarted verifier believes exactly what it believed before."""
    snapshot = Snapshot(
        host_id=HostId(uuid.uuid4()),
        guest_ek=b"\x01",
        guest_ak=b"\x02",
        mtls_cert="pem",
        host_ak=b"\x03",
        host_ak_qualified_name=b"\x04",
        host_baseline=BASE,
        host_enrolled_at=1.5,
    )
    assert decode_snapshot(encode_snapshot(snapshot)) == snapshot


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"host_id": 1}'])
def test_a_snapshot_of_somebody_else_is_refused(text: str) -> None:
    """A row that this program did not write is an error, not a half-empty snapshot."""
    with pytest.raises(StoreError):
        decode_snapshot(text)
