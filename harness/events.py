"""Events: what a service did, one JSON object per line.

Experiments, the demo's report and people read them. Nonces, keys and payloads never get in.

Invariants:
    1. A field whose name says that it is secret is replaced, at any depth.
    2. `emit` does not raise: an event is not worth a failed request.
    3. A file is rotated by its size, and a full disk loses lines that are counted (`log_file`).
    4. Warnings of libraries and their tracebacks (``logging``) become events too: the log is JSON throughout.

Owner: `configure` is called once per process, by a composition root; `emit` may be called from any thread.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import structlog

from harness.log_file import LogFile, Rotation

_SECRET = frozenset({"nonce", "key", "secret", "payload", "auth", "u", "v", "password", "quote", "attest"})
_SECRET_ENDINGS = ("_nonce", "_key", "_secret", "_password", "_auth")
_REDACTED = "(not logged)"
_DEPTH = 6
_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def configure(
    service: str, path: Path | None = None, *, rotation: Rotation | None = None, streams: bool = False
) -> LogFile:
    """Sends this process's events to a file or to its standard error, marked with the service's name.

    Args:
        service: stands in each event.
        path: file to append to, made with mode 0600, of this process alone; standard error when None.
        rotation: bounds of the file.
        streams: standard output and standard error go into the file too: tracebacks, and what libraries print.

    Raises:
        OSError: the file cannot be opened.
    """
    file = LogFile(path, service=service, rotation=rotation, streams=streams)
    structlog.configure(
        processors=_processors(service),
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=_Lines(file),
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    if not any(isinstance(handler, _ToEvents) for handler in root.handlers):
        root.addHandler(_ToEvents(logging.WARNING))
    return file


def emit(event: str, *, level: str = "info", **fields: Any) -> None:
    """Writes one event; to standard error, without a service, when nothing was configured.

    Args:
        event: short name in snake_case.
        level: debug (not written), info, warning or error.
        **fields: plain data; ``exc_info=True`` adds the traceback of the exception that is being handled.
    """
    name = level if level in _LEVELS else "info"
    if _LEVELS[name] < logging.INFO:
        return
    with contextlib.suppress(OSError, ValueError, TypeError, structlog.DropEvent):  # a closed stream, say
        if structlog.is_configured():
            # What structlog's own logger does, which is made anew for each event and takes as long as all of this.
            config, line = structlog.get_config(), {**fields, "event": event}
            for process in config["processors"]:
                line = process(None, name, line)
            config["logger_factory"]().info(line)
        else:
            _to_standard_error().log(_LEVELS[name], event, **fields)


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """Events from a service's log so far; lines that are none (a half-written one) are skipped.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                event = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(event, dict) and "event" in event:
                yield event


class _Lines:
    """What structlog calls a logger: hands each line to the file."""

    def __init__(self, file: LogFile) -> None:
        self.file = file

    def __call__(self, *_: object) -> _Lines:
        return self

    def info(self, line: str) -> None:
        self.file.write(line)

    debug = warning = error = info


def _to_standard_error() -> Any:
    return structlog.wrap_logger(
        structlog.WriteLogger(sys.stderr),
        processors=_processors(None),
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
    )


def _processors(service: str | None) -> list[Any]:
    return [
        functools.partial(_mark, service),
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        _without_secrets,
        structlog.processors.JSONRenderer(),
    ]


def _mark(service: str | None, _logger: Any, _method: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
    return event if service is None else {**event, "service": service}


def _without_secrets(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
    return {name: _REDACTED if _is_secret(name) else _plain(value, _DEPTH) for name, value in event.items()}


def _is_secret(name: str) -> bool:
    return name.lower() in _SECRET or name.lower().endswith(_SECRET_ENDINGS)


def _plain(value: object, depth: int) -> object:
    """JSON-able form of a value, without secrets."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if depth == 0:
        return "(too deep)"
    if isinstance(value, Mapping):
        items = ((str(name), each) for name, each in value.items())
        return {name: _REDACTED if _is_secret(name) else _plain(each, depth - 1) for name, each in items}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(each, depth - 1) for each in value]
    if isinstance(value, bytes | bytearray):
        return f"({len(value)} bytes)"  # a key or a nonce is bytes more often than not
    return str(value)


class _ToEvents(logging.Handler):
    """Turns records of ``logging`` into events."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "error" if record.levelno >= logging.ERROR else "warning"
        with contextlib.suppress(ValueError, TypeError):  # a message that does not fit its arguments
            emit("log", level=level, logger=record.name, detail=record.getMessage(), exc_info=record.exc_info)
