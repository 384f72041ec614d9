"""The transition table of the tenant verifier: every (state, event) pair, and the diagram made from it."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from harness.errors import HarnessError, IllegalTransition
from harness.tenant import states
from harness.tenant.states import ACTIVE, STOPPED, TABLE, Effect, Event, State, render_diagram, transition

PAIRS = list(itertools.product(State, Event))
DOCS = Path(__file__).parents[2] / "docs" / "states.md"

ACTIVITY_OF = {
    State.START: {Effect.AWAIT_STORE},
    State.SAVED: {Effect.AWAIT_TASK},
    State.GET_QUOTE: {Effect.ASK_GUEST, Effect.WAIT_INTERVAL},
    State.GET_QUOTE_RETRY: {Effect.BACK_OFF},
    State.GET_PROVIDER_QUOTE: {Effect.ASK_PROVIDER},
    State.GET_PROVIDER_QUOTE_RETRY: {Effect.BACK_OFF},
    State.PROVIDE_V: {Effect.SEND_V},
    State.PROVIDE_V_RETRY: {Effect.BACK_OFF},
    State.FAILED: {Effect.AWAIT_OPERATOR},
    State.INVALID_QUOTE: {Effect.AWAIT_OPERATOR},
    State.TENANT_FAILED: {Effect.AWAIT_OPERATOR},
    State.TERMINATED: {Effect.END},
}


def test_the_integers_are_keylimes() -> None:
    """The wire integers are Keylime's, with 11 and 12 added, and none is used twice."""
    assert [(state.value, state.name) for state in State] == [
        (0, "REGISTERED"),
        (1, "START"),
        (2, "SAVED"),
        (3, "GET_QUOTE"),
        (4, "GET_QUOTE_RETRY"),
        (5, "PROVIDE_V"),
        (6, "PROVIDE_V_RETRY"),
        (7, "FAILED"),
        (8, "TERMINATED"),
        (9, "INVALID_QUOTE"),
        (10, "TENANT_FAILED"),
        (11, "GET_PROVIDER_QUOTE"),
        (12, "GET_PROVIDER_QUOTE_RETRY"),
    ]


@pytest.mark.parametrize(("state", "event"), PAIRS, ids=lambda value: value.name)
def test_every_pair_is_a_row_or_an_illegal_transition(state: State, event: Event) -> None:
    """A pair in the table ends with one activity that fits its state; any other pair raises and is no handled error."""
    if (state, event) in TABLE:
        row = transition(state, event)
        *before, last = row.effects
        assert last in ACTIVITY_OF[row.state]
        assert not any(effect.is_activity for effect in before)
    else:
        with pytest.raises(IllegalTransition, match=f"{state.name} .* {event.name}") as caught:
            transition(state, event)
        assert not isinstance(caught.value, HarnessError)


def test_no_row_is_given_twice() -> None:
    """No second row of the same pair hides behind the first."""
    assert len(states._rows()) == len(TABLE)


def test_every_state_can_be_reached_and_left() -> None:
    """From REGISTERED every state can be reached; only TERMINATED has no exit."""
    reached = {State.REGISTERED}
    while more := {row.state for (state, _), row in TABLE.items() if state in reached} - reached:
        reached |= more
    assert reached == set(State)
    assert {state for state in State if not any(source == state for source, _ in TABLE)} == {State.TERMINATED}


def test_stopped_states_are_left_by_resume_or_delete_only() -> None:
    """FAILED, INVALID_QUOTE and TENANT_FAILED have two exits, and resume starts anew at GET_QUOTE."""
    for state in STOPPED:
        exits = {event: row.state for (source, event), row in TABLE.items() if source == state}
        assert exits == {Event.RESUME: State.GET_QUOTE, Event.DELETE: State.TERMINATED}


def test_v_is_sent_after_acceptance_only() -> None:
    """The only ways into PROVIDE_V are the acceptance of all evidence and a retry of the delivery."""
    ways = {(state, event) for (state, event), row in TABLE.items() if row.state == State.PROVIDE_V}
    assert ways == {
        (State.GET_QUOTE, Event.V_DUE),
        (State.GET_PROVIDER_QUOTE, Event.V_DUE),
        (State.PROVIDE_V_RETRY, Event.RETRY_DUE),
    }
    assert all((Effect.SEND_V in row.effects) == (row.state == State.PROVIDE_V) for row in TABLE.values())


def test_whoever_stops_a_session_raises_an_alarm_and_stores_both_at_once() -> None:
    """Every way into a stopped state ends in alarm, record, operator; an alarm is always followed by its record."""
    for (_, event), row in TABLE.items():
        if row.state in STOPPED:
            assert row.effects[-3:] == (Effect.RAISE_ALARM, Effect.RECORD_FAILURE, Effect.AWAIT_OPERATOR), event
        for effect, following in itertools.pairwise(row.effects):
            if effect is Effect.RAISE_ALARM:
                assert following in {Effect.RECORD_FAILURE, Effect.STORE_BASELINE}


def test_a_rejection_is_never_retried() -> None:
    """Rejected evidence leads to INVALID_QUOTE from both questions, with an alarm."""
    rows = {state: row for (state, event), row in TABLE.items() if event is Event.APPRAISAL_FAILED}
    assert set(rows) == {State.GET_QUOTE, State.GET_PROVIDER_QUOTE}
    for row in rows.values():
        assert row.state == State.INVALID_QUOTE
        assert Effect.RAISE_ALARM in row.effects


def test_a_reboot_never_records_success() -> None:
    """An allowed reboot stores the baseline and starts the round anew; it is no acceptance."""
    rows = [row for (_, event), row in TABLE.items() if event is Event.REBOOT_ALLOWED]
    assert rows
    for row in rows:
        assert row.state == State.GET_QUOTE
        assert {Effect.STORE_BASELINE, Effect.RAISE_ALARM, Effect.NEW_ROUND} < set(row.effects)
        assert Effect.RECORD_SUCCESS not in row.effects


def test_every_active_state_can_be_stopped() -> None:
    """A stop of the service, a fault of ours and a deletion are legal in every active state."""
    for state in ACTIVE:
        assert transition(state, Event.SUSPEND).state == State.SAVED
        assert transition(state, Event.INTERNAL_FAULT).state == State.TENANT_FAILED
        assert transition(state, Event.DELETE).state == State.TERMINATED


def test_the_diagram_in_the_docs_is_the_generated_one() -> None:
    """docs/states.md is what the table renders to."""
    assert DOCS.read_text(encoding="utf-8") == render_diagram()
