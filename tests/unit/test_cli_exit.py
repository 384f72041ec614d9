"""Exit codes: 0 success, 1 a negative finding, 2 unusable input or set-up, 3 internal fault."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from harness import cli_exit, errors


def all_errors(kind: type[errors.HarnessError] = errors.HarnessError) -> Iterator[type[errors.HarnessError]]:
    """Every class of the exception tree below ``kind``."""
    for child in kind.__subclasses__():
        yield child
        yield from all_errors(child)


FINDINGS = {"AppraisalError", "EnrolmentError", "Refused", "Overloaded", "BatchFailed"}
ASIDE = (errors.PeerRefusedUs, errors.LocalRefusal, errors.NotFound)


@pytest.mark.parametrize("kind", [kind for kind in all_errors() if kind not in ASIDE], ids=lambda kind: kind.__name__)
def test_every_error_of_the_tree_is_a_finding_or_unusable(kind: type[errors.HarnessError]) -> None:
    """An error that answers the question is 1, one that prevented the question is 2; none is an internal fault."""
    error = kind.__new__(kind)
    finding = any(parent.__name__ in FINDINGS for parent in kind.__mro__)
    assert cli_exit.exit_code_of(error) == (1 if finding else 2)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.NotFound("x"), 2),
        (errors.Conflict("x"), 1),
        (errors.PeerRefusedUs("x", status=400), 2),
        (errors.PeerRefusedUs("x", status=404), 2),
        (errors.PeerRefusedUs("x", status=413), 2),
        (errors.PeerRefusedUs("x", status=409), 1),
        (errors.PeerRefusedUs("x", status=403), 1),
        (errors.LocalRefusal("x", error="NotFound"), 2),
        (errors.LocalRefusal("x", error="MalformedMessage"), 2),
        (errors.LocalRefusal("x", error="Conflict"), 1),
        (errors.LocalRefusal("x", error="AccessDenied"), 1),
    ],
    ids=lambda value: f"{type(value).__name__}-{vars(value)}" if isinstance(value, Exception) else None,
)
def test_a_request_that_cannot_be_used_is_2_and_a_refusal_is_1(error: errors.HarnessError, code: int) -> None:
    """What another command line would mend is 2, whoever noticed it; what the services answer is 1."""
    assert cli_exit.exit_code_of(error) == code


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (errors.PeerUnreachable, "harness lab up"),
        (errors.KeyChanged, "re-enrol"),
        (errors.HostRebooted, "--accept-reboot"),
        (errors.ReferenceValueMismatch, "policy show AGENT_ID"),
        (errors.QuoteSignatureInvalid, "guest resume AGENT_ID"),
        (errors.PoolFull, "try again"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_an_operator_is_told_what_to_type(kind: type[errors.HarnessError], said: str) -> None:
    """An error's class, or the nearest class above it, has a next step with the command in it."""
    step = cli_exit.next_step(kind("x"))
    assert step is not None
    assert said in step


def test_an_error_without_a_step_has_none() -> None:
    """Where the sentence says it all nothing is added: `store_errors` names the way out of each fault of a database."""
    assert cli_exit.next_step(errors.ConfigError("x")) is None
    assert cli_exit.next_step(errors.StoreError("x")) is None


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
        (FileNotFoundError(2, "No usable temporary directory found"), 2),
        (OSError(28, "No space left on device", "/x"), 2),
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


PROGRAM = [sys.executable, "-c", "from harness.cli import main; main()"]


@pytest.mark.parametrize("words", [["--help"], ["tenant", "--help"], ["--version"]], ids=" ".join)
@pytest.mark.parametrize("where", ["/dev/full", "closed"])
def test_output_that_cannot_be_written_is_2_and_one_sentence(where: str, words: list[str]) -> None:
    """A full disk and a closed stream are said, and nothing else is."""
    out = os.open("/dev/full", os.O_WRONLY)
    close = (lambda: os.close(1)) if where == "closed" else None
    try:
        ended = subprocess.run(
            [*PROGRAM, *words],
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            timeout=240,
            check=False,
            preexec_fn=close,
        )
    finally:
        os.close(out)
    assert ended.returncode == 2
    assert re.fullmatch(r"harness: standard output (is closed|cannot be written: .+)\n", ended.stderr)


@pytest.mark.parametrize("words", [["--help"], ["tenant", "--help"], ["--version"]], ids=" ".join)
def test_a_reader_that_has_gone_is_told_nothing(words: list[str]) -> None:
    """`... | head` ends with the code that a shell shows for a closed pipe, and in silence."""
    out = _closed_pipe()
    try:
        ended = subprocess.run(
            [*PROGRAM, *words], stdout=out, stderr=subprocess.PIPE, text=True, timeout=240, check=False
        )
    finally:
        os.close(out)
    assert (ended.returncode, ended.stderr) == (141, "")


def _closed_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer
