"""Standard output of a command: claimed while it runs, and given back whole."""

from __future__ import annotations

import io
import sys

import pytest

from harness import console


def test_output_is_given_back_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """What printed before a command prints after it, on the same stream; nothing is lost and nothing is closed."""
    buffer = io.BytesIO()
    out = io.TextIOWrapper(buffer, encoding="utf-8", write_through=True)
    monkeypatch.setattr(sys, "stdout", out)
    print("before")
    with console.claimed_output():
        print("within")
        assert sys.stdout is not out
    assert sys.stdout is out
    print("after")
    assert buffer.getvalue() == b"before\nwithin\nafter\n"


def test_output_is_given_back_when_a_command_ends_by_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was printed until then is written, and the error goes on."""
    buffer = io.BytesIO()
    out = io.TextIOWrapper(buffer, encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", out)

    def fails() -> None:
        with console.claimed_output():
            print("so far")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert sys.stdout is out
    assert buffer.getvalue() == b"so far\n"


def test_a_stream_of_another_kind_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream without bytes below it is used as it is."""
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    with console.claimed_output():
        print("text")
        assert sys.stdout is out
    assert out.getvalue() == "text\n"


def test_closed_output_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process without standard output runs no command."""
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(console.OutputGone, match="closed"), console.claimed_output():
        pytest.fail("it ran")
