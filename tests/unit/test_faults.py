"""Fault plans: which command is hit is decided by the plan and the sequence of commands alone."""

from __future__ import annotations

import pytest

from harness.errors import ConfigError
from harness.sim.commands import Command
from harness.sim.faults import Action, Effect, Fault, FaultInjector, parse_plan

Q, R, N = Command.Quote, Command.PCR_Read, None


def hits(plan: list[Fault], commands: list[Command | None]) -> list[int]:
    """Positions (from 1) of the commands that are hit."""
    injector = FaultInjector(plan)
    return [number for number, command in enumerate(commands, 1) if injector.next(command)]


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (Fault(action=Action.FAIL), [1]),
        (Fault(action=Action.FAIL, at=3), [3]),
        (Fault(action=Action.FAIL, at=2, times=3), [2, 3, 4]),
        (Fault(action=Action.FAIL, command="Quote"), [2]),
        (Fault(action=Action.FAIL, command="Quote", at=2), [5]),
        (Fault(action=Action.FAIL, command="Quote", at=2, times=9), [5, 6]),
        (Fault(action=Action.FAIL, command="Clear"), []),
        (Fault(action=Action.FAIL, at=99), []),
    ],
)
def test_fault_hits_the_command_it_names(fault: Fault, expected: list[int]) -> None:
    """A fault counts all commands or those of one name, and hits ``times`` of them from number ``at``."""
    assert hits([fault], [R, Q, N, R, Q, Q, R]) == expected


def test_every_fault_counts_for_itself_and_the_first_wins() -> None:
    """Two faults count independently; where both hit, the one that stands first in the plan is carried out."""
    first, second = Fault(action=Action.CUT, command="Quote"), Fault(action=Action.FAIL, at=2, times=2)
    injector = FaultInjector([first, second])
    assert [injector.next(command) for command in (R, Q, R, Q)] == [None, first, second, None]


def test_plan_is_parsed_from_plain_data() -> None:
    """Plain data gives typed faults; what is left out has the stated defaults."""
    plan = parse_plan([{"action": "hang", "command": "Quote", "at": 2}, {"action": "fail", "effect": "after"}])
    assert plan == (
        Fault(action=Action.HANG, effect=Effect.BEFORE, command="Quote", at=2, times=1),
        Fault(action=Action.FAIL, effect=Effect.AFTER, command=None, at=1, response_code=0x101),
    )


@pytest.mark.parametrize(
    "value",
    [
        {"action": "fail"},
        "fail",
        [{}],
        [{"action": "explode"}],
        [{"action": "fail", "command": "Quotes"}],
        [{"action": "fail", "at": 0}],
        [{"action": "fail", "times": 0}],
        [{"action": "fail", "response_code": 0}],
        [{"action": "fail", "when": 3}],
        [7],
    ],
)
def test_broken_plan_is_refused(value: object) -> None:
    """Anything that is not a list of well-formed faults is a ConfigError."""
    with pytest.raises(ConfigError):
        parse_plan(value)
