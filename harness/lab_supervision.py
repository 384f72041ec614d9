"""Keeps a lab's services running: starts them, restarts what dies with growing pauses, and ends them in order.

Invariants:
    1. Every listening socket is bound before the first service starts, and stays bound while its service is away: a
       client waits for the restart instead of being refused, and nobody else gets the port.
    2. A service is started again after it has ended, however it ended, until it is stopped here.
    3. `stop` leaves no process of the lab: guests first, hardware last.

Owner: one task, in the supervisor's process (`lab_supervisor`) or the demo's.

Spec: DESIGN 6 (a supervisor restarts what dies).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from harness import events
from harness.errors import ConfigError, HarnessError, NotFound, SimulationError
from harness.lab_processes import ServiceProcess, end_parent, last_line, warm_up
from harness.lab_site import ServiceFile
from harness.sim.control import ask as ask_hardware

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 10.0
_STABLE_S = 10.0
"""A service that ran this long is restarted at once; one that did not, after a longer pause each time."""
_PORT_S = 10.0
_FORK_S = 60.0
_POLL_S = 0.05
_BACKLOG = 512
_STOP_ORDER = ("guest-manager", "", "hardware-tpm")
_POWERED = ("guests", "agent")
"""What goes off with a host, in this order."""


@dataclass(eq=False)
class _Kept:
    file: ServiceFile
    process: ServiceProcess
    sock: socket.socket | None
    task: asyncio.Task[None] | None = None
    restarts: int = 0
    why: str | None = None
    at_once: asyncio.Event = field(default_factory=asyncio.Event)
    powered: asyncio.Event = field(default_factory=asyncio.Event)


class Supervision:
    """The services of one lab.

    Args:
        log: gives each service's log.
        restart: start again what ends by itself; else that is an error (`failed`).
    """

    def __init__(self, log: Callable[[str], Path], *, restart: bool = True) -> None:
        self._log = log
        self._restart = restart
        self._kept: dict[str, _Kept] = {}
        self._changing = asyncio.Lock()
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def apply(self, services: Sequence[ServiceFile]) -> bool:
        """Makes these the lab's services: starts what is new, restarts what has other settings, ends what is gone.

        Returns:
            Whether anything was changed.

        Raises:
            ConfigError: a port is taken; nothing was started, and nothing ended.

        *Cancellation:* call `stop`.
        """
        async with self._changing:
            wanted = {service.name: service for service in services}
            gone = [kept for name, kept in self._kept.items() if wanted.get(name) != kept.file]
            new = [service for service in services if service not in [kept.file for kept in self._kept.values()]]
            stay = {service.url for service in new}
            sockets = {kept.file.url: kept.sock for kept in gone if kept.sock is not None and kept.file.url in stay}
            unbound = [service for service in new if service.url is not None and service.url not in sockets]
            sockets |= await _bound(unbound)  # before anything is ended
            await self._end(gone)
            for kept in gone:
                del self._kept[kept.file.name]
                if kept.sock is not None and kept.file.url not in stay:
                    kept.sock.close()
            if new:
                await asyncio.to_thread(warm_up)
            for service in new:
                process = ServiceProcess(service.name, service.service, service.config, self._log(service.name))
                kept = _Kept(file=service, process=process, sock=sockets.get(service.url))
                kept.powered.set()
                self._kept[service.name] = kept
                kept.task = asyncio.create_task(self._keep(kept), name=f"keep {service.name}")
            return bool(gone or new)

    async def restart(self, name: str) -> None:
        """Ends a service in order and starts it again at once; one that waits for its restart is started now.

        Raises:
            NotFound: the lab has no such service.

        *Cancellation:* the service starts again all the same.
        """
        kept = self._kept.get(name)
        if kept is None:
            raise NotFound(f"no service {name}; this lab has {', '.join(self._kept)}")
        kept.at_once.set()
        if kept.process.running:
            await kept.process.stop(kept.file.stop_s)

    async def power_cycle(self, host: str, request: Mapping[str, object], *, orderly: bool) -> Mapping[str, object]:
        """Switches a host off and on: guests and agent end, its hardware TPM does what is asked, and they start again.

        Args:
            host: its name.
            request: for the control socket of its hardware TPM (`sim.control`), made while the host is off.
            orderly: guests and agent are stopped in order; else they are killed.

        Returns:
            The hardware TPM's answer.

        Raises:
            NotFound: the lab has no such host.
            SimulationError: the hardware TPM refused, or is away; guests and agent start again all the same.

        *Cancellation:* guests and agent start again; the hardware TPM carries on with the request.
        """
        parts = [self._kept.get(f"{host}-{part}") for part in _POWERED]
        found = [kept for kept in parts if kept is not None]
        control = found[-1].file.powered if len(found) == len(parts) else None
        if control is None:
            raise NotFound(f"no host {host} in this lab")
        async with self._changing:
            try:
                for kept in found:
                    kept.powered.clear()
                    kept.at_once.set()  # whoever waits for its restart waits for the power instead
                    await (kept.process.stop(kept.file.stop_s) if orderly else kept.process.kill())
                return await ask_hardware(control, request)
            finally:
                for kept in found:
                    kept.powered.set()

    async def stop(self) -> None:
        """Ends everything. *Cancellation:* processes are killed."""
        async with self._changing:
            await self._end(self._kept.values())
            for kept in self._kept.values():
                if kept.sock is not None:
                    kept.sock.close()
            self._kept.clear()
            self._ended.cancel()

    async def failed(self) -> None:
        """Waits until a service has ended by itself; for a lab that restarts nothing.

        Raises:
            SimulationError: that has happened; the end of its log is in the text.

        *Cancellation:* the lab goes on.
        """
        await asyncio.shield(self._ended)

    def status(self) -> list[dict[str, object]]:
        """Every service in plain data: pid is None while it is away, and ``why`` then says what ended it."""
        return [
            {
                "name": name,
                "pid": kept.process.pid if kept.process.running else None,
                "url": kept.file.url,
                "state_dir": str(kept.file.state_dir),
                "restarts": kept.restarts,
                "why": None if kept.process.running else kept.why,
            }
            for name, kept in self._kept.items()
        ]

    async def _keep(self, kept: _Kept) -> None:
        pause_s = _FIRST_PAUSE_S
        while True:
            await kept.powered.wait()
            if kept.file.powered is not None:
                await _until_powered(kept.file.powered)
            began = time.monotonic()
            kept.why = await self._one_run(kept)
            if not self._restart:
                if not self._ended.done():
                    self._ended.set_exception(SimulationError(f"{kept.file.name} {kept.why}"))
                return
            if time.monotonic() - began >= _STABLE_S:
                pause_s = _FIRST_PAUSE_S
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await kept.at_once.wait()
            pause_s = _FIRST_PAUSE_S if kept.at_once.is_set() else min(2 * pause_s, _LONGEST_PAUSE_S)
            kept.at_once.clear()
            kept.restarts += 1

    async def _one_run(self, kept: _Kept) -> str:
        """Starts a service and waits for its end; returns why it ended."""
        try:
            await _to_its_end(asyncio.to_thread(kept.process.start, kept.sock))  # it waits for the parent that forks
        except SimulationError as error:
            events.emit("service_not_started", level="error", name=kept.file.name, detail=error.detail)
            return error.detail
        events.emit("service_started", name=kept.file.name, pid=kept.process.pid)
        code = await kept.process.wait()
        log = self._log(kept.file.name)
        why = f"ended with code {code}: {await asyncio.to_thread(last_line, log)} (log: {log})"
        events.emit("service_ended", level="warning", name=kept.file.name, code=code)
        return why

    async def _end(self, which: Iterable[_Kept]) -> None:
        chosen = list(which)
        for kept in chosen:
            if kept.task is not None:
                kept.task.cancel()
        await asyncio.gather(*(kept.task for kept in chosen if kept.task), return_exceptions=True)
        for kind in _STOP_ORDER:
            group = [kept for kept in chosen if _group(kept.file) == kind]
            await asyncio.gather(*(kept.process.stop(kept.file.stop_s) for kept in group))


def _group(file: ServiceFile) -> str:
    return file.service if file.service in _STOP_ORDER else ""


async def _to_its_end(starting: Coroutine[Any, Any, None]) -> None:
    """Awaits a start also when cancelled meanwhile: what was started must be known to be stopped."""
    task = asyncio.ensure_future(starting)
    try:
        await asyncio.wait({task}, timeout=_FORK_S)
        if not task.done():
            end_parent()  # it hangs: whoever waits for it goes on, and the next start makes a new one
        await asyncio.shield(task)
    except asyncio.CancelledError:
        if not (await asyncio.wait({task}, timeout=_FORK_S))[0]:
            end_parent()
            await asyncio.wait({task})
        raise


async def _until_powered(control: Path) -> None:
    """Waits until a hardware TPM has booted; its own supervision says why it does not."""
    while True:
        with contextlib.suppress(HarnessError):
            await ask_hardware(control, {"op": "status"})
            return
        await asyncio.sleep(_POLL_S)


async def _bound(services: Sequence[ServiceFile]) -> dict[str | None, socket.socket]:
    """Listening sockets by URL, all or none. A service of a lab that was killed may hold its port for a moment."""
    made: dict[str | None, socket.socket] = {}
    until = time.monotonic() + _PORT_S
    try:
        for service in services:
            while service.url not in made:
                try:
                    made[service.url] = _listening(service)
                except OSError as error:
                    if error.errno != errno.EADDRINUSE or time.monotonic() > until:
                        raise ConfigError(_refused(service, error)) from error
                    await asyncio.sleep(_POLL_S)
    except BaseException:
        for sock in made.values():
            sock.close()
        raise
    return made


def _listening(service: ServiceFile) -> socket.socket:
    address = urlsplit(service.url or "")
    return socket.create_server((str(address.hostname), int(address.port or 0)), backlog=_BACKLOG)


def _refused(service: ServiceFile, error: OSError) -> str:
    port = urlsplit(service.url or "").port
    if error.errno == errno.EADDRINUSE:
        return f"port {port} of {service.name} is taken by another program; `ss -tlnp sport = :{port}` shows which"
    return f"port {port} of {service.name} cannot be listened on: {error.strerror}"
