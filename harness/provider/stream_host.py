"""The host agent's end of the stream: orders of one connection in, answers out.

Invariants:
    1. Each order is answered once, or not at all if it was cancelled or the connection is gone; then nothing of it
       stays behind: its waiter leaves the pool.
    2. Answers that are there at the same time leave in one frame, those of one batch with the part that they share once
       (up to the limits of `stream_answers`); it is encoded once, also where its answers come in several turns.
    3. A frame that cannot be answered under an id, and an id that is still in use, end the connection.

Owner: the task that serves the connection.

Spec: DESIGN 4; docs/protocol.md, stream.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping

from harness.errors import HarnessError, MalformedMessage, MessageTooLarge
from harness.messages import compact, encode_shared, proof_text
from harness.metrics import OTHER, Metrics
from harness.provider.batch import PendingQuote
from harness.provider.batcher import Answer, SharedAnswer
from harness.provider.stream import (
    ORDER_LIMIT,
    ActivateOrder,
    CancelOrder,
    CertifyOrder,
    Channel,
    IdentityOrder,
    Order,
    QuoteOrder,
    frames_of,
    lines_of,
    open_order,
    parse_order,
)
from harness.provider.stream_answers import ANSWER_LIMIT, encode_batch, encode_error, encode_result

FLUSH_S = 0.5
_CALLS: Mapping[type, str] = {
    QuoteOrder: "stream quote",
    IdentityOrder: "stream identity",
    ActivateOrder: "stream activate",
    CertifyOrder: "stream certify",
}


Quotes = Callable[[PendingQuote], Awaitable[Answer]]
Others = Callable[[Order], Awaitable[Mapping[str, object]]]
Outgoing = tuple[int, Answer | Mapping[str, object] | HarnessError]


class StreamSession:
    """One connection of a provider verifier.

    Args:
        channel: the connection.
        quotes: answers requests for a quote.
        others: answers the orders of enrolment.
        metrics: count the orders, as ``stream quote`` and so on.
    """

    def __init__(self, channel: Channel, quotes: Quotes, others: Others, metrics: Metrics | None = None) -> None:
        self._channel = channel
        self._quotes = quotes
        self._others = others
        self._metrics = metrics or Metrics("host-agent")
        self._running: dict[int, asyncio.Task[None]] = {}
        self._outbox: asyncio.Queue[Outgoing | None] = asyncio.Queue()  # None: the last one has been put

    async def serve(self) -> None:
        """Serves until the peer closes, `stop` was called, or the connection is gone.

        Raises:
            MalformedMessage: a frame without a usable id, or an id in use; the caller closes the connection.
            MessageTooLarge: a frame above its limit; likewise.
            TransportError: the connection is gone.

        *Cancellation:* everything that this connection waits for is cancelled.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                halves = {tasks.create_task(self._write()), tasks.create_task(self._read(tasks))}
                await asyncio.wait(halves, return_when=asyncio.FIRST_COMPLETED)
                for task in (*halves, *self._running.values()):
                    task.cancel()
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from failures

    async def stop(self) -> None:
        """Ends `serve` when the orders in work are answered, and after `FLUSH_S` in any case.

        *Cancellation:* the session goes on.
        """
        if self._running:
            await asyncio.wait(self._running.values(), timeout=FLUSH_S)
        self._outbox.put_nowait(None)

    async def _read(self, tasks: asyncio.TaskGroup) -> None:
        while (text := await self._channel.receive()) is not None:
            for line in lines_of(text, ORDER_LIMIT):
                self._accept(line, tasks)

    def _accept(self, line: str, tasks: asyncio.TaskGroup) -> None:
        number, members = open_order(line)
        try:
            order = parse_order(members)
        except (MalformedMessage, MessageTooLarge) as error:
            self._metrics.ended(f"stream {OTHER}", 0.0, error)
            self._outbox.put_nowait((number, error))
            return
        running = self._running.get(number)
        if isinstance(order, CancelOrder):
            if running is not None:
                running.cancel()
        elif running is not None:
            raise MalformedMessage(f"order {number} is still in work")
        else:
            task = self._running[number] = tasks.create_task(self._work(number, order))
            task.add_done_callback(lambda _, number=number: self._running.pop(number))  # type: ignore[misc]

    async def _work(self, number: int, order: Order) -> None:
        try:
            with self._metrics.call(_CALLS[type(order)]):
                answer: Answer | Mapping[str, object] = (
                    await self._quotes(order.pending) if isinstance(order, QuoteOrder) else await self._others(order)
                )
            self._outbox.put_nowait((number, answer))
        except HarnessError as error:
            self._outbox.put_nowait((number, error))

    async def _write(self) -> None:
        texts = _SharedTexts()
        while True:
            outgoing = [await self._outbox.get()]
            while not self._outbox.empty():  # a batch releases its waiters in one step of the loop
                outgoing.append(self._outbox.get_nowait())
            lines = answer_lines([answer for answer in outgoing if answer is not None], texts.of)
            for frame in frames_of(lines, ANSWER_LIMIT):
                await self._channel.send(frame)
            if None in outgoing:
                return


class _SharedTexts:
    """The shared part of the last batch as text: its answers may come in several turns of the loop."""

    def __init__(self) -> None:
        self._last: tuple[SharedAnswer, str] | None = None

    def of(self, shared: SharedAnswer) -> str:
        if self._last is None or self._last[0] is not shared:
            self._last = (shared, compact(encode_shared_answer(shared)))
        return self._last[1]


def answer_lines(outgoing: Iterable[Outgoing], text_of: Callable[[SharedAnswer], str]) -> Iterator[str]:
    """Lines for these answers: those of one batch together, all others one by one.

    Args:
        outgoing: ids and their answers.
        text_of: the part that all members of a batch share, as compact JSON.
    """
    batches: dict[int, tuple[SharedAnswer, list[tuple[int, str]]]] = {}
    for number, answer in outgoing:
        if isinstance(answer, Answer):
            _, proofs = batches.setdefault(id(answer.shared), (answer.shared, []))
            proofs.append((number, proof_text(answer.proof)))
        elif isinstance(answer, HarnessError):
            yield encode_error(number, answer)
        else:
            yield encode_result(number, answer)
    for shared, proofs in batches.values():
        yield from encode_batch(text_of(shared), proofs)


def encode_shared_answer(shared: SharedAnswer) -> Mapping[str, object]:
    """The part of an answer that all members of its batch are given (DESIGN 3.3)."""
    quote = shared.quote
    return encode_shared(
        host_id=quote.host_id,
        attest=quote.attest,
        signature=quote.signature,
        pcrs=quote.pcrs,
        batch_id=shared.batch_id,
        sealed_at=shared.sealed_at.strftime("%Y-%m-%dT%H:%M:%SZ"),  # whole seconds: more would tell of other tenants
    )
