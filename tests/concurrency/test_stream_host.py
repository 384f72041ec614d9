"""The host agent's end of the stream alone: what it answers, refuses and sends together."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

import pytest

from harness.errors import HarnessError, MalformedMessage, MessageTooLarge, PeerUnreachable, TransportError
from harness.provider.batch import Deliver, PendingQuote, Waiter
from harness.provider.stream import (
    ORDER_LIMIT,
    IdentityOrder,
    Order,
    QuoteOrder,
    encode_order,
    frames_of,
    lines_of,
)
from harness.provider.stream_answers import ANSWER_LIMIT, BatchLine, ErrorLine, parse_answer
from harness.provider.stream_host import StreamSession
from tests.support.batching import WAIT_S, settle, within
from tests.support.bench import bench
from tests.support.channels import Pipe, pipe
from tests.support.pendings import a_request

T = TypeVar("T")


def start(call: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    return asyncio.create_task(call)


class Never:
    """Nobody asks it for a quote."""

    def enter(self, pending: PendingQuote, deliver: Deliver) -> Waiter:
        raise AssertionError(f"{pending} was not to be quoted")

    def leave(self, waiter: Waiter) -> None:
        raise AssertionError(f"{waiter} never entered")


async def forever(order: Order) -> Mapping[str, object]:
    await asyncio.Event().wait()
    raise AssertionError(order)


async def test_a_malformed_order_is_answered_under_its_id() -> None:
    """And the connection goes on."""
    near, far = pipe()
    session = start(StreamSession(far, Never(), forever).serve())
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
    session = start(StreamSession(far, Never(), forever).serve())
    for text in texts:
        await near.send(text)
    await asyncio.wait([session], timeout=WAIT_S)
    assert type(session.exception()) is error


async def test_a_fault_of_ours_ends_the_connection_and_nobody_waits() -> None:
    """An unexpected exception is not swallowed: the peer sees the end, not silence."""
    near, far = pipe()

    async def broken(order: Order) -> Mapping[str, object]:
        raise ZeroDivisionError(order)

    session = start(StreamSession(far, Never(), broken).serve())
    await near.send(encode_order(1, IdentityOrder()))
    await asyncio.wait([session], timeout=WAIT_S)
    assert isinstance(session.exception(), ZeroDivisionError)


async def test_a_reader_that_is_gone_ends_the_session() -> None:
    """Answers that nobody takes do not pile up."""
    near, far = pipe()
    session = start(StreamSession(far, Never(), forever).serve())
    await settle()
    near.cut()
    await asyncio.wait([session], timeout=WAIT_S)
    assert isinstance(session.exception(), TransportError)


async def test_a_batch_leaves_in_frames_that_fit_and_its_shared_part_is_encoded_once() -> None:
    """2,500 waiters of one batch: all of them are answered, each once, by the same text."""
    async with bench() as made:
        near, far = pipe()
        session = start(StreamSession(far, made.batcher, forever).serve())
        early = await made.in_flight()
        orders = [QuoteOrder(pending=a_request(f"t{number // 1000}")) for number in range(2500)]
        for frame in frames_of([encode_order(number, order) for number, order in enumerate(orders)], ORDER_LIMIT):
            await near.send(frame)
        await settle(20)
        assert made.batcher.waiting == 2501
        made.quoter.let_go()
        await within([early])
        lines: list[str] = []
        async with asyncio.timeout(WAIT_S):
            while sum(len(json.loads(line)["proofs"]) for line in lines) < 2500:
                lines += lines_of(await near.receive() or "", ANSWER_LIMIT)
        answered = [entry["id"] for line in lines for entry in json.loads(line)["proofs"]]
        assert sorted(answered) == list(range(2500))
        assert len({line.partition(',"proofs"')[0] for line in lines}) == 1
        near.close()
        await within([session])


class DeafPipe(Pipe):
    """An end whose peer does not read: `send` stays in it until the connection is given up."""

    def __init__(self) -> None:
        super().__init__()
        self.gives_up = asyncio.Event()

    async def send(self, text: str) -> None:
        await self.gives_up.wait()
        raise PeerUnreachable("the peer did not read")


async def test_a_provider_verifier_that_does_not_read_holds_nobody_of_another() -> None:
    """The batch that both share is answered on the other stream; then its session ends, and its waiters leave."""
    async with bench() as made:
        deaf, (near, far) = DeafPipe(), pipe()
        held = start(StreamSession(deaf, made.batcher, forever).serve())
        session = start(StreamSession(far, made.batcher, forever).serve())
        early = await made.in_flight()
        deaf._inbox.put_nowait(encode_order(1, QuoteOrder(pending=a_request("deaf"))))
        await near.send(encode_order(1, QuoteOrder(pending=a_request("reads"))))
        await settle()
        made.quoter.let_go()
        await within([early])
        async with asyncio.timeout(WAIT_S):
            answer = parse_answer(await near.receive() or "")
        assert isinstance(answer, BatchLine)
        made.quoter.hold()
        deaf._inbox.put_nowait(encode_order(2, QuoteOrder(pending=a_request("deaf"))))
        deaf._inbox.put_nowait(encode_order(3, QuoteOrder(pending=a_request("deaf"))))
        await settle()
        assert made.batcher.waiting == 2
        deaf.gives_up.set()
        await asyncio.wait([held], timeout=WAIT_S)
        assert isinstance(held.exception(), PeerUnreachable)
        assert made.batcher.waiting == 0
        made.quoter.let_go()
        near.close()
        await within([session])


async def test_orders_of_one_frame_are_each_answered_or_refused() -> None:
    """One that is malformed keeps no other from being carried out."""
    async with bench() as made:
        near, far = pipe()
        session = start(StreamSession(far, made.batcher, forever).serve())
        good = [encode_order(number, QuoteOrder(pending=a_request())) for number in (1, 3)]
        await near.send("\n".join([good[0], '{"id":2,"op":"sign"}', good[1]]))
        answered: dict[int, bool] = {}
        async with asyncio.timeout(WAIT_S):
            while len(answered) < 3:
                for line in lines_of(await near.receive() or "", ANSWER_LIMIT):
                    answer = parse_answer(line)
                    answered |= dict.fromkeys(answer.proofs, True) if isinstance(answer, BatchLine) else {}
                    answered |= {answer.number: False} if isinstance(answer, ErrorLine) else {}
        assert answered == {1: True, 2: False, 3: True}
        near.close()
        await within([session])


async def test_stopping_sends_the_last_answers_first() -> None:
    """Waiters that the stop releases still learn why; then the session ends."""
    async with bench() as made:
        near, far = pipe()
        session = StreamSession(far, made.batcher, forever)
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
    session = StreamSession(far, Never(), forever)
    task = start(session.serve())
    await near.send(encode_order(1, IdentityOrder()))
    await settle()
    async with asyncio.timeout(WAIT_S):
        await session.stop()
        await task
