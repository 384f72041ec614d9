"""One round of a session: the two questions, their deadlines, and what is kept between them.

Invariants:
    1. The baseline for an answer is what was stored when its nonce was created: it is read right before.
    2. The host is asked only while its stored counters are those of the moment when the guest nonce was created:
       otherwise a reset between the two quotes, accepted by another guest's round meanwhile, would go unseen.
    3. The host's request is bound to the very guest evidence that was accepted in this round.
    4. Evidence raises a stored clock only after its acceptance.

Owner: the session's task.

Spec: DESIGN 3.1 (nonces), 3.5, 3.8.
"""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass, field, replace
from typing import TypeVar

from harness.errors import DeadlineExceeded, HarnessError, IllegalTransition, StoreError
from harness.protocol import QuoteRequest, guest_binding
from harness.tenant.appraisal import (
    AppraisedEvidence,
    GuestTrust,
    HostTrust,
    Rejected,
    SentRequest,
    appraise_guest,
    appraise_host,
)
from harness.tenant.plan import HostKeys, Plan
from harness.tenant.ports import Ports, Reboot
from harness.tenant.retries import GUEST, HOST
from harness.values import ClockBaseline, Nonce, PcrValues

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Finding:
    """Why a round did not succeed, for the record, the operator and the next state."""

    layer: str
    error: str
    detail: str
    check: int | None = None
    reboot: Reboot | None = None
    proven: PcrValues | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Unanswered:
    """A peer gave no answer to appraise."""

    error: HarnessError


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """A round whose guest evidence was accepted.

    Args:
        started: monotonic seconds when the guest nonce was created.
        guest: the accepted guest evidence.
        attest: the guest's TPMS_ATTEST as received; the binding is made from it.
        transport_key_pem: NK that this evidence vouches for.
        host_at_start: the host's stored baseline when the guest nonce was created.
        host: the accepted host evidence; None until then.
        needs_host: whether the plan asks for a host quote at all.
    """

    started: float
    guest: AppraisedEvidence
    attest: bytes
    transport_key_pem: bytes = field(repr=False)
    host_at_start: ClockBaseline | None
    host: AppraisedEvidence | None = None
    needs_host: bool

    @property
    def host_baseline(self) -> ClockBaseline | None:
        """The clock of the accepted host evidence."""
        return None if self.host is None else self.host.baseline

    def accepted_key(self) -> bytes:
        """NK to which V may be wrapped.

        Raises:
            IllegalTransition: the host's evidence was not accepted in this round, and the plan needs it.
        """
        if self.needs_host and self.host is None:
            raise IllegalTransition("V is not released before both layers were accepted in one round")
        return self.transport_key_pem


class Rounds:
    """Makes the rounds of one session.

    Args:
        plan: whom to ask and what to believe.
        ports: the peers, the records, time and chance.
    """

    def __init__(self, plan: Plan, ports: Ports) -> None:
        self._plan = plan
        self._ports = ports
        self._since_host: int | None = None  # rounds since the last host quote; None: there is none that counts

    def host_due(self, *, v_due: bool) -> bool:
        """Whether this round needs a host quote: by the interval, and always before V is released."""
        if self._plan.host is None:
            return False
        interval = self._plan.timing.provider_quote_interval
        return v_due or self._since_host is None or self._since_host + 1 >= interval

    def require_host(self) -> None:
        """The next round needs a host quote whatever the interval says: something happened."""
        self._since_host = None

    def finished(self, done: Round) -> None:
        """Counts a round whose evidence was all accepted."""
        if done.host is not None:
            self._since_host = 0
        elif self._since_host is not None:
            self._since_host += 1

    def expired(self, current: Round) -> bool:
        """Whether the round's deadline has passed."""
        return self._remaining_s(current) <= 0

    async def ask_guest(self) -> Round | Finding | Unanswered:
        """Asks the guest agent and has its evidence appraised.

        Raises:
            StoreError: our own database does not take a contact that moved.

        *Cancellation:* the answer is dropped.
        """
        plan, ports = self._plan, self._ports
        host_at_start = None if plan.host is None else await ports.records.baseline(plan.host.ak.name)
        baseline = await ports.records.baseline(plan.guest_ak.name)
        started, nonce = ports.clock.monotonic(), ports.chance.guest_nonce()
        try:
            answer = await self._attempt(
                ports.guest.quote(nonce, plan.guest_selection), started, min(self._attempt_s, self._round_s)
            )
        except StoreError:  # our own, of a contact that moved: the guest is not to blame
            raise
        except HarnessError as error:
            return Unanswered(error)
        trust = GuestTrust(
            ak=plan.guest_ak,
            policy=plan.guest_policy,
            baseline=baseline,
            transport_key_pem=answer.transport_key_pem,
        )
        verdict = appraise_guest(answer.evidence, nonce.encode(), trust, plan.guest_selection)
        if isinstance(verdict, Rejected):
            return _finding(GUEST, verdict, plan.guest_ak.name, baseline)
        await ports.records.raise_clock(plan.guest_ak.name, verdict.evidence.baseline)
        return Round(
            started=started,
            guest=verdict.evidence,
            attest=answer.evidence.attest,
            transport_key_pem=answer.transport_key_pem,
            host_at_start=host_at_start,
            needs_host=plan.host is not None,
        )

    async def ask_host(self, current: Round, *, own: ClockBaseline | None) -> Round | Finding | Unanswered | None:
        """Asks the provider for a host quote bound to this round's guest evidence, and has it appraised.

        Args:
            current: the round; its guest evidence was accepted.
            own: the host's clock at this session's last acceptance.

        Returns:
            The round with the host's evidence; or None when the host's stored counters changed since the guest nonce.

        *Cancellation:* as `ask_guest`.
        """
        plan, ports, keys = self._plan, self._ports, self._host_keys()
        stored = await ports.records.baseline(keys.ak.name)
        if not same_counters(stored, current.host_at_start):
            return None
        baseline = self._baseline_for(stored, own)
        binding = guest_binding(plan.guest_ak.name, current.attest)
        started = ports.clock.monotonic()
        request = QuoteRequest(
            nonce=Nonce(ports.chance.host_nonce()),
            bank=plan.bank,
            mask=plan.host_mask,
            agent_id=plan.agent_id,
            binding=binding,
        )
        try:
            deadline_s = min(self._attempt_s, self._remaining_s(current))
            results = await self._attempt(ports.provider.quote(request, wait_s=deadline_s), started, deadline_s)
        except HarnessError as error:
            return Unanswered(error)
        sent = SentRequest(request=request, requester=plan.requester, vtpm_ek=keys.vtpm_ek)
        verdict = appraise_host(results, sent, self._trust(keys, baseline), guest_binding=binding)
        if isinstance(verdict, Rejected):
            return _finding(HOST, verdict, keys.ak.name, stored)
        await ports.records.raise_clock(keys.ak.name, verdict.evidence.baseline)
        return replace(current, host=verdict.evidence)

    # --- helpers ------------------------------------------------------------------------------------------

    @property
    def _attempt_s(self) -> float:
        return self._plan.timing.attempt_deadline_s

    @property
    def _round_s(self) -> float:
        return self._plan.timing.round_deadline_s

    def _remaining_s(self, current: Round) -> float:
        return current.started + self._round_s - self._ports.clock.monotonic()

    def _host_keys(self) -> HostKeys:
        if self._plan.host is None:
            raise IllegalTransition("a host quote is to be asked for under a plan without a host")
        return self._plan.host

    def _trust(self, keys: HostKeys, baseline: ClockBaseline | None) -> HostTrust:
        return HostTrust(
            host_id=keys.host_id,
            ak=keys.ak,
            ak_qualified_name=keys.ak_qualified_name,
            policy=self._plan.host_policy,
            baseline=baseline,
        )

    def _baseline_for(self, stored: ClockBaseline | None, own: ClockBaseline | None) -> ClockBaseline | None:
        """The stored baseline; for a guest without reboots never one that another guest's policy let in."""
        if self._plan.allow_reboots or own is None or same_counters(stored, own):
            return stored
        return own

    async def _attempt(self, question: Awaitable[T], started: float, deadline_s: float) -> T:
        """The answer, if it is here in time; also one that comes after a stall of the event loop is late."""
        clock = self._ports.clock
        try:
            async with clock.timeout(deadline_s):
                answer = await question
        except TimeoutError:
            raise DeadlineExceeded(f"no answer within {deadline_s:.1f} s") from None
        if clock.monotonic() - started > deadline_s:
            raise DeadlineExceeded(f"the answer came later than {deadline_s:.1f} s and was discarded")
        return answer


def same_counters(left: ClockBaseline | None, right: ClockBaseline | None) -> bool:
    """Whether two baselines are of one run of the TPM: equal reset and restart counts and firmware version."""
    if left is None or right is None:
        return left is right
    return (left.reset_count, left.restart_count, left.firmware_version) == (
        right.reset_count,
        right.restart_count,
        right.firmware_version,
    )


def _finding(layer: str, verdict: Rejected, ak_name: bytes, old: ClockBaseline | None) -> Finding:
    reboot = None if verdict.new_baseline is None else Reboot(ak_name=ak_name, old=old, new=verdict.new_baseline)
    return Finding(layer, verdict.error, verdict.detail, verdict.check, reboot, verdict.proven)
