"""What the tenant's clients make of answers: evidence that cannot be read is check 1, everything else is typed."""

from __future__ import annotations

import functools
import uuid
from collections.abc import Mapping
from typing import Any, cast

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from harness.config import TlsSettings
from harness.errors import ConfigError, MalformedEvidence, MalformedMessage, MessageTooLarge, PeerUnreachable
from harness.keylime_wire import encode_quote
from harness.peer import PeerClient
from harness.protocol import QuoteRequest
from harness.tenant.client import (
    GuestClient,
    ProviderClient,
    RegistrarClient,
    encode_baseline,
    only_authority,
    parse_pem,
    without_authority,
)
from harness.tenant.guest_agent import public_pem
from harness.values import AgentId, ClockBaseline, HashAlg, HostId, Nonce, PcrSelection
from tests.support.tenant_wire import AGENT, SoftTpm

HOST = HostId(uuid.UUID("d432fbb3-d2f1-8a97-9ef7-75bd81c00000"))
REQUEST = QuoteRequest(nonce=Nonce(bytes(32)), bank=HashAlg.SHA256, mask=1, agent_id=AGENT, binding=bytes(32))
SELECTION = PcrSelection.of(HashAlg.SHA256, 0x11)
BASELINE = ClockBaseline(clock=1, reset_count=2, restart_count=3, firmware_version=4)


class FakePeer:
    """Answers with what it was given, and records what it was asked."""

    def __init__(self, *answers: object) -> None:
        self.answers = list(answers)
        self.calls: list[tuple[str, str, object]] = []
        self.headers: list[Mapping[str, str] | None] = []

    def _answer(self, *call: Any) -> object:
        self.calls.append(call)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def get(self, path: str, params: object = (), *, headers: Mapping[str, str] | None = None) -> object:
        self.headers.append(headers)
        return self._answer("GET", path, params)

    async def post(self, path: str, body: object) -> object:
        return self._answer("POST", path, body)


def fake(*answers: object) -> PeerClient:
    return cast(PeerClient, FakePeer(*answers))


def quote_text() -> str:
    return encode_quote(*SoftTpm().quote(b"n", 0x11 | 1 << 16))


@functools.cache
def transport_key() -> bytes:
    return public_pem(rsa.generate_private_key(65537, 2048))


async def test_a_guest_quote_becomes_evidence() -> None:
    """The query is Keylime's; quote and transport key come back typed."""
    peer = FakePeer({"quote": quote_text(), "pubkey": transport_key().decode()})
    answer = await GuestClient(cast(PeerClient, peer)).quote("Abcdefghij0123456789", SELECTION)
    assert answer.transport_key_pem == transport_key()
    params = [("nonce", "Abcdefghij0123456789"), ("mask", "0x11"), ("partial", "0")]
    assert peer.calls == [("GET", "/v2.1/quotes/integrity", params)]


@pytest.mark.parametrize(
    "answer",
    [
        [],
        {},
        {"quote": "r::", "pubkey": "pem"},
        {"quote": 5, "pubkey": "pem"},
        {"quote": quote_text()},
        {"quote": quote_text(), "pubkey": "a key to which nothing can be wrapped"},
        MalformedMessage("not JSON"),
        MessageTooLarge("1 MiB"),
    ],
)
async def test_a_guest_answer_that_is_no_evidence_is_check_1(answer: object) -> None:
    """Never a transport failure, which would be retried."""
    with pytest.raises(MalformedEvidence):
        await GuestClient(fake(answer)).quote("Abcdefghij0123456789", SELECTION)


@pytest.mark.parametrize("answer", [MalformedMessage("not JSON"), MessageTooLarge("1 MiB")])
async def test_a_provider_answer_that_cannot_be_read_is_check_1(answer: object) -> None:
    """S that is not JSON is check 1."""
    with pytest.raises(MalformedEvidence):
        await ProviderClient(fake(answer)).quote(REQUEST, wait_s=30.0)


async def test_a_transport_failure_stays_one() -> None:
    """What the peer did not answer is no evidence and no verdict."""
    with pytest.raises(PeerUnreachable):
        await ProviderClient(fake(PeerUnreachable("x"))).quote(REQUEST, wait_s=30.0)
    with pytest.raises(PeerUnreachable):
        await GuestClient(fake(PeerUnreachable("x"))).provide_v(b"v")


async def test_a_host_quote_is_asked_for_as_the_protocol_says() -> None:
    """Nonce, mask, bank, agent_id and binding; the results are handed on unread."""
    peer = FakePeer({"anything": 1})
    assert await ProviderClient(cast(PeerClient, peer)).quote(REQUEST, wait_s=30.0) == {"anything": 1}
    [(method, path, params)] = peer.calls
    assert (method, path) == ("GET", "/v1/verifier")
    assert dict(cast(Any, params)).keys() == {"nonce", "mask", "hash_alg", "agent_id", "binding"}


@pytest.mark.parametrize(("wait_s", "preferred"), [(30.0, 30), (29.99, 29), (1.5, 1), (0.2, 1), (3600.0, 30)])
async def test_the_provider_is_told_how_long_an_answer_is_of_use(wait_s: float, preferred: int) -> None:
    """``Prefer: wait`` in whole seconds, rounded down, 1 to 30: a provider never waits for longer than we do."""
    peer = FakePeer({})
    await ProviderClient(cast(PeerClient, peer)).quote(REQUEST, wait_s=wait_s)
    assert peer.headers == [{"Prefer": f"wait={preferred}"}]


IDENTITY = {
    "host_id": str(HOST),
    "ek": "AA==",
    "ek_certificates": ["AA==", "AQ=="],
    "ak": "AA==",
    "ca": "AA==",
    "ca_certificate": "AA==",
}


async def test_an_identity_is_parsed() -> None:
    """Bytes from base64, the leaf first."""
    identity = await ProviderClient(fake(IDENTITY)).identity(HOST)
    assert (identity.host_id, identity.ek_certificates) == (HOST, (b"\0", b"\1"))


@pytest.mark.parametrize(
    "change",
    [
        {"host_id": "x"},
        {"host_id": None},
        {"ek": "?"},
        {"ak": None},
        {"ek_certificates": "AA=="},
        {"ek_certificates": ["?"]},
        {"ek_certificates": ["AA=="] * 9},
    ],
)
async def test_an_identity_with_one_fault_is_refused(change: dict[str, object]) -> None:
    """Each member has its form."""
    with pytest.raises(MalformedMessage):
        await ProviderClient(fake(IDENTITY | change)).identity(HOST)


async def test_other_answers_of_the_provider_are_typed() -> None:
    """Lists of hosts, challenge answers and certifications."""
    assert await ProviderClient(fake({"hosts": [str(HOST)]})).hosts() == [HOST]
    assert await ProviderClient(fake({"answer": "ab" * 32})).activate(HOST, b"c") == b"\xab" * 32
    assert await ProviderClient(fake({"attest": "AA==", "signature": "AQ=="})).certify(HOST, b"n") == (b"\0", b"\1")
    with pytest.raises(MalformedMessage):
        await ProviderClient(fake({})).hosts()
    for wrong in ({}, {"answer": "AB" * 32}, {"answer": "ab" * 31}):
        with pytest.raises(MalformedMessage):
            await ProviderClient(fake(wrong)).activate(HOST, b"c")
    with pytest.raises(MalformedMessage):
        await ProviderClient(fake({"attest": "AA=="})).certify(HOST, b"n")


GUEST = {"host_id": str(HOST), "ek_tpm": "AA==", "aik_tpm": "AQ==", "mtls_cert": "pem"}
HOST_RECORD = {"ak": "Ag==", "ak_qualified_name": "03", "baseline": encode_baseline(BASELINE), "enrolled_at": 7}


async def test_a_snapshot_is_of_guest_and_host() -> None:
    """Two calls to our own registrar."""
    peer = FakePeer(GUEST, HOST_RECORD)
    snapshot = await RegistrarClient(cast(PeerClient, peer)).snapshot(AgentId(AGENT))
    assert (snapshot.guest_ek, snapshot.guest_ak, snapshot.host_ak) == (b"\0", b"\1", b"\2")
    assert (snapshot.host_ak_qualified_name, snapshot.host_baseline, snapshot.host_enrolled_at) == (
        b"\3",
        BASELINE,
        7.0,
    )
    assert [path for _, path, _ in peer.calls] == [f"/v2.1/agents/{AGENT}", f"/v1/hosts/{HOST}"]


@pytest.mark.parametrize(
    ("guest", "host"),
    [
        ({"mtls_cert": None}, {}),
        ({"host_id": 5}, {}),
        ({}, {"enrolled_at": True}),
        ({}, {"enrolled_at": "now"}),
        ({}, {"baseline": None}),
        ({}, {"ak_qualified_name": None}),
    ],
)
async def test_a_snapshot_with_one_fault_is_refused(guest: dict[str, object], host: dict[str, object]) -> None:
    """A half-empty snapshot is never stored."""
    with pytest.raises(MalformedMessage):
        await RegistrarClient(fake(GUEST | guest, HOST_RECORD | host)).snapshot(AgentId(AGENT))


def test_authorities_are_narrowed(tmp_path: Any) -> None:
    """Our own services are reached by our own authority alone, a provider by the others."""
    paths = {name: tmp_path / name for name in ("alice", "provider")}
    tls = TlsSettings(certificate=tmp_path / "c", key=tmp_path / "k", authorities=paths)
    assert only_authority(tls, "alice").authorities == {"alice": paths["alice"]}
    assert without_authority(tls, "alice").authorities == {"provider": paths["provider"]}
    with pytest.raises(ConfigError, match="bob"):
        only_authority(tls, "bob")


def test_a_certificate_must_be_one() -> None:
    """mtls_cert of a record that somebody spoiled."""
    with pytest.raises(MalformedMessage, match="mtls_cert"):
        parse_pem("disabled")
