"""PostgreSQL: a server that stops, comes back, hangs or refuses under a running service."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator

import psutil  # type: ignore[import-untyped]
import pytest
from sqlalchemy import func, select, text

from harness.errors import StoreError
from harness.store import Store
from harness.store_engine import lock_number
from harness.tenant.tables import AlarmRow
from tests.support.postgres import PostgresServer
from tests.support.schemas import TENANT

pytestmark = pytest.mark.needs_postgres
WAIT_S = 240
DOWN = "start the server, or wait for it; the service goes on by itself"


@pytest.fixture
def server(postgres: PostgresServer) -> Iterator[PostgresServer]:
    """The server, which a test may stop: it runs again afterwards."""
    yield postgres
    postgres.stop()
    postgres.start()


@pytest.fixture
async def store(server: PostgresServer) -> AsyncIterator[Store]:
    made = await TENANT.open(server.new_database())
    yield made
    await made.close()


async def write(store: Store) -> None:
    async with asyncio.timeout(WAIT_S), store.begin() as session:
        session.add(AlarmRow(at=1.0, kind="k", detail="d"))


async def count(store: Store) -> int | None:
    async with asyncio.timeout(WAIT_S), store.begin() as session:
        return await session.scalar(select(func.count()).select_from(AlarmRow))


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT])
async def test_a_server_that_restarted_is_not_noticed(
    store: Store, server: PostgresServer, how: signal.Signals
) -> None:
    """In order or as after a crash: the next transaction of each connection works, and what was committed is there."""
    await asyncio.gather(*(write(store) for _ in range(4)))
    server.stop(how)
    server.start()
    await asyncio.gather(*(write(store) for _ in range(4)))
    assert await count(store) == 8


async def test_a_server_that_is_down_is_one_sentence_until_it_is_back(store: Store, server: PostgresServer) -> None:
    """The sentence names the database and says what to do; then the same store goes on."""
    await write(store)
    server.stop()
    for _ in range(2):
        with pytest.raises(StoreError, match=DOWN) as refused:
            await write(store)
        assert refused.value.detail.startswith("database postgresql+asyncpg://harness@/test")
    server.start()
    await write(store)
    assert await count(store) == 2


async def test_a_server_that_stops_inside_a_transaction_undoes_it(store: Store, server: PostgresServer) -> None:
    """What was not committed is not there afterwards."""

    async def interrupted() -> None:
        async with store.begin() as session:
            session.add(AlarmRow(at=1.0, kind="k", detail="lost"))
            await session.flush()
            server.stop(signal.SIGQUIT)

    with pytest.raises(StoreError, match=DOWN):
        await interrupted()
    server.start()
    assert await count(store) == 0


async def test_a_service_does_not_start_without_its_server(server: PostgresServer) -> None:
    """A server that is down, a user or a database that it does not know: one sentence each."""
    url = server.new_database()
    for wrong, reason in (
        (url.replace("harness@", "stranger@"), 'role "stranger" does not exist'),
        (url.replace("/test", "/no"), "does not exist"),
        ("postgresql+asyncpg://u:5ec3e7@127.0.0.1:1/x", DOWN),
    ):
        with pytest.raises(StoreError, match=reason) as refused:
            await TENANT.open(wrong)
        assert "5ec3e7" not in refused.value.detail
    server.stop()
    with pytest.raises(StoreError, match=DOWN):
        await TENANT.open(url)


async def test_a_server_that_hangs_costs_a_bounded_wait(store: Store, server: PostgresServer) -> None:
    """No answer to a statement, or to a new connection, is a StoreError; then the same store goes on."""
    impatient = Store(store._engine, deadline_s=0.5)
    for again in (False, True):
        if again:
            await store._engine.dispose()
        else:
            await write(store)
        _signal(server, signal.SIGSTOP)
        try:
            with pytest.raises(StoreError, match=r"not done within 0\.5 s"):
                async with asyncio.timeout(WAIT_S), impatient.begin() as session:
                    await session.execute(text("SELECT 1"))
        finally:
            _signal(server, signal.SIGCONT)
        await write(store)


async def test_a_lock_that_is_never_given_back_costs_a_bounded_wait(store: Store, server: PostgresServer) -> None:
    """Another program of ours that hangs in a transaction; afterwards all is well."""
    impatient = Store(store._engine, deadline_s=0.5)
    async with store.begin():
        with pytest.raises(StoreError, match=r"not done within 0\.5 s; another program may hold its lock"):
            await write(impatient)
    await write(impatient)


async def test_the_lock_is_the_components_own(store: Store) -> None:
    """While one writes, another component's transaction does not wait: their numbers differ, within 63 bits."""
    numbers = {lock_number(name) for name in ("tenant", "provider", "host-agent")}
    assert len(numbers) == 3
    assert all(0 <= number < 1 << 63 for number in numbers)
    async with store.begin() as session:
        held = await session.scalars(text("SELECT mode FROM pg_locks WHERE locktype = 'advisory' AND granted"))
        assert sorted(held) == ["ExclusiveLock", "ShareLock"]  # the turn's, and that the database is in use
        assert await session.scalar(text("SHOW transaction_isolation")) == "read committed"
        assert await session.scalar(text("SHOW idle_in_transaction_session_timeout")) == "1min"


def _signal(server: PostgresServer, number: signal.Signals) -> None:
    main = psutil.Process(server.pid)
    for process in (main, *main.children()):
        process.send_signal(number)
