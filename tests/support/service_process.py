"""A service of the harness in a process of its own, as ``harness serve`` runs it; a test kills, stops and limits it."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from harness.config import Settings, dump
from harness.errors import HarnessError
from harness.peer import PeerClient

START_S = 120.0
STOP_S = 30.0
"""Every service stops within this time when it is told to."""


def free_port() -> int:
    """A port where nobody listens now."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


class ServiceProcess:
    """One service.

    Args:
        service: its name.
        settings: written to a file in ``folder``.
        probe: somebody whom it answers ``GET /version``.
        folder: for settings and log.
    """

    def __init__(self, service: str, settings: Settings, probe: PeerClient, folder: Path) -> None:
        self._service = service
        self._config = folder / f"{service}.yml"
        self._log = folder / f"{service}.log"
        self._probe = probe
        self._child: asyncio.subprocess.Process | None = None
        dump(settings, self._config)

    @property
    def log(self) -> str:
        """What it has said so far, in all its runs."""
        return self._log.read_text()

    async def start(self) -> None:
        """Starts it, and waits until it answers."""
        child = await self._spawn()
        async with asyncio.timeout(START_S):
            while True:
                try:
                    await self._probe.get("/version")
                except HarnessError:
                    assert child.returncode is None, self.log[-2000:]
                    await asyncio.sleep(0.05)
                else:
                    return

    async def refused(self) -> tuple[int, str]:
        """Starts it in vain: its exit code, and the sentence that it says."""
        child = await self._spawn()
        async with asyncio.timeout(START_S):
            code = await child.wait()
        return code, next(line for line in self.log.splitlines() if line.startswith("harness: "))

    async def kill(self) -> None:
        """Ends it at once: it has no chance to do anything."""
        await self._end(signal.SIGKILL, -signal.SIGKILL)

    async def stop(self) -> None:
        """Tells it to stop; it must do so in time and in order."""
        await self._end(signal.SIGTERM, 0)

    def limit_files(self, size: int | None) -> None:
        """Bounds what it may write to any file, as a full disk does; None: no bound any more."""
        assert self._child is not None
        _, hard = resource.prlimit(self._child.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(self._child.pid, resource.RLIMIT_FSIZE, (hard if size is None else size, hard))

    async def _spawn(self) -> asyncio.subprocess.Process:
        descriptor = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            self._child = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "harness", "serve", self._service, "--config", str(self._config)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=descriptor,
                stderr=descriptor,
            )
        finally:
            os.close(descriptor)
        return self._child

    async def _end(self, number: signal.Signals, code: int) -> None:
        child, self._child = self._child, None
        assert child is not None
        assert child.returncode is None, f"it ended by itself: {self.log[-2000:]}"
        child.send_signal(number)
        try:
            async with asyncio.timeout(STOP_S):
                assert await child.wait() == code, self.log[-2000:]
        except TimeoutError:
            child.kill()
            await child.wait()
            raise AssertionError(f"it did not stop within {STOP_S:g} s") from None

    async def close(self) -> None:
        """Ends it if it still runs."""
        child, self._child = self._child, None
        if child is not None and child.returncode is None:
            child.kill()
            await child.wait()


@asynccontextmanager
async def serving(process: ServiceProcess) -> AsyncIterator[ServiceProcess]:
    """A service that runs; afterwards it is ended, however it stands."""
    try:
        await process.start()
        yield process
    finally:
        await process.close()
