"""What a session needs from outside: time, the two peers, and the tenant's records.

Invariants:
    1. A port raises errors of `harness.errors` only; anything else is a fault of ours and ends the session.
    2. Answers of peers are received, not believed: `GuestAnswer` and the provider's ``results`` go to appraisal.
    3. ``Records`` commits before it returns: what a session was told to be stored survives a kill. The clock of
       evidence is stored with the success that rests on it, or before the session waits for anything but an answer.

Owner: one session task uses each port; implementations may be shared by all sessions of a verifier.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import string
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from harness.keylime_wire import GuestEvidence
from harness.protocol import QuoteRequest
from harness.tenant.states import Effect, Event, State
from harness.values import AgentId, ClockBaseline, PcrSelection, PcrValues

if TYPE_CHECKING:
    from harness.errors import StoreError
    from harness.tenant.round import Finding, Round

NONCE_SIZE = 32
_GUEST_NONCE_SIZE = 20
_ALPHANUMERIC = (string.ascii_letters + string.digits).encode("ascii")
_LETTERS = bytes(_ALPHANUMERIC[value % len(_ALPHANUMERIC)] for value in range(256))
_LEFT_OUT = bytes(range(256 - 256 % len(_ALPHANUMERIC), 256))


class Clock(Protocol):
    """Time as a session sees it; tests give one that they move by hand."""

    def monotonic(self) -> float:
        """Seconds on a clock that never goes back."""

    def now(self) -> float:
        """Seconds since the epoch, for records and people."""

    async def sleep(self, seconds: float) -> None:
        """Waits. *Cancellation:* nothing has changed."""

    def timeout(self, seconds: float) -> AbstractAsyncContextManager[Any]:
        """Context that raises TimeoutError when its body lasts longer."""


class SystemClock:
    """The machine's clocks."""

    def monotonic(self) -> float:
        """See `Clock`."""
        return time.monotonic()

    def now(self) -> float:
        """See `Clock`."""
        return time.time()

    async def sleep(self, seconds: float) -> None:
        """See `Clock`."""
        await asyncio.sleep(seconds)

    def timeout(self, seconds: float) -> AbstractAsyncContextManager[Any]:
        """See `Clock`."""
        return asyncio.timeout(seconds)


def _alphanumeric() -> str:
    """Letters and digits, each as likely as any other: bytes beyond the last whole alphabet are left out."""
    drawn = b""
    while len(drawn) < _GUEST_NONCE_SIZE:
        drawn += secrets.token_bytes(2 * _GUEST_NONCE_SIZE).translate(_LETTERS, _LEFT_OUT)
    return drawn[:_GUEST_NONCE_SIZE].decode("ascii")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chance:
    """Sources of randomness: nonces from a CSPRNG, jitter from anything.

    Args:
        host_nonce: 32 fresh bytes (DESIGN 3.1).
        guest_nonce: 20 fresh ASCII letters and digits, as Keylime's verifier draws them.
        jitter: a number in [0, 1).
    """

    host_nonce: Callable[[], bytes] = lambda: secrets.token_bytes(NONCE_SIZE)
    guest_nonce: Callable[[], str] = _alphanumeric
    jitter: Callable[[], float] = random.random


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestAnswer:
    """An integrity quote of the guest agent: received, not believed.

    Args:
        evidence: attest, signature and PCR values.
        transport_key_pem: NK as the agent gave it; check 8 and PCR 16 say whether it is the agent's.
    """

    evidence: GuestEvidence
    transport_key_pem: bytes = field(repr=False)


class GuestPort(Protocol):
    """The guest agent of this session."""

    async def quote(self, nonce: str, selection: PcrSelection) -> GuestAnswer:
        """Integrity quote over these PCRs and PCR 16.

        Raises:
            AppraisalError: the answer is not evidence at all (check 1).
            HarnessError: transport failures and refusals, as `harness.messages.error_from_response` makes them.

        *Cancellation:* the answer is dropped.
        """

    async def provide_v(self, wrapped: bytes) -> None:
        """Hands over V, wrapped to NK. Raises as `quote`. *Cancellation:* V may have arrived."""


class ProviderPort(Protocol):
    """The provider verifier of this session."""

    async def quote(self, request: QuoteRequest, *, wait_s: float) -> object:
        """``results`` of GET /v1/verifier. Raises as `GuestPort.quote`.

        Args:
            request: the question.
            wait_s: seconds in which an answer is of use; the provider may refuse at once what it cannot answer in time.

        *Cancellation:* the answer is dropped.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """A finding that the operator must see."""

    kind: str
    agent_id: AgentId | None
    host_id: str | None
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Reboot:
    """Believable evidence of other counters than the baseline's.

    Args:
        ak_name: of the key that signed it.
        old: the baseline that all agents of this key share; None: nothing yet.
        new: what the evidence shows.
    """

    ak_name: bytes
    old: ClockBaseline | None
    new: ClockBaseline


@dataclass(frozen=True, slots=True, kw_only=True)
class PastVerdict:
    """One appraisal, for the operator.

    Args:
        at: seconds since the epoch.
        accepted: whether the evidence was believed.
        layer: guest or host.
        failed_check, error: None when it was accepted.
    """

    at: float
    accepted: bool
    layer: str
    failed_check: int | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """PCR values that signature and digest proved last; whether the policy allows them is another question.

    Args:
        at: seconds since the epoch.
        pcrs: of the PCRs that were asked for.
    """

    at: float
    pcrs: PcrValues = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What is stored of a session: enough to go on after a kill, and never more than was reached."""

    state: State
    v_released: bool = False
    rounds: int = 0
    last_success: float | None = None
    """Unix time of the last round whose evidence was all accepted."""
    host_baseline: ClockBaseline | None = None
    """The host's counters under which this session last accepted (not shared with other sessions)."""
    layer: str | None = None
    """Where the last failure was: guest, host or payload."""
    failed_check: int | None = None
    error: str | None = None
    detail: str | None = None
    refused_reboot: Reboot | None = None
    """The counters for which the session stopped; an operator may accept them."""
    verdicts: tuple[PastVerdict, ...] = ()
    """The newest, oldest first."""
    seen: Mapping[str, Seen] = field(default_factory=dict, repr=False)
    """By layer; for the capture of reference values."""


class Records(Protocol):
    """The tenant's database, as a session sees it."""

    async def baseline(self, ak_name: bytes) -> ClockBaseline | None:
        """Last believed clock of this AK."""

    async def raise_clock(self, ak_name: bytes, seen: ClockBaseline) -> None:
        """Believes an accepted clock: as the first baseline, or when it is higher under equal counters; never lower.

        It counts at once, and is stored with whatever is saved next, or by `settle`.
        """

    async def settle(self) -> None:
        """Stores all clocks that are believed."""

    async def replace_baseline(self, reboot: Reboot, alarm: Alarm) -> bool:
        """Stores the baseline after an allowed reboot if the stored counters still are the old ones; and the alarm."""

    async def save(self, agent_id: AgentId, progress: Progress, alarm: Alarm | None = None) -> None:
        """Stores a session's progress, the alarm that belongs to it, and all believed clocks, in one transaction."""


class Told(Protocol):
    """Is told of each event of a session, for the figures."""

    def __call__(
        self,
        event: Event,
        effects: Sequence[Effect],
        finding: Finding | None,
        fault: StoreError | None,
        done: Round | None,
    ) -> None:
        """Takes note; must not raise.

        Args:
            event: what happened.
            effects: what follows.
            finding: why there was no success since the last one, if so.
            fault: for a write of the session's own that our database did not take: why; then there is no finding.
            done: the round whose guest evidence was accepted, if it was.
        """


def nobody_is_told(
    event: Event,
    effects: Sequence[Effect],
    finding: Finding | None,
    fault: StoreError | None,
    done: Round | None,
) -> None:
    """Default of `Ports`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """Everything that a session touches outside itself."""

    guest: GuestPort
    provider: ProviderPort
    records: Records
    clock: Clock = field(default_factory=SystemClock)
    chance: Chance = field(default_factory=Chance)
    told: Told = nobody_is_told
