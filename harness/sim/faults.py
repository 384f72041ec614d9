"""Fault plans: at which TPM command something goes wrong, how, and whether the command took effect before.

Invariants:
    1. A plan and the sequence of commands decide everything: no randomness, no time.
    2. Each fault counts only the commands that it is about, from the moment when the plan was set.

Owner: the command proxy that holds the injector.

Spec: DESIGN 5; TPM 2.0 Part 2, 6.6 (response codes).
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from harness.errors import ConfigError
from harness.sim.commands import Command

RC_FAILURE = 0x101


class Action(enum.Enum):
    """What goes wrong."""

    FAIL = "fail"
    """The client gets a response code."""
    HANG = "hang"
    """The TPM answers nobody until the client that asked has gone or the TPM is power cycled."""
    CUT = "cut"
    """The connection is closed without a response."""


class Effect(enum.Enum):
    """Whether the TPM carries the command out."""

    BEFORE = "before"
    """It fails before the TPM sees it."""
    AFTER = "after"
    """The TPM carries it out, and the response is lost."""


class Fault(BaseModel):
    """One fault.

    ``command`` is a name such as ``Quote``, or None for any command; the first hit is number ``at`` (from 1) and
    ``times`` in a row are hit.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    action: Action
    effect: Effect = Effect.BEFORE
    command: str | None = None
    at: Annotated[int, Field(ge=1)] = 1
    times: Annotated[int, Field(ge=1)] = 1
    response_code: Annotated[int, Field(ge=1, le=0xFFF)] = RC_FAILURE

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.command is not None and self.command not in Command.__members__:
            raise ValueError(f"{self.command} is not a TPM command with a name here")
        return self

    def concerns(self, command: Command | None) -> bool:
        """Whether this fault counts this command."""
        return self.command is None or (command is not None and command.name == self.command)


def parse_plan(value: object) -> tuple[Fault, ...]:
    """Fault plan from plain data (YAML or JSON): a list of faults.

    Raises:
        ConfigError: anything else.
    """
    if not isinstance(value, list):
        raise ConfigError("a fault plan is a list of faults")
    try:
        return tuple(Fault.model_validate(entry) for entry in value)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"fault plan: {'.'.join(map(str, first['loc'])) or 'fault'}: {first['msg']}") from error


class FaultInjector:
    """Counts commands and says which one is hit.

    Args:
        plan: the faults; where several hit one command, the first in the plan wins.
    """

    def __init__(self, plan: Iterable[Fault] = ()) -> None:
        self.plan = tuple(plan)
        self._seen = [0] * len(self.plan)

    def next(self, command: Command | None) -> Fault | None:
        """Fault that hits this command, if any; counts it."""
        hit: Fault | None = None
        for number, fault in enumerate(self.plan):
            if fault.concerns(command):
                self._seen[number] += 1
                if hit is None and fault.at <= self._seen[number] < fault.at + fault.times:
                    hit = fault
        return hit
