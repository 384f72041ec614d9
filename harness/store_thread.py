"""Transactions on a SQLite file, each one call of a worker thread: for what is written all the time.

aiosqlite makes a call of each statement's cursor, execution and end; eleven times in a small transaction one thread
wakes another, and that is most of what it costs. Here the whole transaction is one call.

Invariants:
    1. The connection is set up like all others of the file (`store_engine`): a transaction begins with the write lock,
       and what was committed outlives a power cut.
    2. A call that began ends before the next one begins, whether or not somebody waits for it.
    3. A disk that hangs costs the caller its patience, and not the next caller: it gets a thread and a connection anew.

Owner: one `store.Store`.
"""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import Connection, Engine
from sqlalchemy.engine import URL

from harness.errors import DeviceUnavailable
from harness.store_engine import thread_engine_of
from harness.store_errors import late
from harness.worker import CallThread


class ThreadTransactions:
    """Transactions on one file.

    Args:
        url: of the file.
        deadline_s: for one transaction.
    """

    def __init__(self, url: URL, *, deadline_s: float) -> None:
        self._url = url
        self._deadline_s = deadline_s
        self._thread: CallThread | None = None
        self._engine: Engine | None = None

    async def run(self, work: Callable[[Connection], None]) -> None:
        """Does the work in a transaction: committed at its end, rolled back on an exception.

        Args:
            work: executes statements; called in the thread.

        Raises:
            StoreError: it was not done in time.
            Exception: what the work or the database raises.

        *Cancellation:* a transaction that began goes on, and is committed or rolled back.
        """
        thread, engine = self._opened()
        try:
            await thread.run(lambda: _in_transaction(engine, work))
        except DeviceUnavailable as error:
            if self._thread is thread:
                self._thread = self._engine = None
            raise late(self._url, self._deadline_s) from error

    async def close(self) -> None:
        """Closes the connection. *Cancellation:* it is being closed all the same."""
        thread, engine = self._thread, self._engine
        if thread is not None and engine is not None:
            self._thread = self._engine = None
            await thread.finish(engine.dispose, "the database was closed")

    def _opened(self) -> tuple[CallThread, Engine]:
        if self._thread is None or self._engine is None:
            self._thread = CallThread("database", timeout_s=self._deadline_s)
            self._engine = thread_engine_of(self._url)
        return self._thread, self._engine


def _in_transaction(engine: Engine, work: Callable[[Connection], None]) -> None:
    with engine.begin() as connection:
        work(connection)
