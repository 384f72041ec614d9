"""Events: JSON lines without secrets; emitting never fails."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from harness import events


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Path]:
    """A configured event log; the process is as before afterwards."""
    root = logging.getLogger()
    before = list(root.handlers)
    path = tmp_path / "events.jsonl"
    file = events.configure("host-agent", path)
    try:
        yield path
    finally:
        file.close()
        structlog.reset_defaults()
        for handler in set(root.handlers) - set(before):
            root.removeHandler(handler)


def only(path: Path) -> dict[str, Any]:
    [event] = events.read_events(path)
    return event


def test_an_event_is_one_json_line(log: Path) -> None:
    """An event has a time in UTC, a service, a level, a name and its fields."""
    events.emit("batch", size=3, outcome="answered")
    [line] = log.read_text().splitlines()
    event = json.loads(line)
    assert event.pop("timestamp").endswith("Z")
    assert event == {"event": "batch", "service": "host-agent", "level": "info", "size": 3, "outcome": "answered"}


def test_the_file_is_private(log: Path) -> None:
    """An event log is its owner's only."""
    assert log.stat().st_mode & 0o777 == 0o600


SECRETS = ["nonce", "key", "secret", "payload", "auth", "u", "v", "password", "Nonce", "guest_nonce", "ak_auth"]


@pytest.mark.parametrize("name", SECRETS)
def test_secrets_are_replaced(log: Path, name: str) -> None:
    """A field whose name says that it is secret does not reach the log."""
    events.emit("round", **{name: "5ec3e7"})
    assert "5ec3e7" not in log.read_text()
    assert only(log)[name] == "(not logged)"


@pytest.mark.parametrize("name", SECRETS)
def test_secrets_are_replaced_at_any_depth(log: Path, name: str) -> None:
    """Nesting does not hide a secret."""
    events.emit("round", body={"members": [{name: "5ec3e7"}]})
    assert "5ec3e7" not in log.read_text()


@pytest.mark.parametrize("name", ["monkey", "size", "tpm_quotes", "state", "requests"])
def test_other_names_stay(log: Path, name: str) -> None:
    """Only whole words are taken for secrets."""
    fields: dict[str, Any] = {name: 4}
    events.emit("batch", **fields)
    assert only(log)[name] == 4


def test_bytes_are_not_written(log: Path) -> None:
    """Bytes under any name are told by their length only."""
    events.emit("batch", digest=b"\x5e\xc3" * 16, more=[bytearray(3)])
    assert only(log)["digest"] == "(32 bytes)"
    assert only(log)["more"] == ["(3 bytes)"]


def test_a_traceback_is_one_line(log: Path) -> None:
    """``exc_info`` puts the traceback into the event, and the event stays one line."""
    try:
        int("nothing")
    except ValueError:
        events.emit("internal_fault", level="error", exc_info=True)
    assert len(log.read_text().splitlines()) == 1
    assert "ValueError: invalid literal" in only(log)["exception"]
    assert only(log)["level"] == "error"


def test_debug_is_not_written(log: Path) -> None:
    """The level debug is below the log's."""
    events.emit("detail", level="debug")
    assert list(events.read_events(log)) == []


def endless() -> list[Any]:
    made: list[Any] = []
    made.append(made)
    return made


@pytest.mark.parametrize(
    "fields",
    [{"x": endless()}, {"x": object()}, {"x": {(1, 2): {3}}}, {"x": float("nan")}, {"x": "\ud800"}],
    ids=["endless", "object", "odd-keys", "nan", "surrogate"],
)
def test_any_field_can_be_emitted(log: Path, fields: dict[str, Any]) -> None:
    """A value that JSON does not know never makes a request fail."""
    events.emit("odd", **fields)
    events.emit("next")
    assert [event["event"] for event in events.read_events(log)][-1] == "next"


def test_warnings_of_libraries_become_events(log: Path) -> None:
    """What a library logs as a warning is an event, traceback included; information is not."""
    logging.getLogger("aiohttp.server").info("nothing")
    try:
        int("cable")
    except ValueError:
        logging.getLogger("aiohttp.server").exception("lost %s", "it")
    event = only(log)
    assert (event["event"], event["logger"], event["detail"]) == ("log", "aiohttp.server", "lost it")
    assert "ValueError: invalid literal" in event["exception"]


def test_without_configuration_events_go_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    """A program that did not configure events keeps its standard output clean."""
    structlog.reset_defaults()
    events.emit("lonely", nonce="5ec3e7")
    out, err = capsys.readouterr()
    assert out == ""
    assert json.loads(err)["event"] == "lonely"
    assert "5ec3e7" not in err


def test_reading_skips_what_is_no_event(tmp_path: Path) -> None:
    """A half-written line, a bare traceback and other JSON are skipped; the rest is read in order."""
    path = tmp_path / "log"
    path.write_bytes(b'{"event": "a"}\nTraceback (most recent call last)\n[1]\n{"x": 1}\n\xff\n{"event": "b"}\n{"ev')
    assert [event["event"] for event in events.read_events(path)] == ["a", "b"]
