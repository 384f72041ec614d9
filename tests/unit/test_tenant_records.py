"""The verifier's store: baselines that only rise, progress that survives a kill, V that is gone once delivered."""

from __future__ import annotations

import json
import secrets
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from sqlalchemy import text, update

from harness.audit import AuditEntry
from harness.errors import Conflict, StoreError
from harness.store import Store, open_store
from harness.tenant.agent_request import Snapshot
from harness.tenant.alarms_store import AlarmStore
from harness.tenant.ports import Alarm, PastVerdict, Progress, Reboot, Seen
from harness.tenant.snapshots import decode_snapshot, encode_snapshot
from harness.tenant.states import ACTIVE, State
from harness.tenant.tables import SCHEMA, Base, Baseline
from harness.tenant.verifier_store import StoredAgent, VerifierStore
from harness.values import AgentId, ClockBaseline, HashAlg, HostId

AGENT = AgentId(uuid.UUID(int=7 << 64))
OTHER = AgentId(uuid.UUID(int=8 << 64))
AK = b"\x00\x0b" + bytes(32)
ALARM = Alarm(kind="HostRebooted", agent_id=AGENT, host_id="h", detail="host: reset")
BASE = ClockBaseline(clock=100, reset_count=4_000_000_000, restart_count=1, firmware_version=(1 << 64) - 1)
ADDED = AuditEntry(at=8.0, who="alice/tenant-operator/op", action="agent-add", subject=str(AGENT), reason="a new guest")
ENTRY = AuditEntry(at=9.0, who="alice/tenant-operator/op", action="resume", subject=str(AGENT), reason="kernel update")


@pytest.fixture
async def database(store_url: str) -> AsyncIterator[Store]:
    store = await open_store(store_url, Base.metadata, component="tenant", version=SCHEMA)
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
    await records.settle()
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
    await records.settle()
    assert await (await again(database)).baseline(AK) == (seen if raised else BASE)


async def test_a_reboot_is_stored_once(database: Store) -> None:
    """Two rounds saw the same old counters and different new ones: the first one stored stays."""
    records = await again(database)
    await records.raise_clock(AK, BASE)
    first, second = replace(BASE, reset_count=5, clock=1), replace(BASE, reset_count=6, clock=2)
    assert await records.replace_baseline(Reboot(ak_name=AK, old=BASE, new=first), ALARM)
    assert not await records.replace_baseline(Reboot(ak_name=AK, old=BASE, new=second), ALARM)
    assert await (await again(database)).baseline(AK) == first
    assert len(await AlarmStore(database).alarms()) == 2


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
    await records.add(agent, ADDED)
    progress = Progress(
        state=State.INVALID_QUOTE,
        rounds=3,
        last_success=5.5,
        host_baseline=BASE,
        layer="host",
        failed_check=9,
        error="ReferenceValueMismatch",
        detail="PCR 4",
        refused_reboot=Reboot(ak_name=AK, old=None, new=BASE),
        verdicts=(
            PastVerdict(at=1.5, accepted=True, layer="guest"),
            PastVerdict(at=2.5, accepted=False, layer="host", failed_check=9, error="ReferenceValueMismatch"),
        ),
        seen={"host": Seen(at=2.5, pcrs={HashAlg.SHA256: {4: bytes(32)}})},
    )
    await records.save(AGENT, progress)
    assert await VerifierStore(database, lambda: 0.0).load() == [replace(agent, progress=progress)]


@pytest.mark.parametrize("state", sorted(ACTIVE))
async def test_an_agent_that_was_active_comes_back_saved(database: Store, state: State) -> None:
    """A killed verifier forgets the round that was under way."""
    records = await again(database)
    await records.add(stored(state), ADDED)
    [loaded] = await VerifierStore(database, lambda: 0.0).load()
    assert loaded.progress.state is State.SAVED


async def test_v_is_removed_with_its_delivery(database: Store) -> None:
    """The half of the key does not lie around longer than it must."""
    records = await again(database)
    agent = stored()
    await records.add(agent, ADDED)
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
    await records.add(stored(), ADDED)
    with pytest.raises(Conflict):
        await records.add(stored(), ADDED)
    await records.remove(AGENT, ENTRY)
    await records.save(AGENT, Progress(state=State.FAILED))
    assert await VerifierStore(database, lambda: 0.0).load() == []


async def test_alarms_of_sessions_reach_the_operators_list(database: Store) -> None:
    """A finding and its alarm are stored together; verifier and registrar may share a database."""
    records = await again(database)
    await records.add(stored(), ADDED)
    await records.save(AGENT, Progress(state=State.INVALID_QUOTE), ALARM)
    [record] = await AlarmStore(database).alarms()
    assert (record.at, record.alarm) == (9.0, ALARM)


async def test_a_row_of_the_first_version_is_read(database: Store) -> None:
    """Progress without verdicts, and without values seen, as it was written before there were any."""
    await (await again(database)).add(stored(), ADDED)
    first = {
        "state": 7, "v_released": True, "rounds": 3, "last_success": 5.5, "host_baseline": None,
        "layer": "host", "failed_check": None, "error": "NotYourGuest", "detail": "no",
    }  # fmt: skip
    async with database.begin() as session:
        values = {"state": 7, "progress": json.dumps(first)}
        await session.execute(text("UPDATE agents SET seen = NULL, state = :state, progress = :progress"), values)
    [loaded] = await VerifierStore(database, lambda: 0.0).load()
    assert loaded.progress == Progress(
        state=State.FAILED, v_released=True, rounds=3, last_success=5.5, layer="host", error="NotYourGuest", detail="no"
    )


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("progress", "[]"),
        ("progress", '{"no_member": 1}'),
        ("progress", '{"verdicts": [{"at": 1}]}'),
        ("seen", "[]"),
        ("seen", '{"guest": {"at": 1, "pcrs": {"sha1": {}}}}'),
        ("state", 77),
    ],
)
async def test_a_row_that_nobody_of_ours_wrote_is_left_out(database: Store, column: str, value: str | int) -> None:
    """It is no session, and keeps no other one from being loaded."""
    records = await again(database)
    await records.add(stored(), ADDED)
    await records.add(replace(stored(), agent_id=OTHER), ADDED)
    async with database.begin() as session:
        names: dict[str, str | int] = {"value": value, "id": str(AGENT)}
        await session.execute(text(f"UPDATE agents SET {column} = :value WHERE agent_id = :id"), names)  # noqa: S608
    assert [loaded.agent_id for loaded in await VerifierStore(database, lambda: 0.0).load()] == [OTHER]


async def test_a_reboot_that_the_operator_accepts_is_stored_with_its_entry(database: Store) -> None:
    """Baseline, progress and audit entry are one transaction."""
    records = await again(database)
    await records.add(stored(State.INVALID_QUOTE), ADDED)
    await records.raise_clock(AK, BASE)
    new = replace(BASE, reset_count=5, clock=1)
    reboot = Reboot(ak_name=AK, old=BASE, new=new)
    await records.accept_reboot(AGENT, Progress(state=State.GET_QUOTE), ENTRY, reboot)
    restarted = VerifierStore(database, lambda: 9.0)
    assert [agent.progress.state for agent in await restarted.load()] == [State.SAVED]
    assert await restarted.baseline(AK) == await records.baseline(AK) == new
    assert await AlarmStore(database).audit() == [ADDED, ENTRY]


async def test_a_second_agent_accepts_the_same_reboot_and_lowers_no_clock(database: Store) -> None:
    """Another agent's operator was first, and rounds went on: the higher clock of the new run stays."""
    records = await again(database)
    await records.add(stored(State.INVALID_QUOTE), ADDED)
    risen, refused = replace(BASE, reset_count=5, clock=900), replace(BASE, reset_count=5, clock=800)
    await records.raise_clock(AK, risen)
    reboot = Reboot(ak_name=AK, old=BASE, new=refused)
    await records.accept_reboot(AGENT, Progress(state=State.GET_QUOTE), ENTRY, reboot)
    assert await records.baseline(AK) == risen


async def test_a_reboot_that_was_overtaken_is_not_accepted(database: Store) -> None:
    """The stored counters are a third reboot's: nothing changes, neither the agent nor the trail."""
    records = await again(database)
    await records.add(stored(State.INVALID_QUOTE), ADDED)
    third = replace(BASE, reset_count=6)
    await records.raise_clock(AK, third)
    reboot = Reboot(ak_name=AK, old=BASE, new=replace(BASE, reset_count=5))
    with pytest.raises(Conflict):
        await records.accept_reboot(AGENT, Progress(state=State.GET_QUOTE), ENTRY, reboot)
    assert [agent.progress.state for agent in await VerifierStore(database, lambda: 9.0).load()] == [
        State.INVALID_QUOTE
    ]
    assert await AlarmStore(database).audit() == [ADDED]
    assert await records.baseline(AK) == third


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


@pytest.mark.parametrize("row", ["", "{}", "[]", '{"host_id": 1}'])
def test_a_snapshot_of_somebody_else_is_refused(row: str) -> None:
    """A row that this program did not write is an error, not a half-empty snapshot."""
    with pytest.raises(StoreError):
        decode_snapshot(row)


@pytest.mark.parametrize("member", ["clock", "firmware_version"])
async def test_a_damaged_clock_is_no_first_use(database: Store, member: str) -> None:
    """Without the clock that was believed last nothing is believed: one sentence, with the way back."""
    records = await again(database)
    await records.raise_clock(AK, BASE)
    await records.settle()
    async with database.begin() as session:
        await session.execute(update(Baseline).values({member: "no number"}))
    with pytest.raises(StoreError, match=r"clock of key 000b0000.* is damaged; `harness db restore`"):
        await again(database)
