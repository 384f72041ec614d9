"""`harness demo`: a whole lab from nothing to verdicts, shown as the chain of trust that was or was not closed.

Spec: DESIGN 2 (chain of trust), 6.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from harness import console
from harness.demo_options import DemoOptions
from harness.demo_report import draw
from harness.errors import ConfigError
from harness.lab import Lab
from harness.lab_outcome import GuestOutcome
from harness.lab_plan import LabPlan, plan, tampered
from harness.lab_topology import DEFAULT_CHIP
from harness.sim.profiles import load_profile

_ACCEPTED, _REFUSED = 0, 1


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoResult:
    """What a demo showed.

    Args:
        plan: of its lab.
        outcomes: one per guest.
        batches: requests and TPM quotes of each batch.
        timings_s: seconds per step, and the total.
        host_id: of the lab's host.
    """

    plan: LabPlan
    outcomes: list[GuestOutcome]
    batches: list[dict[str, int]]
    timings_s: dict[str, float]
    host_id: str

    @property
    def accepted(self) -> bool:
        """Whether every guest was accepted."""
        return all(outcome.accepted for outcome in self.outcomes)

    def as_json(self) -> dict[str, object]:
        """The one object of ``harness demo --json``."""
        return {
            "accepted": self.accepted,
            "guests": [outcome.as_json() for outcome in self.outcomes],
            "batches": self.batches,
            "timings_s": self.timings_s,
        }


def run(options: DemoOptions) -> int:
    """Runs the demo and prints what came of it.

    Returns:
        0 when every guest was accepted, 1 when one was refused.

    Raises:
        ConfigError: options that make no lab.
        HarnessError: the lab could not be set up, or came to no verdict.
    """
    honest = plan(tenants=options.tenants, guests=options.guests, chip=options.chip or DEFAULT_CHIP)
    wanted = honest if options.tamper is None else tampered(honest, options.tamper)
    _check_chip(wanted.hosts[0].chip)
    with _folder(options) as folder, _ended_in_order():
        result = asyncio.run(_demo(wanted, folder, options))
        if options.json:
            console.print_json(result.as_json())
        elif not options.keep:
            draw(result, options.tamper)
    return _ACCEPTED if result.accepted else _REFUSED


def _check_chip(chip: str) -> None:
    try:
        load_profile(chip)
    except ConfigError as error:
        raise ConfigError(f"--chip {chip}: {error.detail}") from error


async def _demo(wanted: LabPlan, folder: Path, options: DemoOptions) -> DemoResult:
    started = time.monotonic()
    async with contextlib.AsyncExitStack() as stack:
        with console.progress("setting up: hardware TPM, services, certificates"):
            lab = await stack.enter_async_context(Lab(wanted, folder))
        with console.progress("starting and attesting guests"):
            outcomes = await lab.attest_all()
        result = DemoResult(
            plan=wanted, outcomes=outcomes, batches=lab.batches(), timings_s=lab.timings_s, host_id=lab.host_id
        )
        if options.keep:
            if not options.json:
                draw(result, options.tamper)
            console.say(f"the lab is running; in another terminal: export HARNESS_LAB={folder}\nCtrl-C ends it")
            await _until_interrupted()
    lab.timings_s["total"] = round(time.monotonic() - started, 3)
    return result


async def _until_interrupted() -> None:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ended.set)
    await ended.wait()


@contextlib.contextmanager
def _ended_in_order() -> Iterator[None]:
    """SIGTERM ends the demo as Ctrl-C does: services are stopped, and the folder with their keys is removed."""
    # A shell that starts us in the background has SIGINT ignored; whoever sends it all the same means it.
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, interrupt)


@contextlib.contextmanager
def _folder(options: DemoOptions) -> Iterator[Path]:
    if options.lab is not None:
        try:
            options.lab.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ConfigError(f"--lab {options.lab}: cannot be made: {error.strerror}") from error
        yield options.lab
        return
    try:
        folder = Path(tempfile.mkdtemp(prefix="hl"))  # short: UNIX socket paths hold 107 bytes
    except OSError as error:
        raise ConfigError(f"no temporary folder can be made: {error.strerror}") from error
    try:
        yield folder
    except KeyboardInterrupt:
        shutil.rmtree(folder, ignore_errors=True)  # ended on purpose: nobody asks what went wrong
        raise
    except BaseException:
        console.say(f"logs are in {folder}/log")
        raise
    shutil.rmtree(folder, ignore_errors=True)
