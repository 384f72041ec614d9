"""The load generator, a process of its own: ``python -m harness.bench_load ORDER``.

It opens its connections and says ``ready``; told to go on, it makes the load and says ``done``; then it verifies the
answers, outside of the measured time, and writes the results.

Invariants:
    1. In an open loop a response time counts from the time that was drawn for the request, whenever it could be sent:
       a service that is slow cannot make its own load lighter.
    2. Whatever the service does, the run ends: what is not answered by the deadline is counted as that.

Owner: one event loop.

Spec: docs/performance.md, method.
"""

from __future__ import annotations

import asyncio
import gc
import json
import random
import resource
import ssl
import statistics
import sys
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path

from harness.bench_client import GONE, Connection, Target, open_connections
from harness.bench_orders import Burst, Closed, Load, Order, Outcome, Poisson, Results, read_order, write
from harness.bench_requests import RequestMaker, maker_of, verified
from harness.config import TlsSettings
from harness.errors import HarnessError
from harness.tls import client_context

UNANSWERED = -1
_HEAD_START_S = 0.5


class Running:
    """One load under way: what was sent when, and what came of it.

    Args:
        load: what to do.
        make: makes requests.
        seed: of arrival times.
    """

    def __init__(self, load: Load, make: RequestMaker, seed: int) -> None:
        self.load = load
        self.make = make
        self.connections: list[Connection] = []
        self.scheduled: list[float] = []
        self.ended: list[float] = []
        self.status: list[int] = []
        self.bodies: list[bytes] = []
        self.sent: list[tuple[int, int]] = []
        """Tenant and number of the nonce of each request."""
        self._random = random.Random(seed)  # noqa: S311 - arrival times, repeatable on purpose
        self._idle: deque[Connection] = deque()
        self._queue: deque[int] = deque()
        self._out = 0
        self._changed = asyncio.Event()
        self._again: Callable[[Connection], None] = self._rest
        self.begin_s = 0.0
        self.end_s = 0.0

    async def open(self, target: Target) -> None:
        """Opens the connections. Raises PeerUnreachable. *Cancellation:* the process is expected to end."""
        tenants = [self.load.tenants[place % len(self.load.tenants)] for place in range(self.load.connections)]
        bounded = isinstance(self.load, Closed)
        self.connections = await open_connections(target, tenants, self._answered, refused_is_fine=bounded)
        self._idle.extend(self.connections)

    async def run(self, drain_s: float) -> None:
        """Makes the load; returns when every answer has come, or the deadline has passed.

        *Cancellation:* what is out stays unanswered.
        """
        self.begin_s = asyncio.get_running_loop().time()
        match self.load:
            case Poisson():
                await self._poisson(self.load)
            case Closed():
                await self._closed(self.load)
            case Burst():
                await self._burst(self.load, drain_s)
        await self._until_answered(drain_s)
        self.end_s = asyncio.get_running_loop().time()

    async def _poisson(self, load: Poisson) -> None:
        loop = asyncio.get_running_loop()
        due = self.begin_s
        last = self.begin_s + load.seconds
        while (due := due + self._random.expovariate(load.rate)) < last:
            if due > loop.time():
                await asyncio.sleep(due - loop.time())
            self._send(self._new(due))

    async def _closed(self, load: Closed) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(load.after_s)
        self.begin_s = loop.time()
        last = self.begin_s + load.seconds

        def again(connection: Connection) -> None:
            if len(self.scheduled) < load.requests and loop.time() < last and connection.open:
                self._send_on(connection, self._new(loop.time()))
            else:
                self._changed.set()

        self._again = again
        for connection in self.connections:
            again(connection)
        while loop.time() < last and len(self.scheduled) < load.requests and self._out:
            self._changed.clear()
            try:
                async with asyncio.timeout(max(0.0, last - loop.time())):
                    await self._changed.wait()
            except TimeoutError:
                return

    async def _burst(self, load: Burst, drain_s: float) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(load.rounds):
            waiting = len(self.connections)
            if load.first_alone:
                waiting -= 1
                self._send(self._new(loop.time()))
                await asyncio.sleep(_HEAD_START_S)
            for _ in range(waiting):
                self._send(self._new(loop.time()))
            await self._until_answered(drain_s)

    async def _until_answered(self, drain_s: float) -> None:
        try:
            async with asyncio.timeout(drain_s):
                while self._out:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return

    def _new(self, due: float) -> int:
        self.scheduled.append(due)
        self.ended.append(0.0)
        self.status.append(UNANSWERED)
        self.bodies.append(b"")
        self.sent.append((0, 0))
        self._out += 1
        return len(self.scheduled) - 1

    def _send(self, number: int) -> None:
        if self._idle:
            self._send_on(self._idle.popleft(), number)
        else:
            self._queue.append(number)

    def _send_on(self, connection: Connection, number: int) -> None:
        request, nonce = self.make.request()
        self.sent[number] = (connection.tenant, nonce)
        connection.send(request, number)

    def _answered(self, connection: Connection, status: int, body: bytes) -> None:
        number = connection.tag
        self.ended[number] = asyncio.get_running_loop().time()
        self.status[number] = status
        self.bodies[number] = body
        self._out -= 1
        self._again(connection)
        if not self._out:
            self._changed.set()

    def _rest(self, connection: Connection) -> None:
        if not connection.open:
            return
        if self._queue:
            self._send_on(connection, self._queue.popleft())
        else:
            self._idle.append(connection)

    def outcome(self) -> Outcome:
        """What came of it."""
        pairs = zip(self.scheduled, self.ended, self.status, strict=True)
        return Outcome(
            begin_s=self.begin_s,
            end_s=self.end_s,
            scheduled_s=self.scheduled,
            latency_s=[ended - due if status != UNANSWERED else -1.0 for due, ended, status in pairs],
            status=self.status,
            refused=dict(Counter(map(_name, self.status, self.bodies)) - Counter({"": sys.maxsize})),
            connected=len(self.connections),
        )


def _name(status: int, body: bytes) -> str:
    """Name of a refusal; empty for an answer."""
    if status == 200:
        return ""
    if status in {GONE, UNANSWERED}:
        return "connection ended" if status == GONE else "not answered"
    try:
        return str(json.loads(body)["results"]["error"])
    except (ValueError, KeyError, TypeError):
        return f"status {status}"


def main() -> None:
    """Entry point of the process. Exit code 2 and a sentence when the load cannot be made."""
    try:
        asyncio.run(_run(read_order(Path(sys.argv[1]))))
    except HarnessError as error:
        print(f"harness: {error.detail}", file=sys.stderr)
        raise SystemExit(2) from error


async def _run(order: Order) -> None:
    make = maker_of(order)
    runs = [Running(load, make, order.seed + place) for place, load in enumerate(order.loads)]
    target = Target(host=order.host, port=order.port, contexts=_contexts(order))
    for run in runs:
        await run.open(target)
    print("ready", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    gc.collect()
    gc.freeze()
    gc.disable()  # answers are kept by the ten thousand, and none of them is garbage
    before = resource.getrusage(resource.RUSAGE_SELF)
    await asyncio.gather(*(run.run(order.drain_s) for run in runs))
    after = resource.getrusage(resource.RUSAGE_SELF)
    print("done", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    for connection in (connection for run in runs for connection in run.connections):
        connection.close()
    write(
        _results(order, runs, make, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime), order.result
    )


def _contexts(order: Order) -> Sequence[ssl.SSLContext | None]:
    if order.authority is None:
        return [None] * max(1, 1 + max(tenant for load in order.loads for tenant in load.tenants))
    authorities = {"server": order.authority}
    return [
        client_context(TlsSettings(certificate=certificate, key=key, authorities=authorities))
        for certificate, key in order.certificates
    ]


def _results(order: Order, runs: Sequence[Running], make: RequestMaker, cpu_s: float) -> Results:
    bodies = [len(body) for run in runs for status, body in zip(run.status, run.bodies, strict=True) if status == 200]
    count, wrong = verified(order, make, [(run.status, run.bodies, run.sent) for run in runs])
    return Results(
        outcomes=[run.outcome() for run in runs],
        verified=count,
        wrong=wrong,
        body_bytes=int(statistics.median(bodies)) if bodies else 0,
        client_cpu_s=cpu_s,
    )


if __name__ == "__main__":
    main()
