"""Turns what a command did into the one exit code and the one sentence that people and programs rely on.

Invariants:
    1. Exit codes live here only: 0 success, 1 a negative finding, 2 unusable input or set-up, 3 internal fault, 141 the
       reader of standard output has gone, which is no error to tell.
    2. 2 is what another command line or another set-up would mend: a usage error, an id that nobody knows (404), a
       body that cannot be read (400), a service that does not answer, a file or output that cannot be used. 1 is an
       answer: a refusal, a conflict (409), evidence that is not believed.
    3. Every error is one sentence on standard error, with the next step where there is one; standard output stays
       what the command promised. A traceback is shown only with ``HARNESS_DEBUG=1``.
"""

from __future__ import annotations

import enum
import os
import sys
import traceback
from collections.abc import Callable

from harness import cli_advice, console, errors


class ExitCode(enum.IntEnum):
    """What the exit code of a command means."""

    OK = 0
    FINDING = 1
    UNUSABLE = 2
    FAULT = 3
    READER_GONE = 141


_CODES: tuple[tuple[type[errors.HarnessError], ExitCode], ...] = (
    (errors.NotFound, ExitCode.UNUSABLE),  # what was typed does not exist
    (errors.Refused, ExitCode.FINDING),
    (errors.AppraisalError, ExitCode.FINDING),
    (errors.EnrolmentError, ExitCode.FINDING),
    (errors.Overloaded, ExitCode.FINDING),
    (errors.BatchFailed, ExitCode.FINDING),
)
"""First match wins: an error that is an answer to the question is a finding; every other one means that the question
could not be asked, or not as it was typed. What a peer refused in its own words is judged by `_of_refusal`."""

_UNUSABLE_STATUS = frozenset({400, 404, 405, 413, 414, 415, 422})
"""Statuses that say that the request itself cannot be used; 401, 403, 409 and 429 answer it."""
_UNUSABLE_LOCALLY = frozenset({"MalformedMessage", "NotFound", "ConfigError", "SimulatorMissing", "MessageTooLarge"})


def exit_code_of(error: errors.HarnessError) -> ExitCode:
    """Exit code for an error that a command did not handle itself."""
    match error:
        case errors.PeerRefusedUs(status=status):
            return ExitCode.UNUSABLE if status in _UNUSABLE_STATUS else ExitCode.FINDING
        case errors.LocalRefusal(error=name):
            return ExitCode.UNUSABLE if name in _UNUSABLE_LOCALLY else ExitCode.FINDING
    return next((code for kind, code in _CODES if isinstance(error, kind)), ExitCode.UNUSABLE)


def next_step(error: errors.HarnessError) -> str | None:
    """What to do about it, where that does not follow from the error's own sentence."""
    return cli_advice.step_for_class(type(error))


def run(command: Callable[[], object]) -> int:
    """`guarded`, for a process of its own: what cannot be written to standard output is code 2 as well."""

    def written() -> None:
        with console.claimed_output():
            command()

    return guarded(written)


def guarded(command: Callable[[], object]) -> int:
    """Run a command line; every way to end becomes an exit code.

    Args:
        command: the typer application. It ends by SystemExit, also on usage errors, which are code 2.
    """
    try:
        command()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except console.ReaderGone:
        return ExitCode.READER_GONE
    except errors.HarnessError as error:
        say(error.detail, next_step(error))
        _show_traceback()
        return exit_code_of(error)
    except OSError as error:  # no room, no permission, no folder for temporary files: what the system refused
        say(_refused_by_the_system(error))
        _show_traceback()
        return ExitCode.UNUSABLE
    except Exception as error:
        fault = f"internal fault: {type(error).__name__}: {error}".splitlines()[0]
        say(fault, None if _debugging() else "run it again with HARNESS_DEBUG=1 to see where")
        _show_traceback()
        return ExitCode.FAULT
    return ExitCode.OK


def _refused_by_the_system(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}".splitlines()[0]


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
