"""Control of a simulated hardware TPM: one JSON object per line on a UNIX socket, one as answer.

* ``{"op": "status"}``
* ``{"op": "power_cycle", "scenario": NAME or PATH, "orderly": true}`` (both optional; orderly by default)
* ``{"op": "replace", "replaced": N}``: the chip is exchanged for a new one with a new EK, the state of the old one is
  kept aside as ``tpm.old-<n>``, and the same scenario boots; the host is a new one to every tenant (DESIGN 3.6). With
  ``replaced``, which may be left out, nothing happens unless N chips were replaced before: an order that is given again
* ``{"op": "faults", "plan": [...]}``: the fault plan from now on (`faults`)

The answer is the device's status, or ``{"error": NAME, "detail": SENTENCE}``.

Invariants:
    1. A request that is not understood completely does nothing.

Spec: DESIGN 5.
"""

from __future__ import annotations

import asyncio
import json
from asyncio import StreamReader, StreamWriter
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from harness import unix_client
from harness.errors import (
    ConfigError,
    DeadlineExceeded,
    HarnessError,
    LocalRefusal,
    PeerUnreachable,
    ProtocolError,
    SimulationError,
)
from harness.messages import parse_json
from harness.unix_server import LINE_LIMIT, refusal

_REQUEST_S = 60.0


class Device(Protocol):
    """What can be controlled; see `harness.sim.hardware.HardwareTpm`."""

    async def power_cycle(self, *, scenario: str | None = None, orderly: bool = True) -> None:
        """Switches the host off and on."""

    async def replace(self, *, replaced: int | None = None) -> None:
        """Gives the host another chip, unless another number of them was replaced before."""

    def set_faults(self, plan: object) -> None:
        """Sets the fault plan."""

    def status(self) -> dict[str, object]:
        """State in plain data."""


async def ask(control: Path, request: Mapping[str, object]) -> dict[str, object]:
    """Status of the device behind this socket after it has carried a request out.

    Raises:
        SimulationError: the device is not there, or it refused (its own words are in the text).
        DeadlineExceeded: no answer within a minute and a half.

    *Cancellation:* the device carries on with the request.
    """
    try:
        return await unix_client.ask(control, request, deadline_s=1.5 * _REQUEST_S)
    except LocalRefusal as error:
        raise SimulationError(f"the device refused: {error.error}: {error.detail}") from error
    except (PeerUnreachable, ProtocolError) as error:
        raise SimulationError(f"the device at {control} cannot be reached: {error.detail}") from error


async def serve_control(device: Device, reader: StreamReader, writer: StreamWriter) -> None:
    """Serves one client of the control socket until it leaves.

    *Cancellation:* a power cycle may be half done.
    """
    while line := await reader.readline():
        writer.write(json.dumps(await _answer(line, device)).encode() + b"\n")
        await writer.drain()


async def _answer(line: bytes, device: Device) -> Mapping[str, object]:
    try:
        async with asyncio.timeout(_REQUEST_S):
            await _carry_out(_request(line), device)
        return device.status()
    except HarnessError as error:
        return refusal(error)
    except TimeoutError:
        return refusal(DeadlineExceeded(f"not done within {_REQUEST_S:g} s"))


def _request(line: bytes) -> Mapping[str, object]:
    try:
        request = parse_json(line, limit=LINE_LIMIT)
    except ProtocolError as error:
        raise ConfigError("a request is one JSON object per line") from error
    if not isinstance(request, dict):
        raise ConfigError("a request is one JSON object per line")
    return request


async def _carry_out(request: Mapping[str, object], device: Device) -> None:
    match request:
        case {"op": "status", **rest} if not rest:
            return
        case {"op": "replace", **rest} if rest.keys() <= {"replaced"}:
            replaced = rest.get("replaced")
            if not (replaced is None or (isinstance(replaced, int) and not isinstance(replaced, bool))):
                raise ConfigError("replace: replaced is a number")
            await device.replace(replaced=replaced)
        case {"op": "faults", "plan": plan, **rest} if not rest:
            device.set_faults(plan)
        case {"op": "power_cycle", **rest} if rest.keys() <= {"scenario", "orderly"}:
            scenario, orderly = rest.get("scenario"), rest.get("orderly", True)
            if not (scenario is None or isinstance(scenario, str)) or not isinstance(orderly, bool):
                raise ConfigError("power_cycle: scenario is a string, orderly is true or false")
            await device.power_cycle(scenario=scenario, orderly=orderly)
        case _:
            raise ConfigError('"op" is status, power_cycle (scenario, orderly), replace or faults (plan)')
