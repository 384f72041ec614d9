"""The life of one agent in the tenant verifier: states, events, and the only table of transitions.

Invariants:
    1. Every exit from a state is a row of ``TABLE``; a pair that is not there raises `IllegalTransition` and
       changes nothing.
    2. This module is pure: it knows neither sockets nor clocks nor databases, and not why an event came.
    3. Every row ends with exactly one activity (`Effect.is_activity`); all other effects come before it.
    4. ``SEND_V`` is reached from ``V_DUE`` and from a retry of the delivery only, never from a failure.
    5. Whoever stops a session raises an alarm; ``RAISE_ALARM`` stands right before the effect that stores it, so that
       the finding and its alarm are one transaction.

Owner: nobody; the table is read-only.

Spec: DESIGN 3.8 (states and integers as Keylime's ``common/states.py``, plus 11 and 12).

>>> transition(State.GET_PROVIDER_QUOTE, Event.APPRAISAL_FAILED).state
<State.INVALID_QUOTE: 9>
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from harness.errors import IllegalTransition


class State(enum.IntEnum):
    """Operational state; the integer is Keylime's, and appears on the wire only."""

    REGISTERED = 0  # known, not yet added here
    START = 1  # the add request was accepted, not yet stored
    SAVED = 2  # stored, no task drives it
    GET_QUOTE = 3
    GET_QUOTE_RETRY = 4
    PROVIDE_V = 5
    PROVIDE_V_RETRY = 6
    FAILED = 7
    TERMINATED = 8
    INVALID_QUOTE = 9
    TENANT_FAILED = 10  # a fault of this verifier itself, never the agent's
    GET_PROVIDER_QUOTE = 11
    GET_PROVIDER_QUOTE_RETRY = 12


class Event(enum.Enum):
    """What happened; the value is the sentence for people and for the diagram."""

    ADD = "agent added"
    STORED = "record stored"
    BEGIN = "task started"
    INTERVAL_OVER = "interval over"
    RETRY_DUE = "back-off over"
    GUEST_ACCEPTED = "guest evidence accepted, host quote due"
    ROUND_ACCEPTED = "all evidence of the round accepted"
    V_DUE = "all evidence accepted, V not yet released"
    V_DELIVERED = "V delivered"
    TRANSPORT_FAILED = "transport failure"
    ABSENT = "404"
    RETRIES_EXHAUSTED = "retries exhausted"
    REFUSED = "403"
    CLIENT_ERROR = "other 4xx"
    APPRAISAL_FAILED = "evidence rejected"
    REBOOT_ALLOWED = "reboot, allowed by policy"
    CLOCK_NOT_SAFE = "clock not safe"
    CLOCK_UNSAFE_TOO_LONG = "clock not safe for too long"
    BASELINE_CHANGED = "host counters changed within the round"
    ROUND_EXPIRED = "round deadline passed"
    INTERNAL_FAULT = "fault of the verifier"
    SUSPEND = "service stopped"
    RESUME = "operator resumes"
    DELETE = "agent deleted"


class Effect(enum.Enum):
    """What the session does on a transition, in the order of the row."""

    STORE_AGENT = "store the agent"
    NEW_ROUND = "forget the evidence of the round"
    RECORD_SUCCESS = "record the time of success"
    RAISE_ALARM = "raise an alarm"
    STORE_BASELINE = "store the new clock baseline"
    LOG_ERROR = "log an error of ours"
    RECORD_FAILURE = "store the failure and its reason"
    RESET_COUNTERS = "forget earlier failures"
    # activities: each yields the next event
    ASK_GUEST = "ask the guest for a quote"
    ASK_PROVIDER = "ask the provider for a host quote"
    SEND_V = "send V to the guest"
    BACK_OFF = "wait before the retry"
    WAIT_INTERVAL = "wait for the next round"
    AWAIT_STORE = "wait until stored"
    AWAIT_TASK = "wait for a task"
    AWAIT_OPERATOR = "wait for the operator"
    END = "end"

    @property
    def is_activity(self) -> bool:
        """Whether the session waits in this effect, so that it yields the next event."""
        return self in ACTIVITIES


ACTIVITIES = frozenset(
    {
        Effect.ASK_GUEST,
        Effect.ASK_PROVIDER,
        Effect.SEND_V,
        Effect.BACK_OFF,
        Effect.WAIT_INTERVAL,
        Effect.AWAIT_STORE,
        Effect.AWAIT_TASK,
        Effect.AWAIT_OPERATOR,
        Effect.END,
    }
)

STOPPED = frozenset({State.FAILED, State.INVALID_QUOTE, State.TENANT_FAILED})
"""Left only by an operator's resume (DESIGN 3.8), or by deletion."""

STOPPED_NAMES = frozenset(state.name for state in STOPPED)
"""The same, as views and people name them."""

ACTIVE = frozenset(
    {
        State.GET_QUOTE,
        State.GET_QUOTE_RETRY,
        State.GET_PROVIDER_QUOTE,
        State.GET_PROVIDER_QUOTE_RETRY,
        State.PROVIDE_V,
        State.PROVIDE_V_RETRY,
    }
)
"""A task drives the agent."""


@dataclass(frozen=True, slots=True)
class Transition:
    """The next state and what to do on the way there."""

    state: State
    effects: tuple[Effect, ...]


_Row = tuple[State, Event, State, tuple[Effect, ...]]

_NEW_ROUND = (Effect.NEW_ROUND, Effect.ASK_GUEST)
_STOP = (Effect.RAISE_ALARM, Effect.RECORD_FAILURE, Effect.AWAIT_OPERATOR)
_OUR_BUG = (Effect.LOG_ERROR, *_STOP)


def _life() -> list[_Row]:
    """Rows of adding, storing, stopping, resuming and deleting."""
    rows: list[_Row] = [
        (State.REGISTERED, Event.ADD, State.START, (Effect.STORE_AGENT, Effect.AWAIT_STORE)),
        (State.START, Event.STORED, State.SAVED, (Effect.AWAIT_TASK,)),
        (State.SAVED, Event.BEGIN, State.GET_QUOTE, _NEW_ROUND),
        (State.GET_QUOTE, Event.INTERVAL_OVER, State.GET_QUOTE, _NEW_ROUND),
    ]
    for state in ACTIVE:
        rows.append((state, Event.SUSPEND, State.SAVED, (Effect.AWAIT_TASK,)))
        rows.append((state, Event.INTERNAL_FAULT, State.TENANT_FAILED, _OUR_BUG))
    rows.extend(
        (state, Event.RESUME, State.GET_QUOTE, (Effect.RESET_COUNTERS, Effect.NEW_ROUND, Effect.ASK_GUEST))
        for state in STOPPED
    )
    rows.extend((state, Event.DELETE, State.TERMINATED, (Effect.END,)) for state in State if state != State.TERMINATED)
    return rows


def _failures(asking: State, retry: State, again: Effect) -> list[_Row]:
    """Rows that all three questions share: what a peer's failure leads to."""
    return [
        (asking, Event.TRANSPORT_FAILED, retry, (Effect.BACK_OFF,)),
        (asking, Event.ABSENT, retry, (Effect.BACK_OFF,)),
        (asking, Event.RETRIES_EXHAUSTED, State.FAILED, _STOP),
        (asking, Event.REFUSED, State.FAILED, _STOP),
        (asking, Event.CLIENT_ERROR, State.FAILED, _OUR_BUG),
        (retry, Event.RETRY_DUE, asking, (again,)),
    ]


def _verdicts(asking: State, retry: State) -> list[_Row]:
    """Rows of the two questions whose answer is appraised."""
    rebooted = (Effect.RAISE_ALARM, Effect.STORE_BASELINE, *_NEW_ROUND)
    return [
        (asking, Event.ROUND_ACCEPTED, State.GET_QUOTE, (Effect.RECORD_SUCCESS, Effect.WAIT_INTERVAL)),
        (asking, Event.V_DUE, State.PROVIDE_V, (Effect.RECORD_SUCCESS, Effect.SEND_V)),
        (asking, Event.APPRAISAL_FAILED, State.INVALID_QUOTE, _STOP),
        (asking, Event.REBOOT_ALLOWED, State.GET_QUOTE, rebooted),
        (asking, Event.CLOCK_NOT_SAFE, retry, (Effect.BACK_OFF,)),
        (asking, Event.CLOCK_UNSAFE_TOO_LONG, State.FAILED, _STOP),
    ]


def _rows() -> list[_Row]:
    guest = (State.GET_QUOTE, State.GET_QUOTE_RETRY)
    host = (State.GET_PROVIDER_QUOTE, State.GET_PROVIDER_QUOTE_RETRY)
    share = (State.PROVIDE_V, State.PROVIDE_V_RETRY)
    return [
        *_life(),
        *_failures(*guest, Effect.ASK_GUEST),
        *_verdicts(*guest),
        (State.GET_QUOTE, Event.GUEST_ACCEPTED, State.GET_PROVIDER_QUOTE, (Effect.ASK_PROVIDER,)),
        *_failures(*host, Effect.ASK_PROVIDER),
        *_verdicts(*host),
        (State.GET_PROVIDER_QUOTE, Event.BASELINE_CHANGED, State.GET_QUOTE, _NEW_ROUND),
        (State.GET_PROVIDER_QUOTE, Event.ROUND_EXPIRED, State.GET_QUOTE, _NEW_ROUND),
        (State.GET_PROVIDER_QUOTE_RETRY, Event.ROUND_EXPIRED, State.GET_QUOTE, _NEW_ROUND),
        *_failures(*share, Effect.SEND_V),
        (State.PROVIDE_V, Event.V_DELIVERED, State.GET_QUOTE, (Effect.WAIT_INTERVAL,)),
        (State.PROVIDE_V, Event.ROUND_EXPIRED, State.GET_QUOTE, _NEW_ROUND),
        (State.PROVIDE_V_RETRY, Event.ROUND_EXPIRED, State.GET_QUOTE, _NEW_ROUND),
    ]


TABLE: Mapping[tuple[State, Event], Transition] = MappingProxyType(
    {(state, event): Transition(after, effects) for state, event, after, effects in _rows()}
)
"""Every legal pair (state, event) with what follows."""


def transition(state: State, event: Event) -> Transition:
    """The row of the table for this pair.

    Raises:
        IllegalTransition: the state does not allow the event: a bug of the caller; nothing has changed.
    """
    try:
        return TABLE[state, event]
    except KeyError:
        raise IllegalTransition(f"state {state.name} does not allow the event {event.name}") from None


_HEADER = """# States of an agent in the tenant verifier

Generated from the table in `harness/tenant/states.py` by `python -m harness.tenant.states > docs/states.md`; a test
compares the two. The numbers are Keylime's, with 11 and 12 added (DESIGN 3.8).
"""


def _diagram_line(before: State, after: State) -> str:
    events = [event.value for (state, event), row in TABLE.items() if state == before and row.state == after]
    return f"    {before.name} --> {after.name}: {'<br/>'.join(events)}"


def render_diagram() -> str:
    """The state diagram (mermaid) and the table with its effects, as Markdown: the text of ``docs/states.md``.

    Every active state also goes to SAVED, TENANT_FAILED and TERMINATED; these edges are in the table below the
    diagram and are left out of the drawing, which nobody could read with them.
    """
    pairs = sorted({(state, row.state) for (state, _), row in TABLE.items()})
    common = {State.SAVED, State.TENANT_FAILED, State.TERMINATED}
    drawn = [(before, after) for before, after in pairs if before not in ACTIVE or after not in common]
    lines = [_HEADER, "```mermaid", "stateDiagram-v2"]
    lines += [f"    [*] --> {State.REGISTERED.name}"]
    lines += [_diagram_line(before, after) for before, after in drawn]
    lines += [f"    {State.TERMINATED.name} --> [*]", "```", ""]
    lines += ["Not drawn: each of " + ", ".join(s.name for s in sorted(ACTIVE)) + " also leads"]
    lines += ["to SAVED, TENANT_FAILED and TERMINATED, as the table says.", ""]
    lines += ["| state | event | next | effects |", "|---|---|---|---|"]
    for (state, event), row in sorted(TABLE.items(), key=lambda item: (item[0][0], list(Event).index(item[0][1]))):
        effects = ", ".join(effect.value for effect in row.effects)
        lines.append(f"| {state.name} {state.value} | {event.value} | {row.state.name} | {effects} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(render_diagram(), end="")
