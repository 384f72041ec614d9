"""The simulated hardware TPM: manufacture, certificates, measured boot, power cycles, the control socket."""

from __future__ import annotations

import asyncio
import concurrent.futures
import datetime
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from harness.attest import Attest, parse_attest
from harness.certificates import verify_ek_chain
from harness.errors import CertificateRefused, ConfigError, SimulationError, SimulatorCrashed, SimulatorMissing
from harness.sim.boot import Scenario, reference_values
from harness.sim.control import ask
from harness.sim.hardware import HardwareTpm, HardwareTpmService
from harness.sim.profiles import load_profile
from harness.sim.swtpm import CreateCerts, manufacture
from harness.sim.vendor import EK_CERTIFICATE_CHAIN, EK_CERTIFICATE_RSA2048, EK_HANDLE, ROOT_CERTIFICATE, open_vendor
from harness.swtpm import SwtpmProcess
from harness.tpm import KeyTemplate, Tpm
from harness.values import HashAlg, PcrSelection
from tests.support.tpms import AUTH, PCRS_0_TO_7, DeviceSettings, blank_swtpm, short_folder

pytestmark = pytest.mark.needs_swtpm

AK = 0x81010002
BOOT_PCRS = PcrSelection.from_lists({bank: [*range(8), 14] for bank in (HashAlg.SHA256, HashAlg.SHA384)})
NOW = datetime.datetime.now(datetime.UTC)


@pytest.fixture
def settings() -> Iterator[DeviceSettings]:
    """Settings of a new device in a folder of its own."""
    with short_folder() as folder:
        yield DeviceSettings(folder=folder)


async def assert_booted(tpm: Tpm, name: str) -> None:
    """The PCRs are those of this scenario, in both banks."""
    scenario = Scenario.load(name)
    expected = {bank: reference_values(scenario, bank) for bank in (HashAlg.SHA256, HashAlg.SHA384)}
    assert await tpm.pcr_read(BOOT_PCRS) == expected


async def make_ak(tpm: Tpm) -> None:
    await tpm.persist(await tpm.create_primary(KeyTemplate.AK_P256, AUTH), AK)


async def quote(tpm: Tpm) -> Attest:
    """A parsed quote."""
    raw, _ = await tpm.quote(AK, AUTH, b"q", PCRS_0_TO_7)
    return parse_attest(raw)


async def test_new_device_has_its_boot_and_a_certified_ek(settings: DeviceSettings) -> None:
    """A new device shows the PCRs of its scenario, and its EK certificate chains to the vendor's root and no other."""
    async with HardwareTpm(replace(settings, chip="ifx-slb9670")) as device, await Tpm.open(device.tcti) as tpm:
        assert await tpm.banks() == {HashAlg.SHA256, HashAlg.SHA384}
        await assert_booted(tpm, "good")
        certificate, chain = await tpm.nv_read(EK_CERTIFICATE_RSA2048), await tpm.nv_read(EK_CERTIFICATE_CHAIN)
        assert certificate is not None
        assert chain is not None
        ek = await tpm.read_public(EK_HANDLE)
        assert ek is not None
        made_again = await tpm.read_public(await tpm.create_primary(KeyTemplate.EK_RSA2048, b""))
        assert made_again is not None
        assert made_again.name == ek.name  # the persistent EK is the one of template L-1
        root = x509.load_pem_x509_certificate((settings.vendor_ca / ROOT_CERTIFICATE).read_bytes())
        verify_ek_chain(certificate, [chain], [root], ek, NOW)
        other = open_vendor(settings.folder / "other", name="Other vendor", now=NOW).root
        with pytest.raises(CertificateRefused):
            verify_ek_chain(certificate, [chain], [other], ek, NOW)
        with pytest.raises(CertificateRefused):
            verify_ek_chain(certificate, [], [root], ek, NOW)
        san = x509.load_der_x509_certificate(certificate).extensions.get_extension_for_class(
            x509.SubjectAlternativeName
        )
        assert "id:49465800" in str(san.value)


@pytest.mark.parametrize("orderly", [True, False])
async def test_power_cycle_boots_anew(settings: DeviceSettings, orderly: bool) -> None:
    """A power cycle boots the new scenario, counts as a reset and keeps keys; the clock is unsafe after a cut only."""
    async with HardwareTpm(settings) as device, await Tpm.open(device.tcti) as tpm:
        await make_ak(tpm)
        before = await quote(tpm)
        await tpm.pcr_extend(4, {HashAlg.SHA256: bytes(32), HashAlg.SHA384: bytes(48)})
        await device.power_cycle(scenario="tampered-kernel", orderly=orderly)
        await assert_booted(tpm, "tampered-kernel")
        after = await quote(tpm)
        assert after.clock_info.reset_count == before.clock_info.reset_count + 1
        assert after.clock_info.safe is orderly
        await device.power_cycle(scenario="good")
        await assert_booted(tpm, "good")


async def test_client_never_sees_a_half_booted_tpm(settings: DeviceSettings) -> None:
    """A client that reads all the time through power cycles sees whole boots only: the one before or the one after."""
    whole = [reference_values(Scenario.load(name), HashAlg.SHA256) for name in ("good", "tampered-firmware")]
    seen: list[dict[int, bytes]] = []
    stop = asyncio.Event()
    async with HardwareTpm(settings) as device, await Tpm.open(device.tcti) as tpm:
        selection = PcrSelection.of(HashAlg.SHA256, 0xFF)  # eight values: one command, one moment

        async def read() -> None:
            while not stop.is_set():
                seen.append((await tpm.pcr_read(selection))[HashAlg.SHA256])

        reading = asyncio.create_task(read())
        for name in ("tampered-firmware", "good", "tampered-firmware"):
            await device.power_cycle(scenario=name)
        stop.set()
        async with asyncio.timeout(10):
            await reading
    expected = [{pcr: boot[pcr] for pcr in range(8)} for boot in whole]
    assert seen
    assert all(values in expected for values in seen)


async def test_second_start_keeps_the_device(settings: DeviceSettings) -> None:
    """A service that starts again powers the same TPM on: same EK, same certificate, one more reset."""
    found = []
    for _ in range(2):
        async with HardwareTpm(settings) as device, await Tpm.open(device.tcti) as tpm:
            if await tpm.read_public(AK) is None:
                await make_ak(tpm)
            ek = await tpm.read_public(EK_HANDLE)
            assert ek is not None
            found.append((ek.name, await tpm.nv_read(EK_CERTIFICATE_RSA2048), (await quote(tpm)).clock_info))
    assert found[0][:2] == found[1][:2]
    assert found[1][2].reset_count == found[0][2].reset_count + 1
    assert found[1][2].safe


async def test_unknown_scenario_changes_nothing(settings: DeviceSettings) -> None:
    """A power cycle into a scenario that does not exist is refused before the power goes off."""
    async with HardwareTpm(settings) as device, await Tpm.open(device.tcti) as tpm:
        with pytest.raises(ConfigError):
            await device.power_cycle(scenario="no-such-boot")
        await assert_booted(tpm, "good")
    with pytest.raises(ConfigError):
        HardwareTpm(replace(settings, chip="no-such-chip"))


class Control:
    """A client of the control socket."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def ask(self, request: object) -> dict[str, object]:
        reader, writer = await asyncio.open_unix_connection(self._path)
        try:
            writer.write((request if isinstance(request, bytes) else json.dumps(request).encode()) + b"\n")
            async with asyncio.timeout(30):
                answer: dict[str, object] = json.loads(await reader.readline())
            return answer
        finally:
            writer.close()

    async def ready(self) -> None:
        async with asyncio.timeout(30):
            while True:
                try:
                    _, writer = await asyncio.open_unix_connection(self._path)
                except (FileNotFoundError, ConnectionRefusedError):
                    await asyncio.sleep(0.01)
                else:
                    writer.close()
                    return


async def test_control_socket(settings: DeviceSettings) -> None:
    """Status, power cycle and fault plan work over the socket; requests that are not understood are refused by name."""
    service = asyncio.create_task(HardwareTpmService(settings).run())
    control = Control(settings.control)
    await control.ready()
    status = await control.ask({"op": "status"})
    assert (status["chip"], status["scenario"], status["power_cycles"], status["held"]) == ("swtpm", "good", 0, False)
    status = await control.ask({"op": "power_cycle", "scenario": "tampered-kernel", "orderly": False})
    assert (status["scenario"], status["power_cycles"]) == ("tampered-kernel", 1)
    assert "error" not in await control.ask({"op": "faults", "plan": [{"action": "cut", "command": "Quote"}]})
    for bad in (
        {"op": "power_cycle", "scenario": 7},
        {"op": "power_cycle", "orderly": "yes"},
        {"op": "power_cycle", "speed": 1},
        {"op": "power_cycle", "scenario": "no-such-boot"},
        {"op": "faults", "plan": "all"},
        {"op": "faults"},
        {"op": "explode"},
        {"op": "status", "more": 1},
        [1],
        b"not JSON",
        b'{"op": "status", "op": "status"}',
        b"[" * 20_000,
    ):
        answer = await control.ask(bad)
        assert answer["error"] == "ConfigError", bad
        assert answer["detail"]
    assert (await ask(settings.control, {"op": "status"}))["power_cycles"] == 1
    with pytest.raises(SimulationError, match="refused: ConfigError"):
        await ask(settings.control, {"op": "explode"})
    service.cancel()
    await asyncio.gather(service, return_exceptions=True)
    assert not settings.control.exists()
    with pytest.raises(SimulationError, match="cannot be reached"):
        await ask(settings.control, {"op": "status"})


async def test_death_of_swtpm_ends_the_service(settings: DeviceSettings) -> None:
    """When swtpm is killed from outside the service ends with SimulatorCrashed, for its supervisor to see."""
    service = asyncio.create_task(HardwareTpmService(settings).run())
    control = Control(settings.control)
    await control.ready()
    pid = (await control.ask({"op": "status"}))["swtpm_pid"]
    assert isinstance(pid, int)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(SimulatorCrashed):
        async with asyncio.timeout(10):
            await service


async def test_failed_manufacture_leaves_nothing(settings: DeviceSettings) -> None:
    """When the certificate tool fails, the error has swtpm_setup's last lines, and no half-made state is left."""
    tool = CreateCerts(tool=Path("/bin/false"), config=Path("/dev/null"), options=Path("/dev/null"), vmid="g:1")
    target = settings.folder / "guest"
    with pytest.raises(SimulationError, match="swtpm_setup failed with code 1"):
        await manufacture(target, create_certs=tool)
    assert list(settings.folder.iterdir()) == []
    await manufacture(target)
    with pytest.raises(SimulationError, match="made once"):
        await manufacture(target)


def test_vendor_is_made_once_and_kept(settings: DeviceSettings) -> None:
    """A vendor's folder is read again; its root's private key is nowhere; a damaged folder is refused."""
    folder = settings.folder / "v"
    first, second = (open_vendor(folder, name="V", now=NOW) for _ in range(2))
    assert (folder / "issuing.key").stat().st_mode & 0o777 == 0o600
    assert first.root == second.root
    assert first.issuing == second.issuing
    first.issuing.verify_directly_issued_by(first.root)
    assert isinstance(first.root.public_key(), ec.EllipticCurvePublicKey)
    assert sorted(path.name for path in folder.iterdir()) == ["issuing.key", "issuing.pem", "root.pem"]
    assert folder.stat().st_mode & 0o077 == 0
    (folder / "issuing.pem").unlink()
    with pytest.raises(SimulationError, match=r"/v/issuing\.pem of the TPM vendor cannot be read"):
        open_vendor(folder, name="V", now=NOW)
    (folder / "issuing.key").write_text("-----BEGIN PRIVATE KEY-----\nMIGHAgEAMBMGByq\n")
    with pytest.raises(SimulationError, match=r"/v/issuing\.key of the TPM vendor is not in PEM"):
        open_vendor(folder, name="V", now=NOW)


def test_processes_that_make_a_vendor_at_once_agree(settings: DeviceSettings) -> None:
    """Many callers that find no vendor all end with the same one, and nothing else is left in the folder."""
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: open_vendor(settings.vendor_ca, name="V", now=NOW), range(16)))
    assert len({vendor.root.serial_number for vendor in made}) == 1
    assert list(settings.folder.iterdir()) == [settings.vendor_ca]


async def test_device_that_cannot_start_leaves_no_process(settings: DeviceSettings) -> None:
    """When the vendor cannot be used, the device does not come up and its swtpm and sockets are gone."""
    settings.vendor_ca.write_text("a file where the folder should be")
    with pytest.raises(SimulationError, match="vendor"):
        async with HardwareTpm(settings):
            pass
    for path in (settings.state_dir / "back", settings.socket):
        with pytest.raises((ConnectionRefusedError, FileNotFoundError)):
            await asyncio.open_unix_connection(path)
    settings.vendor_ca.unlink()
    async with HardwareTpm(settings) as device, await Tpm.open(device.tcti) as tpm:
        await assert_booted(tpm, "good")


async def test_vendor_needs_an_ek(settings: DeviceSettings) -> None:
    """A TPM without EK, such as a blank one, cannot be equipped."""
    vendor = open_vendor(settings.vendor_ca, name="V", now=NOW)
    async with blank_swtpm(settings.folder) as swtpm, await Tpm.open(swtpm.tcti) as tpm:
        with pytest.raises(SimulationError, match="no RSA EK"):
            await vendor.equip(tpm, load_profile("swtpm").tpm, now=NOW)


async def test_missing_programs_are_named(settings: DeviceSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without swtpm on the path, manufacture and start are SimulatorMissing."""
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(SimulatorMissing):
        await manufacture(settings.state_dir)
    with pytest.raises(SimulatorMissing):
        await SwtpmProcess(settings.state_dir, settings.folder / "back", settings.folder / "log").start()
