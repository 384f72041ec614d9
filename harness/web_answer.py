"""Answers of a server, and the bounds of what it reads.

Invariants:
    1. Every answer made here is Keylime's envelope with ``Cache-Control: no-store``.

Spec: DESIGN 3.3; RFC 9110, 10.2.3 (Retry-After).
"""

from __future__ import annotations

import math
import random
from typing import Any

from aiohttp import web

from harness.messages import ResultsText, compact, success

BODY_LIMIT = 64 * 1024
LINE_LIMIT = 8190
INTERNAL_FAULT = "internal fault; see the service's log"
_HEADERS = {"Content-Type": "application/json; charset=utf-8", "Cache-Control": "no-store"}


def retry_after(wait_s: float, jitter: random.Random) -> str:
    """Value of Retry-After: up to half as much again as the estimate, so that those refused together do not return so.

    Args:
        wait_s: estimate of the time until a try has a chance.
        jitter: where the spread comes from.
    """
    return str(max(1, math.ceil(wait_s * jitter.uniform(1.0, 1.5))))  # whole seconds: RFC 9110


def answer(status: int, content: object, headers: Any = None) -> web.Response:
    """Answer with an envelope; of the headers those that the protocol knows."""
    allowed = {name: value for name, value in (headers or {}).items() if name in {"Allow", "Retry-After"}}
    return web.Response(status=status, body=compact(content).encode(), headers=allowed | _HEADERS)


def answer_success(results: object) -> web.Response:
    """Answer 200 with these results."""
    if isinstance(results, ResultsText):
        return web.Response(body=results.envelope(), headers=_HEADERS)
    return answer(200, success(results))
