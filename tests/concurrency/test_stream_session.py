"""Both ends of the stream against each other: multiplexing, cancellation, and what a broken link does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, TypeVar

import pytest

from harness.errors import (
    DeadlineExceeded,
    GuestNotHere,
    PeerUnreachable,
    PoolFull,
    ShuttingDown,
    WouldBeLate,
)
from harness.provider.stream import IdentityOrder, Order
from harness.provider.stream_host import StreamSession
from harness.provider.stream_link import HostLink, LinkBounds
from tests.support.batching import WAIT_S, settle, within
from tests.support.bench import Bench, bench
from tests.support.channels import Pipe, pipe
from tests.support.manual_clock import ManualClock
from tests.support.pendings import a_request, agent

T = TypeVar("T")


Wired = tuple["HostLink", "Network", "asyncio.Task[None]", ManualClock]


class Network:
    """Connects links to sessions in memory; can be down."""

    def __init__(self, made: Bench) -> None:
        self.bench = made
        self.down = False
        self.ends: list[Pipe] = []
        self.sessions: list[asyncio.Task[None]] = []
        self.asked: list[Order] = []
        self.stall = asyncio.Event()
        self.stall.set()

    async def others(self, order: Order) -> Mapping[str, object]:
        self.asked.append(order)
        await self.stall.wait()
        return {"host_id": "h"}

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Pipe]:
        if self.down:
            raise PeerUnreachable("connection refused")
        near, far = pipe()
        self.ends.append(near)
        session = StreamSession(far, self.bench.batcher, self.others)
        self.sessions.append(asyncio.create_task(session.serve()))
        try:
            yield near
        finally:
            near.close()


@asynccontextmanager
async def wired(
    bounds: LinkBounds | None = None,
) -> AsyncIterator[tuple[HostLink, Network, asyncio.Task[None], ManualClock]]:
    """A link to a running batcher, connected."""
    async with bench() as made:
        network, clock = Network(made), ManualClock()
        link = HostLink(network.connect, clock=clock, bounds=bounds)
        runner = asyncio.create_task(link.run())
        try:
            yield link, network, runner, clock
        finally:
            runner.cancel()
            network.stall.set()
            made.quoter.let_go()
            await asyncio.gather(runner, *network.sessions, return_exceptions=True)


def start(call: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    return asyncio.create_task(call)


# --- multiplexing -----------------------------------------------------------------------------------------------------


async def test_a_batch_travels_once_with_the_proofs_of_all_its_waiters() -> None:
    """N requests, one quote, one frame; each gets the shared part with its own proof."""
    async with wired() as (link, network, _, _):
        made = network.bench
        made.quoter.hold()
        first = start(link.quote(a_request("early")))
        await made.quoter.arrival(1)
        tasks = [start(link.quote(a_request(tenant))) for tenant in "abcdefgh"]
        await settle()
        made.quoter.let_go()
        results = [json.loads(answer.text) for answer in await within([first, *tasks])]
        assert made.quoter.tpm.quotes == 2
        batches = [json.loads(text) for text in network.ends[0].peer.sent]
        assert [len(frame["proofs"]) for frame in batches] == [1, 8]
        assert len({json.dumps(result["proof"]) for result in results[1:]}) == 8
        assert len({str(result["attest"]) for result in results[1:]}) == 1
        assert [len(text.split("\n")) for text in network.ends[0].sent] == [1, 8]


async def test_answers_overtake_each_other() -> None:
    """An order of enrolment is answered while a quote is in the TPM."""
    async with wired() as (link, network, _, _):
        network.bench.quoter.hold()
        quote = start(link.quote(a_request()))
        await network.bench.quoter.arrival(1)
        async with asyncio.timeout(WAIT_S):
            assert await link.ask(IdentityOrder()) == {"host_id": "h"}
        assert not quote.done()
        network.bench.quoter.let_go()
        await within([quote])


async def test_a_refusal_reaches_its_own_caller() -> None:
    """One guest is not here; the others are answered."""
    async with wired() as (link, _, _, _):
        absent, present = start(link.quote(a_request(agent_id=agent(1)))), start(link.quote(a_request()))
        await asyncio.wait([absent, present], timeout=WAIT_S)
        assert isinstance(absent.exception(), GuestNotHere)
        assert present.exception() is None


# --- giving up --------------------------------------------------------------------------------------------------------


async def test_a_cancelled_call_leaves_the_pool_on_the_host() -> None:
    """The host agent is told, and works for nobody."""
    async with wired() as (link, network, _, _):
        made = network.bench
        made.quoter.hold()
        first = start(link.quote(a_request()))
        await made.quoter.arrival(1)
        gone, stays = start(link.quote(a_request("goes"))), start(link.quote(a_request("stays")))
        await settle()
        gone.cancel()
        await settle()
        made.quoter.let_go()
        await within([first, stays])
        assert [waiter.pending.tenant for waiter in made.quoter.batches[1].members] == ["stays"]


async def test_a_call_ends_by_its_own_deadline() -> None:
    """A host agent that never answers keeps nobody."""
    async with wired(LinkBounds(enrol_s=20)) as (link, network, _, clock):
        network.stall.clear()
        call = start(link.ask(IdentityOrder()))
        await settle()
        clock.advance(19.75)
        await settle()
        assert not call.done()
        clock.advance(0.5)
        await asyncio.wait([call], timeout=WAIT_S)
        assert isinstance(call.exception(), DeadlineExceeded)


async def test_the_bound_of_waiting_calls_is_typed() -> None:
    """One call more than the limit is refused at once."""
    async with wired(LinkBounds(waiting=2)) as (link, network, _, _):
        network.stall.clear()
        waiting = [start(link.ask(IdentityOrder())) for _ in range(2)]
        await settle()
        with pytest.raises(PoolFull):
            await link.ask(IdentityOrder())
        network.stall.set()
        await within(waiting)


async def test_the_host_agent_is_told_how_long_an_answer_is_still_of_use() -> None:
    """What passed while the link was being opened is taken off; when nothing is left nobody asks the host agent."""
    near, far = pipe()
    opened = asyncio.Event()

    @asynccontextmanager
    async def connect() -> AsyncIterator[Pipe]:
        await opened.wait()
        yield near

    clock = ManualClock()
    link = HostLink(connect, clock=clock)
    runner = start(link.run())
    waits = start(link.quote(replace(a_request(), wait_s=10.0)))
    too_late = start(link.quote(replace(a_request(), wait_s=1.5)))
    await settle()
    clock.advance(1.75)
    opened.set()
    await asyncio.wait([too_late], timeout=WAIT_S)
    assert isinstance(too_late.exception(), WouldBeLate)
    await settle()
    assert [json.loads(text)["wait_s"] for text in near.sent] == [8.25]
    later = start(link.quote(replace(a_request(), wait_s=10.0)))
    await settle()
    assert [json.loads(text)["wait_s"] for text in near.sent] == [8.25, 10.0]
    runner.cancel()
    await asyncio.gather(runner, waits, later, return_exceptions=True)
    far.close()


async def test_a_call_ends_when_its_answer_is_of_no_use_any_more() -> None:
    """Each by its own deadline, and the host agent is told."""
    async with wired() as (link, network, _, clock):
        network.bench.quoter.hold()
        early = start(link.quote(replace(a_request(), wait_s=1.0)))
        late = start(link.quote(replace(a_request(), wait_s=9.0)))
        await settle()
        clock.advance(1.25)
        await asyncio.wait([early], timeout=WAIT_S)
        assert isinstance(early.exception(), DeadlineExceeded)
        await settle()
        assert not late.done()
        assert json.loads(network.ends[0].sent[-1]) == {"id": 1, "op": "cancel"}
        assert network.bench.batcher.waiting == 1
        network.bench.quoter.let_go()
        await within([late])


# --- a broken link ----------------------------------------------------------------------------------------------------


async def test_a_broken_link_releases_every_waiter_and_comes_back() -> None:
    """All calls end with PeerUnreachable; on the host nothing of them is left; the next call is served."""
    async with wired() as (link, network, _, clock):
        made = network.bench
        made.quoter.hold()
        early = start(link.quote(a_request()))
        await made.quoter.arrival(1)
        later = [start(link.quote(a_request(tenant))) for tenant in "abc"]
        await settle()
        network.ends[0].cut()
        await asyncio.wait([early, *later], timeout=WAIT_S)
        assert all(isinstance(task.exception(), PeerUnreachable) for task in [early, *later])
        await settle()
        made.quoter.let_go()
        await settle()
        assert len(made.quoter.batches) == 1, "nobody waits for a further batch"
        await within([start(link.quote(a_request()))])
        assert len(network.ends) == 2
        assert clock.slept


async def test_an_order_is_never_sent_on_a_second_connection() -> None:
    """What was asked once is not asked again when the link comes back."""
    async with wired() as (link, network, _, _):
        network.stall.clear()
        call = start(link.ask(IdentityOrder()))
        await settle()
        network.ends[0].cut()
        await asyncio.wait([call], timeout=WAIT_S)
        await settle()
        assert len(network.ends) > 1
        assert network.ends[-1].sent == []
        assert len(network.asked) == 1


async def test_a_host_that_is_down_is_unreachable_at_once_and_tried_with_backoff() -> None:
    """Calls do not wait for it; the pauses grow to a bound."""
    async with wired() as (link, network, _, clock):
        await settle()
        network.down = True
        network.ends[0].cut()
        clock_before = len(clock.slept)
        await settle(200)
        with pytest.raises(PeerUnreachable, match="connection refused"):
            await link.quote(a_request())
        pauses = clock.slept[clock_before:]
        assert len(pauses) > 5
        assert max(pauses) <= 5.0
        assert pauses[0] < 0.11
        network.down = False
        await settle(20)
        await within([start(link.quote(a_request()))])


async def test_an_answer_that_is_no_frame_breaks_the_link() -> None:
    """Nothing is guessed from it; every waiter is released."""
    async with wired() as (link, network, _, _):
        network.stall.clear()
        call = start(link.ask(IdentityOrder()))
        await settle()
        await network.ends[0].peer.send('{"proofs": "none"}')
        await asyncio.wait([call], timeout=WAIT_S)
        assert isinstance(call.exception(), PeerUnreachable)


async def test_stopping_the_link_releases_every_waiter() -> None:
    """With ShuttingDown, and so are later calls."""
    async with wired() as (link, network, runner, _):
        network.stall.clear()
        call = start(link.ask(IdentityOrder()))
        await settle()
        runner.cancel()
        await asyncio.wait([call], timeout=WAIT_S)
        assert isinstance(call.exception(), ShuttingDown)
        with pytest.raises(ShuttingDown):
            await link.ask(IdentityOrder())
