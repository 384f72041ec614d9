"""The command proxy in front of a real swtpm: time, faults, turns, and clients that are not ours."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from harness.errors import DeviceFault, DeviceUnavailable, SimulationError
from harness.sim.faults import Action, Effect, Fault, FaultInjector
from harness.sim.profiles import ChipProfile, load_profile
from harness.sim.tpm_proxy import TpmProxy
from harness.swtpm import SwtpmProcess
from harness.tpm import KeyTemplate, Tpm
from harness.values import HashAlg, PcrSelection
from tests.support.tpms import AUTH, PCRS_0_TO_7, blank_swtpm, short_folder

pytestmark = pytest.mark.needs_swtpm

RSA, ECC = 0x81010002, 0x81010003
PCR_15 = PcrSelection.of(HashAlg.SHA256, 1 << 15)
ZERO = bytes(32)


def chip(rsa_ms: float, ecc_ms: float) -> ChipProfile:
    """A chip with fixed times and nothing else delayed."""
    fixed = {"p50": 0, "p95": 0, "p99": 0}
    times = {"rsa2048": rsa_ms, "ecc256": ecc_ms, "other": 0}
    return ChipProfile.model_validate(
        {
            "name": "fixed",
            "chip": "fixed",
            "source": "the test",
            "assumptions": (),
            "tpm": {"manufacturer": "id:00000000", "model": "fixed", "version": "id:1"},
            "private_key": {kind: dict.fromkeys(fixed, ms) for kind, ms in times.items()},
        }
    )


class Bench:
    """A swtpm with an RSA and a P-256 AK, and a proxy in front of it."""

    def __init__(self, folder: Path, swtpm: SwtpmProcess) -> None:
        self._folder = folder
        self.swtpm = swtpm
        self.proxy = self.chip(load_profile("swtpm"))

    def chip(self, profile: ChipProfile, *faults: Fault) -> TpmProxy:
        """Proxy with this chip; start and stop it."""
        front = self._folder / "tpm"
        return TpmProxy(front, self.swtpm.socket, profile, seed=1, faults=FaultInjector(faults))


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    """Bench whose proxy delays nothing and runs."""
    with short_folder() as folder:
        async with blank_swtpm(folder) as swtpm:
            async with await Tpm.open(swtpm.tcti) as tpm:
                for template, handle in ((KeyTemplate.AK_RSA2048, RSA), (KeyTemplate.AK_P256, ECC)):
                    await tpm.persist(await tpm.create_primary(template, AUTH), handle)
            bench = Bench(folder, swtpm)
            await bench.proxy.start()
            try:
                yield bench
            finally:
                await bench.proxy.stop()


async def timed_quote(tpm: Tpm, handle: int, auth: bytes = AUTH) -> float:
    """Milliseconds of one quote."""
    started = time.perf_counter()
    await tpm.quote(handle, auth, b"q", PCRS_0_TO_7)
    return (time.perf_counter() - started) * 1000


async def test_quote_takes_the_time_of_its_key(bench: Bench) -> None:
    """A quote takes the chip's time for the type of its key, and other commands are not delayed."""
    await bench.proxy.stop()
    proxy = bench.chip(chip(rsa_ms=400, ecc_ms=100))
    await proxy.start()
    try:
        async with await Tpm.open(proxy.tcti) as tpm:
            transient = await tpm.create_primary(KeyTemplate.AK_P256, b"another key")
            assert await timed_quote(tpm, RSA) >= 400
            for handle, auth in ((ECC, AUTH), (transient, b"another key")):
                assert 100 <= min([await timed_quote(tpm, handle, auth) for _ in range(3)]) < 400
            started = time.perf_counter()
            await tpm.pcr_read(PCRS_0_TO_7)
            assert time.perf_counter() - started < 0.100
    finally:
        await proxy.stop()


async def test_refused_command_does_not_take_the_time_of_the_key(bench: Bench) -> None:
    """A chip checks the authorization before it uses the key: a wrong authValue is refused at once."""
    await bench.proxy.stop()
    proxy = bench.chip(chip(rsa_ms=5000, ecc_ms=5000))
    await proxy.start()
    try:
        async with await Tpm.open(proxy.tcti, timeout_s=4) as tpm:
            with pytest.raises(DeviceFault):
                await tpm.quote(ECC, b"wrong", b"q", PCRS_0_TO_7)
    finally:
        await proxy.stop()


async def test_two_clients_wait_for_each_other(bench: Bench) -> None:
    """The chip does one command at a time: two clients with four quotes together need four times one quote."""
    await bench.proxy.stop()
    proxy = bench.chip(chip(rsa_ms=60, ecc_ms=60))
    await proxy.start()
    try:
        async with await Tpm.open(proxy.tcti) as one, await Tpm.open(proxy.tcti) as two:
            started = time.perf_counter()
            await asyncio.gather(*(timed_quote(tpm, ECC) for tpm in (one, two, one, two)))
            assert time.perf_counter() - started >= 0.240
    finally:
        await proxy.stop()


FAILURE = 0x101


@pytest.mark.parametrize("action", [Action.FAIL, Action.CUT])
@pytest.mark.parametrize("effect", list(Effect))
async def test_fault_happens_once_with_or_without_effect(bench: Bench, action: Action, effect: Effect) -> None:
    """Each fault hits the second extend only; PCR 15 shows whether the TPM had carried it out; the client goes on."""
    once = bench.swtpm  # the proxy's own TPM, read directly to see what really happened
    async with await Tpm.open(bench.proxy.tcti) as tpm, await Tpm.open(once.tcti) as truth:
        bench.proxy.faults = FaultInjector([Fault(action=action, effect=effect, command="PCR_Extend", at=2)])
        await tpm.pcr_extend(15, {HashAlg.SHA256: ZERO})
        before = (await truth.pcr_read(PCR_15))[HashAlg.SHA256][15]
        with pytest.raises(DeviceFault if action is Action.FAIL else DeviceUnavailable) as caught:
            await tpm.pcr_extend(15, {HashAlg.SHA256: ZERO})
        if isinstance(caught.value, DeviceFault):
            assert caught.value.response_code == FAILURE
        after = (await truth.pcr_read(PCR_15))[HashAlg.SHA256][15]
        assert (after != before) is (effect is Effect.AFTER)
        await tpm.pcr_extend(15, {HashAlg.SHA256: ZERO})
        assert (await tpm.pcr_read(PCR_15))[HashAlg.SHA256][15] != after


async def test_busy_tpm_is_waited_for(bench: Bench) -> None:
    """TPM_RC_RETRY, often enough to pass the TSS's own five tries, is a delay and not an error."""
    async with await Tpm.open(bench.proxy.tcti) as tpm:
        bench.proxy.faults = FaultInjector([Fault(action=Action.FAIL, command="Quote", times=8, response_code=0x922)])
        await tpm.quote(ECC, AUTH, b"q", PCRS_0_TO_7)
        assert bench.proxy.faults.next(None) is None


@pytest.mark.parametrize("effect", list(Effect))
async def test_hung_tpm_answers_nobody_until_power_is_cut(bench: Bench, effect: Effect) -> None:
    """While one client's quote hangs, another client waits; after a power cut it gets its answer."""
    hung, other = await Tpm.open(bench.proxy.tcti, timeout_s=0.3), await Tpm.open(bench.proxy.tcti)
    bench.proxy.faults = FaultInjector([Fault(action=Action.HANG, effect=effect, command="Quote")])
    with pytest.raises(DeviceUnavailable, match="did not answer"):
        await hung.quote(ECC, AUTH, b"q", PCRS_0_TO_7)
    waiting = asyncio.create_task(other.pcr_read(PCR_15))
    assert not (await asyncio.wait([waiting], timeout=0.2))[0]
    await bench.proxy.hold(cut=True)
    bench.proxy.release()
    async with asyncio.timeout(10):
        await waiting
    await other.close()


async def test_hung_tpm_goes_on_when_the_client_has_gone(bench: Bench) -> None:
    """A hang lasts as long as the client that caused it stays: its disconnect lets the next one through."""
    bench.proxy.faults = FaultInjector([Fault(action=Action.HANG, command="GetRandom")])
    _, writer = await asyncio.open_unix_connection(bench.proxy.tcti.removeprefix("swtpm:path="))
    writer.write(bytes.fromhex("80010000000c0000017b0008"))
    async with await Tpm.open(bench.proxy.tcti) as other:
        waiting = asyncio.create_task(other.pcr_read(PCR_15))
        assert not (await asyncio.wait([waiting], timeout=0.2))[0]
        writer.close()
        async with asyncio.timeout(10):
            await waiting


async def test_held_proxy_keeps_commands_back(bench: Bench) -> None:
    """While the proxy is held nothing reaches the TPM, not even a locality; after the release the command goes on."""
    async with await Tpm.open(bench.proxy.tcti) as tpm:
        await bench.proxy.hold(cut=False)
        count = bench.proxy.commands
        waiting = asyncio.create_task(tpm.pcr_extend(15, {HashAlg.SHA256: ZERO}))
        assert not (await asyncio.wait([waiting], timeout=0.2))[0]
        assert bench.proxy.commands == count
        bench.proxy.release()
        async with asyncio.timeout(10):
            await waiting


async def control(path: str, request: bytes) -> bytes:
    """Answer on a control channel."""
    reader, writer = await asyncio.open_unix_connection(f"{path}.ctrl")
    writer.write(request)
    try:
        async with asyncio.timeout(10):
            return await reader.read(64)
    finally:
        writer.close()


async def test_control_channel_is_passed_on(bench: Bench) -> None:
    """The proxy answers as swtpm does on the control channel, before and after somebody changed the locality."""
    front, back = (tcti.removeprefix("swtpm:path=") for tcti in (bench.proxy.tcti, bench.swtpm.tcti))
    get_capability, set_locality_0, set_locality_3 = (
        bytes.fromhex(text) for text in ("00000001", "0000000500", "0000000503")
    )
    assert len(await control(back, get_capability)) > 4
    for request in (set_locality_0, get_capability, set_locality_3, set_locality_0, get_capability):
        assert await control(front, request) == await control(back, request)
    async with await Tpm.open(bench.proxy.tcti) as tpm:
        await control(front, set_locality_3)
        await tpm.pcr_extend(15, {HashAlg.SHA256: ZERO})  # the client's own locality 0 reaches swtpm again


async def test_socket_that_cannot_be_made_is_named(bench: Bench) -> None:
    """A folder that is not there, and a path that no socket can have, are SimulationErrors with the path."""
    for path in (Path("/nonexistent/tpm"), Path("/tmp") / ("x" * 100)):
        proxy = TpmProxy(path, bench.swtpm.socket, load_profile("swtpm"), seed=1)
        with pytest.raises(SimulationError, match=str(path)):
            await proxy.start()
        await proxy.stop()


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n", b"\x80\x01\x00\x00\x00\x09\x00\x00\x01\x44", b"\x80"])
async def test_garbage_ends_its_own_connection_only(bench: Bench, garbage: bytes) -> None:
    """Bytes that are no TPM command close that connection; the next client is served."""
    reader, writer = await asyncio.open_unix_connection(bench.proxy.tcti.removeprefix("swtpm:path="))
    writer.write(garbage)
    writer.write_eof()
    async with asyncio.timeout(10):
        assert await reader.read() == b""
    writer.close()
    async with await Tpm.open(bench.proxy.tcti) as tpm:
        await tpm.banks()


async def test_absent_tpm_cuts_clients_off(bench: Bench) -> None:
    """When swtpm is gone clients get a closed connection, and service again when it is back."""
    async with await Tpm.open(bench.proxy.tcti) as tpm:
        bench.swtpm.kill()
        await bench.swtpm.stop()
        with pytest.raises(DeviceUnavailable):
            await tpm.banks()
        await bench.swtpm.start()
        await tpm.startup()
        await tpm.quote(ECC, AUTH, b"q", PCRS_0_TO_7)


@pytest.mark.needs_tpm2_tools
async def test_tpm2_tools_work_through_the_proxy(bench: Bench) -> None:
    """A client that is not ours reads the same PCRs and quotes with our key."""
    environment = os.environ | {"TPM2TOOLS_TCTI": bench.proxy.tcti}
    for command in (
        ["tpm2_pcrread", "sha256:0,1"],
        ["tpm2_quote", "-Q", "-c", hex(ECC), "-p", AUTH.decode(), "-l", "sha256:0,1", "-q", "00ff"],
    ):
        tool = await asyncio.create_subprocess_exec(
            *command, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        async with asyncio.timeout(30):
            _, errors = await tool.communicate()
        assert tool.returncode == 0, errors.decode()
