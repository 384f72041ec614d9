"""The guest agent's side of the vTPM and of registration, against fakes: races, PCR 16, refusals and retries."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from harness.credential import keylime_auth_tag, make_credential
from harness.errors import (
    CapabilityMissing,
    CertificateRefused,
    ConfigError,
    HarnessError,
    KeyChanged,
    MalformedMessage,
    NotFound,
    PeerRefusedUs,
    PeerUnreachable,
    PoolFull,
)
from harness.keylime_wire import GuestEvidence
from harness.registration import registration_view
from harness.tenant.appraisal import verify_transport_key
from harness.tenant.guest_registration import Contact, Registration
from harness.tenant.vtpm import AK_HANDLE, EK_HANDLE, GuestTpm, cut_der
from harness.tpm import Tpm
from harness.values import HashAlg, PcrSelection
from tests.support.enrolment_parties import SoftVtpm, open_credential
from tests.support.tenant_wire import AGENT, SoftTpm

SHA256 = HashAlg.SHA256
NONCE = b"Abcdefghij0123456789"
PEM = b"-----BEGIN PUBLIC KEY-----"


class FakeTpm:
    """A vTPM: quotes with a soft TPM; ``races`` extend a PCR between the quote and the read, once each."""

    def __init__(self) -> None:
        self.soft = SoftTpm()
        self.soft.pcrs[16] = bytes(32)
        self.keys = SoftVtpm()
        self.publics: dict[int, Any] = {}
        self.certificate: bytes | None = b"\x30\x02\x05\x00" + bytes(50)
        self.races: list[int] = []
        self.keep = True
        self.restless = False

    async def flush_transients(self) -> int:
        return 0

    async def nv_read(self, index: int) -> bytes | None:
        assert index == 0x01C00002
        return self.certificate

    async def read_public(self, handle: int) -> Any:
        return self.publics.get(handle)

    async def create_primary(self, template: Any, auth: bytes) -> int:
        return 0x80000000 if not auth else 0x80000001

    async def persist(self, transient: int, handle: int) -> None:
        if self.keep:
            self.publics[handle] = self.keys.ek if transient == 0x80000000 else self.soft.ak

    async def quote(self, handle: int, auth: bytes, nonce: bytes, selection: PcrSelection) -> tuple[bytes, bytes]:
        assert handle == AK_HANDLE
        attest, signature, _ = self.soft.quote(nonce, selection.mask(SHA256))
        if self.restless:
            self.soft.pcrs[4] = hashlib.sha256(self.soft.pcrs[4]).digest()
        if self.races:
            self.soft.pcrs[self.races.pop()] = hashlib.sha256(b"race").digest()
        return attest, signature

    async def pcr_read(self, selection: PcrSelection) -> Mapping[HashAlg, Mapping[int, bytes]]:
        return {SHA256: {pcr: self.soft.pcrs[pcr] for _, pcr in selection}}

    async def pcr_reset(self, pcr: int) -> None:
        self.soft.pcrs[pcr] = bytes(32)

    async def pcr_extend(self, pcr: int, digests: Mapping[HashAlg, bytes]) -> None:
        self.soft.pcrs[pcr] = hashlib.sha256(self.soft.pcrs[pcr] + digests[SHA256]).digest()

    async def activate_credential(self, ak: int, auth: bytes, ek: int, credential: Any) -> bytes:
        assert (ak, ek) == (AK_HANDLE, EK_HANDLE)
        return open_credential(self.keys.ek_key, self.soft.ak.name, credential)


async def provision(tpm: FakeTpm, folder: Path) -> GuestTpm:
    return await GuestTpm.provision(cast(Tpm, tpm), folder)


async def test_keys_are_made_once(tmp_path: Path) -> None:
    """A second start finds EK, AK and authValue; the file is the agent's alone; the certificate is cut to its DER."""
    tpm = FakeTpm()
    first = await provision(tpm, tmp_path / "s")
    second = await provision(tpm, tmp_path / "s")
    assert (first.ek, first.ak) == (second.ek, second.ak) == (tpm.keys.ek, tpm.soft.ak)
    assert first.ek_certificate == b"\x30\x02\x05\x00"
    assert (tmp_path / "s" / "ak-auth").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("content", [b"", b"short", bytes(33)])
async def test_a_spoiled_auth_value_is_named(tmp_path: Path, content: bytes) -> None:
    """The file is named; nothing is made in its place."""
    (tmp_path / "ak-auth").write_bytes(content)
    with pytest.raises(ConfigError, match="ak-auth"):
        await provision(FakeTpm(), tmp_path)


async def test_an_auth_value_that_cannot_be_read_or_written_is_named(tmp_path: Path) -> None:
    """A folder in its place, a file in its folder's place."""
    (tmp_path / "ak-auth").mkdir()
    with pytest.raises(ConfigError, match="ak-auth"):
        await provision(FakeTpm(), tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="ak-auth"):
        await provision(FakeTpm(), tmp_path / "file")


async def test_a_vtpm_that_keeps_nothing_is_named(tmp_path: Path) -> None:
    """No certificate, or a persistent key that does not stay."""
    tpm = FakeTpm()
    tpm.keep = False
    with pytest.raises(CapabilityMissing, match="EK"):
        await provision(tpm, tmp_path)
    tpm.publics[EK_HANDLE] = tpm.keys.ek
    with pytest.raises(CapabilityMissing, match="AK"):
        await provision(tpm, tmp_path)
    tpm.certificate = None
    with pytest.raises(CapabilityMissing, match="certificate"):
        await provision(tpm, tmp_path)


@pytest.mark.parametrize("data", [b"", b"\x31\x02\x05\x00", b"\x30\x05\x05\x00", b"\x30\x85\x00\x00\x00\x00\x00\x00"])
def test_what_is_no_der_is_no_certificate(data: bytes) -> None:
    """Another tag, a length beyond the data, a length of five bytes."""
    with pytest.raises(CapabilityMissing):
        cut_der(data)


def test_a_long_certificate_is_cut() -> None:
    """The long form of the length."""
    assert cut_der(b"\x30\x82\x01\x00" + bytes(400)) == b"\x30\x82\x01\x00" + bytes(256)


async def quoted(tpm: FakeTpm, vtpm: GuestTpm) -> None:
    """A quote that the verifier's own check believes, transport key included."""
    quote = await vtpm.quote(NONCE, 0x11)
    evidence = GuestEvidence(attest=quote.attest, signature=quote.signature, pcrs=quote.pcrs)
    verify_transport_key(evidence, NONCE, tpm.soft.ak, PEM)


@pytest.mark.parametrize("races", [[], [4], [16], [4, 16]])
async def test_a_quote_vouches_for_the_transport_key_whatever_others_extend(tmp_path: Path, races: list[int]) -> None:
    """A PCR that changes between quote and read costs one more quote; PCR 16 is put right again."""
    tpm = FakeTpm()
    vtpm = await provision(tpm, tmp_path)
    await vtpm.vouch_for(PEM)
    tpm.races = races
    await quoted(tpm, vtpm)
    tpm.soft.pcrs[16] = bytes(32)
    await quoted(tpm, vtpm)


async def test_pcrs_that_never_stand_still_are_an_error(tmp_path: Path) -> None:
    """No values are handed out that do not hash to the signed digest."""
    tpm = FakeTpm()
    vtpm = await provision(tpm, tmp_path)
    tpm.restless = True
    with pytest.raises(CapabilityMissing, match="changed"):
        await vtpm.quote(NONCE, 0x11)


@pytest.mark.parametrize("size", [0, 32, 33, 34, 64])
async def test_the_length_of_a_nonce_tells_what_is_signed(tmp_path: Path, size: int) -> None:
    """Nonces of 32 bytes and more are batches; the guest's AK never signs one."""
    vtpm = await provision(FakeTpm(), tmp_path)
    with pytest.raises(MalformedMessage):
        await vtpm.quote(bytes(size), 1)


# --- registration -------------------------------------------------------------------------------------------------


class FakeRegistrar:
    """Makes challenges; raises what the script says first."""

    def __init__(self, tpm: FakeTpm, *script: HarnessError | object) -> None:
        self.tpm = tpm
        self.script = list(script)
        self.posts: list[Any] = []
        self.tags: list[str] = []
        self.known: list[object] = []

    async def get(self, path: str) -> object:
        assert path == f"/v2.1/agents/{AGENT}/registration"
        step = self.known.pop(0)
        if isinstance(step, HarnessError):
            raise step
        return step

    async def post(self, path: str, body: object) -> object:
        assert path == f"/v2.1/agents/{AGENT}"
        self.posts.append(body)
        if self.script:
            step = self.script.pop(0)
            if isinstance(step, HarnessError):
                raise step
            return step
        blob = make_credential(self.tpm.keys.ek, self.tpm.soft.ak.name, bytes(32)).keylime_blob()
        return {"blob": base64.b64encode(blob).decode()}

    async def put(self, path: str, body: object) -> object:
        self.tags.append(cast(Any, body)["auth_tag"])
        return {}


class Slept:
    """Records waits instead of waiting."""

    def __init__(self) -> None:
        self.waits: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.waits.append(seconds)


async def registration(tpm: FakeTpm, folder: Path, slept: Slept) -> Registration:
    contact = Contact(ip="127.0.0.1", port=9002, mtls_cert="pem")
    return Registration(AGENT, await provision(tpm, folder), lambda: contact, sleep=slept)


async def test_registration_answers_with_what_the_vtpm_opened(tmp_path: Path) -> None:
    """Keylime's body and answer; the status says active."""
    tpm, slept = FakeTpm(), Slept()
    made = await registration(tpm, tmp_path, slept)
    registrar = FakeRegistrar(tpm)
    await made.register("https://r", registrar)
    assert registrar.tags == [keylime_auth_tag(bytes(32), str(AGENT))]
    [body] = registrar.posts
    assert body.keys() == {"ek_tpm", "ekcert", "aik_tpm", "mtls_cert", "ip", "port"}
    assert (made.status.state, slept.waits) == ("active", [])


async def test_registration_is_tried_until_it_is_accepted(tmp_path: Path) -> None:
    """Not stated yet, not reachable, full, an answer that is none: tried again with growing waits."""
    tpm, slept = FakeTpm(), Slept()
    made = await registration(tpm, tmp_path, slept)
    faults = [
        NotFound("not stated"),
        PeerUnreachable("x"),
        {},
        {"blob": "?"},
        {"blob": "AAAA"},
        PoolFull("x", retry_after_s=9.0),
    ]
    await made.register("https://r", FakeRegistrar(tpm, *faults))
    assert made.status.state == "active"
    assert len(slept.waits) == 6
    assert all(wait <= 2.0 for wait in slept.waits[:5])
    assert slept.waits[5] >= 9.0


@pytest.mark.parametrize("error", [CertificateRefused("x"), KeyChanged("x")])
async def test_a_refused_vtpm_is_shown_and_tried_slowly(tmp_path: Path, error: HarnessError) -> None:
    """Only an operator can change it: the status names it, the next try is half a minute away."""
    tpm, slept = FakeTpm(), Slept()
    made = await registration(tpm, tmp_path, slept)
    states: list[Any] = []

    async def sleep(seconds: float) -> None:
        states.append((made.status.state, made.status.error, seconds))

    made._sleep = sleep
    await made.register("https://r", FakeRegistrar(tpm, error, error))
    assert states == [("refused", type(error).__name__, 30.0)] * 2
    assert made.status.state == "active"


# --- keeping registered -------------------------------------------------------------------------------------------


class Kept:
    """An agent that was registered, with what the registrar says at its next looks."""

    def __init__(self, tpm: FakeTpm, folder: Path) -> None:
        self.tpm, self.folder = tpm, folder
        self.registrar = FakeRegistrar(tpm)
        self.contact = Contact(ip="127.0.0.1", port=9002, mtls_cert="pem")
        self.waits: list[float] = []

    def view(self, **changes: object) -> dict[str, object]:
        """What a registrar that has registered this agent says, with members changed."""
        keys = {"ek": self.tpm.keys.ek.marshal(), "ak": self.tpm.soft.ak.marshal()}
        return registration_view(**keys, mtls_cert="pem", ip="127.0.0.1", port=9002) | changes

    async def registrations(self, *known: object) -> int:
        """How often it registers while the registrar says this, one answer at each look."""
        self.registrar.known = list(known)

        async def sleep(seconds: float) -> None:
            self.waits.append(seconds)
            if not self.registrar.known:
                raise asyncio.CancelledError

        made = Registration(AGENT, await provision(self.tpm, self.folder), lambda: self.contact, sleep=sleep)
        with pytest.raises(asyncio.CancelledError):
            await made.run("https://r", self.registrar)
        return len(self.registrar.tags)


@pytest.fixture
def kept(tmp_path: Path) -> Kept:
    return Kept(FakeTpm(), tmp_path)


async def test_a_registered_agent_looks_again_and_again_and_opens_no_challenge(kept: Kept) -> None:
    """Every half minute at most: an activation costs the vTPM more than a look costs anybody."""
    assert await kept.registrations(kept.view(), kept.view(), kept.view()) == 1
    assert len(kept.waits) == 4
    assert all(15 <= wait <= 30 for wait in kept.waits)


@pytest.mark.parametrize(
    "change",
    [
        {"registered": False},
        {"mtls_cert": "0" * 64},
        {"mtls_cert": None},
        {"aik_tpm": "0" * 64},
        {"ek_tpm": "0" * 64},
        {"ip": None},
        {"port": 9003},
    ],
)
async def test_an_agent_whose_record_is_another_registers_anew(kept: Kept, change: dict[str, object]) -> None:
    """Forgotten, from a backup, or from before its certificate was renewed."""
    assert await kept.registrations(kept.view(), kept.view(**change), kept.view()) == 2


async def test_an_agent_whose_certificate_was_renewed_registers_it(kept: Kept) -> None:
    """The record is compared with the certificate that is in use now."""
    kept.contact = replace(kept.contact, mtls_cert="new")
    assert await kept.registrations(kept.view(), kept.view(mtls_cert=hashlib.sha256(b"new").hexdigest())) == 2
    assert [body["mtls_cert"] for body in kept.registrar.posts] == ["new", "new"]


@pytest.mark.parametrize(
    "answer", [PeerUnreachable("gone"), PeerRefusedUs("no such path", status=404), {}, [], None, "registered"], ids=repr
)
async def test_not_knowing_is_no_reason_to_register(kept: Kept, answer: object) -> None:
    """A registrar that is away, or a stock one that does not know the question."""
    assert await kept.registrations(answer, answer, kept.view()) == 1


async def test_an_agent_that_is_forgotten_is_shown_as_pending_until_it_is_back(kept: Kept) -> None:
    """Also through refusals: a guest that was removed and is stated again later."""
    states: list[str] = []
    made: list[Registration] = []

    async def sleep(_: float) -> None:
        states.append(made[0].status.state)
        if len(states) == 4:
            raise asyncio.CancelledError

    made.append(Registration(AGENT, await provision(kept.tpm, kept.folder), lambda: kept.contact, sleep=sleep))
    kept.registrar.known = [{"registered": False}, kept.view()]
    kept.registrar.script = [{}, {}]
    await made[0].once(FakeRegistrar(kept.tpm))
    with pytest.raises(asyncio.CancelledError):
        await made[0].run("https://r", kept.registrar)
    assert states == ["active", "pending", "pending", "active"]
