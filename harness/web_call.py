"""A call in work, as others may end it: its own deadline, a server that stops, a tenant that is removed.

Invariants:
    1. A call that is ended raises the refusal that it was ended with, in whoever awaits inside of it.

Owner: the task of the call.
"""

from __future__ import annotations

import asyncio

from aiohttp import web

from harness.errors import HarnessError


class Call:
    """One call.

    Args:
        deadline: the scope that it runs in.
    """

    __slots__ = ("_deadline", "refusal")

    def __init__(self, deadline: asyncio.Timeout) -> None:
        self._deadline = deadline
        self.refusal: HarnessError | None = None
        """What it was ended with; None while it goes on, and where its own deadline ended it."""

    def end(self, refusal: HarnessError, *, within_s: float = 0.0) -> None:
        """Ends the call with a refusal, unless it has ended before.

        Args:
            refusal: what its client is answered.
            within_s: how long it may still go on.
        """
        if self._deadline.expired():
            return
        until = asyncio.get_running_loop().time() + within_s
        when = self._deadline.when()
        if when is None or until < when:
            self.refusal = refusal
            self._deadline.reschedule(until)


CALL: web.RequestKey[Call] = web.RequestKey("call", Call)


def call_of(request: web.Request) -> Call:
    """The call that a request is."""
    return request[CALL]
