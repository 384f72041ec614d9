"""Waits until the services of a lab answer, and says of each that cannot run why it cannot.

Invariants:
    1. A service that ends again and again is told in its own words, and is waited for no longer.
    2. It holds up nobody who does without it.

Owner: the command line.

Spec: DESIGN 6.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any

from harness.errors import HarnessError, SimulationError
from harness.lab_plan import LabPlan

READY_S = 60.0
_POLL_S = 0.1
_ENDS = 3
"""A service that ended this often while we waited will not run by itself."""
_HOST_PARTS, _TENANT_PARTS = ("tpm", "agent", "guests"), ("registrar", "verifier")

Services = Sequence[Mapping[str, Any]]
"""As the supervisor's status shows them."""
Broken = Mapping[str, SimulationError]
"""Services that do not run, by name, and why."""


async def broken_services(
    services: Callable[[], Awaitable[Services]],
    unanswered: Callable[[Mapping[str, Any]], Coroutine[Any, Any, str | None]],
    *,
    wait_s: float = READY_S,
) -> dict[str, SimulationError]:
    """Returns as soon as every service answers or is known not to run; gives the latter.

    Args:
        services: the supervisor's view now.
        unanswered: why a service that has a process does not answer; None when it does.
        wait_s: how long one may take that neither answers nor ends.

    Raises:
        HarnessError: what ``services`` or ``unanswered`` raise.

    *Cancellation:* nothing has changed.
    """
    until = time.monotonic() + wait_s
    first: dict[str, int] = {}
    ended: dict[str, str] = {}
    silent: dict[str, str] = {}
    broken: dict[str, SimulationError] = {}
    probes: dict[str, asyncio.Task[str | None]] = {}
    ready: set[str] = set()
    try:
        while True:
            shown = {str(service["name"]): service for service in await services()}
            for name, service in shown.items():
                ended |= {name: service["why"]} if service["why"] else {}
                first.setdefault(name, service["restarts"] - (service["pid"] is None))
                if service["restarts"] - first[name] >= _ENDS:
                    broken.setdefault(name, SimulationError(f"{name} {ended.get(name, 'ends again and again')}"))
                elif service["pid"] is not None and name not in ready and name not in probes:
                    probes[name] = asyncio.create_task(unanswered(service))
            results = {name: probe.result() for name, probe in probes.items() if probe.done()}
            ready |= {name for name, trouble in results.items() if trouble is None}
            silent |= {name: f"does not answer: {trouble}" for name, trouble in results.items() if trouble is not None}
            probes = {name: probe for name, probe in probes.items() if not probe.done()}
            broken |= {name: error for name in shown if (error := _without_tpm(name, broken)) and name not in broken}
            pending = shown.keys() - ready - broken.keys()
            if pending and time.monotonic() <= until:
                await asyncio.sleep(_POLL_S)
                continue
            said = {name: ended.get(name) or silent.get(name, "does not run") for name in pending}
            broken |= {name: SimulationError(f"{name} {text}") for name, text in said.items()}
            return {name: broken[name] for name in shown if name in broken and name not in ready}
    finally:
        for probe in probes.values():
            probe.cancel()
        await asyncio.gather(*probes.values(), return_exceptions=True)


def _without_tpm(name: str, broken: Broken) -> SimulationError | None:
    """Why an agent is not even started: its host is not powered."""
    host, _, part = name.rpartition("-")
    return broken.get(f"{host}-tpm") if part == "agent" else None


def check_provider(broken: Broken) -> None:
    """Checks that what everybody needs runs. Raises SimulationError: it does not."""
    for name in ("provider-registrar", "provider-verifier"):
        if name in broken:
            raise broken[name]


def concerned(plan: LabPlan, broken: Broken) -> tuple[dict[str, HarnessError], dict[str, HarnessError]]:
    """Hosts and tenants that miss a service, by name, and which."""
    hosts = {host.name: _first(broken, host.name, _HOST_PARTS) for host in plan.hosts}
    tenants = {tenant.name: _first(broken, tenant.name, _TENANT_PARTS) for tenant in plan.tenants}
    return (
        {name: error for name, error in hosts.items() if error is not None},
        {name: error for name, error in tenants.items() if error is not None},
    )


def _first(broken: Broken, owner: str, parts: Sequence[str]) -> HarnessError | None:
    return next((broken[f"{owner}-{part}"] for part in parts if f"{owner}-{part}" in broken), None)
