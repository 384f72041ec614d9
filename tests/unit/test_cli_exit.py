"""Exit codes: 0 success, 1 a negative finding, 2 unusable input or set-up, 3 internal fault."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from harness import cli_exit, errors


def all_errors(kind: type[errors.HarnessError] = errors.HarnessError) -> Iterator[type[errors.HarnessError]]:
    """Every class of the exception tree below ``kind``."""
    for child in kind.__subclasses__():
        yield child
        yield from all_errors(child)


FINDINGS = {"AppraisalError", "EnrolmentError", "Refused", "PeerRefusedUs", "Overloaded", "BatchFailed"}


@pytest.mark.parametrize("kind", list(all_errors()), ids=lambda kind: kind.__name__)
def test_every_error_of_the_tree_is_a_finding_or_unusable(kind: type[errors.HarnessError]) -> None:
    """An error that answers the question is 1, one that prevented the question is 2; none is an internal fault."""
    error = kind.__new__(kind)
    finding = any(parent.__name__ in FINDINGS for parent in kind.__mro__)
    assert cli_exit.exit_code_of(error) == (1 if finding else 2)


def raising(error: BaseException) -> Callable[[], None]:
    """A command line that ends with this exception."""

    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("ended", "code"),
    [
        (SystemExit(0), 0),
        (SystemExit(1), 1),
        (SystemExit(2), 2),
        (SystemExit(None), 0),
        (SystemExit("text"), 1),
        (errors.ConfigError("x"), 2),
        (errors.WrongHost("x"), 1),
        (errors.IllegalTransition("x"), 3),
        (RuntimeError("x"), 3),
    ],
)
def test_each_way_to_end_has_its_code(ended: BaseException, code: int) -> None:
    """Whatever a command raises becomes one of the four codes."""
    assert cli_exit.guarded(raising(ended)) == code


def test_a_command_that_returns_is_a_success() -> None:
    """A command line that ends without an exception is code 0."""
    assert cli_exit.guarded(lambda: None) == 0


def test_an_error_is_one_sentence_and_its_next_step(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error's own sentence goes to standard error with the next step; no traceback, nothing on standard output."""
    monkeypatch.delenv("HARNESS_DEBUG", raising=False)
    cli_exit.guarded(raising(errors.SimulatorMissing("swtpm is not installed")))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "harness: swtpm is not installed",
        "         `harness doctor` tells what is missing and how to install it",
    ]


def test_an_internal_fault_shows_its_traceback_only_when_asked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without HARNESS_DEBUG a fault is one sentence; with it the traceback follows."""
    monkeypatch.delenv("HARNESS_DEBUG", raising=False)
    cli_exit.guarded(raising(KeyError("first\nsecond")))
    quiet = capsys.readouterr().err
    monkeypatch.setenv("HARNESS_DEBUG", "1")
    cli_exit.guarded(raising(KeyError("first")))
    loud = capsys.readouterr().err
    assert quiet.startswith("harness: internal fault: KeyError: ")
    assert "HARNESS_DEBUG=1" in quiet
    assert "Traceback" not in quiet
    assert "Traceback" in loud
