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
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from typing import Protocol

from harness.errors import HarnessError, MalformedMessage, MessageTooLarge
from harness.messages import compact, encode_shared, proof_text
from harness.metrics import OTHER, Metrics
from harness.provider.batch import Answer, Deliver, Outcome, PendingQuote, SharedAnswer, Waiter
from harness.provider.outbox import Outbox
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
_QUOTE = "stream quote"
_CALLS: Mapping[type, str] = {
    IdentityOrder: "stream identity",
    ActivateOrder: "stream activate",
    CertifyOrder: "stream certify",
}


class Quotes(Protocol):
    """Who answers requests for a quote: `desk.Desk`, and behind it `batcher.Batcher`."""

    def enter(self, pending: PendingQuote, deliver: Deliver) -> Waiter:
        """Lets a request wait; its outcome is delivered once, later. Raises a HarnessError where it may not."""

    def leave(self, waiter: Waiter) -> None:
        """Takes it back: nothing is delivered any more."""


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
        self._waiters: dict[int, tuple[Waiter, float]] = {}  # with the moment in which the order came
        self._running: dict[int, asyncio.Task[None]] = {}  # orders of enrolment
        self._outbox: Outbox[Outgoing | None] = Outbox()  # None: the last one has been put

    async def serve(self) -> None:
        """Serves until the peer closes, `stop` was called, or the connection is gone.

        Raises:
            MalformedMessage: a frame without a usable id, or an id in use; the caller closes the connection.
            MessageTooLarge: a frame above its limit; likewise.
            TransportError: the connection is gone.

        *Cancellation:* everything that this connection waits for is taken back.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                halves = {tasks.create_task(self._write()), tasks.create_task(self._read(tasks))}
                await asyncio.wait(halves, return_when=asyncio.FIRST_COMPLETED)
                for task in (*halves, *self._running.values()):
                    task.cancel()
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from failures
        finally:
            for number in list(self._waiters):
                self._take_back(number)

    async def stop(self) -> None:
        """Ends `serve` when the orders of enrolment in work are answered, and after `FLUSH_S` in any case.

        Requests for a quote are not waited for: whoever answers them has stopped, and so released them, before.

        *Cancellation:* the session goes on.
        """
        if self._running:
            await asyncio.wait(self._running.values(), timeout=FLUSH_S)
        self._outbox.put(None)

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
            self._outbox.put((number, error))
            return
        if isinstance(order, CancelOrder):
            self._cancel(number)
        elif number in self._waiters or number in self._running:
            raise MalformedMessage(f"order {number} is still in work")
        elif isinstance(order, QuoteOrder):
            self._let_wait(number, order.pending)
        else:
            task = self._running[number] = tasks.create_task(self._work(number, order))
            task.add_done_callback(lambda _, number=number: self._running.pop(number))  # type: ignore[misc]

    # --- requests for a quote: no task of their own ---------------------------------------------------------------

    def _let_wait(self, number: int, pending: PendingQuote) -> None:
        begun_s = time.perf_counter()

        def deliver(outcome: Outcome) -> None:
            self._waiters.pop(number, None)
            error = outcome if isinstance(outcome, HarnessError) else None
            self._metrics.ended(_QUOTE, time.perf_counter() - begun_s, error)
            self._outbox.put((number, outcome))

        try:
            self._waiters[number] = (self._quotes.enter(pending, deliver), begun_s)
        except HarnessError as error:
            deliver(error)

    def _take_back(self, number: int) -> None:
        waiter, begun_s = self._waiters.pop(number)
        self._quotes.leave(waiter)
        self._metrics.ended(_QUOTE, time.perf_counter() - begun_s, asyncio.CancelledError())

    def _cancel(self, number: int) -> None:
        if number in self._waiters:
            self._take_back(number)
        elif number in self._running:
            self._running[number].cancel()

    # --- orders of enrolment --------------------------------------------------------------------------------------

    async def _work(self, number: int, order: Order) -> None:
        try:
            with self._metrics.call(_CALLS[type(order)]):
                answer = await self._others(order)
            self._outbox.put((number, answer))
        except HarnessError as error:
            self._outbox.put((number, error))

    # --- answers --------------------------------------------------------------------------------------------------

    async def _write(self) -> None:
        texts = _SharedTexts()
        while True:
            outgoing = await self._outbox.take()
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
