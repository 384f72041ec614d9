"""The domains of this host, as the guest manager (libvirt, or the lab's for process guests) reports them.

The guest manager reports every change of a domain; the host agent keeps a cache of it and never asks, neither at
sealing nor when it issues a certificate.

Invariants:
    1. While the cache is not complete nothing is said about any guest: NotReady, not GuestNotHere.
    2. Nothing here waits for the guest manager but the task that follows it.
    3. A domain that was seen off is in another run from then on, whether or not its next start was seen. Where the
       guest manager gives each start an id, that id says so too, also for starts that no report told of.

Owner: `GuestCache.follow` changes the domains.

Spec: DESIGN 3.1 (runs here), 3.6.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from harness import events
from harness.errors import GuestNotHere, MalformedMessage, NotReady, PeerUnreachable
from harness.messages import parse_json
from harness.values import AgentId, parse_agent_id

_LINE_LIMIT = 1 << 20
_CONNECT_S = 5.0
_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.05, 2.0
_SETTLE_S = 5.0
_RUN = re.compile(r"[A-Za-z0-9_-]{1,64}")
RUNNING, STARTING, SHUTOFF = "running", "starting", "shutoff"
_ALIVE = frozenset({RUNNING, "paused", "migrating"})
"""States of one and the same run; a guest in any other one (crashed, ...) runs again only after a new start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain:
    """A domain as the guest manager reports it.

    Args:
        agent_id: its UUID.
        state: ``shutoff``, ``starting``, ``running``, ``paused`` or ``migrating``.
        persistent: False for a transient domain.
        run: id of its present start; None while it is off, and from a guest manager that has no such ids.
    """

    agent_id: AgentId
    state: str
    persistent: bool
    run: str | None = None


class GuestSource(Protocol):
    """Reports domains: first all of them, then each change, until the connection breaks."""

    def watch(self) -> AsyncIterator[Mapping[AgentId, Domain] | tuple[AgentId, Domain | None]]:
        """All domains first; then (id, domain), with None for one that is gone. Raises PeerUnreachable at the end."""


class SocketGuestSource:
    """The guest manager's UNIX socket: ``{"op": "watch"}``, then one JSON object per line.

    Args:
        path: of the socket.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    async def watch(self) -> AsyncIterator[Mapping[AgentId, Domain] | tuple[AgentId, Domain | None]]:
        """See `GuestSource`.

        *Cancellation:* the connection is closed.
        """
        try:
            async with asyncio.timeout(_CONNECT_S):
                reader, writer = await asyncio.open_unix_connection(self._path, limit=_LINE_LIMIT)
        except (OSError, TimeoutError) as error:
            raise PeerUnreachable(f"the guest manager at {self._path} cannot be reached: {error}") from error
        try:
            writer.write(b'{"op": "watch"}\n')
            while line := await reader.readline():
                yield _report(line)
        except (OSError, ValueError) as error:  # ValueError: a line above the limit
            raise PeerUnreachable(f"the connection to the guest manager broke: {error}") from error
        finally:
            writer.close()
        raise PeerUnreachable("the guest manager closed the connection")


def _report(line: bytes) -> Mapping[AgentId, Domain] | tuple[AgentId, Domain | None]:
    try:
        match parse_json(line, limit=_LINE_LIMIT):
            case {"domains": list(entries)}:
                domains = [_domain(entry) for entry in entries]
                return {domain.agent_id: domain for domain in domains}
            case {"domain": entry, "event": str(event)}:
                domain = _domain(entry)
                return domain.agent_id, None if event == "undefined" else domain
    except MalformedMessage as error:
        raise PeerUnreachable(f"the guest manager's report is malformed: {error.detail}") from error
    raise PeerUnreachable("the guest manager's report is neither a list nor a change")


def _domain(entry: object) -> Domain:
    match entry:
        case {"uuid": str(uuid_text), "state": str(state), "persistent": bool(persistent), **rest}:
            run = parse_run(rest.get("run"))
            return Domain(agent_id=parse_agent_id(uuid_text), state=state, persistent=persistent, run=run)
    raise MalformedMessage("a domain must have uuid, state and persistent")


def parse_run(value: object) -> str | None:
    """Id of a start as a guest manager gives it, or None.

    Raises:
        MalformedMessage: neither null nor 1 to 64 letters, digits, dashes and underscores.
    """
    if value is None or (isinstance(value, str) and _RUN.fullmatch(value)):
        return value
    raise MalformedMessage("run must be 1 to 64 letters, digits, dashes and underscores")


class GuestCache:
    """Domains of this host, from reports.

    Args:
        source: of the reports.
        rng: jitter of the pauses between two connections.
        settle_s: seconds that a report may come later than a question about it.
    """

    def __init__(self, source: GuestSource, *, rng: random.Random | None = None, settle_s: float = _SETTLE_S) -> None:
        self._source = source
        self._settle_s = settle_s
        self._rng = rng or random.SystemRandom()
        self._domains: dict[AgentId, Domain] | None = None
        self._runs: dict[AgentId, int] = {}
        self._changed = asyncio.Event()

    async def follow(self) -> None:
        """Follows the guest manager for ever; connects anew when it must.

        *Cancellation:* the cache says NotReady from then on.
        """
        delay_s = _FIRST_DELAY_S
        try:
            while True:
                try:
                    async for report in self._source.watch():
                        self._take(report)
                        delay_s = _FIRST_DELAY_S
                except PeerUnreachable as error:
                    if self._domains is not None:
                        events.emit("guest_manager_lost", level="warning", detail=error.detail)
                self._domains = None
                await asyncio.sleep(delay_s * self._rng.uniform(0.5, 1.0))
                delay_s = min(2 * delay_s, _LONGEST_DELAY_S)
        finally:
            self._domains = None

    def _take(self, report: Mapping[AgentId, Domain] | tuple[AgentId, Domain | None]) -> None:
        before = self._domains
        if isinstance(report, tuple):
            agent_id, domain = report
            if before is None:
                raise PeerUnreachable("the guest manager reported a change before the list")
            self._domains = {**before, agent_id: domain} if domain is not None else _without(before, agent_id)
            touched = {agent_id}
        else:
            self._domains = dict(report)
            touched = report.keys() | (before or {}).keys()
        for agent_id in touched:
            old = before.get(agent_id) if before is not None else None
            if _ends_run(old, self._domains.get(agent_id), known=before is not None):
                self._runs[agent_id] = self.run_of(agent_id) + 1
        self._changed.set()
        self._changed = asyncio.Event()

    def run_of(self, agent_id: AgentId) -> int:
        """Number of a guest's present or next run, from 0; whatever was found out in another run is out of date."""
        return self._runs.get(agent_id, 0)

    async def off(self, agent_id: AgentId) -> int:
        """Number of the next run of a guest that is defined and does not run; waits for it, a few seconds at most.

        Raises:
            NotReady: the cache is not complete.
            GuestNotHere: not defined here, or it runs.

        *Cancellation:* nothing has changed.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settle_s):
                while not self._is_off(agent_id):  # the report is on another connection than the question
                    await self._changed.wait()
        if not self._is_off(agent_id):
            self.domains()
            raise GuestNotHere(f"domain {agent_id} is not defined on this host, or runs already")
        return self.run_of(agent_id)

    def _is_off(self, agent_id: AgentId) -> bool:
        domain = (self._domains or {}).get(agent_id)
        return domain is not None and domain.state not in _ALIVE

    async def changed(self) -> None:
        """Waits for the next report; no deadline, for a task that passes them on.

        *Cancellation:* nothing is lost; the next call waits for the next report.
        """
        await self._changed.wait()

    def domain(self, agent_id: AgentId) -> Domain | None:
        """Domain of a guest; None when it is not defined here.

        Raises:
            NotReady: the cache is not complete.
        """
        return self.domains().get(agent_id)

    def domains(self) -> Mapping[AgentId, Domain]:
        """All domains.

        Raises:
            NotReady: the cache is not complete.
        """
        if self._domains is None:
            raise NotReady("it is not known yet which guests run here", retry_after_s=1.0)
        return self._domains

    def check_manufacturing(self, agent_id: AgentId) -> None:
        """Checks that a vTPM may be manufactured for this guest now.

        Raises:
            NotReady: the cache is not complete.
            GuestNotHere: not defined here, transient, or not shut off.
        """
        domain = self.domain(agent_id)
        if domain is None:
            raise GuestNotHere(f"domain {agent_id} is not defined on this host")
        if not domain.persistent or domain.state not in {SHUTOFF, STARTING}:
            raise GuestNotHere(f"domain {agent_id} is transient or runs already: no vTPM is manufactured for it")


def _ends_run(old: Domain | None, new: Domain | None, *, known: bool) -> bool:
    """Whether what was read before a guest's start does not hold after this report.

    Args:
        old: the last report; None when there is none.
        new: this report; None when the domain is gone.
        known: whether ``old`` is complete: without a last report the domain was not there.
    """
    if new is None or old is None:
        return known or (new is not None and new.state not in _ALIVE | {STARTING})
    if new.state in _ALIVE or new.state == old.state:
        return False  # the end of the run before was seen already
    return new.state != STARTING or old.state in _ALIVE


def _without(domains: Mapping[AgentId, Domain], agent_id: AgentId) -> dict[AgentId, Domain]:
    return {other: domain for other, domain in domains.items() if other != agent_id}
