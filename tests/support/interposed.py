"""Somebody between a tenant's verifier and those that it asks: hands questions on, and answers as a test wants.

Whoever stands there has the certificate of the one it plays, and asks under the verifier's own key: so its answers are
the honest ones, but for what it changes, and only the checks of the appraisal can tell.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from aiohttp import web

from harness.config import Listen, TlsSettings
from harness.errors import HarnessError
from harness.peer import PeerClient
from harness.pki import Role
from harness.tls import identities_of
from harness.web import Route, application, serve

Answer = dict[str, Any]
Change = Callable[[Answer], Answer]
_VERIFIER = frozenset({Role.TENANT_VERIFIER})
_START_S = 120.0


class Interposed:
    """One such party, in a thread of its own.

    ``change`` is made to each answer, ``query`` to each question; ``error`` is answered in place of anything, and with
    ``silent`` nothing is. None of them: it is honest.
    """

    def __init__(self, name: str, paths: tuple[str, ...], own: TlsSettings, asks: TlsSettings, upstream: str) -> None:
        self.change: Change | None = None
        self.query: Callable[[list[tuple[str, str]]], list[tuple[str, str]]] | None = None
        self.error: HarnessError | None = None
        self.silent = False
        self.url = ""
        self._name, self._paths, self._own, self._asks, self._upstream = name, paths, own, asks, upstream

    def honest(self) -> None:
        """Changes nothing any more."""
        self.change = self.query = self.error = None
        self.silent = False

    @contextlib.contextmanager
    def serving(self, where: Listen) -> Iterator[None]:
        """Answers there for the time of the context."""
        loop, ready = asyncio.new_event_loop(), threading.Event()
        end = asyncio.Event()

        async def serving() -> None:
            routes = [Route("GET", path, self._answer, roles=_VERIFIER) for path in self._paths]
            routes += [Route("POST", path, self._answer, roles=_VERIFIER) for path in self._paths]
            app = application(self._name, routes, identities_of(self._own))
            async with PeerClient(self._asks, self._upstream) as self._peer, serve(app, self._own, where) as server:
                self.url = server.url
                ready.set()
                await end.wait()

        thread = threading.Thread(target=loop.run_until_complete, args=(serving(),))
        thread.start()
        try:
            assert ready.wait(_START_S), "nobody answers there"
            yield
        finally:
            loop.call_soon_threadsafe(end.set)
            thread.join(_START_S)
            loop.close()

    async def _answer(self, request: web.Request) -> object:
        if self.error is not None:
            raise self.error
        if self.silent:
            await asyncio.Event().wait()
        query = list(request.query.items())
        if request.method == "POST":
            return await self._peer.post(request.path, await request.json())
        results = await self._peer.get(request.path, query if self.query is None else self.query(query))
        assert isinstance(results, dict)
        return results if self.change is None else self.change(results)
