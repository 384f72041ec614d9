"""Answers of a server: every one an envelope, also of what never reached a handler.

Invariants:
    1. Every answer is Keylime's envelope with ``Cache-Control: no-store``.
    2. An unknown exception is one neutral sentence to the client, and a traceback in the log.

Spec: DESIGN 3.3; RFC 9110.
"""

from __future__ import annotations

import math
import random
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from harness import events
from harness.door import request_began, request_ended
from harness.errors import HarnessError, MalformedMessage, MessageTooLarge
from harness.messages import ResultsText, compact, failure, retry_after_s, status_of, success

BODY_LIMIT = 64 * 1024
LINE_LIMIT = 8190
JITTER: web.AppKey[random.Random] = web.AppKey("jitter", random.Random)
"""Spreads the tries that Retry-After asks for."""
OPENED: web.RequestKey[web.WebSocketResponse] = web.RequestKey("opened", web.WebSocketResponse)
_HEADERS = {"Content-Type": "application/json; charset=utf-8", "Cache-Control": "no-store"}
_INTERNAL_FAULT = "internal fault; see the service's log"


@web.middleware
async def envelope(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Middleware of every application."""
    transport = request.transport
    request_began(transport)
    try:
        return _not_stored(await handler(request))
    except HarnessError as error:
        said = _refusal(error, request.app[JITTER])
    except web.HTTPRequestEntityTooLarge:
        said = _refusal(MessageTooLarge(f"the body has more than {BODY_LIMIT} bytes"), request.app[JITTER])
    except web.HTTPException as error:
        sentence = ascii(f"{request.method} {request.path[:100]}: {error.reason}")[1:-1]
        said = answer(error.status, {"code": error.status, "status": sentence, "results": {}}, error.headers)
    except Exception:  # the border of a request: the client learns that it failed, the log learns why
        events.emit("internal_fault", level="error", method=request.method, path=request.path, exc_info=True)
        said = answer(500, {"code": 500, "status": _INTERNAL_FAULT, "results": {}})
    finally:
        request_ended(transport)
    opened = request.get(OPENED)  # an open channel has no place for an answer: it is closed
    return said if opened is None else opened


def _not_stored(response: web.StreamResponse) -> web.StreamResponse:
    if not response.prepared:  # a WebSocket is
        response.headers["Cache-Control"] = "no-store"
    return response


def _refusal(error: HarnessError, jitter: random.Random) -> web.Response:
    wait_s = retry_after_s(error)
    headers = {} if wait_s is None else {"Retry-After": retry_after(wait_s, jitter)}
    return answer(status_of(error), failure(error), headers)


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


class Connection(web.RequestHandler):
    """aiohttp's connection; answers what never gets as far as the application with an envelope as well."""

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """Answers what could not be read, or failed outside of `envelope`."""
        if request.writer.output_size > 0:
            raise ConnectionError("a part of the answer has been sent: there is no place for an error")
        if status == 500:
            events.emit("internal_fault", level="error", exc_info=exc)
            response = answer(500, {"code": 500, "status": _INTERNAL_FAULT, "results": {}})
        else:
            refusal = MalformedMessage(f"not HTTP/1.1, or a line or header field of more than {LINE_LIMIT} bytes")
            response = answer(status_of(refusal), failure(refusal))
        response.force_close()
        return response
