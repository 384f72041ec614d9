"""The lab's processes: services forked from one preloaded parent, each with its own log.

A Python process with all our libraries takes 60 to 80 MB and half a second to start; forked from a parent that has
them loaded it takes a few milliseconds and some 10 MB of its own (facts measured with PSS). The service is the same
as under ``harness serve``: the child calls `harness.serve.run`.

Invariants:
    1. A service ends when the process that asked for it ends, however that ends (it watches the parent's sentinel).
    2. A listening socket is bound before the service starts: a client that connects early waits, and is not refused.
    3. `stop` ends only processes that were started here, by PID file descriptor, and waits for them.
    4. Whether a process lives is asked of the kernel (pidfd): the parent that forks for us may die, and its word with
       it, while the services go on.

Owner: the lab (and the guest manager, which forks guest agents from the same parent).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import cast

from harness import events, serve
from harness.errors import HarnessError, SimulationError

PRELOADED = "harness.preload"
_SAFE_PATH = "PYTHONSAFEPATH"
_CHANGED = threading.Lock()
"""Of our environment: services are started by several threads, and each puts back what it found."""
_STOP_S = 5.0
_REPORT_S, _POLL_S = 0.5, 0.01


def warm_up() -> None:
    """Starts the preloaded parent, so that it loads while the caller still does other things."""
    multiprocessing.get_context("forkserver").set_forkserver_preload([PRELOADED])
    with _safe_path():
        forkserver.ensure_running()


@contextlib.contextmanager
def _safe_path() -> Iterator[None]:
    """What is started here does not import what lies in the folder where a person stands; we, and others, go on."""
    with _CHANGED:
        before = os.environ.get(_SAFE_PATH)
        os.environ[_SAFE_PATH] = "1"
        try:
            yield
        finally:
            if before is None:
                del os.environ[_SAFE_PATH]
            else:
                os.environ[_SAFE_PATH] = before


def end_parent() -> None:
    """Kills the preloaded parent, when it does not answer; services go on, and the next start makes a new one."""
    pid = getattr(forkserver._forkserver, "_forkserver_pid", None)
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


class ServiceProcess:
    """One forked service.

    Args:
        name: what people call it, unique in the lab.
        service: name for `harness.serve`.
        config: its settings file.
        log: where its output and events go, appended to.
    """

    def __init__(self, name: str, service: str, config: Path, log: Path) -> None:
        self.name = name
        self.log = log
        self._service = service
        self._config = config
        self._process: BaseProcess | None = None
        self._pidfd: int | None = None
        self._lock = threading.Lock()
        """Of the descriptor: a start, in another thread, closes the one before it."""

    def start(self, sock: socket.socket | None = None) -> None:
        """Forks the service, also after it has ended; it gets a duplicate of the socket.

        Raises:
            SimulationError: the parent that forks cannot be reached.
        """
        self._forget()
        context = multiprocessing.get_context("forkserver")
        self._process = context.Process(
            target=_serve_in_child, args=(self._service, self._config, sock, self.log), name=self.name
        )
        try:
            warm_up()
            self._process.start()
            self._pidfd = os.pidfd_open(cast(int, self._process.pid))
        except ProcessLookupError:
            self._pidfd = None  # it has ended already
        except (OSError, EOFError) as error:  # the parent was killed between two forks; the next try starts a new one
            self._process = None
            raise SimulationError(f"{self.name} cannot be started: {error or 'the forking parent is gone'}") from error

    @property
    def pid(self) -> int | None:
        """Process id; None before the start."""
        return self._process.pid if self._process else None

    @property
    def running(self) -> bool:
        """Whether the process was started and has not ended."""
        with self._lock:
            return self._pidfd is not None and not select.select([self._pidfd], [], [], 0)[0]

    @property
    def exit_code(self) -> int | None:
        """Exit code of the ended process, negative for a signal; None when nobody knows it any more."""
        process = self._process
        return process.exitcode if process is not None and not self.running else None

    def check(self) -> None:
        """Says so when the service is gone.

        Raises:
            SimulationError: it ended by itself; the message carries the end of its log.
        """
        if self._process is not None and not self.running:
            raise SimulationError(
                f"{self.name} ended with code {self.exit_code}: {last_line(self.log)} (log: {self.log})"
            )

    async def wait(self) -> int | None:
        """Exit code as soon as the process has ended, at once when it was never started; no deadline, for a watcher.

        *Cancellation:* the process goes on.
        """
        with self._watched() as own:
            if own is not None:
                await _readable(own)
                with contextlib.suppress(
                    TimeoutError
                ):  # the parent that forked it tells its code a moment later, or never
                    async with asyncio.timeout(_REPORT_S):
                        while self.exit_code is None:  # noqa: ASYNC110 - multiprocessing has no more than a poll
                            await asyncio.sleep(_POLL_S)
        return self.exit_code

    async def stop(self, deadline_s: float = _STOP_S) -> None:
        """Asks the service to end (SIGTERM), insists when that takes too long (SIGKILL), and waits for its end.

        What is started again meanwhile is another process, and left alone.

        *Cancellation:* the process is killed.
        """
        with self._watched() as own:
            if own is None:
                return
            try:
                _signal(own, signal.SIGTERM)
                async with asyncio.timeout(deadline_s):
                    await _readable(own)
            except TimeoutError:
                pass
            finally:
                _signal(own, signal.SIGKILL)
            await _readable(own)

    async def kill(self) -> None:
        """Kills the service, and waits for its end; does nothing when it does not run.

        *Cancellation:* the process is killed.
        """
        with self._watched() as own:
            if own is not None:
                _signal(own, signal.SIGKILL)
                await _readable(own)

    @contextlib.contextmanager
    def _watched(self) -> Iterator[int | None]:
        """A descriptor of our own of the process that runs now: a start in another thread closes the one it knows."""
        with self._lock:
            own = None if self._pidfd is None else os.dup(self._pidfd)
        try:
            yield own
        finally:
            if own is not None:
                os.close(own)

    def _forget(self) -> None:
        with self._lock:
            if self._pidfd is not None:
                os.close(self._pidfd)
            self._pidfd, self._process = None, None


def _signal(pidfd: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, number)


async def _readable(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    own = os.dup(descriptor)  # a loop keeps one reader for each descriptor, and there may be two who wait
    seen = asyncio.Event()
    loop.add_reader(own, seen.set)
    try:
        await seen.wait()
    finally:
        loop.remove_reader(own)
        os.close(own)


def last_line(log: Path) -> str:
    """Last word of a log, for an error message: what an event says in its detail, else the line itself."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        return "no log"
    if not lines:
        return "its log is empty"
    with contextlib.suppress(ValueError):
        match json.loads(lines[-1]):
            case {"detail": str(detail)}:
                return "; ".join(detail.splitlines())[:500]
    return lines[-1][:500]


def _serve_in_child(service: str, config: Path, sock: socket.socket | None, log: Path) -> None:
    os.setsid()  # a Ctrl-C at the terminal is the lab's: it stops its services in order
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    parent = multiprocessing.parent_process()
    try:
        serve.run(service, config, sock=sock, lifeline=None if parent is None else parent.sentinel, log=log)
    except HarnessError as error:  # one sentence is enough; anything else is a fault of ours, and its traceback is kept
        events.emit("service_failed", level="error", error=type(error).__name__, detail=error.detail)
        sys.exit(1)
