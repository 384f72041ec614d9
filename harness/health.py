"""Health of a service: named checks, each with a deadline, for ``GET /health``.

::

    health = Health()
    health.check("database", lambda: check_database(store))
    health.check("vtpm", vtpm_answers, vital=False)

A check that fails makes the service ``failing`` (503): it does not do its work. One that is not vital, for example one
host of many, makes it ``degraded`` (200): it works, in part, and taking it out of service would make it worse.

Invariants:
    1. A report is ready within two seconds and a little, whatever hangs.
    2. Whoever asks more often than once a second gets the same report: asking costs the service nothing.
    3. What a check says is one sentence made for people who may see it: no secret, nonce, key or path of one. The cause
       goes into the log, once for each change.

Owner: the service; one event loop.

Spec: docs/architecture.md (health).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Protocol

from harness import events
from harness.errors import HarnessError, StoreError

OK, DEGRADED, FAILING = "ok", "degraded", "failing"
DEADLINE_S = 2.0
KEPT_S = 1.0

Check = Callable[[], Awaitable[None]]
"""Returns when all is well; raises a `HarnessError` whose sentence may be shown."""
Parts = Callable[[], Mapping[str, str]]
"""State of things that come and go, by name: ``ok``, or one sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """How a service is.

    Args:
        status: ``ok``, ``degraded`` or ``failing``.
        uptime_s: seconds since its start.
        checks: by name: ``ok``, or one sentence.
    """

    status: str
    uptime_s: float
    checks: Mapping[str, str] = field(default_factory=dict)

    @property
    def sentence(self) -> str:
        """Status with the reasons."""
        reasons = [f"{name}: {said}" for name, said in self.checks.items() if said != OK]
        return f"{self.status}: {'; '.join(reasons)}" if reasons else self.status

    def as_json(self) -> dict[str, object]:
        """Members of the answer to ``GET /health``."""
        return {"status": self.status, "uptime_s": round(self.uptime_s, 1), "checks": dict(self.checks)}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Named:
    name: str
    ask: Check
    vital: bool


class Health:
    """Checks of one service.

    Args:
        monotonic: seconds, for the uptime and the age of a report.
    """

    def __init__(self, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._begun_s = monotonic()
        self._checks: list[_Named] = []
        self._parts: list[tuple[str, Parts]] = []
        self._asking = asyncio.Lock()
        self._found: tuple[float, dict[str, str]] | None = None
        self._told: dict[str, str] = {}
        self._causes: dict[str, str] = {}

    def check(self, name: str, ask: Check, *, vital: bool = True) -> None:
        """Adds a check.

        Args:
            name: in the report.
            ask: see `Check`; ended after `DEADLINE_S`.
            vital: whether the service is of no use without it.
        """
        self._checks.append(_Named(name=name, ask=ask, vital=vital))

    def parts(self, kind: str, look: Parts) -> None:
        """Adds things that come and go, none of them vital: ``<kind> <name>`` each.

        Whoever asks from another authority is told how many there are, not which: a provider's tenants see no hosts of
        others.

        Args:
            kind: what they are, for example ``host``.
            look: tells their state without waiting.
        """
        self._parts.append((kind, look))

    async def report(self, *, in_full: bool) -> Report:
        """Report, at most a second old.

        Args:
            in_full: with each of the parts by name.

        *Cancellation:* the checks are ended; the next one asks again.
        """
        async with self._asking:
            if self._found is None or self._monotonic() - self._found[0] >= KEPT_S:
                answers = await asyncio.gather(*(self._ask(each) for each in self._checks))
                said = {each.name: answer for each, answer in zip(self._checks, answers, strict=True)}
                self._tell(said)
                self._found = (self._monotonic(), said)
            checks = dict(self._found[1])
        for kind, look in self._parts:
            checks |= _shown(kind, look(), in_full=in_full)
        vital = {each.name for each in self._checks if each.vital}
        bad = {name for name, said in checks.items() if said != OK}
        status = FAILING if bad & vital else DEGRADED if bad else OK
        return Report(status=status, uptime_s=self._monotonic() - self._begun_s, checks=checks)

    async def _ask(self, check: _Named) -> str:
        self._causes.pop(check.name, None)
        try:
            async with asyncio.timeout(DEADLINE_S):
                await check.ask()
        except TimeoutError:
            return f"no answer within {DEADLINE_S:g} s"
        except HarnessError as error:
            self._causes[check.name] = str(error.__cause__ or "")
            return error.detail
        except Exception:  # the border of a check: a fault in it is no answer, and not the end of the report
            events.emit("internal_fault", level="error", check=check.name, exc_info=True)
            return "internal fault; see the service's log"
        return OK

    def _tell(self, said: Mapping[str, str]) -> None:
        for name, answer in said.items():
            if self._told.get(name, OK) != answer:
                level = "info" if answer == OK else "warning"
                cause = "" if answer == OK else self._causes.get(name, "")
                events.emit("health", level=level, check=name, state=answer, cause=cause)
        self._told = dict(said)


def _shown(kind: str, states: Mapping[str, str], *, in_full: bool) -> dict[str, str]:
    if in_full:
        return {f"{kind} {name}": said for name, said in states.items()}
    bad = sum(said != OK for said in states.values())
    return {f"{kind}s": f"{bad} of {len(states)} cannot be reached" if bad else OK} if states else {}


class Database(Protocol):
    """What a check needs of a database; `store.Store` has it."""

    def begin(self) -> AbstractAsyncContextManager[object]:
        """A transaction."""


async def check_database(database: Database) -> None:
    """Makes a transaction that does nothing.

    Raises:
        StoreError: the database cannot be used. Its name and the cause are in the log, not in the sentence.

    *Cancellation:* it is rolled back.
    """
    try:
        async with database.begin():
            pass
    except StoreError as error:
        raise StoreError("the database cannot be used; the service's log says why") from error
