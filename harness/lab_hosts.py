"""Hosts of a lab that runs, switched off and on with all that runs on them.

Invariants:
    1. What a real reboot ends is ended: guests and host agent first, then the hardware TPM; guests come back by
       themselves, started by their guest manager.

Owner: the command line.

Spec: DESIGN 5, 6 (a power cycle of a host).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import config
from harness.errors import HarnessError, SimulationError
from harness.lab_control import LabControl
from harness.lab_names import SITE_FILE
from harness.unix_client import ask

_GUESTS_S = 90.0
_ASK_S = 10.0
_POLL_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerCycle:
    """What a power cycle came to.

    Args:
        scenario: what the host booted.
        running: how many guests run again.
        away: names of those that were to run and do not.
    """

    scenario: str
    running: int
    away: tuple[str, ...]


async def power_cycle(control: LabControl, host: str, *, scenario: str | None, orderly: bool) -> PowerCycle:
    """Switches a host off and on; returns when its guests run again.

    Args:
        control: of the lab.
        host: its name.
        scenario: what it boots from now on, by name or whole path; None: what it booted last.
        orderly: everything is stopped in order; else power is cut.

    Raises:
        ConfigError: the lab is down, has no such host, or the scenario cannot be used.
        SimulationError: the host did not come up again in time.

    *Cancellation:* the supervisor completes it.
    """
    manager = config.load(control.folder / SITE_FILE, config.SiteSettings).hosts[host].guest_manager
    status = await control.power_cycle(host, scenario=scenario, orderly=orderly)
    guests = await _until_running(manager)
    running = [guest for guest in guests if guest.get("state") == "running"]
    away = tuple(str(guest.get("name")) for guest in guests if guest.get("autostart") and guest not in running)
    return PowerCycle(scenario=str(status.get("scenario")), running=len(running), away=away)


async def _until_running(manager: Path) -> list[Mapping[str, Any]]:
    """The guests of a manager that has just started, when all that it keeps run, or when that takes too long."""
    until, guests = time.monotonic() + _GUESTS_S, None
    while time.monotonic() < until:
        try:
            guests = await domains(manager)
        except HarnessError:  # it is just starting
            if time.monotonic() + _POLL_S >= until:
                raise
        if guests is not None and all(guest.get("state") == "running" for guest in guests if guest.get("autostart")):
            break
        await asyncio.sleep(_POLL_S)
    return guests or []


async def domains(manager: Path, *, deadline_s: float = _ASK_S) -> list[Mapping[str, Any]]:
    """What a guest manager says of its guests.

    Raises:
        SimulationError: its answer has another form.
        HarnessError: it does not answer.
    """
    match await ask(manager, {"op": "list"}, deadline_s=deadline_s):
        case {"domains": [*found]}:
            return [domain for domain in found if isinstance(domain, dict)]
    raise SimulationError(f"{manager}: the answer has no list of domains")
