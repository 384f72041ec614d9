"""What the load generator is told to do, and what it gives back: plain data in two files.

Invariants:
    1. A load is bounded: in count or in time, in its connections, and by a deadline for what is still out.
    2. It goes to loopback only.

Spec: docs/performance.md, method.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from harness.errors import ConfigError

MOST_CONNECTIONS = 12_000
MOST_REQUESTS = 500_000
LONGEST_S = 600.0


def _loopback(host: str) -> str:
    if not ipaddress.ip_address(host).is_loopback:
        raise ValueError("a load goes to loopback only")
    return host


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


Seconds = Annotated[float, Field(ge=0, le=LONGEST_S)]
Connections = Annotated[int, Field(ge=1, le=MOST_CONNECTIONS)]


class Poisson(_Data):
    """Open loop: requests at times that are drawn beforehand, whatever the answers do."""

    kind: Literal["poisson"] = "poisson"
    rate: Annotated[float, Field(gt=0, le=20_000)]
    seconds: Seconds
    connections: Connections
    tenants: list[int]


class Closed(_Data):
    """Closed loop: each connection asks again as soon as it was answered, until time or count are used up."""

    kind: Literal["closed"] = "closed"
    connections: Connections
    tenants: list[int]
    seconds: Seconds = LONGEST_S
    requests: Annotated[int, Field(ge=1, le=MOST_REQUESTS)] = MOST_REQUESTS
    after_s: Seconds = 0.0


class Burst(_Data):
    """All connections ask in the same moment; again when all were answered."""

    kind: Literal["burst"] = "burst"
    connections: Connections
    tenants: list[int]
    rounds: Annotated[int, Field(ge=1, le=10_000)]
    first_alone: bool = False
    """One connection asks half a second before the others: its batch is with the TPM when they come."""


Load = Annotated[Poisson | Closed | Burst, Field(discriminator="kind")]


class Quotes(_Data):
    """Requests for a quote of the host, and what their answers are verified with."""

    host_id: str
    ak: str
    """TPM2B_PUBLIC of the host's AK, base64."""
    scenario: str = "good"
    mask: int = 0xFF
    verify: int = 5_000
    """Answers that are verified at most, drawn by the seed; every one where there are fewer."""


class Order(_Data):
    """One run of the load generator; its loads go on at the same time."""

    host: Annotated[str, AfterValidator(_loopback)]
    port: Annotated[int, Field(ge=1, le=65535)]
    certificates: list[tuple[Path, Path]]
    """Certificate and key of each tenant; none: plain TCP."""
    authority: Path | None = None
    """The authority of the server; None for plain TCP."""
    quotes: Quotes | None = None
    """None: a fixed answer is asked for, at ``path``."""
    path: str = "/fixed"
    loads: list[Load]
    seed: int = 1
    drain_s: Seconds = 40.0
    result: Path


class Outcome(_Data):
    """What came of one load. Times are seconds of the monotonic clock, which all processes share."""

    begin_s: float
    end_s: float
    """When the last answer had come, or the deadline."""
    scheduled_s: list[float]
    latency_s: list[float]
    """From the scheduled time; negative for a request that was not answered before the deadline."""
    status: list[int]
    """Of HTTP; 0 when the connection ended first, -1 without an answer."""
    refused: dict[str, int]
    """Refusals by the error's name; an answer without one is named by its status."""
    connected: int


class Results(_Data):
    """What one run gives."""

    outcomes: list[Outcome]
    verified: int
    wrong: list[str]
    """Why answers were not accepted."""
    body_bytes: int
    """Median size of an answer."""
    client_cpu_s: float


def write(data: Order | Results, path: Path) -> None:
    """Writes an order, or results."""
    path.write_text(data.model_dump_json(), encoding="utf-8")


def read_order(path: Path) -> Order:
    """An order from its file. Raises ConfigError when it is none."""
    try:
        return Order.model_validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: is no order for a load: {error}") from error


def read_results(path: Path) -> Results:
    """Results from their file. Raises ConfigError when they are none."""
    try:
        data: Mapping[str, object] = json.loads(path.read_bytes())
        return Results.model_validate(data)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: holds no results of a load: {error}") from error
