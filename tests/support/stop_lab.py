"""A lab whose services are told to stop one by one, each with connections of every kind and requests in work."""

from __future__ import annotations

import asyncio
import functools
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ParamSpec

from harness.config import SiteSettings, TlsSettings
from harness.errors import HarnessError
from harness.lab_onboarding import Onboarding
from harness.lab_plan import LabPlan, plan
from harness.lab_site import LabSite, ServiceFile
from harness.peer import PeerClient
from harness.serve import EXIT_OVERDUE
from harness.sim.control import ask as ask_hardware
from tests.support.web_lab import Wire, wire

STARTED_S = 240.0
ENDED_S = 40.0
"""A process that is not ended after this is not going to be; whether it was done in time, its exit code tells."""
IDLE, HALF = 10, 4
P = ParamSpec("P")


class Overdue(AssertionError):
    """A service was not done within `serve.STOP_S`: on a busy machine that need not be its fault."""


def once_more_if_overdue(test: Callable[P, Awaitable[None]]) -> Callable[P, Awaitable[None]]:
    """Lets a test begin anew, once, when a service was overdue and nothing else failed; it makes all that it uses."""

    @functools.wraps(test)
    async def twice(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            await test(*args, **kwargs)
        except Overdue as overdue:
            print(f"once more: {overdue}")
        else:
            return
        await test(*args, **kwargs)

    return twice


@dataclass(slots=True)
class Running:
    """A service as a process of its own."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    async def ended(self, within_s: float = ENDED_S) -> int:
        """Its exit code."""
        try:
            return await asyncio.to_thread(self.process.wait, within_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} does not end: {self.log.read_text()[-2000:]}") from None

    async def stopped(self, numbers: Sequence[signal.Signals] = (signal.SIGTERM,)) -> int:
        """Its exit code after these signals; 0 says that it stopped in order within `serve.STOP_S`.

        Raises:
            Overdue: it ended itself because it was not done by then.
        """
        began = time.monotonic()
        for number in numbers:
            self.process.send_signal(number)
        code = await self.ended()
        if code == EXIT_OVERDUE:
            raise Overdue(f"{self.name} was not done and ended after {time.monotonic() - began:.2f} s")
        return code


@contextmanager
def started(name: str, service: str, config: Path, log: Path) -> Iterator[Running]:
    """``harness serve`` until the block is left."""
    command = [sys.executable, "-m", "harness", "serve", service, "--config", str(config)]
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        yield Running(name, process, log)
    finally:
        process.kill()
        process.wait()


@dataclass(slots=True)
class StopLab:
    """Services of a lab with one guest."""

    files: LabSite
    site: SiteSettings
    services: dict[str, Running] = field(default_factory=dict)

    def config(self, name: str) -> ServiceFile:
        return next(file for file in self.files.services() if file.name == name)


async def until(act: Callable[[], Awaitable[object]], running: Running | None = None) -> None:
    """Waits until a call succeeds."""
    async with asyncio.timeout(STARTED_S):
        while True:
            try:
                await act()
            except (HarnessError, OSError):
                assert running is None or running.process.poll() is None, running.log.read_text()[-2000:]
                await asyncio.sleep(0.05)
            else:
                return


@asynccontextmanager
async def stop_lab(chip: str) -> AsyncIterator[tuple[StopLab, Onboarding, LabPlan]]:
    """The lab, its guest enrolled and under attestation."""
    made = plan(tenants=1, guests=1, chip=chip)
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="h")))
        files = LabSite.open(folder, made)
        lab = StopLab(files=files, site=files.site())
        for file in files.services():
            if (control := file.powered) is not None:
                await until(lambda control=control: ask_hardware(control, {"op": "status"}))  # type: ignore[misc]
            lab.services[file.name] = stack.enter_context(
                started(file.name, file.service, file.config, files.log(file.name))
            )
        operators = await stack.enter_async_context(Onboarding(files, lab.site))
        await operators.onboard()
        [guest] = made.guests
        image = await operators.start_guest(guest)
        await operators.enrol(guest.tenant)
        contact = await operators.registered(guest, image)
        await operators.admit(guest, contact)
        assert (await operators.verdict(guest, contact)).error is None
        yield lab, operators, made


async def answered_or_closed(call: Awaitable[object]) -> str:
    """How a request that was in work ended: ``ok``, or the name of the error; it must end."""
    async with asyncio.timeout(ENDED_S):
        try:
            await call
        except HarnessError as error:
            return type(error).__name__
        return "ok"


@dataclass(slots=True)
class Crowd:
    """Open connections that do nothing, or not enough."""

    idle: list[Wire]
    half: list[Wire]

    async def ended(self) -> None:
        """Every one of them is closed by the server."""
        await asyncio.gather(*(each.ended() for each in (*self.idle, *self.half)))


@asynccontextmanager
async def crowd(tls: TlsSettings, url: str) -> AsyncIterator[Crowd]:
    """Idle keep-alive connections, requests that stop in their headers, and requests without their body."""
    port = int(url.rsplit(":", 1)[1])
    async with AsyncExitStack() as stack:
        idle = [await stack.enter_async_context(wire(tls, port)) for _ in range(IDLE)]
        for each in idle:
            await each.send(b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await each.answer())[0] == 200
        half = [await stack.enter_async_context(wire(tls, port)) for _ in range(2 * HALF)]
        for each in half[:HALF]:
            await each.send(b"GET /version HTTP/1.1\r\nHos")
        for each in half[HALF:]:
            await each.send(b"PUT /v1/certificate HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
        yield Crowd(idle=idle, half=half)


def client(tls: TlsSettings, url: str) -> PeerClient:
    """A client that may wait."""
    return PeerClient(tls, url, deadline_s=60)
