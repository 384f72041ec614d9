"""The TPM client against a real swtpm: keys, quotes, credentials, NV, and what happens when the TPM goes away."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils

from harness.attest import (
    CertifyInfo,
    QuoteInfo,
    owner_qualified_name,
    parse_attest,
    parse_signature,
    verify_signature,
)
from harness.credential import check_ak, check_ca_key, check_ek, make_credential
from harness.errors import CapabilityMissing, DeviceFault, DeviceUnavailable, SimulatorCrashed, UnacceptableKey
from harness.sim.swtpm import manufacture
from harness.swtpm import SwtpmProcess
from harness.tpm import KeyTemplate, Tpm
from harness.values import HashAlg, PcrSelection
from tests.support.processes import left_by, processes_of
from tests.support.tpms import AUTH, PCRS_0_TO_7, blank_swtpm, short_folder

pytestmark = pytest.mark.needs_swtpm

EK, AK, CA = 0x81010001, 0x81010002, 0x81010003
AUTH_FAIL = {0x98E, 0x9A2}  # TPM_RC_AUTH_FAIL and TPM_RC_BAD_AUTH of session 1


@pytest.fixture
async def swtpm() -> AsyncIterator[SwtpmProcess]:
    """A started swtpm with empty state."""
    with short_folder() as folder:
        async with blank_swtpm(folder) as process:
            yield process


@pytest.fixture
async def tpm(swtpm: SwtpmProcess) -> AsyncIterator[Tpm]:
    """A client of it."""
    async with await Tpm.open(swtpm.tcti) as client:
        yield client


async def make(tpm: Tpm, template: KeyTemplate, handle: int, auth: bytes = AUTH) -> None:
    """Makes a persistent key."""
    await tpm.persist(await tpm.create_primary(template, auth), handle)


@pytest.mark.parametrize("template", [KeyTemplate.AK_RSA2048, KeyTemplate.AK_P256])
async def test_quote_verifies_with_our_own_parser(tpm: Tpm, template: KeyTemplate) -> None:
    """A quote by each kind of AK parses completely, carries our data and verifies under the key's public area."""
    await make(tpm, template, AK)
    public = await tpm.read_public(AK)
    assert public is not None
    check_ak(public)
    raw, signature = await tpm.quote(AK, AUTH, b"q" * 32, PCRS_0_TO_7)
    attest = parse_attest(raw)
    assert isinstance(attest.attested, QuoteInfo)
    assert attest.extra_data == b"q" * 32
    assert attest.qualified_signer == owner_qualified_name(public)
    verify_signature(public, parse_signature(signature), raw)
    values = (await tpm.pcr_read(PCRS_0_TO_7))[HashAlg.SHA256]
    assert attest.attested.pcr_digest == hashlib.sha256(b"".join(values[pcr] for pcr in range(8))).digest()


async def test_key_is_used_with_its_auth_value_only(tpm: Tpm) -> None:
    """A wrong authValue is refused, costs nothing (noDA) and does not spoil the next right one."""
    await make(tpm, KeyTemplate.AK_P256, AK)
    for wrong in (b"", b"wrong", AUTH + b"x"):
        for _ in range(5):
            with pytest.raises(DeviceFault) as caught:
                await tpm.quote(AK, wrong, b"", PCRS_0_TO_7)
            assert caught.value.response_code in AUTH_FAIL
    await tpm.quote(AK, AUTH, b"", PCRS_0_TO_7)


async def test_same_auth_value_makes_the_same_key_and_another_one_does_not(tpm: Tpm) -> None:
    """A primary is made again from the same authValue, and never from another: see `KeyTemplate.public`."""
    names = []
    for auth in (AUTH, AUTH, b"another authValue"):
        handle = await tpm.create_primary(KeyTemplate.AK_P256, auth)
        public = await tpm.read_public(handle)
        assert public is not None
        names.append(public.name)
        await tpm.flush(handle)
    assert names[0] == names[1] != names[2]


async def test_certify_binds_the_ca_key_to_the_ak(tpm: Tpm) -> None:
    """TPM2_Certify by the AK names the CA key and carries our data; the CA key is no AK and the AK no CA key."""
    await make(tpm, KeyTemplate.AK_RSA2048, AK)
    await make(tpm, KeyTemplate.CA_P256, CA, b"ca auth value 16")
    ak, ca = await tpm.read_public(AK), await tpm.read_public(CA)
    assert ak is not None
    assert ca is not None
    raw, signature = await tpm.certify(CA, b"ca auth value 16", AK, AUTH, b"c" * 32)
    attest = parse_attest(raw)
    assert isinstance(attest.attested, CertifyInfo)
    assert attest.attested.name == ca.name
    assert attest.extra_data == b"c" * 32
    verify_signature(ak, parse_signature(signature), raw)
    check_ca_key(ca)
    for check, public in ((check_ca_key, ak), (check_ak, ca)):
        with pytest.raises(UnacceptableKey):
            check(public)


async def test_digest_is_signed_by_the_ca_key_and_not_by_the_ak(tpm: Tpm) -> None:
    """The CA key signs a digest of ours; the restricted AK refuses (TPM_RC_TICKET): it forges no quotes."""
    await make(tpm, KeyTemplate.CA_P256, CA)
    await make(tpm, KeyTemplate.AK_P256, AK)
    public = await tpm.read_public(CA)
    assert public is not None
    key = public.key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    for number in range(8):
        r, s = await tpm.sign_digest(CA, AUTH, hashlib.sha256(bytes([number])).digest())
        key.verify(utils.encode_dss_signature(r, s), bytes([number]), ec.ECDSA(hashes.SHA256()))
    with pytest.raises(DeviceFault) as caught:
        await tpm.sign_digest(AK, AUTH, bytes(32))
    assert caught.value.response_code & 0xBF == 0xA0


async def test_credential_is_activated_for_the_named_key_only(tpm: Tpm) -> None:
    """A credential made in Python opens in the TPM that has EK and AK, and not for another key there; nothing leaks."""
    await make(tpm, KeyTemplate.EK_RSA2048, EK, b"")
    await make(tpm, KeyTemplate.AK_P256, AK)
    await make(tpm, KeyTemplate.CA_P256, CA)
    ek, ak = await tpm.read_public(EK), await tpm.read_public(AK)
    assert ek is not None
    assert ak is not None
    check_ek(ek)
    secret = secrets.token_bytes(32)
    credential = make_credential(ek, ak.name, secret)
    for _ in range(5):  # more often than there are session slots
        assert await tpm.activate_credential(AK, AUTH, EK, credential) == secret
        with pytest.raises(DeviceFault):
            await tpm.activate_credential(CA, AUTH, EK, credential)
    assert await tpm.flush_transients() == 0


async def test_pcrs_are_read_in_all_banks_and_amounts(tpm: Tpm) -> None:
    """More values than fit in one answer come back complete; an extend changes one PCR in each named bank."""
    selection = PcrSelection.from_lists(dict.fromkeys(HashAlg, range(24)))
    before = await tpm.pcr_read(selection)
    assert {bank: set(values) for bank, values in before.items()} == {bank: set(range(24)) for bank in HashAlg}
    digests = {bank: bytes(bank.digest_size) for bank in HashAlg}
    await tpm.pcr_extend(7, digests)
    after = await tpm.pcr_read(selection)
    for bank in HashAlg:
        assert after[bank] == before[bank] | {7: bank.digest(before[bank][7] + digests[bank])}
    await tpm.pcr_extend(16, {HashAlg.SHA256: bytes(32)})
    await tpm.pcr_reset(16)
    assert await tpm.pcr_read(selection) == after


async def test_missing_bank_is_named() -> None:
    """Reading a bank that is not allocated is CapabilityMissing, not an endless loop and not an empty answer."""
    with short_folder() as folder:
        await manufacture(folder / "state", banks=[HashAlg.SHA384])
        async with blank_swtpm(folder) as process, await Tpm.open(process.tcti) as tpm:
            assert await tpm.banks() == {HashAlg.SHA384}
            with pytest.raises(CapabilityMissing, match="sha256"):
                await tpm.pcr_read(PCRS_0_TO_7)


async def test_nv_index_is_written_read_and_replaced(tpm: Tpm) -> None:
    """Data longer than one transfer comes back whole; a second write replaces it; an unknown index is None."""
    index = 0x01C00002
    assert await tpm.nv_read(index) is None
    for size in (1200, 512, 700):
        data = secrets.token_bytes(size)
        await tpm.nv_write(index, data)
        assert await tpm.nv_read(index) == data


async def test_absent_key_is_none_and_evicted_key_is_gone(tpm: Tpm) -> None:
    """A handle without a key reads as None, before the key was made persistent and after it was evicted."""
    assert await tpm.read_public(AK) is None
    await make(tpm, KeyTemplate.AK_P256, AK)
    assert await tpm.read_public(AK) is not None
    await tpm.evict(AK)
    assert await tpm.read_public(AK) is None
    await make(tpm, KeyTemplate.CA_P256, AK)
    check_ca_key(await tpm.read_public(AK) or pytest.fail("no key"))


async def test_clear_destroys_the_owners_keys(tpm: Tpm) -> None:
    """After TPM2_Clear the AK is gone and the same template makes another key: a clear cannot hide a reboot."""
    await make(tpm, KeyTemplate.AK_P256, AK)
    before = await tpm.read_public(AK)
    await tpm.clear()
    assert await tpm.read_public(AK) is None
    await make(tpm, KeyTemplate.AK_P256, AK)
    after = await tpm.read_public(AK)
    assert before is not None
    assert after is not None
    assert before.name != after.name


async def test_leftover_transients_are_flushed(swtpm: SwtpmProcess, tpm: Tpm) -> None:
    """Keys that a client left loaded fill the TPM's three slots; the next client flushes them and can work."""
    async with await Tpm.open(swtpm.tcti) as other:
        for _ in range(3):
            await other.create_primary(KeyTemplate.AK_P256, AUTH)
        with pytest.raises(DeviceFault):
            await other.create_primary(KeyTemplate.AK_P256, AUTH)
    assert await tpm.flush_transients() == 3
    await make(tpm, KeyTemplate.AK_P256, AK)


async def test_commands_of_many_tasks_do_not_mix(tpm: Tpm) -> None:
    """Thirty tasks at once each get the answer to their own command."""
    await make(tpm, KeyTemplate.AK_P256, AK)
    quotes = await asyncio.gather(*(tpm.quote(AK, AUTH, bytes([n]) * 20, PCRS_0_TO_7) for n in range(30)))
    assert [parse_attest(raw).extra_data for raw, _ in quotes] == [bytes([n]) * 20 for n in range(30)]


async def test_client_survives_a_power_cut_of_the_tpm(swtpm: SwtpmProcess, tpm: Tpm) -> None:
    """While the TPM is off calls are DeviceUnavailable; when it is back the same client and key work, eight times."""
    await make(tpm, KeyTemplate.AK_P256, AK)
    for _ in range(8):
        await tpm.quote(AK, AUTH, b"", PCRS_0_TO_7)
        swtpm.kill()
        await swtpm.stop()
        with pytest.raises(DeviceUnavailable):
            await tpm.quote(AK, AUTH, b"", PCRS_0_TO_7)
        await swtpm.start()
        await tpm.startup()


async def test_closed_client_refuses_and_absent_tpm_is_unavailable(swtpm: SwtpmProcess) -> None:
    """A closed client, a TPM that is not there and a TCTI that does not exist are DeviceUnavailable."""
    client = await Tpm.open(swtpm.tcti)
    await client.close()
    await client.close()
    with pytest.raises(DeviceUnavailable, match="closed"):
        await client.banks()
    for tcti in ("swtpm:path=/nonexistent", "no-such-tcti:x"):
        with pytest.raises(DeviceUnavailable):
            await Tpm.open(tcti)


HUNG = """
import asyncio, sys
from harness.errors import DeviceUnavailable
from harness.tpm import Tpm
async def main():
    for _ in range(2):
        try:
            await Tpm.open(sys.argv[1], timeout_s=0.2)
        except DeviceUnavailable as error:
            print(error.detail)
asyncio.run(main())
"""


def test_hung_tpm_does_not_keep_the_interpreter() -> None:
    """A TPM that never answers fails each try in time, and the process ends in order and quietly while calls hang."""
    with short_folder() as folder, contextlib.ExitStack() as stack:
        for name in ("tpm", "tpm.ctrl"):  # connections wait in the backlog: nobody will ever accept
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(str(folder / name))
            listener.listen()
        command = [sys.executable, "-c", HUNG, f"swtpm:path={folder}/tpm"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.count("did not answer within 0.2 s") == 2
    assert done.stderr == ""


async def test_broken_swtpm_is_reported_with_its_log() -> None:
    """A state that swtpm cannot use, and a path that is too long, are SimulatorCrashed with the place to look."""
    with short_folder() as folder:
        (folder / "state").mkdir()
        (folder / "state" / "tpm2-00.permall").write_bytes(b"not a TPM")
        process = SwtpmProcess(folder / "state", folder / "back", folder / "swtpm.log")
        with pytest.raises(SimulatorCrashed, match=r"swtpm\.log"):
            await process.start()
        await process.stop()
        with pytest.raises(SimulatorCrashed, match="107 bytes"):
            await SwtpmProcess(folder / "state", folder / ("x" * 100), folder / "swtpm.log").start()


ORPHAN = """
import asyncio, os, sys
from pathlib import Path
from harness.swtpm import SwtpmProcess
async def main():
    folder = Path(sys.argv[1])
    process = SwtpmProcess(folder / "state", folder / "back", folder / "swtpm.log")
    await process.start()
    print(process.pid, flush=True)
    os.kill(os.getpid(), 9)
asyncio.run(main())
"""


async def test_swtpm_ends_with_its_killed_parent() -> None:
    """When the parent is killed with SIGKILL its swtpm goes too (needs setpriv)."""
    with short_folder() as folder:
        command = [sys.executable, "-c", ORPHAN, str(folder)]
        parent = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
        async with asyncio.timeout(30):
            output, _ = await parent.communicate()
        assert int(output) > 0
        async with asyncio.timeout(10):
            while True:  # the socket refuses as soon as the process is gone
                try:
                    _, writer = await asyncio.open_unix_connection(folder / "back")
                except (ConnectionRefusedError, FileNotFoundError):
                    break
                writer.close()
                await asyncio.sleep(0.01)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 10])
async def test_a_manufacture_that_is_given_up_leaves_neither_processes_nor_files(steps: int) -> None:
    """Wherever it is cancelled, even while asyncio is still starting swtpm_setup, everything that this started ends."""
    with short_folder() as folder:
        task = asyncio.ensure_future(manufacture(folder / "state"))
        for _ in range(steps):
            await asyncio.sleep(0)
        until = time.monotonic() + 0.5  # without the loop: only swtpm_setup goes on
        while not any("swtpm socket" in line for line in processes_of(folder).values()) and time.monotonic() < until:
            time.sleep(0.005)  # noqa: ASYNC251 - the loop must stand still
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (left_by(folder), list(folder.iterdir())) == ({}, [])
