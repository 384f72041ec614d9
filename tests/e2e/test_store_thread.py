"""Transactions that are one call of a thread: whole or not at all, in turn, and no hung disk keeps the next one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import Connection, text
from sqlalchemy.engine import make_url

from harness.errors import StoreError
from harness.store import Store, open_store
from harness.store_thread import ThreadTransactions
from harness.tenant.tables import SCHEMA, Base

WAIT_S = 60.0
KEY = b"\x00\x0b" + bytes(32)
INSERT = text(
    "INSERT INTO baselines (ak_name, clock, reset_count, restart_count, firmware_version, enrolled_at)"
    " VALUES (:name, '1', 1, 1, '1', 1.0)"
)


def insert(connection: Connection) -> None:
    connection.execute(INSERT, {"name": KEY})


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    opened = await open_store(f"sqlite+aiosqlite:///{tmp_path}/a.db", Base.metadata, component="tenant", version=SCHEMA)
    try:
        yield opened
    finally:
        await opened.close()


async def count(store: Store) -> int:
    """Rows that another connection sees."""
    async with store.begin() as session:
        return len(list(await session.scalars(text("SELECT ak_name FROM baselines"))))


async def test_what_was_run_is_committed(store: Store) -> None:
    """Another connection sees it."""
    await store.run(insert)
    assert await count(store) == 1


async def test_an_exception_rolls_everything_back(store: Store) -> None:
    """Nothing of the transaction is left, and the next one works."""

    def fails(connection: Connection) -> None:
        insert(connection)
        raise RuntimeError("bug")

    with pytest.raises(RuntimeError, match="bug"):
        await store.run(fails)
    assert await count(store) == 0
    await store.run(insert)
    assert await count(store) == 1


async def test_what_the_database_refuses_is_a_store_error(store: Store) -> None:
    """It names the database; a key that is there twice is refused."""
    await store.run(insert)
    with pytest.raises(StoreError, match=r"a\.db"):
        await store.run(insert)


async def test_a_cancelled_caller_leaves_no_half_transaction(store: Store) -> None:
    """The transaction goes on to its end, and the next one begins after it."""
    begun, go_on = threading.Event(), threading.Event()

    def waits(connection: Connection) -> None:
        begun.set()
        go_on.wait(WAIT_S)
        insert(connection)

    task = asyncio.create_task(store.run(waits))
    assert await asyncio.to_thread(begun.wait, WAIT_S)
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()
    seen: list[int] = []
    following = asyncio.create_task(
        store.run(lambda connection: seen.append(len(list(connection.execute(text("SELECT 1 FROM baselines"))))))
    )
    go_on.set()
    async with asyncio.timeout(WAIT_S):
        await following
    assert seen == [1]


async def test_a_file_that_was_replaced_is_not_written(store: Store, tmp_path: Path) -> None:
    """As with every other transaction: found out before anything is written."""
    (tmp_path / "a.db").unlink()
    with pytest.raises(StoreError, match="deleted or replaced"):
        await store.run(insert)


async def test_a_disk_that_hangs_keeps_nobody_for_ever(store: Store, tmp_path: Path) -> None:
    """The caller gets a StoreError after the deadline; the next one gets a thread and a connection of its own."""
    quick = ThreadTransactions(make_url(f"sqlite+aiosqlite:///{tmp_path}/a.db"), deadline_s=0.2)
    go_on = threading.Event()

    def hangs(_: Connection) -> None:
        go_on.wait(WAIT_S)

    try:
        async with asyncio.timeout(WAIT_S):
            with pytest.raises(StoreError):
                await quick.run(hangs)
    finally:
        go_on.set()
    async with asyncio.timeout(WAIT_S):
        while not await _reads(quick):
            pass
    await quick.close()


async def _reads(transactions: ThreadTransactions) -> bool:
    try:
        await transactions.run(lambda connection: connection.execute(text("SELECT 1 FROM baselines")).close())
    except StoreError:  # a machine that stalls is slower than this deadline
        return False
    return True
