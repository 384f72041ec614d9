"""Answers of a server: every one an envelope, also of what never reached a handler.

Invariants:
    1. Every answer is Keylime's envelope with ``Cache-Control: no-store``.
    2. An unknown exception is one neutral sentence to the client, and a traceback in the log.

Spec: DESIGN 3.3; RFC 9110.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable

from aiohttp import web

from harness import events
from harness.door import request_began, request_ended
from harness.errors import HarnessError, MessageTooLarge
from harness.messages import failure, retry_after_s, status_of
from harness.web_answer import BODY_LIMIT, INTERNAL_FAULT, answer, retry_after
from harness.web_connection import is_surplus

JITTER: web.AppKey[random.Random] = web.AppKey("jitter", random.Random)
"""Spreads the tries that Retry-After asks for."""
OPENED: web.RequestKey[web.WebSocketResponse] = web.RequestKey("opened", web.WebSocketResponse)


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
        said = answer(500, {"code": 500, "status": INTERNAL_FAULT, "results": {}})
    finally:
        request_ended(transport)
    if is_surplus(request):
        said.force_close()
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
