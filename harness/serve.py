"""Runs one service of the harness in this process: what ``harness serve`` does, and what the lab forks.

Invariants:
    1. A service is named here once, with its class and its settings; both are imported when it is asked for.
    2. SIGTERM and SIGINT, and the end of a watched parent, cancel the service: it stops in order, within its own bound.
"""

from __future__ import annotations

import asyncio
import importlib
import signal
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from harness.errors import ConfigError


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
    "guest-manager": _Entry("harness.lab_guests", "LabGuestManager", "GuestManagerSettings"),
    "hostile-provider": _Entry("harness.attacks.hostile_provider", "HostileProvider", "HostileProviderSettings"),
}
"""What a lab adds to them: simulated hardware, its guests, and a provider that lies."""


def load_all() -> None:
    """Imports every service and the settings, for a parent that forks them."""
    importlib.import_module("harness.config")
    for entry in (*SERVICES.values(), *SIMULATION.values()):
        importlib.import_module(entry.module)


def run(service: str, config: Path, *, sock: socket.socket | None = None, lifeline: int | None = None) -> None:
    """Runs a service until it is told to stop.

    Args:
        service: a name in `SERVICES` or `SIMULATION`.
        config: its settings file (YAML).
        sock: a bound, listening socket to serve on; else the settings say where.
        lifeline: file descriptor that becomes readable when the parent ends; the service then stops.

    Raises:
        ConfigError: unknown service, unusable settings, port in use.
    """
    entry = (SERVICES | SIMULATION).get(service)
    if entry is None:
        raise ConfigError(f"service {service!r} is not one of {', '.join(SERVICES)}")
    settings_module = importlib.import_module("harness.config")
    events = importlib.import_module("harness.events")
    settings = settings_module.load(config, getattr(settings_module, entry.settings))
    events.configure(service)
    made = cast(Service, getattr(importlib.import_module(entry.module), entry.service)(settings))
    asyncio.run(_until_told(made, sock, lifeline))


async def _until_told(service: Service, sock: socket.socket | None, lifeline: int | None) -> None:
    loop = asyncio.get_running_loop()
    task = loop.create_task(service.run(sock))
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    if lifeline is not None:
        loop.add_reader(lifeline, _parent_ended, loop, lifeline, task)
    try:
        await asyncio.wait({task})
    finally:
        if lifeline is not None:
            loop.remove_reader(lifeline)
    if not task.cancelled():
        task.result()


def _parent_ended(loop: asyncio.AbstractEventLoop, lifeline: int, task: asyncio.Task[None]) -> None:
    loop.remove_reader(lifeline)
    task.cancel()
