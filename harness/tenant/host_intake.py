"""Takes a provider's hosts through the enrolment, one after the other, and pins them.

Invariants:
    1. Hosts that are not pinned yet come first, so that a call that is repeated gets further each time.
    2. A host that is refused keeps no other from being enrolled; the first refusal is the call's answer.
    3. Six challenges per minute are not exceeded: when they are used up, the next host waits.

Owner: the registrar's event loop.

Spec: DESIGN 3.6; docs/protocol.md (the enrolment exchange).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from harness import events
from harness.audit import AuditEntry
from harness.enrolment_metrics import HOST, Enrolments
from harness.errors import EnrolmentError, HarnessError, NotFound, ShareExhausted, StoreError
from harness.metrics import Metrics
from harness.tenant.enrolment import EnrolledHost, HostAccess, HostEnroller
from harness.tenant.enrolment_alarms import EnrolmentAlarms
from harness.tenant.registrar_store import PinnedHost, RegistrarStore
from harness.values import AgentId, HostId


class ProviderAccess(HostAccess, Protocol):
    """A provider verifier, as a registrar asks it."""

    async def hosts(self) -> list[HostId]:
        """Hosts on which this tenant has an allowlist."""


Connect = Callable[[str], AbstractAsyncContextManager[ProviderAccess]]
"""Connects to the provider verifier at a URL."""


class HostIntake:
    """Enrols hosts.

    Args:
        store: what is pinned.
        enroller: makes the checks.
        alarms: told about refusals.
        connect: to provider verifiers.
        sleep: waits; tests give their own.
        counted: by outcome.
    """

    def __init__(
        self,
        store: RegistrarStore,
        enroller: HostEnroller,
        alarms: EnrolmentAlarms,
        connect: Connect,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        counted: Enrolments | None = None,
    ) -> None:
        self._store = store
        self._enroller = enroller
        self._alarms = alarms
        self._connect = connect
        self._sleep = sleep
        self._counted = counted or Enrolments(Metrics("tenant-registrar"), HOST)

    async def add(self, url: str, named: HostId | None, act: Callable[[HostId], AuditEntry]) -> list[PinnedHost]:
        """Enrols one host, or all that the provider lists for this tenant.

        Args:
            url: of the provider verifier.
            named: the one host.
            act: audit entry of a host.

        Raises:
            NotFound: the provider lists none.
            HarnessError: the first host that was refused or could not be asked; the others were taken.

        *Cancellation:* hosts that were pinned stay pinned.
        """
        pinned: dict[HostId, PinnedHost] = {}
        failures: list[HarnessError] = []
        async with self._connect(url) as access:
            ids = await access.hosts() if named is None else [named]
            if not ids:
                raise NotFound("the provider lists no host on which this tenant has an allowlist")
            known = {host.host_id for host in await self._store.hosts()}
            for host_id in sorted(ids, key=lambda each: each in known):
                try:
                    with self._counted.step(HOST, last=True):
                        enrolled = await self._enrol(url, host_id, access, patient=True)
                        pinned[host_id] = await self._pin(enrolled, act(host_id))
                except StoreError:
                    raise
                except HarnessError as error:
                    failures.append(error)
        if failures:
            raise failures[0]
        return [pinned[host_id] for host_id in ids]

    async def replace(self, host_id: HostId, act: AuditEntry) -> tuple[PinnedHost, list[AgentId]]:
        """Enrols a pinned host anew where it was enrolled, and replaces its keys.

        Returns:
            The host, and the guests that have to register again.

        Raises:
            NotFound: it is not enrolled.
            HarnessError: it was refused, or could not be asked; the pinned keys stay.

        *Cancellation:* the keys are the old or the new ones.
        """
        url = (await self._store.host(host_id)).url
        with self._counted.step(HOST, last=True):
            async with self._connect(url) as access:
                enrolled = await self._enrol(url, host_id, access, patient=False)
            try:
                replaced = await self._store.replace_host(enrolled, act)
            except EnrolmentError as error:
                await self._refused(host_id, error)
                raise
        events.emit("host_enrolled", host_id=str(host_id), url=url, again=True)
        return replaced

    async def _enrol(self, url: str, host_id: HostId, access: HostAccess, *, patient: bool) -> EnrolledHost:
        while True:
            try:
                return await self._enroller.enrol(url, host_id, access)
            except ShareExhausted as error:
                if not patient:
                    raise
                events.emit("enrolment_waits", host_id=str(host_id), wait_s=error.retry_after_s, detail=error.detail)
                await self._sleep(error.retry_after_s)
            except HarnessError as error:
                await self._refused(host_id, error)
                raise

    async def _pin(self, host: EnrolledHost, act: AuditEntry) -> PinnedHost:
        try:
            pinned = await self._store.pin_host(host, act)
        except EnrolmentError as error:
            await self._refused(host.host_id, error)
            raise
        events.emit("host_enrolled", host_id=str(host.host_id), url=host.url)
        return pinned

    async def _refused(self, host_id: HostId, error: HarnessError) -> None:
        name = type(error).__name__
        events.emit("host_not_enrolled", level="warning", host_id=str(host_id), error=name, detail=error.detail)
        if isinstance(error, EnrolmentError):
            await self._alarms.tell(error, host_id=host_id)
