"""Runs one service of the harness in this process: what ``harness serve`` does, and what the lab forks.

Invariants:
    1. A service is named here once, with its class and its settings; both are imported when it is asked for.
    2. SIGTERM and SIGINT, and the end of a watched parent, cancel the service: it stops in order, and exits with 0.
       What comes after the first of them changes nothing; a service that is not done in time is ended (`STOP_S`).
"""

from __future__ import annotations

import asyncio
import functools
import gc
import importlib
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from harness.errors import ConfigError

if TYPE_CHECKING:
    from harness.config import LogSettings


STOP_S = 4.5
"""Seconds for an orderly stop; every service stops within five."""
_GUESTS_STOP_S = 28.0
"""The guest manager's, however many guests it has: each of them is shut down, and none is left without its manager."""
EXIT_OVERDUE = 3
_YOUNG_OBJECTS = 20_000


class Service(Protocol):
    """What every service offers: it serves until it is cancelled."""

    async def run(self, sock: socket.socket | None = None) -> None:
        """Serves on the given bound socket, or on the address in its settings.

        *Cancellation:* stops in order: waiters are answered, connections closed.
        """


@dataclass(frozen=True, slots=True)
class _Entry:
    module: str
    service: str
    settings: str
    stop_s: float = STOP_S


SERVICES = {
    "host-agent": _Entry("harness.provider.host_agent", "HostAgent", "HostAgentSettings"),
    "provider-verifier": _Entry("harness.provider.proxy", "ProviderVerifier", "ProviderVerifierSettings"),
    "provider-registrar": _Entry("harness.provider.registrar", "ProviderRegistrar", "ProviderRegistrarSettings"),
    "tenant-registrar": _Entry("harness.tenant.registrar", "TenantRegistrar", "TenantRegistrarSettings"),
    "tenant-verifier": _Entry("harness.tenant.verifier", "TenantVerifier", "TenantVerifierSettings"),
    "guest-agent": _Entry("harness.tenant.guest_agent", "GuestAgent", "GuestAgentSettings"),
}
"""The services that run outside a lab too."""

SIMULATION = {
    "hardware-tpm": _Entry("harness.sim.hardware", "HardwareTpmService", "HardwareTpmSettings"),
    "guest-manager": _Entry("harness.lab_guests", "LabGuestManager", "GuestManagerSettings", _GUESTS_STOP_S),
    "hostile-provider": _Entry("harness.attacks.hostile_provider", "HostileProvider", "HostileProviderSettings"),
}
"""What a lab adds to them: simulated hardware, its guests, and a provider that lies."""


def load_all() -> None:
    """Imports every service and the settings, for a parent that forks them."""
    importlib.import_module("harness.config")
    for entry in (*SERVICES.values(), *SIMULATION.values()):
        importlib.import_module(entry.module)


def run(
    service: str,
    config: Path,
    *,
    sock: socket.socket | None = None,
    lifeline: int | None = None,
    log: Path | None = None,
) -> None:
    """Runs a service until it is told to stop.

    Args:
        service: a name in `SERVICES` or `SIMULATION`.
        config: its settings file (YAML).
        sock: a bound, listening socket to serve on; else the settings say where.
        lifeline: file descriptor that becomes readable when the parent ends; the service then stops.
        log: for events, standard output and standard error, where the settings name no file.

    Raises:
        ConfigError: unknown service, unusable settings or log, port in use.
    """
    entry = (SERVICES | SIMULATION).get(service)
    if entry is None:
        raise ConfigError(f"service {service!r} is not one of {', '.join(SERVICES)}")
    told = _Told()
    settings_module = importlib.import_module("harness.config")
    settings = settings_module.load(config, getattr(settings_module, entry.settings))
    _log_to(service, settings.log, log)
    made = cast(Service, getattr(importlib.import_module(entry.module), entry.service)(settings))
    _spare_the_collector()
    if not told.heard:
        asyncio.run(_until_told(made, sock, told, lifeline, stop_s=entry.stop_s))


def _spare_the_collector() -> None:
    """Keeps Python's cycle collector from looking at the same objects again and again.

    What was imported stays for good. And a service holds thousands of requests at a time, none of them in a cycle, that
    would be looked at after every 700 new objects: without this it is a sixth of the CPU that a request costs.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS, 10, 10)


def _log_to(service: str, settings: LogSettings, given: Path | None) -> None:
    events = importlib.import_module("harness.events")
    path = settings.file or given
    rotation = events.Rotation(max_bytes=settings.max_bytes, keep=settings.keep)
    try:
        events.configure(service, path, rotation=rotation, streams=path is not None)
    except OSError as error:
        raise ConfigError(f"log.file: {path}: cannot be opened: {error.strerror}") from error


class _Told:
    """Whether this process has been told to stop. Its signals stay caught to the end: a second one changes nothing.

    An event loop gives its signals back when it closes, and the default action would end the process in the middle of
    its stop; so these are caught by the process.
    """

    def __init__(self) -> None:
        self.heard = False
        self._wake: Callable[[], object] | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, _number: int, _frame: object) -> None:
        self.heard = True
        if self._wake is not None:
            self._wake()

    async def wait(self, lifeline: int | None) -> None:
        """Waits for a signal, or for the end of the parent. *Cancellation:* signals are noted all the same."""
        loop, told = asyncio.get_running_loop(), asyncio.Event()
        self._wake = functools.partial(loop.call_soon_threadsafe, told.set)
        if lifeline is not None:
            loop.add_reader(lifeline, told.set)
        try:
            if not self.heard:
                await told.wait()
        finally:
            self._wake = None
            if lifeline is not None:
                loop.remove_reader(lifeline)


async def _until_told(
    service: Service, sock: socket.socket | None, told: _Told, lifeline: int | None, *, stop_s: float
) -> None:
    task = asyncio.create_task(service.run(sock))
    telling = asyncio.create_task(told.wait(lifeline))
    await asyncio.wait({task, telling}, return_when=asyncio.FIRST_COMPLETED)
    if not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=stop_s)
    telling.cancel()
    if not task.done():
        _give_up(task, stop_s)
    if not task.cancelled():
        task.result()


def _give_up(task: asyncio.Task[None], stop_s: float) -> None:
    """Ends the process: what hangs would keep the interpreter from ending, and a supervisor from starting anew."""
    where = [f"{frame.f_code.co_filename}:{frame.f_lineno}" for frame in task.get_stack()]
    importlib.import_module("harness.events").emit("stop_overdue", level="error", after_s=stop_s, where=where)
    os._exit(EXIT_OVERDUE)
