"""The host's keys in a real swtpm: made once, found again, and used for nothing but what they are for."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_der_public_key
from cryptography.x509.oid import NameOID

from harness import protocol
from harness.attest import CertifyInfo, QuoteInfo, parse_attest, parse_signature, verify_signature
from harness.credential import Credential, check_ak, check_ca_key, check_ek, make_credential
from harness.errors import CapabilityMissing, ChallengeFailed, ConfigError, MalformedMessage, TpmError
from harness.provider import auths
from harness.provider.batch import RFC9162, Quote, SealedBatch, Waiter, seal
from harness.provider.endorsement import EK_HANDLE, ek_certificates
from harness.provider.keys import AK_HANDLES, CA_HANDLE, HostKeys
from harness.sim.hardware import HardwareTpm
from harness.tpm import KeyTemplate, Tpm
from harness.values import HashAlg, PcrSelection
from tests.support.pendings import a_request
from tests.support.tpms import DeviceSettings, blank_swtpm, short_folder

pytestmark = pytest.mark.needs_swtpm

KINDS = ("rsa2048", "ecc256")
PCR_0 = PcrSelection.of(HashAlg.SHA256, 1)
REQUESTER = b"r" * 32


class Meddler:
    """A TPM client in front of a real one: counts PCR reads, and extends PCR 0 before the next ``races`` of them.

    In a ``storm`` it extends PCR 0 before every quote and every read.
    """

    def __init__(self, tpm: Tpm, *, races: int = 0, storm: bool = False) -> None:
        self._tpm = tpm
        self.races = races
        self.storm = storm
        self.reads = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tpm, name)

    async def extend(self) -> None:
        await self._tpm.pcr_extend(0, {HashAlg.SHA256: b"x" * 32})

    async def quote(self, handle: int, auth: bytes, qualifying: bytes, selection: PcrSelection) -> tuple[bytes, bytes]:
        if self.storm:
            await self.extend()
        return await self._tpm.quote(handle, auth, qualifying, selection)

    async def pcr_read(self, selection: PcrSelection) -> dict[HashAlg, dict[int, bytes]]:
        self.reads += 1
        if self.races or self.storm:
            self.races -= 1
            await self.extend()
        return await self._tpm.pcr_read(selection)


@asynccontextmanager
async def blank(folder: Path) -> AsyncIterator[Tpm]:
    """A client of a TPM without vendor, keys or certificates."""
    async with blank_swtpm(folder) as process, await Tpm.open(process.tcti) as tpm:
        yield tpm


@asynccontextmanager
async def keys_in_blank(
    *, ak: str = "ecc256", races: int = 0, storm: bool = False
) -> AsyncIterator[tuple[HostKeys, Meddler]]:
    """Keys in a blank TPM, with a meddler in between."""
    with short_folder() as folder:
        async with blank(folder) as tpm:
            meddler = Meddler(tpm, races=races, storm=storm)
            yield await HostKeys.provision(cast(Tpm, meddler), folder / "agent", ak=ak), meddler


def a_batch(*pcrs: int) -> SealedBatch:
    member = Waiter(pending=a_request(pcrs=pcrs or [0, 7]), arrived_s=0.0)
    return seal({member: None}, builder=RFC9162, rng=random.SystemRandom(), sealed_at=datetime.now(UTC))


def assert_values_hash_to_digest(quote: Quote) -> None:
    attested = parse_attest(quote.attest).attested
    assert isinstance(attested, QuoteInfo)
    values = b"".join(
        quote.pcrs[bank][pcr] for bank in sorted(quote.pcrs, key=lambda b: b.value) for pcr in sorted(quote.pcrs[bank])
    )
    assert hashlib.sha256(values).digest() == attested.pcr_digest


# --- provisioning -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ak", KINDS)
async def test_provisioning_twice_finds_the_same_keys(ak: str) -> None:
    """A restarted host agent has the keys that tenants pinned; all of them are acceptable in their roles."""
    with short_folder() as folder:
        async with blank_swtpm(folder) as process:
            identities = []
            for _ in range(2):
                async with await Tpm.open(process.tcti) as tpm:
                    identities.append((await HostKeys.provision(tpm, folder / "agent", ak=ak)).identity)
            first, second = identities
            assert first == second
            check_ak(first.ak)
            check_ek(first.ek)
            check_ca_key(first.ca)
            assert first.host_id == protocol.host_id_of(first.ek.name)
            assert HashAlg.SHA256 in first.banks


async def test_a_device_with_a_vendor_keeps_its_keys_over_a_power_cycle() -> None:
    """The EK is the one that the vendor certified, and the chain comes out of NV as plain DER, leaf first."""
    with short_folder() as folder:
        async with HardwareTpm(DeviceSettings(folder=folder)) as device:
            async with await Tpm.open(device.tcti) as tpm:
                before = (await HostKeys.provision(tpm, folder / "agent", ak="rsa2048")).identity
            await device.power_cycle(orderly=False)
            async with await Tpm.open(device.tcti) as tpm:
                assert (await HostKeys.provision(tpm, folder / "agent", ak="rsa2048")).identity == before
    leaf, *above = [x509.load_der_x509_certificate(der) for der in before.ek_certificates]
    assert leaf.public_key() == load_der_public_key(before.ek.spki())
    assert above
    leaf.verify_directly_issued_by(above[0])


async def test_without_a_vendor_there_is_no_certificate_and_the_ek_is_made() -> None:
    """Nothing is made up: tenants will refuse a host without a chain."""
    with short_folder() as folder:
        async with blank(folder) as tpm:
            assert await ek_certificates(tpm) == ()
            keys = await HostKeys.provision(tpm, folder / "agent", ak="ecc256")
            assert (await tpm.read_public(EK_HANDLE)) == keys.identity.ek


async def test_a_foreign_key_at_the_eks_place_is_left_alone() -> None:
    """The EK then lives at another handle, and is found there again."""
    with short_folder() as folder:
        async with blank(folder) as tpm:
            await tpm.persist(await tpm.create_primary(KeyTemplate.AK_P256, b"somebody"), EK_HANDLE)
            foreign = await tpm.read_public(EK_HANDLE)
            keys = await HostKeys.provision(tpm, folder / "agent", ak="ecc256")
            check_ek(keys.identity.ek)
            assert await tpm.read_public(EK_HANDLE) == foreign
            assert (await HostKeys.provision(tpm, folder / "agent", ak="ecc256")).identity == keys.identity


async def test_lost_auth_values_are_an_error_that_says_what_to_do() -> None:
    """Keys are never replaced without a word: every tenant would see a changed host."""
    with short_folder() as folder:
        async with blank(folder) as tpm:
            await HostKeys.provision(tpm, folder / "agent", ak="ecc256")
            file = folder / "agent" / auths.FILE_NAME
            file.unlink()
            with pytest.raises(CapabilityMissing, match=r"auth\.json .* gone: restore .*tpm2_evictcontrol"):
                await HostKeys.provision(tpm, folder / "agent", ak="ecc256")
            assert not file.exists()
            assert await tpm.read_public(CA_HANDLE) is not None


async def test_auth_values_of_other_keys_show_at_the_start() -> None:
    """Not with the first tenant's quote."""
    with short_folder() as folder:
        async with blank(folder) as tpm:
            await HostKeys.provision(tpm, folder / "agent", ak="ecc256")
            auths.make(folder / "other")
            with pytest.raises(CapabilityMissing, match="do not open"):
                await HostKeys.provision(tpm, folder / "other", ak="ecc256")


async def test_a_foreign_key_at_the_aks_place_is_not_used() -> None:
    """A key that anybody could have put there never signs for this host."""
    with short_folder() as folder:
        async with blank(folder) as tpm:
            auths.make(folder / "agent")
            await tpm.persist(await tpm.create_primary(KeyTemplate.CA_P256, b""), AK_HANDLES["ecc256"])
            with pytest.raises(CapabilityMissing, match="not ours"):
                await HostKeys.provision(tpm, folder / "agent", ak="ecc256")


async def test_a_damaged_auth_file_is_not_replaced() -> None:
    """The error is about the file; no key is touched."""
    with short_folder() as folder:
        async with blank(folder) as tpm:
            (folder / "agent").mkdir()
            (folder / "agent" / auths.FILE_NAME).write_text("{")
            with pytest.raises(ConfigError):
                await HostKeys.provision(tpm, folder / "agent", ak="ecc256")
            assert await tpm.read_public(CA_HANDLE) is None


async def test_a_cleared_tpm_gets_new_keys() -> None:
    """TPM2_Clear destroys AK and CA key; what comes after is another key, which tenants see as KeyChanged."""
    with short_folder() as folder:
        async with blank(folder) as tpm:
            before = (await HostKeys.provision(tpm, folder / "agent", ak="ecc256")).identity
            await tpm.clear()
            after = (await HostKeys.provision(tpm, folder / "agent", ak="ecc256")).identity
            assert before.ak.name != after.ak.name
            assert before.ca.name != after.ca.name


# --- quotes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ak", KINDS)
async def test_a_batch_is_quoted_over_its_own_qualifying_data(ak: str) -> None:
    """ExtraData, selection, values and signature belong to this batch and this AK."""
    async with keys_in_blank(ak=ak) as (keys, _):
        batch = a_batch(0, 3, 7)
        quote = await keys.quote_batch(batch)
        attest = parse_attest(quote.attest)
        assert attest.extra_data == protocol.qualifying_data(batch.tree.size, batch.tree.root)
        verify_signature(keys.identity.ak, parse_signature(quote.signature), quote.attest)
        assert {bank: set(values) for bank, values in quote.pcrs.items()} == {HashAlg.SHA256: {0, 3, 7}}
        assert quote.tpm_quotes == 1
        assert_values_hash_to_digest(quote)


@pytest.mark.parametrize("size", [1, 20, 31])
async def test_a_raw_nonce_is_signed_as_it_is(size: int) -> None:
    """Shorter than any batch's."""
    async with keys_in_blank() as (keys, _):
        quote = await keys.quote_raw(b"n" * size, PCR_0)
        assert parse_attest(quote.attest).extra_data == b"n" * size


@pytest.mark.parametrize("size", [0, 32, 33, 34, 64])
async def test_a_raw_nonce_that_could_be_a_batch_never_reaches_the_tpm(size: int) -> None:
    """The one place that quotes refuses it."""
    async with keys_in_blank() as (keys, _):
        with pytest.raises(MalformedMessage):
            await keys.quote_raw(b"n" * size, PCR_0)


async def test_values_are_read_once_while_they_match() -> None:
    """Later quotes cost no TPM2_PCR_Read; an extend in between is noticed and read."""
    async with keys_in_blank() as (keys, meddler):
        for _ in range(5):
            await keys.quote_batch(a_batch(0, 7))
        assert meddler.reads == 1
        await meddler.pcr_extend(7, {HashAlg.SHA256: b"y" * 32})
        quote = await keys.quote_batch(a_batch(0, 7))
        assert meddler.reads == 2
        assert_values_hash_to_digest(quote)
        assert quote.pcrs[HashAlg.SHA256][7] == hashlib.sha256(bytes(32) + b"y" * 32).digest()


async def test_one_race_with_an_extend_costs_a_second_quote() -> None:
    """The values that are handed out are those that were signed."""
    async with keys_in_blank(races=1) as (keys, meddler):
        quote = await keys.quote_batch(a_batch(0))
        assert (quote.tpm_quotes, meddler.races) == (2, 0)
        assert_values_hash_to_digest(quote)


async def test_an_extend_during_each_of_two_quotes_fails_cleanly() -> None:
    """No evidence with values that do not match leaves; the next quote is fine."""
    async with keys_in_blank(storm=True) as (keys, meddler):
        with pytest.raises(TpmError, match="extended during each"):
            await keys.quote_batch(a_batch(0))
        assert meddler.reads == 2
        meddler.storm = False
        assert_values_hash_to_digest(await keys.quote_batch(a_batch(0)))


async def test_no_two_signatures_carry_the_same_millisecond() -> None:
    """Honest evidence always passes check 10, however fast the TPM is, whoever asks at once."""
    async with keys_in_blank() as (keys, _):
        async with asyncio.timeout(60):
            quotes = await asyncio.gather(*(keys.quote_batch(a_batch(0)) for _ in range(200)))
            certified, _signature = await keys.certify_ca(b"n" * 32)
        clocks = [parse_attest(quote.attest).clock_info.clock for quote in quotes]
        assert len(set(clocks)) == len(clocks)
        assert parse_attest(certified).clock_info.clock > max(clocks)


# --- enrolment --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ak", KINDS)
async def test_the_right_credential_is_answered(ak: str) -> None:
    """The answer is the one that the tenant computes from its secret."""
    async with keys_in_blank(ak=ak) as (keys, _):
        identity = keys.identity
        credential = make_credential(identity.ek, identity.ak.name, b"s" * 32)
        assert await keys.activate(credential, REQUESTER) == protocol.enrol_answer(
            b"s" * 32, requester=REQUESTER, host_id=identity.host_id, ak_name=identity.ak.name
        )


async def test_a_credential_for_another_key_or_damaged_gets_one_answer() -> None:
    """Whatever is wrong with it, the refusal is the same."""
    async with keys_in_blank() as (keys, _):
        identity = keys.identity
        good = make_credential(identity.ek, identity.ak.name, b"s" * 32)
        flipped = good.id_object[:-1] + bytes([good.id_object[-1] ^ 1])
        bad = [
            make_credential(identity.ek, identity.ca.name, b"s" * 32),
            Credential(id_object=flipped, encrypted_secret=good.encrypted_secret),
        ]
        details = set()
        for credential in bad:
            with pytest.raises(ChallengeFailed) as caught:
                await keys.activate(credential, REQUESTER)
            details.add(caught.value.detail)
        assert len(details) == 1
        await keys.activate(good, REQUESTER)


async def test_the_ca_key_is_certified_by_the_ak() -> None:
    """Name, labelled qualifying data and signature; the tenant's nonce never goes in raw."""
    async with keys_in_blank() as (keys, _):
        raw, signature = await keys.certify_ca(b"n" * 32)
        attest = parse_attest(raw)
        verify_signature(keys.identity.ak, parse_signature(signature), raw)
        assert isinstance(attest.attested, CertifyInfo)
        assert attest.attested.name == keys.identity.ca.name
        assert attest.extra_data == protocol.certify_qualifying(b"n" * 32, keys.identity.ca.name)


async def test_a_certificate_signed_in_the_tpm_verifies_with_the_ca_key() -> None:
    """The builder's content, under the signature of the key that the AK certified."""
    async with keys_in_blank() as (keys, _):
        ca_key = keys.identity.ca.key()
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "vTPM CA")])
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(ca_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(datetime.now(UTC))
            .not_valid_after(datetime.now(UTC) + timedelta(days=1))
        )
        for _ in range(5):
            certificate = x509.load_der_x509_certificate(await keys.sign_certificate(builder))
            certificate.verify_directly_issued_by(certificate)
