"""The host agent's end of the stream: orders of one connection in, answers out.

Invariants:
    1. Each order is answered once, or not at all if it was cancelled or the connection is gone; then nothing of it
       stays behind: its waiter leaves the pool.
    2. Answers that one batch gave at the same time leave in one frame (of up to `PROOFS_PER_FRAME` proofs).
    3. A frame that cannot be answered under an id, and an id that is still in use, end the connection.

Owner: the task that serves the connection.

Spec: DESIGN 4; docs/protocol.md, stream.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence

from harness.errors import HarnessError, MalformedMessage, MessageTooLarge
from harness.messages import encode_proof, encode_shared
from harness.metrics import OTHER, Metrics
from harness.provider.batch import PendingQuote
from harness.provider.batcher import Answer, SharedAnswer
from harness.provider.stream import (
    PROOFS_PER_FRAME,
    ActivateOrder,
    CancelOrder,
    CertifyOrder,
    Channel,
    IdentityOrder,
    Order,
    QuoteOrder,
    encode_batch,
    encode_error,
    encode_result,
    open_order,
    parse_order,
)

FLUSH_S = 0.5
_CALLS: Mapping[type, str] = {
    QuoteOrder: "stream quote",
    IdentityOrder: "stream identity",
    ActivateOrder: "stream activate",
    CertifyOrder: "stream certify",
}


Quotes = Callable[[PendingQuote], Awaitable[Answer]]
Others = Callable[[Order], Awaitable[Mapping[str, object]]]
_Outgoing = tuple[int, Answer | Mapping[str, object] | HarnessError]


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
        self._outbox: asyncio.Queue[_Outgoing | None] = asyncio.Queue()  # None: the last one has been put

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
            number, members = open_order(text)
            try:
                order = parse_order(members)
            except (MalformedMessage, MessageTooLarge) as error:
                self._metrics.ended(f"stream {OTHER}", 0.0, error)
                self._outbox.put_nowait((number, error))
                continue
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
        while True:
            outgoing = [await self._outbox.get()]
            while not self._outbox.empty():  # a batch releases its waiters in one step of the loop
                outgoing.append(self._outbox.get_nowait())
            for text in frames([answer for answer in outgoing if answer is not None]):
                await self._channel.send(text)
            if None in outgoing:
                return


def frames(outgoing: Sequence[_Outgoing]) -> Iterator[str]:
    """Frames for these answers: those of one batch together, all others one by one."""
    batches: dict[int, tuple[SharedAnswer, list[tuple[int, Mapping[str, object]]]]] = {}
    for number, answer in outgoing:
        if isinstance(answer, Answer):
            _, proofs = batches.setdefault(id(answer.shared), (answer.shared, []))
            proofs.append((number, encode_proof(answer.proof)))
        elif isinstance(answer, HarnessError):
            yield encode_error(number, answer)
        else:
            yield encode_result(number, answer)
    for shared, proofs in batches.values():
        encoded = encode_shared_answer(shared)
        for first in range(0, len(proofs), PROOFS_PER_FRAME):
            yield encode_batch(encoded, proofs[first : first + PROOFS_PER_FRAME])


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
