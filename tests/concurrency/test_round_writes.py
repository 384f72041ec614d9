"""What rounds write, many sessions at once: few transactions, nobody is told "stored" too early, no fault spreads."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest
from sqlalchemy import Connection

from harness.audit import AuditEntry
from harness.errors import StoreError
from harness.store import Store, open_store
from harness.tenant.alarms_store import AlarmStore
from harness.tenant.ports import Alarm, Progress
from harness.tenant.states import State
from harness.tenant.tables import SCHEMA, Base
from harness.tenant.verifier_store import StoredAgent, VerifierStore
from harness.values import AgentId, ClockBaseline
from tests.support.manual_time import settle

IDS = [AgentId(uuid.UUID(int=number + 1)) for number in range(40)]
BASE = ClockBaseline(clock=100, reset_count=1, restart_count=1, firmware_version=1)
HOST_AK = b"\x00\x0b" + b"host" * 8
WAIT_S = 60.0


def ak_of(agent_id: AgentId) -> bytes:
    return b"\x00\x0b" + agent_id.bytes * 2


class GatedStore:
    """The store, with a gate before each commit of a round's transaction, a count of them, and faults to come."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.begin = store.begin
        self.gate = asyncio.Event()
        self.gate.set()
        self.inside = asyncio.Event()
        self.transactions = 0
        self.faults: list[Exception | None] = []

    async def run(self, work: Callable[[Connection], None]) -> None:
        self.transactions += 1
        fault = self.faults.pop(0) if self.faults else None

        def spoiled(connection: Connection) -> None:
            work(connection)
            if fault is not None:
                raise fault

        self.inside.set()
        await self.gate.wait()
        await self._store.run(spoiled)


@pytest.fixture
async def database(store_url: str) -> AsyncIterator[Store]:
    store = await open_store(store_url, Base.metadata, component="tenant", version=SCHEMA)
    try:
        yield store
    finally:
        await store.close()


async def opened(database: Store) -> tuple[GatedStore, VerifierStore]:
    """A verifier's records with all agents in them."""
    gated = GatedStore(database)
    records = VerifierStore(gated, lambda: 9.0)  # type: ignore[arg-type]
    for agent_id in IDS:
        progress = Progress(state=State.SAVED)
        agent = StoredAgent(agent_id=agent_id, request="{}", snapshot="{}", v=b"v" * 32, progress=progress)
        entry = AuditEntry(at=1.0, who="x", action="agent-add", subject=str(agent_id), reason="r")
        await records.add(agent, entry)
    return gated, records


async def rounds_in(database: Store) -> list[int]:
    """Rounds of all agents as a restarted verifier finds them."""
    return [agent.progress.rounds for agent in await VerifierStore(database, lambda: 0.0).load()]


def begin(records: VerifierStore, agent_id: AgentId, rounds: int = 1, alarm: Alarm | None = None) -> asyncio.Task[None]:
    progress = Progress(state=State.GET_QUOTE, rounds=rounds)
    return asyncio.get_running_loop().create_task(records.save(agent_id, progress, alarm))


async def all_of(tasks: list[asyncio.Task[None]]) -> list[BaseException | None]:
    async with asyncio.timeout(WAIT_S):
        return await asyncio.gather(*tasks, return_exceptions=True)


async def test_sessions_that_write_together_share_a_transaction(database: Store) -> None:
    """Forty successes at one moment, each with two clocks: one transaction, and all of it is there."""
    gated, records = await opened(database)
    for agent_id in IDS:
        await records.raise_clock(ak_of(agent_id), BASE)
        await records.raise_clock(HOST_AK, BASE)
    assert await all_of([begin(records, agent_id) for agent_id in IDS]) == [None] * 40
    assert gated.transactions == 1
    restarted = VerifierStore(database, lambda: 0.0)
    assert [agent.progress.rounds for agent in await restarted.load()] == [1] * 40
    assert {await restarted.baseline(ak_of(agent_id)) for agent_id in IDS} == {BASE}
    assert await restarted.baseline(HOST_AK) == BASE


async def test_nobody_is_told_before_the_commit(database: Store) -> None:
    """While the transaction is open nobody goes on; who comes meanwhile waits for the next one."""
    gated, records = await opened(database)
    gated.gate.clear()
    first = [begin(records, agent_id) for agent_id in IDS[:20]]
    async with asyncio.timeout(WAIT_S):
        await gated.inside.wait()
    later = [begin(records, agent_id) for agent_id in IDS[20:]]
    await settle()
    assert not any(task.done() for task in first + later)
    gated.gate.set()
    assert await all_of(first + later) == [None] * 40
    assert gated.transactions == 2
    assert await rounds_in(database) == [1] * 40


async def test_a_session_that_is_cancelled_while_it_writes_for_all_loses_nobodys_write(database: Store) -> None:
    """Its transaction is finished first: nobody's write is made twice, none is lost."""
    gated, records = await opened(database)
    gated.gate.clear()
    tasks = [begin(records, agent_id) for agent_id in IDS]
    async with asyncio.timeout(WAIT_S):
        await gated.inside.wait()
    tasks[0].cancel()
    await settle()
    gated.gate.set()
    ended = await all_of(tasks)
    assert isinstance(ended[0], asyncio.CancelledError)
    assert ended[1:] == [None] * 39
    assert await rounds_in(database) == [1] * 40
    assert gated.transactions == 1


async def test_a_session_that_is_cancelled_while_it_waits_takes_its_write_back(database: Store) -> None:
    """What nobody has begun to write is not written for a session that has ended."""
    gated, records = await opened(database)
    gated.gate.clear()
    leading = begin(records, IDS[0])
    async with asyncio.timeout(WAIT_S):
        await gated.inside.wait()
    waiting = begin(records, IDS[1])
    await settle()
    waiting.cancel()
    await settle()
    gated.gate.set()
    await all_of([leading, waiting])
    assert (await rounds_in(database))[:2] == [1, 0]


async def test_a_write_that_has_to_be_made_again_is_not_made_for_a_session_that_has_ended(database: Store) -> None:
    """It was in a transaction that failed by a bug of another's: the others are written again, it is not."""
    gated, records = await opened(database)
    gated.gate.clear()
    gated.faults = [RuntimeError("bug")]
    tasks = [begin(records, agent_id) for agent_id in IDS[:3]]
    async with asyncio.timeout(WAIT_S):
        await gated.inside.wait()
    tasks[1].cancel()
    await settle()
    gated.gate.set()
    ended = await all_of(tasks)
    assert isinstance(ended[1], asyncio.CancelledError)
    assert (await rounds_in(database))[:3] == [1, 0, 1]


async def test_a_database_that_refuses_tells_everybody_who_waited(database: Store) -> None:
    """Each session learns it, keeps what it has to store, and stores it later; the clocks are not forgotten."""
    gated, records = await opened(database)
    await records.raise_clock(HOST_AK, BASE)
    gated.faults = [StoreError("disk full")]
    ended = await all_of([begin(records, agent_id) for agent_id in IDS])
    assert [type(error) for error in ended] == [StoreError] * 40
    assert await rounds_in(database) == [0] * 40
    assert await all_of([begin(records, agent_id) for agent_id in IDS]) == [None] * 40
    assert await rounds_in(database) == [1] * 40
    restarted = VerifierStore(database, lambda: 0.0)
    await restarted.load()
    assert await restarted.baseline(HOST_AK) == BASE


async def test_a_fault_in_one_write_is_nobody_elses(database: Store) -> None:
    """A write that cannot be made at all: its session gets the fault, the others are stored."""
    gated, records = await opened(database)
    bad = Alarm(kind=object(), agent_id=None, host_id=None, detail="x")  # type: ignore[arg-type]
    tasks = [begin(records, agent_id, alarm=bad if agent_id is IDS[7] else None) for agent_id in IDS]
    ended = await all_of(tasks)
    assert isinstance(ended[7], Exception)
    again = [begin(records, agent_id) for agent_id, error in zip(IDS, ended, strict=True) if error is not None]
    assert await all_of(again) == [None] * len(again)
    assert await rounds_in(database) == [1] * 40
    assert await AlarmStore(database).alarms() == []
    assert gated.transactions > 2


async def test_a_bug_while_writing_ends_only_the_session_whose_write_it_is(database: Store) -> None:
    """What is no fault of the database is met again alone: the others never hear of it."""
    gated, records = await opened(database)
    gated.faults = [RuntimeError("bug"), RuntimeError("bug")]
    ended = await all_of([begin(records, agent_id) for agent_id in IDS])
    assert [type(error) for error in ended if error is not None] == [RuntimeError]
    assert sorted(await rounds_in(database)) == [0] + [1] * 39


async def test_a_clock_that_rises_during_the_commit_is_written_next(database: Store) -> None:
    """It is believed at once, and not taken for stored by the transaction that began before it."""
    gated, records = await opened(database)
    await records.raise_clock(HOST_AK, BASE)
    gated.gate.clear()
    first = begin(records, IDS[0])
    async with asyncio.timeout(WAIT_S):
        await gated.inside.wait()
    higher = replace(BASE, clock=200)
    await records.raise_clock(HOST_AK, higher)
    assert await records.baseline(HOST_AK) == higher
    gated.gate.set()
    await all_of([first])
    await records.settle()
    restarted = VerifierStore(database, lambda: 0.0)
    await restarted.load()
    assert await restarted.baseline(HOST_AK) == higher


async def test_nothing_to_settle_is_no_transaction(database: Store) -> None:
    """A wait after a failure costs nothing where no clock rose."""
    gated, records = await opened(database)
    await records.settle()
    assert gated.transactions == 0
