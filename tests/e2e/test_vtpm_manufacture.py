"""vTPMs made by the real swtpm_setup, certified through the tool, the local socket and the CA key of the host.

Size: one way into life, and everything that may go wrong on it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import socket
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from harness.attest import Public
from harness.certificates import PLATFORM_OID, verify_vtpm_certificate
from harness.errors import (
    CertificateRefused,
    DeviceUnavailable,
    GuestNotHere,
    LocalRefusal,
    MalformedMessage,
    NotReady,
    SimulationError,
)
from harness.provider import scratch
from harness.provider.keys import HostKeys
from harness.provider.vtpm_ca import spki_digest
from harness.sim.swtpm import manufacture
from harness.swtpm import STATE_FILE, SwtpmProcess
from harness.tpm import Tpm
from harness.tpm_templates import KeyTemplate
from harness.values import AgentId
from tests.support.pendings import agent
from tests.support.tpms import blank_swtpm, short_folder
from tests.support.vtpm_host import NV_PLATFORM, NV_RSA_EK, SoftCa, VtpmHost, domain, exchange, nv_of, until, vtpm_host

pytestmark = pytest.mark.needs_swtpm
GUEST, OTHER = agent(1), agent(2)


@pytest.fixture
def folder() -> Iterator[Path]:
    with short_folder() as path:
        yield path


@pytest.fixture
def ca() -> SoftCa:
    return SoftCa()


@pytest.fixture
async def host(folder: Path, ca: SoftCa) -> AsyncIterator[VtpmHost]:
    async with vtpm_host(folder, ca.public, ca.sign) as running:
        yield running


async def ek_in(state_dir: Path, folder: Path) -> Public:
    """The EK of a vTPM, created again from its seed."""
    swtpm = SwtpmProcess(state_dir, folder / "ek", folder / "ek.log")
    await swtpm.start()
    try:
        async with await Tpm.open(swtpm.tcti) as tpm:
            await tpm.startup()
            public = await tpm.read_public(await tpm.create_primary(KeyTemplate.EK_RSA2048, b""))
            await tpm.shutdown()
    finally:
        await swtpm.stop()
    assert public is not None
    return public


async def made(host: VtpmHost, agent_id: AgentId = GUEST, name: str = "vtpm") -> Path:
    """State of a vTPM that the host's CA certified."""
    await host.report(domain(GUEST), domain(OTHER))
    state = host.folder / name
    await manufacture(state, create_certs=host.certs(agent_id))
    return state


async def test_a_manufactured_vtpm_is_certified_by_the_key_in_the_hosts_tpm(folder: Path) -> None:
    """The EK certificate in NV verifies with the CA key of the hardware TPM, for this guest and this EK only."""
    (folder / "host").mkdir()
    async with (
        blank_swtpm(folder / "host") as process,
        await Tpm.open(process.tcti) as tpm,
    ):
        keys = await HostKeys.provision(tpm, folder / "agent", ak="ecc256")
        async with vtpm_host(folder, keys.identity.ca, keys.sign_certificate) as host:
            state = await made(host)
            certificate, platform = await nv_of(state, folder, NV_RSA_EK, NV_PLATFORM)
            ek = await ek_in(state, folder)
            assert certificate is not None
            assert platform is not None
            now = datetime.now(UTC)
            verify_vtpm_certificate(certificate, ca=host.ca, agent_id=GUEST, ek=ek, now=now)
            with pytest.raises(CertificateRefused, match="agent_id"):
                verify_vtpm_certificate(certificate, ca=host.ca, agent_id=OTHER, ek=ek, now=now)
            with pytest.raises(CertificateRefused, match="another key"):
                verify_vtpm_certificate(certificate, ca=host.ca, agent_id=GUEST, ek=keys.identity.ek, now=now)
            with pytest.raises(CertificateRefused, match="vTPM CA key"):
                verify_vtpm_certificate(certificate, ca=SoftCa().public, agent_id=GUEST, ek=ek, now=now)
            with pytest.raises(CertificateRefused, match="not one for an EK"):
                verify_vtpm_certificate(platform, ca=host.ca, agent_id=GUEST, ek=ek, now=now)


async def test_three_certificates_are_signed_for_one_vtpm(host: VtpmHost, ca: SoftCa) -> None:
    """RSA EK, platform and ECC EK; the tool ran for each, and the journal holds the RSA one."""
    state = await made(host)
    assert ca.signed == 3
    assert await host.journal.rsa_eks() == {GUEST: await scratch.read_ek(state)}


async def test_the_platform_certificate_names_no_guest(host: VtpmHost) -> None:
    """It has its own extended key usage and no UUID, so it cannot stand for an EK certificate."""
    [data] = await nv_of(await made(host), host.folder, NV_PLATFORM)
    assert data is not None
    certificate = x509.load_der_x509_certificate(data)
    assert list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [PLATFORM_OID]
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == []


async def test_the_scratch_swtpm_reads_the_certified_ek_and_changes_nothing(host: VtpmHost) -> None:
    """Read from a copy: the same key as in the certificate, and not a byte of the state differs afterwards."""
    state = await made(host)
    before = {path.name: hashlib.sha256(path.read_bytes()).digest() for path in state.iterdir()}
    digest = await scratch.read_ek(state)
    assert before == {path.name: hashlib.sha256(path.read_bytes()).digest() for path in state.iterdir()}
    [data] = await nv_of(state, host.folder, NV_RSA_EK)
    assert data is not None
    key = x509.load_der_x509_certificate(data).public_key()
    assert not isinstance(key, ec.EllipticCurvePublicKey)
    assert digest == spki_digest(key)  # type: ignore[arg-type]


async def test_a_guest_that_runs_with_its_certified_vtpm_is_resident(host: VtpmHost) -> None:
    """Only while it runs; the digest in the leaf is that of the certified EK."""
    state = await made(host)
    answer = await host.ask(op="starting", agent_id=str(GUEST), state_dir=str(state))
    assert answer == {"resident": True}
    assert isinstance((await host.residency.check({GUEST}))[GUEST], GuestNotHere)
    await host.report(domain(GUEST, "running"))
    assert await host.residency.check({GUEST}) == {GUEST: await scratch.read_ek(state)}


async def test_a_decoy_under_a_certified_guests_uuid_is_not_resident(host: VtpmHost) -> None:
    """Another vTPM's state, made without our CA: the guest may run and gets no leaf; the real one brings it back."""
    state = await made(host)
    decoy = host.folder / "decoy"
    await manufacture(decoy)
    answer = await host.ask(op="starting", agent_id=str(GUEST), state_dir=str(decoy))
    assert answer == {"resident": False}
    await host.report(domain(GUEST, "running"))
    found = (await host.residency.check({GUEST}))[GUEST]
    assert isinstance(found, GuestNotHere)
    assert "certified" in found.detail
    await host.report(domain(GUEST))
    assert await host.ask(op="starting", agent_id=str(GUEST), state_dir=str(state)) == {"resident": True}
    await host.report(domain(GUEST, "running"))
    assert isinstance((await host.residency.check({GUEST}))[GUEST], bytes)


async def test_a_running_decoy_is_not_mended_by_showing_the_genuine_state(host: VtpmHost) -> None:
    """Whoever may use the local socket: the EK of a guest that runs is not read again."""
    state = await made(host)
    decoy = host.folder / "decoy"
    await manufacture(decoy)
    await host.ask(op="starting", agent_id=str(GUEST), state_dir=str(decoy))
    await host.report(domain(GUEST, "running"))
    with pytest.raises(LocalRefusal, match="runs already") as refused:
        await host.ask(op="starting", agent_id=str(GUEST), state_dir=str(state))
    assert refused.value.error == "GuestNotHere"
    assert isinstance((await host.residency.check({GUEST}))[GUEST], GuestNotHere)


def lock(tcti: str) -> None:
    """What a guest may do to its own TPM."""
    from tpm2_pytss import ESAPI, ESYS_TR, TPM2_SU  # type: ignore[import-untyped]

    with ESAPI(tcti) as tpm:
        tpm.startup(TPM2_SU.CLEAR)
        tpm.clear_control(ESYS_TR.LOCKOUT, True)
        tpm.hierarchy_change_auth(ESYS_TR.ENDORSEMENT, b"own")
        tpm.hierarchy_change_auth(ESYS_TR.LOCKOUT, b"own")
        tpm.shutdown(TPM2_SU.CLEAR)


async def test_a_guest_that_locked_its_tpm_starts_again(host: VtpmHost) -> None:
    """Passwords of its own on the endorsement and lockout hierarchies, and TPM2_Clear forbidden: its EK is read."""
    state = await made(host)
    before = await scratch.read_ek(state)
    swtpm = SwtpmProcess(state, host.folder / "own", host.folder / "own.log")
    await swtpm.start()
    try:
        await asyncio.to_thread(lock, swtpm.tcti)
    finally:
        await swtpm.stop()
    assert await scratch.read_ek(state) == before
    assert await host.ask(op="starting", agent_id=str(GUEST), state_dir=str(state)) == {"resident": True}


async def test_another_guests_vtpm_does_not_start(host: VtpmHost) -> None:
    """Certified by this very host, but for another guest: one of the two is a copy."""
    await made(host)
    others = await made(host, OTHER, "other")
    with pytest.raises(LocalRefusal, match=str(OTHER)) as caught:
        await host.ask(op="starting", agent_id=str(GUEST), state_dir=str(others))
    assert caught.value.error == "CloneSuspected"
    assert await host.ask(op="starting", agent_id=str(OTHER), state_dir=str(others)) == {"resident": True}


async def test_a_second_vtpm_for_one_guest_is_refused_until_the_operator_releases_the_first(host: VtpmHost) -> None:
    """swtpm_setup fails with the journal's words and leaves nothing; after the release a new EK is certified."""
    first = await scratch.read_ek(await made(host))
    with pytest.raises(SimulationError, match=f"guest {GUEST} has a certified rsa-ek already"):
        await made(host, name="second")
    assert sorted(path.name for path in host.folder.iterdir() if "second" in path.name) == []
    assert await host.ask(op="release", agent_id=str(GUEST), reason="disk lost") == {}
    second = await scratch.read_ek(await made(host, name="second"))
    assert second != first
    assert await host.journal.rsa_eks() == {GUEST: second}


async def test_a_release_shows_in_the_hosts_audit_trail(host: VtpmHost) -> None:
    """Who it was is what the kernel says of the caller."""
    await made(host)
    assert await host.ask(op="audit") == {"entries": []}
    await host.ask(op="release", agent_id=str(GUEST), reason=" disk lost ")
    [entry] = cast(list[dict[str, object]], (await host.ask(op="audit"))["entries"])
    assert entry.pop("at")
    assert entry == {
        "who": f"uid {os.getuid()}",
        "action": "vtpm-release",
        "subject": str(GUEST),
        "reason": "disk lost",
    }


async def test_a_guest_that_was_released_while_it_runs_gets_no_leaf(host: VtpmHost) -> None:
    """From that moment: its vTPM is not the certified one any more."""
    state = await made(host)
    await host.ask(op="starting", agent_id=str(GUEST), state_dir=str(state))
    await host.report(domain(GUEST, "running"))
    assert isinstance((await host.residency.check({GUEST}))[GUEST], bytes)
    await host.ask(op="release", agent_id=str(GUEST), reason="stolen")
    assert isinstance((await host.residency.check({GUEST}))[GUEST], GuestNotHere)


async def test_after_the_hosts_tpm_was_replaced_each_vtpm_is_made_anew(folder: Path, ca: SoftCa) -> None:
    """The journal survives and is bound to no CA key: released and made again, a vTPM is certified by the new one."""
    now, new_ca = datetime.now(UTC), SoftCa()
    async with vtpm_host(folder, ca.public, ca.sign) as host:
        first = await made(host)
    async with vtpm_host(folder, new_ca.public, new_ca.sign) as host:
        with pytest.raises(SimulationError, match="has a certified rsa-ek already"):
            await made(host, name="second")
        await host.ask(op="release", agent_id=str(GUEST), reason="the mainboard was replaced")
        second = await made(host, name="second")
        assert await host.ask(op="starting", agent_id=str(GUEST), state_dir=str(first)) == {"resident": False}
        assert await host.ask(op="starting", agent_id=str(GUEST), state_dir=str(second)) == {"resident": True}
        await host.report(domain(GUEST, "running"))
        assert await host.residency.check({GUEST}) == {GUEST: await scratch.read_ek(second)}
    for state, by, other in ((first, ca, new_ca), (second, new_ca, ca)):
        [certificate] = await nv_of(state, folder, NV_RSA_EK)
        ek = await ek_in(state, folder)
        assert certificate is not None
        verify_vtpm_certificate(certificate, ca=by.public, agent_id=GUEST, ek=ek, now=now)
        with pytest.raises(CertificateRefused, match="vTPM CA key"):
            verify_vtpm_certificate(certificate, ca=other.public, agent_id=GUEST, ek=ek, now=now)


async def test_a_copied_vtpm_is_not_certified_for_another_guest(host: VtpmHost) -> None:
    """A clone's EK is in the journal under the first guest's id."""
    [data] = await nv_of(await made(host), host.folder, NV_RSA_EK)
    assert data is not None
    modulus = x509.load_der_x509_certificate(data).public_key().public_numbers().n  # type: ignore[union-attr]
    with pytest.raises(LocalRefusal, match=str(GUEST)) as refused:
        await host.ask(op="issue", type="ek", ek=f"{modulus:0512x}", vmid=f"clone:{OTHER}", tpm={})
    assert refused.value.error == "CloneSuspected"


UNFIT = {
    "not defined": [domain(OTHER)],
    "running": [domain(GUEST, "running")],
    "paused": [domain(GUEST, "paused")],
    "migrating": [domain(GUEST, "migrating")],
    "transient": [domain(GUEST, persistent=False)],
}


@pytest.mark.parametrize("case", UNFIT)
async def test_no_vtpm_is_made_for_a_domain_that_is_not_defined_and_off(host: VtpmHost, ca: SoftCa, case: str) -> None:
    """Nothing is signed or recorded, and no state is left."""
    await host.report(*UNFIT[case])
    with pytest.raises(SimulationError, match=f"the host agent refuses: domain {GUEST}"):
        await manufacture(host.folder / "vtpm", create_certs=host.certs(GUEST))
    assert ca.signed == 0
    assert await host.journal.rsa_eks() == {}
    assert not (host.folder / "vtpm").exists()


async def test_no_vtpm_is_made_while_the_domains_are_not_known(host: VtpmHost) -> None:
    """The guest manager has not reported yet: the refusal says so."""
    with pytest.raises(SimulationError, match="not known yet which guests run here"):
        await manufacture(host.folder / "vtpm", create_certs=host.certs(GUEST))
    assert isinstance((await host.residency.check({GUEST}))[GUEST], NotReady)


async def test_users_that_are_not_in_the_settings_are_refused(folder: Path, ca: SoftCa) -> None:
    """Whatever they ask; the kernel says who they are."""
    async with vtpm_host(folder, ca.public, ca.sign, peer_uids={os.getuid() + 1}) as host:
        await host.report(domain(GUEST))
        with pytest.raises(SimulationError, match=f"user {os.getuid()} may not use"):
            await manufacture(folder / "vtpm", create_certs=host.certs(GUEST))
        for op in ("issue", "starting", "release", "audit", "anything"):
            with pytest.raises(LocalRefusal) as refused:
                await host.ask(op=op)
            assert refused.value.error == "AccessDenied"
    assert ca.signed == 0


ASK = "import socket,sys; s=socket.socket(1); s.connect(sys.argv[1]); s.send(b'%s\\n'); print(s.recv(9999).decode())"


@pytest.mark.needs_root
@pytest.mark.parametrize("op", ["starting", "release", "audit"])
async def test_swtpms_user_asks_for_certificates_only(folder: Path, ca: SoftCa, op: str) -> None:
    """It is in the settings, so it can connect; it may not say what a guest starts with, nor release it, nor read who
    did."""
    nobody = 65534
    async with vtpm_host(folder, ca.public, ca.sign, peer_uids={0, nobody}) as host:
        os.chmod(folder, 0o755)  # noqa: S103 - that user must get as far as the socket
        line = json.dumps({"op": op, "agent_id": str(GUEST), "reason": "r", "state_dir": "/"})
        child = await asyncio.create_subprocess_exec(
            "/usr/bin/python3", "-c", ASK % line, str(host.socket), user=nobody, stdout=asyncio.subprocess.PIPE
        )
        async with asyncio.timeout(30):
            answer, _ = await child.communicate()
    assert json.loads(answer) == {"error": "AccessDenied", "detail": f"user {nobody} may ask for certificates only"}


async def test_a_tpm_that_does_not_sign_keeps_the_guest_from_being_made(host: VtpmHost, ca: SoftCa) -> None:
    """swtpm_setup fails with the reason; the key stays in the journal, for the operator to release."""
    ca.fault = DeviceUnavailable("the TPM is away")
    with pytest.raises(SimulationError, match="the TPM is away"):
        await made(host)
    assert list(await host.journal.rsa_eks()) == [GUEST]


BAD_LINES = {
    b"not json": "MalformedMessage",
    b"[]": "MalformedMessage",
    b'{"op": "quote"}': "MalformedMessage",
    b'{"op": "starting", "agent_id": 5, "state_dir": "/"}': "MalformedMessage",
    b'{"op": "starting", "agent_id": "X", "state_dir": "/"}': "MalformedMessage",
    b'{"op": "starting", "agent_id": "%s", "state_dir": "/nowhere"}' % str(GUEST).encode(): "MalformedMessage",
    b'{"op": "starting", "agent_id": "%s", "state_dir": "/\\u0000"}' % str(GUEST).encode(): "MalformedMessage",
    b'{"op": "starting", "agent_id": "%s", "state_dir": "/", "ek": ""}' % str(GUEST).encode(): "MalformedMessage",
    b'{"op": "release", "agent_id": "%s", "reason": "r"}' % str(GUEST).encode(): "NotFound",
    b'{"op": "release", "agent_id": "%s"}' % str(GUEST).encode(): "MalformedMessage",
    b'{"op": "release", "agent_id": "%s", "reason": 5}' % str(GUEST).encode(): "MalformedMessage",
    b'{"op": "release", "agent_id": "%s", "reason": "a\\nb"}' % str(GUEST).encode(): "MalformedMessage",
    b'{"op": "release", "agent_id": "%s", "reason": "r", "who": "me"}' % str(GUEST).encode(): "MalformedMessage",
    b'{"op": "audit", "all": true}': "MalformedMessage",
    b'{"op": "issue", "type": "ek", "ek": "00", "vmid": "a:%s"}' % str(GUEST).encode(): "MalformedMessage",
    b'{"op": "issue", "op": "issue"}': "MalformedMessage",
}


@pytest.mark.parametrize("line", BAD_LINES)
async def test_a_bad_line_gets_one_named_refusal_and_the_connection_goes_on(host: VtpmHost, line: bytes) -> None:
    """No answer is left out, so a caller never waits for its deadline."""
    await host.report(domain(GUEST))
    first, second = await exchange(host.socket, line, b'{"op": "?"}')
    assert isinstance(first, dict)
    assert isinstance(second, dict)
    assert (first["error"], second["error"]) == (BAD_LINES[line], "MalformedMessage")
    assert first["detail"]


async def test_a_state_that_is_no_vtpm_is_a_clear_error(host: VtpmHost) -> None:
    """swtpm does not start on it; the guest has no EK then, not that of its last start."""
    state = await made(host)
    await host.ask(op="starting", agent_id=str(GUEST), state_dir=str(state))
    broken = host.folder / "broken"
    shutil.copytree(state, broken)
    (broken / STATE_FILE).write_bytes(b"no state of a TPM")
    with pytest.raises(LocalRefusal) as refused:
        await host.ask(op="starting", agent_id=str(GUEST), state_dir=str(broken))
    assert refused.value.error in {"SimulatorCrashed", "DeviceFault", "DeviceUnavailable"}
    assert await host.journal.seen() == {}


async def test_a_state_file_that_is_too_large_is_not_copied(folder: Path) -> None:
    """A sparse file of many gigabytes does not fill the host's disk."""
    with (folder / STATE_FILE).open("wb") as file:
        file.truncate(1 << 33)
    with pytest.raises(MalformedMessage, match="bytes"):
        await scratch.read_ek(folder)


async def test_a_missing_state_is_malformed(folder: Path) -> None:
    """The path is named."""
    with pytest.raises(MalformedMessage, match=str(folder)):
        await scratch.read_ek(folder)


async def test_a_cancelled_reading_leaves_nothing(host: VtpmHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a copy of the state nor its folder."""
    state = await made(host)
    copies = host.folder / "copies"
    copies.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(copies))
    task = asyncio.create_task(scratch.read_ek(state))
    await until(lambda: bool(list(copies.glob("*/tpm"))))
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert list(copies.iterdir()) == []


async def test_stopping_cuts_idle_connections_off(folder: Path, ca: SoftCa) -> None:
    """And the socket is gone: a tool that starts now fails at once."""
    async with vtpm_host(folder, ca.public, ca.sign) as host:
        client = socket.socket(socket.AF_UNIX)
        client.connect(str(host.socket))
        client.sendall(json.dumps({"op": "?"}).encode() + b"\n")
        client.settimeout(10)
        assert await asyncio.to_thread(client.recv, 4096)
    assert await asyncio.to_thread(client.recv, 4096) == b""
    client.close()
    assert not host.socket.exists()
