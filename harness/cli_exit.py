"""Turns what a command did into the one exit code and the one sentence that people and programs rely on.

Invariants:
    1. Exit codes live here only: 0 success, 1 a negative finding, 2 unusable input or set-up, 3 internal fault.
    2. Every error is one sentence on standard error, with the next step where there is one; standard output stays
       what the command promised. A traceback is shown only with ``HARNESS_DEBUG=1``.
"""

from __future__ import annotations

import enum
import os
import sys
import traceback
from collections.abc import Callable

from harness import errors


class ExitCode(enum.IntEnum):
    """What the exit code of a command means."""

    OK = 0
    FINDING = 1
    UNUSABLE = 2
    FAULT = 3


_FINDINGS: tuple[type[errors.HarnessError], ...] = (
    errors.AppraisalError,
    errors.EnrolmentError,
    errors.Refused,
    errors.PeerRefusedUs,
    errors.Overloaded,
    errors.BatchFailed,
)
"""Errors that are an answer to the question; every other HarnessError means that it could not be asked."""

_NEXT_STEPS: tuple[tuple[type[errors.HarnessError], str], ...] = (
    (errors.SimulatorMissing, "`harness doctor` tells what is missing and how to install it"),
    (errors.PeerUnreachable, "is the service running? `harness demo --keep` starts a lab and names its folder"),
    (errors.AccessDenied, "the certificate in use has another role or another authority than this call needs"),
    (errors.Overloaded, "try again in a moment"),
    (errors.KeyChanged, "find out why the key changed; only then remove the record and enrol again"),
)


def exit_code_of(error: errors.HarnessError) -> ExitCode:
    """Exit code for an error that a command did not handle itself."""
    return ExitCode.FINDING if isinstance(error, _FINDINGS) else ExitCode.UNUSABLE


def next_step(error: errors.HarnessError) -> str | None:
    """What to do about it, where that does not follow from the error's own sentence."""
    return next((step for kind, step in _NEXT_STEPS if isinstance(error, kind)), None)


def guarded(command: Callable[[], object]) -> int:
    """Run a command line; every way to end becomes an exit code.

    Args:
        command: the typer application. It ends by SystemExit, also on usage errors, which are code 2.
    """
    try:
        command()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except errors.HarnessError as error:
        say(error.detail, next_step(error))
        _show_traceback()
        return exit_code_of(error)
    except Exception as error:
        fault = f"internal fault: {type(error).__name__}: {error}".splitlines()[0]
        say(fault, None if _debugging() else "run it again with HARNESS_DEBUG=1 to see where")
        _show_traceback()
        return ExitCode.FAULT
    return ExitCode.OK


def say(sentence: str, step: str | None = None) -> None:
    """Print one sentence, and the next step if there is one, on standard error."""
    print(f"harness: {sentence}", file=sys.stderr)
    if step:
        print(f"         {step}", file=sys.stderr)


def _debugging() -> bool:
    return os.environ.get("HARNESS_DEBUG", "") not in ("", "0")


def _show_traceback() -> None:
    if _debugging():
        traceback.print_exc()
