"""Runs the load generator and the yardstick, each in a process of its own.

Invariants:
    1. Whatever comes, the process is ended and waited for.

Owner: the task that entered the context.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path

from harness.bench_bare import BareSettings
from harness.bench_orders import Order, Results, read_results, write
from harness.config import TlsSettings
from harness.errors import SimulationError

_OPEN_S = 180.0
_VERIFY_S = 180.0
_STOP_S = 10.0
_LINE = 4096


class Loader:
    """One run of the load generator; an async context manager. Inside, its connections are open.

    Args:
        order: what to do; its file is beside the results.
    """

    def __init__(self, order: Order) -> None:
        self._order = order
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Loader:
        path = self._order.result.with_suffix(".order")
        await asyncio.to_thread(write, self._order, path)
        self._process = await started("harness.bench_load", path)
        try:
            await self._said("ready", _OPEN_S)
        except BaseException:
            await ended(self._process)
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._process is not None:
            await ended(self._process)

    def go(self) -> None:
        """Lets it begin."""
        self._tell()

    async def done(self) -> None:
        """Returns when the load is over; its connections are still open.

        Raises:
            SimulationError: it ended by itself, or not in time.

        *Cancellation:* the load goes on until the context is left.
        """
        await self._said("done", self._order.drain_s * 40 + _OPEN_S)

    async def results(self) -> Results:
        """Closes the connections, and gives what came of it, verified.

        Raises:
            SimulationError: it ended by itself, or not in time.

        *Cancellation:* leave the context.
        """
        self._tell()
        process = self._running()
        try:
            async with asyncio.timeout(_VERIFY_S):
                code = await process.wait()
        except TimeoutError as error:
            raise SimulationError("the load generator did not end in time") from error
        if code != 0:
            raise SimulationError(f"the load generator ended with code {code}")
        return await asyncio.to_thread(read_results, self._order.result)

    def _running(self) -> asyncio.subprocess.Process:
        if self._process is None:
            raise RuntimeError("enter the context first")
        return self._process

    def _tell(self) -> None:
        stdin = self._running().stdin
        if stdin is not None:
            stdin.write(b"\n")

    async def _said(self, word: str, within_s: float) -> None:
        process = self._running()
        line = await said_line(process, within_s)
        if line != word:
            raise SimulationError(f"the load generator did not get {word}: it ended with code {await process.wait()}")


async def run_load(order: Order) -> Results:
    """One load from its begin to its verified end.

    Raises:
        SimulationError: it could not be made, or an answer was not acceptable.

    *Cancellation:* the process is ended.
    """
    async with Loader(order) as loader:
        loader.go()
        await loader.done()
        results = await loader.results()
    if results.wrong:
        raise SimulationError(f"answers were not accepted: {'; '.join(results.wrong)}")
    return results


class BareServer:
    """The yardstick; an async context manager.

    Args:
        folder: for its settings.
        body_bytes: size of its answer's body.
        tls: certificate and authorities; None: plain TCP.
    """

    def __init__(self, folder: Path, *, body_bytes: int, tls: TlsSettings | None) -> None:
        self._folder = folder
        self._settings = BareSettings(body_bytes=body_bytes, tls=tls)
        self.port = 0

    async def __aenter__(self) -> BareServer:
        path = self._folder / "bare.json"
        path.write_text(self._settings.model_dump_json(), encoding="utf-8")
        self._process = await started("harness.bench_bare", path)
        try:
            self.port = _port(await said_line(self._process, _OPEN_S))
        except BaseException:
            await ended(self._process)
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await ended(self._process)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def release(self) -> None:
        """Lets it answer what waits."""
        os.kill(self._process.pid, signal.SIGUSR1)


def _port(said: str) -> int:
    if not said.isdecimal():
        raise SimulationError("the bare server did not start")
    return int(said)


async def started(module: str, *arguments: str | Path) -> asyncio.subprocess.Process:
    """Starts a module as a process of its own, with pipes to speak through. *Cancellation:* it may have started."""
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", module, *map(str, arguments)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=_LINE,
        start_new_session=True,  # a Ctrl-C at the terminal is the benchmark's: it ends them in order
    )


async def said_line(process: asyncio.subprocess.Process, within_s: float) -> str:
    """What a process says next; empty when it ended.

    Raises:
        SimulationError: it said nothing in time.

    *Cancellation:* the line is lost.
    """
    if process.stdout is None:
        raise RuntimeError("the process was started with a pipe")
    try:
        async with asyncio.timeout(within_s):
            return (await process.stdout.readline()).decode().strip()
    except TimeoutError as error:
        raise SimulationError(f"a process of the benchmark said nothing within {within_s:g} s") from error


async def ended(process: asyncio.subprocess.Process) -> None:
    """Ends a process, by force if it must be. *Cancellation:* it may still run."""
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(_STOP_S):
            await process.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
