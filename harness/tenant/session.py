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
    5. A finding is stored, with its alarm, before the session may end, or handed to the one that takes its place.
    6. An exception that is not a peer's failure ends in TENANT_FAILED: no path leads from it to "attested".
    7. A success counts from the moment of its acceptance, and only once it is stored. It is over after three intervals
       of the monotonic clock and of the wall clock, whichever is faster: a clock that jumps makes nobody attested.
    8. A database that fails ends no session: what is to be stored waits for it (`bookkeeping`).

Owner: the task that runs `run`; `resume`, `delete` and the views are called from the same event loop.

Spec: DESIGN 3.5 (10, 11), 3.8; STYLE B3, job 1.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace

from harness import events
from harness.errors import (
    Conflict,
    DeadlineExceeded,
    HarnessError,
    IllegalTransition,
    MalformedEvidence,
    StoreError,
)
from harness.tenant import history
from harness.tenant.appraisal import AppraisedEvidence
from harness.tenant.bookkeeping import Books
from harness.tenant.payload import parse_transport_key, wrap_share
from harness.tenant.plan import Plan
from harness.tenant.ports import Alarm, Ports, Progress
from harness.tenant.retries import GUEST, HOST, PAYLOAD, STORE, Retries
from harness.tenant.round import Finding, Round, Rounds, Unanswered
from harness.tenant.states import ACTIVE, STOPPED, Effect, Event, State, transition


class Session:
    """One agent under attestation.

    Args:
        plan: whom to ask and what to believe.
        ports: the peers, the records, time and chance.
        progress: what was reached before, as stored.
        start_within_s: the first question is asked within this time, at random: sessions of a verifier that starts
            do not all ask at once.
        after: the session whose place it takes: what that one may not have stored is stored first.
    """

    def __init__(
        self, plan: Plan, ports: Ports, progress: Progress, *, start_within_s: float = 0.0, after: Session | None = None
    ) -> None:
        self.plan = plan
        self._ports = ports
        self._progress = progress
        self._start_within_s = start_within_s
        self._books = Books(plan.agent_id, ports, plan.timing)
        self._success_at = self._restored_success()  # monotonic
        self._due: float | None = None  # monotonic, while the session waits
        self.alarm: Alarm | None = after.alarm if after else None  # raised, to be stored with what comes next
        self._unstored = after is not None and (after.state in STOPPED or after.alarm is not None)
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
            Effect.RECORD_FAILURE: lambda: self._save(self._progress),
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

    @property
    def trouble(self) -> Finding | None:
        """Why there was no success since the last one, while the session goes on by itself."""
        return self._finding if self.state in ACTIVE else None

    @property
    def store_fault(self) -> StoreError | None:
        """Why nothing can be stored now; None when it can."""
        return self._books.fault

    def attested(self) -> bool:
        """Whether all evidence was accepted within the last three intervals, and nothing was refused since."""
        last = self._progress.last_success
        if last is None or self.state not in ACTIVE or self._books.fault is not None:
            return False
        clock, window = self._ports.clock, self.plan.timing.attested_for_s
        fresh = self._success_at is not None and clock.monotonic() - self._success_at < window
        return fresh and 0 <= clock.now() - last < window

    def _restored_success(self) -> float | None:
        """Monotonic time of the stored success, by the wall clock of now; None where it is stale or of the future."""
        last, clock = self._progress.last_success, self._ports.clock
        age = -1.0 if last is None else clock.now() - last
        return clock.monotonic() - age if 0 <= age < self.plan.timing.attested_for_s else None

    def next_round_at(self) -> float | None:
        """Unix time of the next question; None while one is asked, or when none will be."""
        clock = self._ports.clock
        return None if self._due is None else clock.now() + self._due - clock.monotonic()

    def resumed(self) -> Progress:
        """What is to be stored when an operator resumes: `resume` is called once it is.

        Raises:
            Conflict: the session is not stopped.
        """
        if self.state not in STOPPED:
            raise Conflict(f"agent {self.plan.agent_id} is in state {self.state.name}; nothing is to be resumed")
        return replace(history.forgotten(self._progress), state=transition(self.state, Event.RESUME).state)

    def resume(self) -> None:
        """Lets a stopped session start anew at GET_QUOTE. Raises as `resumed`."""
        self.resumed()
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
        if event is not None and self._start_within_s > 0:
            await self._sleep(self._start_within_s * self._ports.chance.jitter())
        try:
            while True:
                event = await self._guarded_step(event)
        finally:
            if self.state in ACTIVE:
                self._fire(Event.SUSPEND)

    async def _guarded_step(self, event: Event | None) -> Event | None:
        """One step; None asks for the operator. This is the task's border: what is unknown ends in TENANT_FAILED."""
        try:
            if self._unstored:
                self._unstored = False
                await self._save(self._progress)
            return await self._await_operator() if event is None else await self._step(event)
        except Exception as error:
            events.emit(
                "session_fault", level="error", agent_id=str(self.plan.agent_id), state=self.state.name, exc_info=True
            )
            self._finding = Finding("verifier", type(error).__name__, str(error))
            return Event.INTERNAL_FAULT if self.state in ACTIVE else None

    async def _step(self, event: Event) -> Event | None:
        *bookkeeping, activity = self._fire(event)
        await self._keep_books(bookkeeping)
        return await self._perform[activity]()

    async def _keep_books(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            await self._perform[effect]()

    def _fire(self, event: Event) -> tuple[Effect, ...]:
        row = transition(self.state, event)
        self._ports.told(event, row.effects, self._finding, None, self._round)
        if row.state is not self.state:
            events.emit(
                "state", agent_id=str(self.plan.agent_id), old=self.state.name, new=row.state.name, cause=event.name
            )
        progress = self._progress if row.state is self.state else replace(self._progress, state=row.state)
        if Effect.RECORD_FAILURE in row.effects and self._finding is not None:
            progress = history.stopped(progress, self._finding)  # nobody sees the state without its reason
        self._progress = progress
        return row.effects

    # --- bookkeeping --------------------------------------------------------------------------------------

    async def _new_round(self) -> None:
        self._round = None

    async def _reset_counters(self) -> None:
        self._resumed.clear()
        self._retries.forget()
        self._rounds.require_host()
        self._finding = None
        await self._save(history.forgotten(self._progress))

    async def _record_success(self) -> None:
        self._retries.succeeded()
        self._finding = None
        host = self._round.host_baseline if self._round else None
        at = self._ports.clock.monotonic()
        reached = replace(
            history.forgotten(self._progress),
            last_success=self._ports.clock.now(),
            rounds=self._progress.rounds + 1,
            host_baseline=host or self._progress.host_baseline,
        )
        await self._save(reached, success_at=at)

    async def _store_baseline(self) -> None:
        reboot, alarm = (self._finding.reboot if self._finding else None), self.alarm
        if reboot is None or alarm is None:
            raise IllegalTransition("a baseline is to be stored without a reboot and its alarm")

        async def store() -> None:
            await self._ports.records.replace_baseline(reboot, alarm)
            self.alarm = None

        await self._books.write(store)
        self._rounds.require_host()

    async def _raise_alarm(self) -> None:
        finding = self._finding
        if finding is None:
            raise IllegalTransition("an alarm is to be raised without a finding")
        host_id = None if self.plan.host is None else str(self.plan.host.host_id)
        events.emit("alarm", agent_id=str(self.plan.agent_id), host_id=host_id, layer=finding.layer, kind=finding.error)
        detail = f"{finding.layer}: {finding.detail}"
        self.alarm = Alarm(kind=finding.error, agent_id=self.plan.agent_id, host_id=host_id, detail=detail)

    async def _log_error(self) -> None:
        detail = self._finding.detail if self._finding else ""
        events.emit("session_error", level="error", agent_id=str(self.plan.agent_id), detail=detail)

    async def _save(self, reached: Progress, *, success_at: float | None = None) -> None:
        """Stores what was reached, with the alarm that was raised; only then it is what others see."""
        alarm = self.alarm

        async def store() -> None:
            await self._ports.records.save(self.plan.agent_id, reached, alarm)
            self._progress, self.alarm = reached, None
            self._success_at = self._success_at if success_at is None else success_at

        await self._books.write(store)

    # --- activities ---------------------------------------------------------------------------------------

    async def _ask_guest(self) -> Event:
        try:
            outcome = await self._rounds.ask_guest()
        except StoreError as error:
            return self._not_stored(error)
        if isinstance(outcome, Unanswered):
            return self._unanswered(GUEST, outcome.error)
        if isinstance(outcome, Finding):
            return self._rejected(outcome)
        self._answered(GUEST, outcome.guest)
        self._round = outcome
        if self._rounds.host_due(v_due=self._v_due()):
            return Event.GUEST_ACCEPTED
        return self._accepted(outcome)

    async def _ask_provider(self) -> Event:
        current = self._current_round()
        if self._rounds.expired(current):
            return self._restarted(Event.ROUND_EXPIRED, "the round was not over in time, again and again")
        try:
            outcome = await self._rounds.ask_host(current, own=self._progress.host_baseline)
        except StoreError as error:
            return self._not_stored(error)
        if outcome is None:
            return self._restarted(Event.BASELINE_CHANGED, "the host was reset within the round, again and again")
        if isinstance(outcome, Unanswered):
            event = self._unanswered(HOST, outcome.error)
            return Event.ROUND_EXPIRED if event is Event.TRANSPORT_FAILED and self._out_of_time(outcome) else event
        if isinstance(outcome, Finding):
            return self._rejected(outcome)
        if outcome.host is not None:
            self._answered(HOST, outcome.host)
        self._round = outcome
        return self._accepted(outcome)

    async def _send_v(self) -> Event:
        share = self.plan.v
        if share is None:
            raise IllegalTransition("V is to be sent for an agent without a payload")
        current = self._current_round()
        if self._rounds.expired(current):  # what is stored before V goes out may have waited for the database
            return Event.ROUND_EXPIRED
        wrapped = wrap_share(share, parse_transport_key(current.accepted_key()))
        try:
            async with self._ports.clock.timeout(self.plan.timing.attempt_deadline_s):
                await self._ports.guest.provide_v(wrapped)
        except TimeoutError:
            return self._unanswered(PAYLOAD, DeadlineExceeded("the guest agent did not take V in time"))
        except HarnessError as error:
            return self._unanswered(PAYLOAD, error)
        self._retries.answered(PAYLOAD)
        await self._save(replace(self._progress, v_released=True))
        return Event.V_DELIVERED

    async def _back_off(self) -> Event:
        await self._books.write_once(self._ports.records.settle)  # the guest's clock, if the host did not answer
        await self._sleep(self._retries.wait_s(self._ports.chance.jitter()))
        bound_to_round = self.state in (State.GET_PROVIDER_QUOTE_RETRY, State.PROVIDE_V_RETRY)
        if bound_to_round and self._rounds.expired(self._current_round()):
            return Event.ROUND_EXPIRED
        return Event.RETRY_DUE

    async def _wait_interval(self) -> Event:
        await self._sleep(self.plan.timing.wait_between_rounds_s(self._ports.chance.jitter()))
        return Event.INTERVAL_OVER

    async def _sleep(self, seconds: float) -> None:
        self._due = self._ports.clock.monotonic() + seconds
        try:
            await self._ports.clock.sleep(seconds)
        finally:
            self._due = None

    async def _await_operator(self) -> Event:
        await self._resumed.wait()
        return Event.RESUME

    # --- from outcomes to events --------------------------------------------------------------------------

    def _v_due(self) -> bool:
        return self.plan.v is not None and not self._progress.v_released

    def _accepted(self, done: Round) -> Event:
        self._rounds.finished(done)
        return Event.V_DUE if self._v_due() else Event.ROUND_ACCEPTED

    def _answered(self, layer: str, evidence: AppraisedEvidence) -> None:
        self._retries.answered(layer)
        self._progress = history.accepted(self._progress, self.plan, layer, evidence.values, self._ports.clock.now())

    def _not_stored(self, error: StoreError) -> Event:
        """Event for a guest's new contact that cannot be stored: the question is asked again."""
        self._books.failed(error)
        self._finding = Finding(STORE, type(error).__name__, error.detail)
        return self._retries.not_stored()

    def _unanswered(self, layer: str, error: HarnessError) -> Event:
        """Event for a failure around a question; an answer that is no evidence at all is a verdict (check 1)."""
        if isinstance(error, MalformedEvidence):
            return self._rejected(Finding(layer, type(error).__name__, error.detail, check=error.check))
        self._finding = Finding(layer, type(error).__name__, error.detail)
        return self._retries.after(layer, error, self._ports.clock.monotonic())

    def _out_of_time(self, outcome: Unanswered) -> bool:
        return isinstance(outcome.error, DeadlineExceeded) and self._rounds.expired(self._current_round())

    def _restarted(self, event: Event, detail: str) -> Event:
        self._finding = Finding(HOST, event.name, detail)
        return self._retries.restart(event, self._ports.clock.monotonic())

    def _rejected(self, finding: Finding) -> Event:
        self._finding = finding
        clock = self._ports.clock
        self._progress = history.rejected(self._progress, self.plan, finding, clock.now())
        if finding.error == "ClockNotSafe":
            return self._retries.unsafe(finding.layer, clock.monotonic())
        if finding.reboot is not None and self.plan.allow_reboots:
            return self._retries.restart(Event.REBOOT_ALLOWED, clock.monotonic())
        return Event.APPRAISAL_FAILED

    def _current_round(self) -> Round:
        if self._round is None:
            raise IllegalTransition("no accepted guest evidence in this round")
        return self._round
