"""Events: what a service did, one JSON object per line.

Experiments, the demo's report and people read them. Nonces, keys and payloads never get in.

Invariants:
    1. A field whose name says that it is secret is replaced, wherever it is emitted.
    2. `emit` does not raise: an event is not worth a failed request.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

import structlog

_SECRET = frozenset({"nonce", "key", "secret", "payload", "auth", "u", "v", "password", "quote", "attest"})
_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def configure(service: str) -> None:
    """Sends this process's events to its standard error, marked with the service's name.

    Called once, by a composition root.
    """
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            _without_secrets,
            structlog.processors.format_exc_info,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(default=str),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(_standard_error()),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(service=service)


def _standard_error() -> Any:
    return open(2, "w", buffering=1, encoding="utf-8", closefd=False)


def emit(event: str, *, level: str = "info", **fields: Any) -> None:
    """Writes one event.

    Args:
        event: short name in snake_case.
        level: debug, info, warning or error.
        **fields: plain data; ``exc_info=True`` adds the traceback of the exception that is being handled.
    """
    structlog.get_logger().log(_LEVELS.get(level, logging.INFO), event, **fields)


def _without_secrets(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for name in event:
        if name in _SECRET:
            event[name] = "(not logged)"
    return event


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """Events from a service's log; lines that are none (a traceback, a half-written line) are skipped."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict) and "event" in event:
                yield event
