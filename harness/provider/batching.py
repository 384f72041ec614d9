"""What the batcher is given and what it tells: its neighbours, its bounds, its surroundings and its reports.

Spec: DESIGN 4.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

from harness.errors import GuestNotHere, NotReady
from harness.provider.batch import Quote, SealedBatch, TreeBuilder
from harness.provider.clock import Clock, SystemClock
from harness.values import AgentId


class Quoter(Protocol):
    """The TPM, as far as the batcher knows it."""

    @property
    def usable(self) -> bool:
        """False when no later quote can succeed; the batcher then stops."""

    async def quote_batch(self, batch: SealedBatch) -> Quote:
        """Quote over the batch's own root and selection. Raises a HarnessError when there is none."""


class Residency(Protocol):
    """Which guests run here."""

    async def check(self, agent_ids: frozenset[AgentId]) -> Mapping[AgentId, bytes | GuestNotHere | NotReady]:
        """Per guest: SHA-256 of the public key of its vTPM's EK if it runs here now, else why it gets no leaf."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchReport:
    """One batch, for the event stream; durations in seconds.

    Args:
        batch_id: names the batch; empty when nothing was sealed.
        requests: members of the batch.
        refused: waiters that got no leaf.
        tree_size: leaves, with the filling; 0 when nothing was sealed.
        tpm_quotes: TPM2_Quote commands of a batch that succeeded.
        waited_s: how long the first member had waited when the pool was taken.
        sealing_s: residency check, leaves and tree.
        quote_s: the TPM's time, PCR values included.
        waiting: requests that wait for a later batch.
        outcome: ``quoted``, ``nobody left`` or the name of the error.
        strategy: as in the settings (``batched``, ``single``, ``window``).
        waits_s: how long each member that was still there had waited when its answer was given; not in the event.
    """

    batch_id: str
    requests: int
    refused: int
    tree_size: int
    tpm_quotes: int
    waited_s: float
    sealing_s: float
    quote_s: float
    waiting: int
    outcome: str
    strategy: str = "batched"
    waits_s: tuple[float, ...] = field(default=(), repr=False)

    def event(self) -> dict[str, Any]:
        """Its members in the event stream, durations to the microsecond: longer runs of digits would look secret."""
        members = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "waits_s"}
        return {name: round(value, 6) if isinstance(value, float) else value for name, value in members.items()}


class Bounds(Protocol):
    """The settings that a batcher reads (`config.BatchSettings`)."""

    @property
    def pool_size(self) -> int:
        """Waiters in all open pools together."""

    @property
    def max_pools(self) -> int:
        """Open pools."""

    @property
    def tenant_share(self) -> int:
        """Waiting requests of one tenant."""

    @property
    def linger_s(self) -> float:
        """Seconds to wait for company before a pool is sealed."""

    @property
    def strategy(self) -> str:
        """Who shares a quote: ``batched``, ``single`` or ``window``."""

    @property
    def window_s(self) -> float:
        """Seconds that ``window`` sleeps."""


def costs(bounds: Bounds, builder: TreeBuilder) -> list[str]:
    """What settings that are there for comparison cost, one sentence each; none for the defaults."""
    found = [f"tree: {builder.name}: {builder.cost}"] if builder.cost else []
    if bounds.strategy == "single":
        found.append("strategy: single: every request has a quote of its own, and waits for all those before it")
    elif bounds.strategy == "window":
        found.append(f"strategy: window: nobody is answered before {bounds.window_s:g} s, however idle the TPM is")
    return found


def _nobody_looks(report: BatchReport) -> None:
    """Default observer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What a batcher takes from outside.

    Args:
        clock: monotonic time and UTC.
        rng: order of leaves and filling; nobody may be able to predict it.
        observe: told about every batch.
        residency_s: seconds that a residency check may take.
        answer_s: most seconds that a waiter waits, whatever its request says; a tenant gives up after 30 (DESIGN 3.5,
            check 1).
    """

    clock: Clock = field(default_factory=SystemClock)
    rng: random.Random = field(default_factory=random.SystemRandom)
    observe: Callable[[BatchReport], None] = _nobody_looks
    residency_s: float = 2.0
    answer_s: float = 30.0
