"""The lab of the demo: set up from nothing, attested, and torn down again. No VM, no root.

::

    async with Lab(plan, folder) as lab:
        outcomes = await lab.attest_all()

Real swtpms, real sockets, mTLS, one process per service (`lab_processes`). Tampering is in the plan: other images,
other vTPMs, another provider in the path; services are the same ones that ``harness serve`` runs. A lab that lives on
(``harness lab up``) consists of the same parts, under a supervisor that restarts what dies.

Invariants:
    1. When a process of the lab ends by itself, whatever waits is ended with an error that quotes its log.
    2. Leaving the context ends every process of the lab, by PID.

Owner: the task that entered the context.

Spec: DESIGN 5, 6.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, TypeVar

from harness import events
from harness.errors import ConfigError
from harness.lab_folder import close_folder
from harness.lab_names import SITE_FILE
from harness.lab_onboarding import Contact, Onboarding
from harness.lab_outcome import GuestOutcome, batches_in
from harness.lab_plan import GuestPlan, LabPlan
from harness.lab_site import LabSite
from harness.lab_supervision import Supervision

T = TypeVar("T")


class Lab:
    """One lab, from set-up to tear-down.

    Args:
        plan: what it consists of.
        folder: where it lives; made, and not removed.

    Raises:
        ConfigError: the folder holds a lab already, or cannot be used.
    """

    def __init__(self, plan: LabPlan, folder: Path) -> None:
        if (folder / SITE_FILE).exists():
            raise ConfigError(f"{folder}: holds a lab already; remove it or choose another folder")
        self.plan = plan
        self.timings_s: dict[str, float] = {}
        self._folder = folder
        self._files = LabSite.open(folder, plan)
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Lab:
        events.configure("lab", self._files.log("lab"))
        self._supervision = Supervision(self._files.log, restart=False)
        try:
            await self._guarded(self._set_up())
        except BaseException:
            await self._tear_down()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        with self._timed("tear_down"):
            await self._tear_down()

    @property
    def host_id(self) -> str:
        """Id of the first host."""
        return str(self._operators.host_ids[self.plan.hosts[0].name])

    async def attest_all(self) -> list[GuestOutcome]:
        """Starts all guests, enrols them, puts them under attestation, and waits for the verdict on each.

        Raises:
            SimulationError: a part of the lab failed; a refusal is an outcome, not an error.
            DeadlineExceeded: there is no verdict in time.

        *Cancellation:* the lab goes on with what was started.
        """
        return await self._guarded(self._attest_all())

    def batches(self) -> list[dict[str, int]]:
        """Requests and TPM quotes of every batch so far, from the host agents' events."""
        return [batch for host in self.plan.hosts for batch in batches_in(self._files.log(f"{host.name}-agent"))]

    async def _set_up(self) -> None:
        with self._timed("hardware"):
            await self._supervision.apply(self._files.services())
            operators = Onboarding(self._files, self._files.site())
            self._operators = await self._stack.enter_async_context(operators)
        with self._timed("onboarding"):
            await self._operators.onboard()

    async def _attest_all(self) -> list[GuestOutcome]:
        # The vTPMs are manufactured while the tenants enrol the host: nothing in one needs the other.
        starting = [asyncio.create_task(self._operators.start_guest(guest)) for guest in self.plan.guests]
        try:
            with self._timed("host_enrolment"):
                await asyncio.gather(*(self._operators.enrol(tenant.name) for tenant in self.plan.tenants))
            with self._timed("guests"):
                images = await asyncio.gather(*starting)
                booted = zip(self.plan.guests, images, strict=True)
                contacts = await asyncio.gather(*(self._operators.registered(guest, image) for guest, image in booted))
        finally:
            for task in starting:
                task.cancel()
            await asyncio.gather(*starting, return_exceptions=True)  # whose errors are second to the one that ended us
        with self._timed("first_round"):
            pairs = zip(self.plan.guests, contacts, strict=True)
            return list(await asyncio.gather(*(self._attest(guest, contact) for guest, contact in pairs)))

    async def _attest(self, guest: GuestPlan, contact: Contact) -> GuestOutcome:
        await self._operators.admit(guest, contact)
        return await self._operators.verdict(guest, contact)

    # --- processes ----------------------------------------------------------------------------------------

    async def _guarded(self, work: Awaitable[T]) -> T:
        """The work's result, or the end of a process that ended by itself."""
        working, watching = asyncio.ensure_future(work), asyncio.create_task(self._supervision.failed())
        try:
            await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
            if watching.done() and not working.done():
                watching.result()
            return await working
        finally:
            for task in (working, watching):
                task.cancel()
            await asyncio.gather(working, watching, return_exceptions=True)

    async def _tear_down(self) -> None:
        await self._stack.aclose()
        await self._supervision.stop()
        close_folder(self._folder)

    def _timed(self, step: str) -> Any:
        return _Timer(self.timings_s, step)


class _Timer:
    def __init__(self, timings_s: dict[str, float], step: str) -> None:
        self._timings_s, self._step = timings_s, step

    def __enter__(self) -> None:
        self._started = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._timings_s[self._step] = round(time.monotonic() - self._started, 3)
