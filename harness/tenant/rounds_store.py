"""What each round writes, of all sessions, in as few transactions as the database allows.

While one transaction is under way, what is to be written next gathers; all of it is the next transaction. A verifier of
many guests pays for one commit per batch of host quotes, not for three per guest.

Invariants:
    1. `save` and `settle` return only after what they were asked to write was committed.
    2. Every transaction writes all clocks that were believed before it began: a success is never stored without the
       clocks that it rests on.
    3. A session that is cancelled takes back what nobody has begun to write; a transaction that it makes for others is
       finished first.
    4. A write that the database does not take spoils no other's for long: after a transaction that failed, they are
       made one at a time until one succeeds.

Owner: the verifier's event loop; whoever comes first writes for all who wait.

Spec: DESIGN 3.5 (10), 3.8.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, bindparam, insert, text, update

from harness.errors import StoreError
from harness.store import Store
from harness.tenant.bookkeeping import finished
from harness.tenant.clocks import Clocks, Known
from harness.tenant.ports import Progress
from harness.tenant.progress_text import encode_progress, encode_seen
from harness.tenant.tables import Agent, AlarmRow
from harness.values import AgentId

_PUT_PROGRESS = (
    update(Agent)
    .where(Agent.agent_id == bindparam("of"))
    .values(state=bindparam("state_"), progress=bindparam("progress_"), seen=bindparam("seen_"))
)
_PUT_RELEASED = _PUT_PROGRESS.values(v=None)
_PUT_CLOCK = text(
    "INSERT INTO baselines (ak_name, clock, reset_count, restart_count, firmware_version, enrolled_at)"
    " VALUES (:ak_name, :clock, :reset_count, :restart_count, :firmware_version, :enrolled_at)"
    " ON CONFLICT (ak_name) DO UPDATE SET clock = excluded.clock, reset_count = excluded.reset_count,"
    " restart_count = excluded.restart_count, firmware_version = excluded.firmware_version,"
    " enrolled_at = excluded.enrolled_at"
)
_ADD_ALARM = insert(AlarmRow)


@dataclass(slots=True, eq=False)
class _Write:
    """What one session asks for; with nothing of its own it asks for the clocks alone."""

    row: dict[str, Any] | None = None
    releases_v: bool = False
    alarm: dict[str, Any] | None = None
    over: bool = False
    error: Exception | None = None


class RoundWriter:
    """The writes of all sessions.

    Args:
        store: the tenant's database.
        writing: the lock under which everybody writes who changes these tables.
        clocks: what is believed.
    """

    def __init__(self, store: Store, writing: asyncio.Lock, clocks: Clocks) -> None:
        self._store = store
        self._writing = writing
        self._clocks = clocks
        self._waiting: list[_Write] = []
        self._turn: asyncio.Event | None = None  # of whoever writes for all; set when they are done
        self._one_at_a_time = False

    async def save(self, agent_id: AgentId, progress: Progress, alarm: dict[str, Any] | None = None) -> None:
        """Stores a session's progress, the alarm that belongs to it, and all believed clocks, in one transaction.

        Args:
            agent_id: whose progress; an agent that was removed meanwhile stays removed.
            progress: what was reached.
            alarm: columns of its row.

        Raises:
            StoreError: nothing of it was stored, as far as is known.

        *Cancellation:* it was stored, or is not.
        """
        row = {
            "of": str(agent_id),
            "state_": progress.state.value,
            "progress_": encode_progress(progress),
            "seen_": encode_seen(progress.seen),
        }
        await self._put(_Write(row=row, releases_v=progress.v_released, alarm=alarm))

    async def settle(self) -> None:
        """Stores all clocks that are believed and not stored. Raises and is cancelled as `save`."""
        if self._clocks.unstored():
            await self._put(_Write())

    async def _put(self, write: _Write) -> None:
        self._waiting.append(write)
        try:
            while not write.over:
                if self._turn is None:
                    await self._write_for_all()
                else:
                    await self._turn.wait()
        finally:
            write.over = True  # also for whoever has taken it and puts back what it could not write
            if write in self._waiting:
                self._waiting.remove(write)
        if write.error is not None:
            raise write.error

    async def _write_for_all(self) -> None:
        turn = self._turn = asyncio.Event()
        taken: list[_Write] = []
        try:
            await asyncio.sleep(0)  # whoever can ask now does
            async with self._writing:
                most = 1 if self._one_at_a_time else len(self._waiting)
                taken, self._waiting = self._waiting[:most], self._waiting[most:]
                await finished(self._commit(taken))
        except StoreError as error:  # everybody's who waited, and each raises it
            self._one_at_a_time = True
            _over(taken, error)
        except Exception as error:
            self._one_at_a_time = True
            if len(taken) == 1:
                _over(taken, error)
            else:
                self._put_back(taken)
        except BaseException:  # our own cancellation: what was not written is for the others to write
            self._put_back(taken)
            raise
        finally:
            self._turn = None
            turn.set()

    def _put_back(self, taken: Sequence[_Write]) -> None:
        self._waiting = [write for write in taken if not write.over] + self._waiting

    async def _commit(self, writes: Sequence[_Write]) -> None:
        clocks = self._clocks.unstored()
        await self._store.run(lambda connection: _execute(connection, writes, clocks))
        self._clocks.stored(clocks)
        self._one_at_a_time = False
        _over(writes, None)


def _execute(connection: Connection, writes: Sequence[_Write], clocks: Mapping[bytes, Known]) -> None:
    for statement, released in ((_PUT_PROGRESS, False), (_PUT_RELEASED, True)):
        rows = [write.row for write in writes if write.row is not None and write.releases_v is released]
        if rows:
            connection.execute(statement, rows)
    alarms = [write.alarm for write in writes if write.alarm is not None]
    if alarms:
        connection.execute(_ADD_ALARM, alarms)
    put_clocks(connection, clocks)


def put_clocks(connection: Connection, clocks: Mapping[bytes, Known]) -> None:
    """Writes baselines, new ones and others. Raises what the database does."""
    rows = [
        {
            "ak_name": ak_name,
            "clock": str(baseline.clock),
            "reset_count": baseline.reset_count,
            "restart_count": baseline.restart_count,
            "firmware_version": str(baseline.firmware_version or 0),
            "enrolled_at": enrolled_at,
        }
        for ak_name, (baseline, enrolled_at) in clocks.items()
    ]
    if rows:
        connection.execute(_PUT_CLOCK, rows)


def _over(writes: Sequence[_Write], error: Exception | None) -> None:
    for write in writes:
        write.over, write.error = True, error
