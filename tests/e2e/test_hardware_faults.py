"""The hardware TPM's service as a process: killed, with files that a crash left, and with another chip.

Size: one service, and every way in which it or its state may come to harm.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import harness.swtpm
from harness.attest import Attest, parse_attest
from harness.config import HardwareTpmSettings, dump
from harness.errors import SimulationError, SimulatorCrashed
from harness.lab_processes import ServiceProcess, last_line
from harness.sim.boot import Scenario, reference_values
from harness.sim.control import ask
from harness.sim.hardware import HardwareTpm
from harness.sim.vendor import EK_CERTIFICATE_RSA2048, EK_HANDLE
from harness.swtpm import SwtpmProcess
from harness.tpm import KeyTemplate, Tpm
from harness.values import HashAlg, PcrSelection
from tests.support.fault_lab import eventually, kill
from tests.support.processes import left_by
from tests.support.tpms import AUTH, PCRS_0_TO_7, DeviceSettings, short_folder

pytestmark = pytest.mark.needs_swtpm
AK = 0x81010002
END_S = 120.0
STATE = "tpm2-00.permall"


class Device:
    """The service and its files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = folder / "device" / "tpm"
        self.boot = folder / "device" / "boot.json"
        self.log = folder / "device.log"
        self.process = ServiceProcess("tpm", "hardware-tpm", folder / "device.yml", self.log)
        self.configure("good")

    def configure(self, scenario: str) -> None:
        settings = HardwareTpmSettings(
            state_dir=self.folder / "device",
            socket=self.folder / "tpm",
            control=self.folder / "power",
            chip="swtpm",
            scenario=scenario,
            vendor_ca=self.folder / "vendor",
        )
        dump(settings, self.folder / "device.yml")

    async def start(self) -> None:
        """Starts the service and waits until it answers."""
        self.process.start()

        async def answers() -> bool:
            self.process.check()
            return (await self.status())["held"] is False

        await eventually(answers)

    async def fails(self) -> str:
        """Starts the service, which must end by itself; the sentence in its log."""
        self.process.start()
        async with asyncio.timeout(END_S):
            assert await self.process.wait() == 1
        assert "Traceback" not in self.log.read_text()
        return last_line(self.log)

    async def status(self) -> dict[str, object]:
        return await ask(self.folder / "power", {"op": "status"})

    async def control(self, **request: object) -> dict[str, object]:
        return await ask(self.folder / "power", request)

    async def swtpm_pid(self) -> int:
        pid = (await self.status())["swtpm_pid"]
        assert isinstance(pid, int)
        return pid

    def tpm(self) -> str:
        return f"swtpm:path={self.folder / 'tpm'}"

    async def make_ak(self) -> None:
        async with await Tpm.open(self.tpm()) as tpm:
            await tpm.persist(await tpm.create_primary(KeyTemplate.AK_P256, AUTH), AK)

    async def keys(self) -> list[bytes | None]:
        """Names of EK and AK, and the EK certificate."""
        async with await Tpm.open(self.tpm()) as tpm:
            publics = [await tpm.read_public(handle) for handle in (EK_HANDLE, AK)]
            return [
                *(None if public is None else public.name for public in publics),
                await tpm.nv_read(EK_CERTIFICATE_RSA2048),
            ]

    async def booted(self, name: str) -> bool:
        expected = reference_values(Scenario.load(name), HashAlg.SHA256)
        async with await Tpm.open(self.tpm()) as tpm:
            values = (await tpm.pcr_read(PcrSelection.of(HashAlg.SHA256, 0xFF)))[HashAlg.SHA256]
        return values == {pcr: expected.get(pcr, bytes(32)) for pcr in range(8)}

    async def quote(self) -> Attest:
        async with await Tpm.open(self.tpm()) as tpm:
            raw, _ = await tpm.quote(AK, AUTH, b"q", PCRS_0_TO_7)
        return parse_attest(raw)


@pytest.fixture
async def device() -> AsyncIterator[Device]:
    with short_folder() as folder:
        made = Device(folder)
        yield made
        await made.process.stop()
        assert left_by(folder) == {}


async def test_a_killed_swtpm_ends_the_service_and_the_next_one_boots_what_was_booted_last(device: Device) -> None:
    """The same chip with the same keys, one reset more; its clock is not safe for some seconds, and then is again."""
    await device.start()
    await device.make_ak()
    await device.control(op="power_cycle", scenario="tampered-kernel")
    keys, before = await device.keys(), await device.quote()
    kill(await device.swtpm_pid())
    async with asyncio.timeout(END_S):
        assert await device.process.wait() == 1
    assert "swtpm of the hardware TPM has ended" in last_line(device.log)
    await device.start()
    after = await device.quote()
    assert await device.booted("tampered-kernel")
    assert await device.keys() == keys
    assert after.clock_info.reset_count == before.clock_info.reset_count + 1
    assert not after.clock_info.safe

    async def is_safe() -> bool:
        return (await device.quote()).clock_info.safe

    await eventually(is_safe)
    assert (await device.quote()).clock_info.reset_count == after.clock_info.reset_count


async def test_a_killed_service_takes_its_swtpm_along_and_can_be_started_at_once(device: Device) -> None:
    """Its swtpm may still be ending; the next start waits for it, and is a power cycle."""
    await device.start()
    await device.make_ak()
    await device.control(op="power_cycle", scenario="tampered-firmware")
    for _ in range(3):
        keys, before = await device.keys(), await device.quote()
        kill(device.process.pid or 0)
        await device.start()
        assert await device.booted("tampered-firmware")
        assert await device.keys() == keys
        assert (await device.quote()).clock_info.reset_count == before.clock_info.reset_count + 1
    kill(device.process.pid or 0)
    assert await asyncio.to_thread(left_by, device.folder) == {}


async def test_another_scenario_in_the_settings_counts_more_than_the_last_boot(device: Device) -> None:
    """Who changes the settings means it; the last boot holds for the settings that it was made under."""
    await device.start()
    await device.control(op="power_cycle", scenario="tampered-kernel")
    await device.process.stop()
    device.configure("tampered-firmware")
    await device.start()
    assert await device.booted("tampered-firmware")
    assert (await device.status())["scenario"] == "tampered-firmware"


async def test_an_own_scenario_survives_a_restart(device: Device) -> None:
    """By its path; a file that is gone by then is named."""
    own = device.folder / "own.yml"
    own.write_text("description: mine\nevents: [{pcr: 4, type: EV_IPL, label: kernel, text: mine}]\n")
    await device.start()
    await device.control(op="power_cycle", scenario=str(own))
    await device.process.stop()
    await device.start()
    assert (await device.status())["scenario"] == "own"
    await device.process.stop()
    own.unlink()
    assert str(own) in await device.fails()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"booted": "good"}', '{"configured": "good", "booted": 5}', "\x00"]
)
async def test_a_record_of_the_last_boot_that_is_broken_is_named(device: Device, content: str) -> None:
    """Nothing is guessed: the service ends with the file's name and what to do; without the file it starts."""
    await device.start()
    await device.process.stop()
    device.boot.write_text(content)
    sentence = await device.fails()
    assert str(device.boot) in sentence
    assert "remove the file" in sentence
    device.boot.unlink()
    await device.start()
    assert await device.booted("good")


async def test_a_scenario_that_cannot_be_kept_is_not_booted(device: Device) -> None:
    """A folder is in the way: refused before the power goes off."""
    await device.start()
    device.boot.mkdir()
    with pytest.raises(SimulationError, match="cannot be written"):
        await device.control(op="power_cycle", scenario="tampered-kernel")
    assert await device.booted("good")
    assert (await device.status())["power_cycles"] == 0


@pytest.mark.parametrize("damage", ["half", "empty", "missing"])
async def test_a_damaged_state_is_named_with_the_way_back(device: Device, damage: str) -> None:
    """No blank TPM takes its place; with the whole file it is the same chip; with the folder moved away a new one."""
    await device.start()
    await device.make_ak()
    keys = await device.keys()
    await device.process.stop()
    state = device.state / STATE
    whole = state.read_bytes()
    if damage == "missing":
        state.unlink()
    else:
        state.write_bytes(whole[: len(whole) // 2 if damage == "half" else 0])
    for _ in range(2):
        sentence = await device.fails()
        assert str(state) in sentence
        assert f"move the folder {device.state} away" in sentence
    state.write_bytes(whole)
    await device.start()
    assert await device.keys() == keys
    await device.process.stop()
    device.state.rename(device.folder / "away")
    await device.start()
    assert await device.booted("good")
    assert (await device.keys())[0] not in (None, keys[0])


async def test_another_chip(device: Device) -> None:
    """New EK and certificate, no keys of the old one; the same boot; each old state is kept."""
    await device.start()
    await device.make_ak()
    await device.control(op="power_cycle", scenario="tampered-kernel")
    eks = [(await device.keys())[0]]
    for number in (1, 2):
        status = await device.control(op="replace")
        assert (status["replaced"], status["power_cycles"], status["held"]) == (number, number + 1, False)
        ek, ak, certificate = await device.keys()
        assert ak is None
        assert certificate is not None
        eks.append(ek)
        assert await device.booted("tampered-kernel")
        assert (device.state.with_name(f"tpm.old-{number}") / STATE).is_file()
    assert len(set(eks)) == 3
    kill(device.process.pid or 0)
    await device.start()
    assert (await device.keys())[0] == eks[-1]
    await device.process.stop()
    shutil.rmtree(device.state)
    device.state.with_name("tpm.old-1").rename(device.state)
    await device.start()
    assert (await device.keys())[0] == eks[0]


async def test_a_replacement_that_is_asked_for_twice_is_made_once(device: Device) -> None:
    """An order that says how many chips were replaced before does nothing when it is given again."""
    await device.start()
    eks = {(await device.keys())[0]}
    for _ in range(2):
        status = await device.control(op="replace", replaced=0)
        assert status["replaced"] == 1
        eks.add((await device.keys())[0])
    assert len(eks) == 2
    for unusable in (True, "1", 1.5):
        with pytest.raises(SimulationError, match="replaced is a number"):
            await device.control(op="replace", replaced=unusable)


async def test_a_replacement_that_a_crash_cut_in_two_is_finished(device: Device) -> None:
    """The old chip is aside, the new one not yet in place: it is put there at the next start."""
    await device.start()
    old = (await device.keys())[0]
    await device.process.stop()
    device.state.rename(device.state.with_name("tpm.next"))
    await device.start()
    assert (await device.keys())[0] == old
    assert not device.state.with_name("tpm.next").exists()


async def test_a_chip_that_cannot_be_put_in_place_leaves_the_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused, and the host is up again with the chip that it had, for clients that wait."""
    with short_folder() as folder:
        settings = DeviceSettings(folder=folder)
        (settings.state_dir / "tpm.old-7").mkdir(parents=True)
        async with HardwareTpm(settings) as device, await Tpm.open(device.tcti) as tpm:

            async def ek() -> bytes:
                public = await tpm.read_public(EK_HANDLE)
                assert public is not None
                return public.name

            old, rename = await ek(), Path.rename

            def fails(path: Path, target: Path) -> Path:
                if path.name == "tpm.next":
                    raise OSError(28, "No space left on device")
                return rename(path, target)

            monkeypatch.setattr(Path, "rename", fails)
            with pytest.raises(SimulationError, match="cannot be replaced: No space left"):
                await device.replace()
            monkeypatch.undo()
            assert await ek() == old
            await device.replace()
            assert await ek() != old
            assert (settings.state_dir / "tpm.old-8" / STATE).is_file()  # never in the place of an older one


async def test_what_a_killed_manufacture_left_is_cleared_away(device: Device) -> None:
    """Half a TPM beside the place where it should be."""
    half = device.state.with_name(".tpm-new")
    half.mkdir(parents=True)
    (half / STATE).write_bytes(b"half")
    await device.start()
    assert await device.booted("good")
    assert not half.exists()


async def test_two_swtpms_do_not_work_on_one_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second waits for the first to end, for a while, and says who is in the way; then it starts."""
    with short_folder() as folder:
        first, second = (SwtpmProcess(folder / "state", folder / name, folder / f"{name}.log") for name in "ab")
        await first.start()
        try:
            monkeypatch.setattr(harness.swtpm, "_FREE_S", 0.2)
            with pytest.raises(SimulatorCrashed, match="another swtpm works on"):
                await second.start()
            monkeypatch.undo()
            starting = asyncio.create_task(second.start())
            await asyncio.sleep(0)
            first.kill()
            async with asyncio.timeout(END_S):
                await starting
            assert second.running
        finally:
            for swtpm in (first, second):
                swtpm.kill()
                await swtpm.stop()


async def test_the_record_of_a_boot_says_what_was_configured_then(device: Device) -> None:
    """Plain JSON, for people who look."""
    await device.start()
    assert not device.boot.exists()
    await device.control(op="power_cycle", scenario="tampered-kernel")
    assert json.loads(device.boot.read_text()) == {"configured": "good", "booted": "tampered-kernel"}
    assert device.boot.stat().st_mode & 0o777 == 0o600
