"""Both ends of the stream against each other: multiplexing, cancellation, and what a broken link does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import pytest

from harness.errors import (
    DeadlineExceeded,
    GuestNotHere,
    HarnessError,
    MalformedMessage,
    MessageTooLarge,
    PeerUnreachable,
    PoolFull,
    ShuttingDown,
    TransportError,
)
from harness.provider.batch import PendingQuote
from harness.provider.batcher import Answer
from harness.provider.stream import IdentityOrder, Order, QuoteOrder, encode_order
from harness.provider.stream_host import StreamSession, frames
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
        session = StreamSession(far, self.bench.batcher.submit, self.others)
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
        results = await within([first, *tasks])
        assert made.quoter.tpm.quotes == 2
        batches = [json.loads(text) for text in network.ends[0].peer.sent]
        assert [len(frame["proofs"]) for frame in batches] == [1, 8]
        assert len({json.dumps(result["proof"]) for result in results[1:]}) == 8
        assert len({str(result["attest"]) for result in results[1:]}) == 1


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
    async with wired(LinkBounds(enrol_s=0.02)) as (link, network, _, _):
        network.stall.clear()
        with pytest.raises(DeadlineExceeded):
            await link.ask(IdentityOrder())


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


# --- the host's end alone ---------------------------------------------------------------------------------------------


async def never(pending: PendingQuote) -> Answer:
    raise AssertionError(f"{pending} was not to be quoted")


async def forever(order: Order) -> Mapping[str, object]:
    await asyncio.Event().wait()
    raise AssertionError(order)


async def test_a_malformed_order_is_answered_under_its_id() -> None:
    """And the connection goes on."""
    near, far = pipe()
    session = start(StreamSession(far, never, forever).serve())
    await near.send(json.dumps({"id": 4, "op": "quote", "root": "00" * 32}))
    async with asyncio.timeout(WAIT_S):
        frame = json.loads(await near.receive() or "")
    assert (frame["id"], frame["error"]["status"], frame["error"]["error"]) == (4, 400, "MalformedMessage")
    assert not session.done()
    near.close()
    await within([session])


@pytest.mark.parametrize(
    ("texts", "error"),
    [
        (["no json"], MalformedMessage),
        (['{"op": "identity"}'], MalformedMessage),
        ([encode_order(1, IdentityOrder()), encode_order(1, IdentityOrder())], MalformedMessage),
        (['{"id": 1, "op": "' + "x" * 70_000 + '"}'], MessageTooLarge),
    ],
    ids=["no-json", "no-id", "id-in-use", "too-large"],
)
async def test_what_cannot_be_answered_ends_the_connection(texts: list[str], error: type[HarnessError]) -> None:
    """With its error, and without a task left behind."""
    near, far = pipe()
    session = start(StreamSession(far, never, forever).serve())
    for text in texts:
        await near.send(text)
    await asyncio.wait([session], timeout=WAIT_S)
    assert type(session.exception()) is error


async def test_a_fault_of_ours_ends_the_connection_and_nobody_waits() -> None:
    """An unexpected exception is not swallowed: the peer sees the end, not silence."""
    near, far = pipe()

    async def broken(order: Order) -> Mapping[str, object]:
        raise ZeroDivisionError(order)

    session = start(StreamSession(far, never, broken).serve())
    await near.send(encode_order(1, IdentityOrder()))
    await asyncio.wait([session], timeout=WAIT_S)
    assert isinstance(session.exception(), ZeroDivisionError)


async def test_a_reader_that_is_gone_ends_the_session() -> None:
    """Answers that nobody takes do not pile up."""
    near, far = pipe()
    session = start(StreamSession(far, never, forever).serve())
    await settle()
    near.cut()
    await asyncio.wait([session], timeout=WAIT_S)
    assert isinstance(session.exception(), TransportError)


async def test_a_large_batch_is_split_into_frames() -> None:
    """No frame has more proofs than fit; all of them arrive."""
    async with bench() as made:
        tasks = [made.submit(a_request(f"t{number // 1000}")) for number in range(2500)]
        await within(tasks)
        texts = list(frames([(number, task.result()) for number, task in enumerate(tasks)]))
        counts = [len(json.loads(text)["proofs"]) for text in texts]
        assert sum(counts) == 2500
        assert max(counts) <= 1000
        assert all(len(text) < 4 * 1024 * 1024 for text in texts)


async def test_stopping_sends_the_last_answers_first() -> None:
    """Waiters that the stop releases still learn why; then the session ends."""
    async with bench() as made:
        near, far = pipe()
        session = StreamSession(far, made.batcher.submit, forever)
        task = start(session.serve())
        made.quoter.hold()
        await near.send(encode_order(1, QuoteOrder(pending=a_request())))
        await made.quoter.arrival(1)
        made.batcher.stop()
        await session.stop()
        await within([task])
        frame = json.loads(far.sent[-1])
        assert (frame["id"], frame["error"]["error"]) == (1, "ShuttingDown")


async def test_stopping_does_not_wait_for_an_order_that_hangs() -> None:
    """The session ends within its bound."""
    near, far = pipe()
    session = StreamSession(far, never, forever)
    task = start(session.serve())
    await near.send(encode_order(1, IdentityOrder()))
    await settle()
    async with asyncio.timeout(WAIT_S):
        await session.stop()
        await task
