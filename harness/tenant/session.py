"""Drives one agent through the table of `states`: asks, has the answers appraised, and performs the effects.

::

    session = Session(plan, ports, progress)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(session.run())

Invariants:
    1. The state changes in `_fire` only, by a row of the table.
    2. Every attempt has a nonce of its own, created after the baseline for its answer was read; an answer that comes
       after the attempt's deadline is discarded.
    3. Within a round the host is asked after the guest's evidence was accepted, and bound to exactly that evidence.
    4. V leaves only through `Round.accepted_key`, which exists only when every layer that the plan needs was accepted
       in the same round.
    5. A finding is stored before the session may end: a stop of the service does not lose it.
    6. An exception that is not a peer's failure ends in TENANT_FAILED: no path leads from it to "attested".

Owner: the task that runs `run`; `resume`, `delete` and the views are called from the same event loop.

Spec: DESIGN 3.5 (10, 11), 3.8; STYLE B3, job 1.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import replace

from harness import events
from harness.errors import Conflict, DeadlineExceeded, HarnessError, IllegalTransition, MalformedEvidence
from harness.tenant.payload import parse_transport_key, wrap_share
from harness.tenant.plan import Plan
from harness.tenant.ports import Alarm, Ports, Progress
from harness.tenant.retries import GUEST, HOST, PAYLOAD, Retries
from harness.tenant.round import Finding, Round, Rounds, Unanswered
from harness.tenant.states import ACTIVE, STOPPED, Effect, Event, State, transition


class Session:
    """One agent under attestation.

    Args:
        plan: whom to ask and what to believe.
        ports: the peers, the records, time and chance.
        progress: what was reached before, as stored.
    """

    def __init__(self, plan: Plan, ports: Ports, progress: Progress) -> None:
        self.plan = plan
        self._ports = ports
        self._progress = progress
        self._retries = Retries(plan.timing)
        self._rounds = Rounds(plan, ports)
        self._round: Round | None = None
        self._finding: Finding | None = None
        self._resumed = asyncio.Event()
        self._perform: dict[Effect, Callable[[], Awaitable[Event | None]]] = {
            Effect.NEW_ROUND: self._new_round,
            Effect.RECORD_SUCCESS: self._record_success,
            Effect.STORE_BASELINE: self._store_baseline,
            Effect.RAISE_ALARM: self._raise_alarm,
            Effect.LOG_ERROR: self._log_error,
            Effect.RECORD_FAILURE: self._record_failure,
            Effect.RESET_COUNTERS: self._reset_counters,
            Effect.ASK_GUEST: self._ask_guest,
            Effect.ASK_PROVIDER: self._ask_provider,
            Effect.SEND_V: self._send_v,
            Effect.BACK_OFF: self._back_off,
            Effect.WAIT_INTERVAL: self._wait_interval,
            Effect.AWAIT_OPERATOR: self._await_operator,
        }

    # --- what others see and do ---------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """Operational state now."""
        return self._progress.state

    @property
    def progress(self) -> Progress:
        """What was reached so far."""
        return self._progress

    def attested(self) -> bool:
        """Whether all evidence was accepted within the last three intervals, and nothing was refused since."""
        last = self._progress.last_success
        if last is None or self.state not in ACTIVE:
            return False
        return 0 <= self._ports.clock.now() - last < self.plan.timing.attested_for_s

    def resume(self) -> None:
        """Lets a stopped session start anew at GET_QUOTE.

        Raises:
            Conflict: the session is not stopped.
        """
        if self.state not in STOPPED:
            raise Conflict(f"agent {self.plan.agent_id} is in state {self.state.name}; nothing is to be resumed")
        self._resumed.set()

    def delete(self) -> None:
        """Marks the session TERMINATED; its task must have ended."""
        self._fire(Event.DELETE)

    # --- the driver ---------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Drives the session until it is cancelled.

        *Cancellation:* an active session goes to SAVED; an answer that is under way is dropped, what is being stored
        is stored.
        """
        event: Event | None = None if self.state in STOPPED else Event.BEGIN
        try:
            while True:
                event = await self._guarded_step(event)
        finally:
            if self.state in ACTIVE:
                self._fire(Event.SUSPEND)

    async def _guarded_step(self, event: Event | None) -> Event | None:
        """One step; None asks for the operator. This is the task's border: what is unknown ends in TENANT_FAILED."""
        try:
            return await self._await_operator() if event is None else await self._step(event)
        except Exception as error:
            events.emit(
                "session_fault", level="error", agent_id=str(self.plan.agent_id), state=self.state.name, exc_info=True
            )
            self._finding = Finding("verifier", type(error).__name__, str(error))
            return Event.INTERNAL_FAULT if self.state in ACTIVE else None

    async def _step(self, event: Event) -> Event | None:
        *bookkeeping, activity = self._fire(event)
        await _finished(self._keep_books(bookkeeping))
        return await self._perform[activity]()

    async def _keep_books(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            await self._perform[effect]()

    def _fire(self, event: Event) -> tuple[Effect, ...]:
        row = transition(self.state, event)
        if row.state is not self.state:
            events.emit(
                "state", agent_id=str(self.plan.agent_id), old=self.state.name, new=row.state.name, cause=event.name
            )
        progress = replace(self._progress, state=row.state)
        self._progress = self._with_finding(progress) if Effect.RECORD_FAILURE in row.effects else progress
        return row.effects

    # --- bookkeeping --------------------------------------------------------------------------------------

    async def _new_round(self) -> None:
        self._round = None

    async def _reset_counters(self) -> None:
        self._resumed.clear()
        self._retries.forget()
        self._rounds.require_host()
        self._finding = None
        # the operator knows of earlier reboots: only the baseline that all guests of the host share counts from here on
        self._progress = replace(
            self._progress, host_baseline=None, layer=None, failed_check=None, error=None, detail=None
        )
        await self._save()

    async def _record_success(self) -> None:
        self._retries.succeeded()
        self._finding = None
        host = self._round.host_baseline if self._round else None
        self._progress = replace(
            self._progress,
            last_success=self._ports.clock.now(),
            rounds=self._progress.rounds + 1,
            host_baseline=host or self._progress.host_baseline,
            layer=None,
            failed_check=None,
            error=None,
            detail=None,
        )
        await self._save()

    async def _record_failure(self) -> None:
        await self._save()

    def _with_finding(self, progress: Progress) -> Progress:
        """Why the session stops, in the same step as the state that says so: nobody sees one without the other."""
        finding = self._finding
        if finding is None:
            return progress
        return replace(
            progress,
            layer=finding.layer,
            failed_check=finding.check,
            error=finding.error,
            detail=finding.detail,
        )

    async def _store_baseline(self) -> None:
        reboot = self._finding.reboot if self._finding else None
        if reboot is None:
            raise IllegalTransition("a baseline is to be stored without a reboot")
        await self._ports.records.replace_baseline(reboot.ak_name, old=reboot.old, new=reboot.new)
        self._rounds.require_host()

    async def _raise_alarm(self) -> None:
        finding = self._finding
        if finding is None:
            raise IllegalTransition("an alarm is to be raised without a finding")
        host_id = None if self.plan.host is None else str(self.plan.host.host_id)
        events.emit("alarm", agent_id=str(self.plan.agent_id), host_id=host_id, layer=finding.layer, kind=finding.error)
        detail = f"{finding.layer}: {finding.detail}"
        await self._ports.records.alarm(
            Alarm(kind=finding.error, agent_id=self.plan.agent_id, host_id=host_id, detail=detail)
        )

    async def _log_error(self) -> None:
        detail = self._finding.detail if self._finding else ""
        events.emit("session_error", level="error", agent_id=str(self.plan.agent_id), detail=detail)

    async def _save(self) -> None:
        await self._ports.records.save(self.plan.agent_id, self._progress)

    # --- activities ---------------------------------------------------------------------------------------

    async def _ask_guest(self) -> Event:
        outcome = await self._rounds.ask_guest()
        if isinstance(outcome, Unanswered):
            return self._unanswered(GUEST, outcome.error)
        if isinstance(outcome, Finding):
            return self._rejected(outcome)
        self._retries.answered(GUEST)
        self._round = outcome
        if self._rounds.host_due(v_due=self._v_due()):
            return Event.GUEST_ACCEPTED
        return self._accepted(outcome)

    async def _ask_provider(self) -> Event:
        current = self._current_round()
        if self._rounds.expired(current):
            return self._restarted(Event.ROUND_EXPIRED, "the round was not over in time, again and again")
        outcome = await self._rounds.ask_host(current, own=self._progress.host_baseline)
        if outcome is None:
            return self._restarted(Event.BASELINE_CHANGED, "the host was reset within the round, again and again")
        if isinstance(outcome, Unanswered):
            event = self._unanswered(HOST, outcome.error)
            return Event.ROUND_EXPIRED if event is Event.TRANSPORT_FAILED and self._out_of_time(outcome) else event
        if isinstance(outcome, Finding):
            return self._rejected(outcome)
        self._retries.answered(HOST)
        self._round = outcome
        return self._accepted(outcome)

    async def _send_v(self) -> Event:
        share = self.plan.v
        if share is None:
            raise IllegalTransition("V is to be sent for an agent without a payload")
        wrapped = wrap_share(share, parse_transport_key(self._current_round().accepted_key()))
        try:
            async with self._ports.clock.timeout(self.plan.timing.attempt_deadline_s):
                await self._ports.guest.provide_v(wrapped)
        except TimeoutError:
            return self._unanswered(PAYLOAD, DeadlineExceeded("the guest agent did not take V in time"))
        except HarnessError as error:
            return self._unanswered(PAYLOAD, error)
        self._retries.answered(PAYLOAD)
        self._progress = replace(self._progress, v_released=True)
        await _finished(self._save())
        return Event.V_DELIVERED

    async def _back_off(self) -> Event:
        await self._ports.clock.sleep(self._retries.wait_s(self._ports.chance.jitter()))
        bound_to_round = self.state in (State.GET_PROVIDER_QUOTE_RETRY, State.PROVIDE_V_RETRY)
        if bound_to_round and self._rounds.expired(self._current_round()):
            return Event.ROUND_EXPIRED
        return Event.RETRY_DUE

    async def _wait_interval(self) -> Event:
        await self._ports.clock.sleep(self.plan.timing.quote_interval_s)
        return Event.INTERVAL_OVER

    async def _await_operator(self) -> Event:
        await self._resumed.wait()
        return Event.RESUME

    # --- from outcomes to events --------------------------------------------------------------------------

    def _v_due(self) -> bool:
        return self.plan.v is not None and not self._progress.v_released

    def _accepted(self, done: Round) -> Event:
        self._rounds.finished(done)
        return Event.V_DUE if self._v_due() else Event.ROUND_ACCEPTED

    def _unanswered(self, layer: str, error: HarnessError) -> Event:
        """Event for a failure around a question; an answer that is no evidence at all is a verdict (check 1)."""
        if isinstance(error, MalformedEvidence):
            return self._rejected(Finding(layer, type(error).__name__, error.detail, check=error.check))
        self._finding = Finding(layer, type(error).__name__, error.detail)
        return self._retries.after(layer, error)

    def _out_of_time(self, outcome: Unanswered) -> bool:
        return isinstance(outcome.error, DeadlineExceeded) and self._rounds.expired(self._current_round())

    def _restarted(self, event: Event, detail: str) -> Event:
        self._finding = Finding(HOST, event.name, detail)
        return self._retries.restart(event)

    def _rejected(self, finding: Finding) -> Event:
        self._finding = finding
        if finding.error == "ClockNotSafe":
            return self._retries.unsafe(finding.layer, self._ports.clock.monotonic())
        if finding.reboot is not None and self.plan.allow_reboots:
            return self._retries.restart(Event.REBOOT_ALLOWED)
        return Event.APPRAISAL_FAILED

    def _current_round(self) -> Round:
        if self._round is None:
            raise IllegalTransition("no accepted guest evidence in this round")
        return self._round


async def _finished(bookkeeping: Coroutine[None, None, None]) -> None:
    """Waits until it is done, also when cancelled meanwhile. Bounded, because a transaction is.

    *Cancellation:* it was done, or a second cancellation stopped it.
    """
    task = asyncio.get_running_loop().create_task(bookkeeping)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        try:
            await asyncio.wait({task})
        finally:
            task.cancel()
        if not task.cancelled() and (fault := task.exception()) is not None:  # must not hide the cancellation
            events.emit("session_fault", level="error", detail=str(fault))
        raise
