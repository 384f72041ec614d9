"""A simulated hardware TPM: swtpm, its measured boot, and the chip's latency, in one process.

Clients use ``socket`` like any swtpm. A second socket is for power cycles, faults and another chip (`control`).

In ``state_dir``: ``tpm`` (swtpm's state), ``tpm.old-<n>`` (chips that were replaced), ``boot.json``, ``swtpm.log``.

Invariants:
    1. No client reaches the TPM between power-on and the end of the measured boot.
    2. A power cycle replays the whole scenario from PCRs at zero; only an orderly one sends TPM2_Shutdown(CLEAR) first.
    3. When swtpm ends by itself, or does not come up again, the service ends with `SimulatorCrashed`; a start of the
       service is a power-on with the scenario that was booted last (`boot_record`).
    4. A TPM is replaced in one step, with the host off: what is at ``tpm`` is whole, and the old one is kept aside.

Owner: one task, `HardwareTpm.run`; power cycles are made one after the other.

Spec: TPM 2.0 Part 1, 12.2.3 (startup); DESIGN 5.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import functools
import shutil
from pathlib import Path
from typing import Protocol

from harness.errors import HarnessError, SimulationError, SimulatorCrashed
from harness.sim.boot import Scenario, replay
from harness.sim.boot_record import BootRecord
from harness.sim.control import serve_control
from harness.sim.faults import FaultInjector, parse_plan
from harness.sim.profiles import load_profile
from harness.sim.swtpm import manufacture
from harness.sim.tpm_proxy import TpmProxy
from harness.sim.vendor import EK_CERTIFICATE_RSA2048, open_vendor
from harness.swtpm import STATE_FILE, SwtpmProcess
from harness.tpm import Tpm
from harness.unix_server import UnixServer

_LAST_COMMAND_S = 1.5
"""For the command in flight when the service is told to stop, which has five seconds for everything."""
_WAY_BACK = (
    "put a copy from a backup in its place, or move the folder {} away: a new TPM with new keys is made at the next "
    "start, and every tenant enrols the host anew"
)


class HardwareSettings(Protocol):
    """What a hardware TPM needs to know; `harness.config` has the settings file."""

    @property
    def state_dir(self) -> Path:
        """Where the TPM lives; a new one is made there when there is none."""

    @property
    def socket(self) -> Path:
        """Command socket for clients; the control channel of the TCTI is at ``<socket>.ctrl``."""

    @property
    def control(self) -> Path:
        """Socket for power cycles and faults."""

    @property
    def chip(self) -> str:
        """Name or path of a latency profile."""

    @property
    def scenario(self) -> str:
        """Name or path of the measured boot."""

    @property
    def seed(self) -> int:
        """Seed of the latencies."""

    @property
    def vendor_ca(self) -> Path:
        """Folder of the simulated vendor, made when there is none."""


class HardwareTpm:
    """The device. Used as an async context manager: powered on inside, orderly off at the end.

    Args:
        settings: where it lives and what it is.
    """

    def __init__(self, settings: HardwareSettings) -> None:
        self._vendor_ca = settings.vendor_ca
        self._profile = load_profile(settings.chip)
        self._boots = BootRecord(settings.state_dir, settings.scenario)
        self._scenario = Scenario.load(self._boots.load())
        self._state = settings.state_dir / "tpm"
        self._next = settings.state_dir / "tpm.next"
        back = settings.state_dir / "back"
        self._swtpm = SwtpmProcess(self._state, back, settings.state_dir / "swtpm.log")
        self._proxy = TpmProxy(settings.socket, back, self._profile, seed=settings.seed)
        self._power = asyncio.Lock()
        self._power_cycles = 0
        self._watch: asyncio.Task[None] | None = None
        self._crashed = asyncio.Event()

    @property
    def tcti(self) -> str:
        """TCTI for clients."""
        return self._proxy.tcti

    async def __aenter__(self) -> HardwareTpm:
        try:
            await self._swtpm.until_free()  # another service on this state keeps its sockets
            if not self._state.exists() and self._next.exists():
                self._next.rename(self._state)  # a replacement that a crash left between its two steps
            if not self._state.exists():
                await manufacture(self._state)
            await self._proxy.hold(cut=False)
            await self._proxy.start()
            await self._power_on()
        except BaseException:
            await self._power_off(orderly=False)
            await self._proxy.stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            async with self._power:
                await self._proxy.hold(cut=False, within_s=_LAST_COMMAND_S)
                await self._power_off(orderly=not self._crashed.is_set())
        finally:
            await self._proxy.stop()

    async def power_cycle(self, *, scenario: str | None = None, orderly: bool = True) -> None:
        """Switches the host off and on; returns when the measured boot is done and clients go on.

        Args:
            scenario: what boots from now on; the same as before when None.
            orderly: the operating system shuts down: TPM2_Shutdown(CLEAR) is sent first. Else power is cut: the command
                in flight is lost, and the TPM's clock is not safe for a while (a new boot, TPM 2.0 Part 1, 36.3.2).

        Raises:
            ConfigError: the scenario cannot be used; nothing has happened.
            SimulationError, TpmError: the scenario cannot be kept: nothing has happened; or the TPM did not come up:
                clients are held back, and the service ends.

        *Cancellation:* the TPM may be off, and clients held back, until the next power cycle; or the service ends.
        """
        boots = self._scenario if scenario is None else Scenario.load(scenario)
        async with self._power:
            if scenario is not None:
                await asyncio.to_thread(self._boots.save, scenario)
            await self._proxy.hold(cut=not orderly)
            await self._power_off(orderly=orderly)
            self._scenario = boots
            await self._again()

    async def replace(self, *, replaced: int | None = None) -> None:
        """Gives the host another chip: shut down in order, a new TPM with new keys, and the same boot.

        Args:
            replaced: how many were replaced before; nothing happens when that is not so. None: never mind.

        Raises:
            SimulationError: the new TPM cannot be made or put in place: the old one runs on.
            TpmError: the new one did not come up; clients are held back, and the service ends.

        *Cancellation:* as for `power_cycle`; the chip is the old one or the new one.
        """
        async with self._power:
            if replaced not in {None, len(self._replaced())}:
                return
            await asyncio.to_thread(shutil.rmtree, self._next, ignore_errors=True)
            await manufacture(self._next)
            await self._proxy.hold(cut=False)
            await self._power_off(orderly=True)
            try:
                await asyncio.to_thread(self._swap)
            except OSError as error:
                await self._again()
                raise SimulationError(f"{self._state}: the TPM cannot be replaced: {error.strerror}") from error
            await self._again()

    def _swap(self) -> None:
        numbers = (path.name.rpartition("-")[2] for path in self._replaced())
        newest = max((int(number) for number in numbers if number.isdecimal()), default=0)
        old = self._state.with_name(f"tpm.old-{newest + 1}")
        self._state.rename(old)
        try:
            self._next.rename(self._state)
        except OSError:
            old.rename(self._state)
            raise

    def _replaced(self) -> list[Path]:
        return list(self._state.parent.glob("tpm.old-*"))

    async def _again(self) -> None:
        try:
            await self._power_on()
        except BaseException:
            self._crashed.set()
            raise
        self._power_cycles += 1

    def set_faults(self, plan: object) -> None:
        """Sets the fault plan from plain data (`parse_plan`); a fault in progress goes on.

        Raises:
            ConfigError: not a fault plan.
        """
        self._proxy.faults = FaultInjector(parse_plan(plan))

    def status(self) -> dict[str, object]:
        """State in plain data."""
        return {
            "chip": self._profile.name,
            "scenario": self._scenario.name,
            "power_cycles": self._power_cycles,
            "replaced": len(self._replaced()),
            "commands": self._proxy.commands,
            "held": self._proxy.held,
            "swtpm_pid": self._swtpm.pid if self._swtpm.running else None,
        }

    async def until_crash(self) -> None:
        """Waits until swtpm ends by itself, or does not come up again.

        Raises:
            SimulatorCrashed: always, when it has happened.

        *Cancellation:* the TPM goes on.
        """
        await self._crashed.wait()
        raise SimulatorCrashed("swtpm of the hardware TPM has ended; see swtpm.log in its state folder")

    async def _power_on(self) -> None:
        await self._start_swtpm()
        async with await Tpm.open(self._swtpm.tcti) as tpm:
            await tpm.startup()
            await replay(self._scenario, tpm)
            if await tpm.nv_read(EK_CERTIFICATE_RSA2048) is None:
                now = datetime.datetime.now(datetime.UTC)
                vendor = open_vendor(self._vendor_ca, name=f"Simulated TPM vendor {self._vendor_ca.name}", now=now)
                await vendor.equip(tpm, self._profile.tpm, now=now)
        self._watch = asyncio.create_task(self._watch_swtpm())
        self._proxy.release()

    async def _start_swtpm(self) -> None:
        state = self._state / STATE_FILE
        if not state.exists():  # swtpm would make a blank one, and nobody would know this host again
            raise SimulationError(f"{state}: the TPM's state is missing; {_WAY_BACK.format(self._state)}")
        try:
            await self._swtpm.start()
        except SimulatorCrashed as error:
            way = _WAY_BACK.format(self._state)
            raise SimulationError(f"{state}: {error.detail}; if the file is damaged, {way}") from error

    async def _power_off(self, *, orderly: bool) -> None:
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
            self._watch = None
        if orderly and self._swtpm.running:
            # A TPM that does not take the command any more loses power all the same.
            with contextlib.suppress(HarnessError):
                async with await Tpm.open(self._swtpm.tcti, timeout_s=5) as tpm:
                    await tpm.shutdown()
        else:
            self._swtpm.kill()
        await self._swtpm.stop()

    async def _watch_swtpm(self) -> None:
        await self._swtpm.wait()
        self._crashed.set()


class HardwareTpmService:
    """The device with its control socket, as a service.

    Args:
        settings: as for `HardwareTpm`.
    """

    def __init__(self, settings: HardwareSettings) -> None:
        self._settings = settings

    async def run(self, sock: object = None) -> None:
        """Serves until it is cancelled.

        Args:
            sock: not used: the sockets are those of the settings.

        Raises:
            ConfigError: chip, scenario or the record of the last boot cannot be used.
            SimulatorCrashed: swtpm ended by itself.
            SimulationError, TpmError: the TPM did not come up.

        *Cancellation:* the TPM is switched off in order.
        """
        async with HardwareTpm(self._settings) as tpm:
            control = UnixServer(self._settings.control, functools.partial(serve_control, tpm))
            try:
                await control.start()
                await tpm.until_crash()
            finally:
                await control.stop()
