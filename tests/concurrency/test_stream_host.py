"""The host agent's end of the stream alone: what it answers, refuses and sends together."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

import pytest

from harness.errors import HarnessError, MalformedMessage, MessageTooLarge, TransportError
from harness.provider.batch import PendingQuote
from harness.provider.batcher import Answer
from harness.provider.stream import IdentityOrder, Order, QuoteOrder, encode_order
from harness.provider.stream_host import StreamSession, frames
from tests.support.batching import WAIT_S, settle, within
from tests.support.bench import bench
from tests.support.channels import pipe
from tests.support.pendings import a_request

T = TypeVar("T")


def start(call: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    return asyncio.create_task(call)


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
