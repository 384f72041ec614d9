"""The provider verifier's end of the stream to one host: kept open, multiplexed, and honest when it breaks.

::

    link = HostLink(connect)
    task = tasks.create_task(link.run())
    results = await link.quote(pending)

Invariants:
    1. Each call ends: with its answer, a typed error, or its own deadline. When the connection breaks, everything that
       waits on it is released with PeerUnreachable at once.
    2. An order is sent on the connection that was open when it was given, never again on the next one: the host agent
       must not sign twice what was asked once.
    3. Whoever gives up sends a cancel, so that the host agent does not work for nobody.

Owner: `run` owns the connection; callers only add to its outbox.

Spec: DESIGN 4 (one multiplexed stream per host).
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace

from harness.errors import (
    DeadlineExceeded,
    HarnessError,
    PeerUnreachable,
    PoolFull,
    ProtocolError,
    ShuttingDown,
    TransportError,
    WouldBeLate,
)
from harness.health import OK
from harness.messages import ResultsText
from harness.provider.batch import PendingQuote
from harness.provider.clock import Clock, SystemClock
from harness.provider.deadlines import Deadlines
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
    encode_order,
    frames_of,
    lines_of,
)
from harness.provider.stream_answers import (
    ANSWER_LIMIT,
    AnswerLine,
    BatchLine,
    ErrorLine,
    ResultLine,
    parse_answer,
)

Results = Mapping[str, object]

_CONNECT_WAIT_S = 2.0  # how long a call waits for a link that is just being opened
_FIRST_DELAY_S, _LAST_DELAY_S = 0.1, 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkBounds:
    """What one host may cost.

    Args:
        quote_s: seconds for a quote, however much longer its tenant would wait (DESIGN 3.5, check 1).
        enrol_s: seconds for an order of enrolment.
        waiting: calls at a time; twice the default pool, so that the host agent's own bounds come first.
    """

    quote_s: float = 30.0
    enrol_s: float = 30.0
    waiting: int = 1 << 17


Connect = Callable[[], AbstractAsyncContextManager[Channel]]
"""Opens a connection; raises TransportError when it cannot."""


class HostLink:
    """One host, as the provider verifier reaches it.

    Args:
        connect: opens a connection.
        clock: for the pauses between tries, and the time that a call has left.
        rng: jitter of those pauses.
        bounds: deadlines, and calls at a time.
    """

    def __init__(
        self,
        connect: Connect,
        *,
        clock: Clock | None = None,
        rng: random.Random | None = None,
        bounds: LinkBounds | None = None,
    ) -> None:
        self._connect = connect
        self._bounds = bounds or LinkBounds()
        self._clock = clock or SystemClock()
        self._rng = rng or random.SystemRandom()
        self._numbers = itertools.count(1)
        self._waiting: dict[int, _Call] = {}
        self._deadlines = Deadlines(self._clock, lambda: self._waiting.values(), _expire)
        self._outbox: Outbox[str] | None = None  # of the open connection
        self._settled = asyncio.Event()  # the first try has ended, one way or the other
        self._fault = "not tried yet"
        self._closed = False

    @property
    def state(self) -> str:
        """``ok`` while the host agent is connected, else why it is not."""
        return OK if self._outbox is not None else f"not connected: {self._fault}"

    # --- orders -----------------------------------------------------------------------------------------------------

    async def quote(self, pending: PendingQuote) -> ResultsText:
        """What the tenant is answered: the batch's shared part with its own proof (DESIGN 3.3), as the host wrote it.

        Raises:
            PeerUnreachable: the host cannot be reached, or the connection broke.
            DeadlineExceeded: no answer in time, which is ``pending.wait_s`` from now.
            WouldBeLate: that time has passed while the link was being opened.
            HarnessError: what the host agent refused it with.

        *Cancellation:* the host agent is told.
        """
        if self._outbox is None:
            begun_s = self._clock.monotonic()
            await self._opened()
            left_s = pending.wait_s - (self._clock.monotonic() - begun_s)
            if left_s <= 0:
                raise WouldBeLate("the host agent was connected to only when no answer was of use any more")
            pending = replace(pending, wait_s=left_s)
        answer = await self._ask(QuoteOrder(pending=pending), min(pending.wait_s, self._bounds.quote_s))
        if not isinstance(answer, ResultsText):
            raise PeerUnreachable("the host agent answered a request for a quote with something else")
        return answer

    async def ask(self, order: IdentityOrder | ActivateOrder | CertifyOrder) -> Results:
        """Answer to an order of enrolment; raises, and is cancelled, like `quote`."""
        await self._opened()
        answer = await self._ask(order, self._bounds.enrol_s)
        if isinstance(answer, ResultsText):
            raise PeerUnreachable("the host agent answered an order of enrolment with a quote")
        return answer

    async def _ask(self, order: Order, deadline_s: float) -> Results | ResultsText:
        if len(self._waiting) >= self._bounds.waiting:
            raise PoolFull("too many requests wait for this host")
        outbox, number = self._usable(), next(self._numbers)
        call = self._waiting[number] = _Call(deadline_s, self._clock.monotonic() + deadline_s)
        self._deadlines.watch(call.due_s)
        outbox.put(encode_order(number, order))
        try:
            return await call.answer
        finally:
            if self._waiting.pop(number, None) is not None:
                outbox.put(encode_order(number, CancelOrder()))

    async def _opened(self) -> None:
        if self._closed:
            raise ShuttingDown("the host was removed, or the provider verifier is stopping")
        try:
            async with asyncio.timeout(_CONNECT_WAIT_S):
                await self._settled.wait()
        except TimeoutError as error:
            raise PeerUnreachable("the host agent is still being connected to") from error
        self._usable()

    def _usable(self) -> Outbox[str]:
        if self._outbox is None:
            raise PeerUnreachable(f"the host agent cannot be reached: {self._fault}")
        return self._outbox

    # --- the connection -----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keeps the connection open, with back-off between tries.

        *Cancellation:* the connection is closed and every waiter released with ShuttingDown.
        """
        delay_s = _FIRST_DELAY_S
        try:
            while True:
                begun_s = self._clock.monotonic()
                try:
                    async with self._connect() as channel:
                        await self._converse(channel)
                except (TransportError, ProtocolError) as error:
                    self._fault = error.detail
                self._release(lambda: PeerUnreachable(f"the connection to the host agent broke: {self._fault}"))
                self._settled.set()
                if self._clock.monotonic() - begun_s > _LAST_DELAY_S:
                    delay_s = _FIRST_DELAY_S  # it had worked for a while: this is a new fault
                await self._clock.sleep(delay_s * self._rng.uniform(0.5, 1.0))
                delay_s = min(delay_s * 2, _LAST_DELAY_S)
        finally:
            self._closed = True
            self._settled.set()
            self._deadlines.stop()
            self._release(lambda: ShuttingDown("the host was removed, or the provider verifier is stopping"))

    async def _converse(self, channel: Channel) -> None:
        """Sends and receives until the connection is gone; always ends with an error."""
        outbox = self._outbox = Outbox()
        self._settled.set()
        halves = {asyncio.create_task(_send(channel, outbox)), asyncio.create_task(self._receive(channel))}
        try:
            ended, _ = await asyncio.wait(halves, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._outbox = None
            for half in halves:
                half.cancel()
            await asyncio.gather(*halves, return_exceptions=True)
        for half in ended:
            half.result()

    async def _receive(self, channel: Channel) -> None:
        while (text := await channel.receive()) is not None:
            for line in lines_of(text, ANSWER_LIMIT):
                self._deliver(parse_answer(line))
        raise PeerUnreachable("the host agent closed the connection")

    def _deliver(self, line: AnswerLine) -> None:
        match line:
            case BatchLine():
                for number, results in line.results():
                    self._settle(number, results)
            case ResultLine(number=number, result=result):
                self._settle(number, result)
            case ErrorLine(number=number, error=error):
                self._settle(number, error)

    def _settle(self, number: int, outcome: Results | ResultsText | HarnessError) -> None:
        call = self._waiting.pop(number, None)
        if call is not None:  # else given up meanwhile, or a second answer
            call.settle(outcome)

    def _release(self, error: Callable[[], HarnessError]) -> None:
        waiting, self._waiting = self._waiting, {}
        for call in waiting.values():
            call.settle(error())


class _Call:
    """A call that waits for its answer, until ``due_s`` at the longest; it has no task and no timer of its own here."""

    __slots__ = ("answer", "deadline_s", "due_s")

    def __init__(self, deadline_s: float, due_s: float) -> None:
        self.deadline_s = deadline_s
        self.due_s = due_s
        self.answer: asyncio.Future[Results | ResultsText] = asyncio.get_running_loop().create_future()

    def settle(self, outcome: Results | ResultsText | HarnessError) -> None:
        if self.answer.done():
            return
        if isinstance(outcome, HarnessError):
            self.answer.set_exception(outcome)
        else:
            self.answer.set_result(outcome)


def _expire(call: _Call) -> None:
    call.settle(DeadlineExceeded(f"the host agent gave no answer within {call.deadline_s:.3g} s"))


async def _send(channel: Channel, outbox: Outbox[str]) -> None:
    while True:
        for frame in frames_of(await outbox.take(), ORDER_LIMIT):
            await channel.send(frame)
