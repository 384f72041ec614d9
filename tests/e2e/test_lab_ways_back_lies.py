"""Answers that a provider, or a guest, changed on the way: each finding that they raise, and how the guest goes on."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.config import GuestAgentSettings, Listen, SiteSettings, TlsSettings, load
from harness.keylime_wire import encode_quote, parse_quote
from harness.pki import Authority, Role
from tests.support.interposed import Answer, Interposed
from tests.support.ways_back import WaysBack, raises, ways_back

pytestmark = [pytest.mark.needs_swtpm, pytest.mark.timeout(900)]

TOPOLOGY = """\
hosts: {host1: {chip: swtpm}}
tenants:
  alice: {quote_interval_s: 1, guests: {vm1: }}
"""
GUEST, HOST = "guest", "host"
HERE, ELSEWHERE = "127.0.0.1", "127.0.0.2"


@dataclass(frozen=True)
class Lie:
    """What is changed in the answers of a layer, and what finds it."""

    kind: str
    check: int
    layer: str
    change: Callable[[Answer], Answer]


def _bytes(name: str, change: Callable[[bytes], bytes]) -> Callable[[Answer], Answer]:
    return lambda answer: {**answer, name: base64.b64encode(change(base64.b64decode(answer[name]))).decode()}


def _proof(change: Callable[[list[str]], list[str]]) -> Callable[[Answer], Answer]:
    return lambda answer: {**answer, "proof": {**answer["proof"], "hashes": change(answer["proof"]["hashes"])}}


def _flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def _other_values(answer: Answer) -> Answer:
    bank = answer["pcrs"]["sha256"]
    return {**answer, "pcrs": {"sha256": {**bank, "0": _flipped(bytes.fromhex(bank["0"])).hex()}}}


def _guest_quote(
    attest: Callable[[bytes], bytes] = bytes, signature: Callable[[bytes], bytes] = bytes
) -> Callable[[Answer], Answer]:
    def change(answer: Answer) -> Answer:
        quote = parse_quote(answer["quote"])
        return {**answer, "quote": encode_quote(attest(quote.attest), signature(quote.signature), quote.pcrs)}

    return change


def _less(query: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The question without its lowest PCR."""
    mask = int(dict(query)["mask"], 16)
    return [(name, f"{mask & (mask - 1):#x}" if name == "mask" else value) for name, value in query]


LIES = [
    Lie("MalformedEvidence", 1, HOST, lambda answer: {name: answer[name] for name in answer if name != "proof"}),
    Lie("MalformedEvidence", 1, GUEST, lambda answer: {**answer, "pubkey": "a key to which nothing can be wrapped"}),
    Lie("WrongHost", 2, HOST, lambda answer: {**answer, "host_id": "3c5d7a0e-1f0b-8a4c-9d2e-5b6f7a8c9d0e"}),
    Lie("InclusionProofInvalid", 3, HOST, _proof(lambda hashes: hashes[:-1])),
    Lie("NotATpmQuote", 4, HOST, _bytes("attest", lambda data: data[:-1])),
    Lie("NotATpmQuote", 4, GUEST, _guest_quote(attest=lambda data: data + b"\0")),
    Lie("QualifyingDataMismatch", 5, HOST, _proof(lambda hashes: [_flipped(bytes.fromhex(h)).hex() for h in hashes])),
    Lie("QuoteSignatureInvalid", 6, HOST, _bytes("signature", _flipped)),
    Lie("QuoteSignatureInvalid", 6, GUEST, _guest_quote(signature=_flipped)),
    Lie("PcrDigestMismatch", 8, HOST, _other_values),
]


@dataclass(frozen=True)
class Between:
    """Who stands where."""

    provider: Interposed
    guest: Interposed

    def of(self, layer: str) -> Interposed:
        """The one that answers for this layer."""
        return self.provider if layer == HOST else self.guest


@pytest.fixture(scope="module")
def lab() -> Iterator[WaysBack]:
    """A lab with one guest; tests leave it attested."""
    with ways_back(TOPOLOGY) as running:
        yield running


@pytest.fixture(scope="module")
def path(lab: WaysBack) -> Iterator[Between]:
    """Somebody in the path to alice's guest, whose tenant was told this address, and to her provider."""
    alice = load(lab.state / "site.yml", SiteSettings).tenants["alice"]
    file = lab.state / "h" / "host1" / "guests" / lab.ids["vm1"] / "image" / "agent.yml"
    agent = load(file, GuestAgentSettings)
    lab.do("provider", "guest", "stop", "vm1")
    changed: dict[str, Any] = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**changed, "public_host": ELSEWHERE, "register_again_s": 1.0}))
    issued = Authority.load(lab.state / "pki" / "alice").issue(
        Role.GUEST_AGENT, lab.ids["vm1"], hosts=(HERE, ELSEWHERE)
    )
    issued.write(file.parent, "agent")
    asks = _certificate_of(agent.tls, lab.state / "pki" / "alice" / "tenant-verifier-alice.pem")
    own = _certificate_of(agent.tls, lab.state / "pki" / "provider" / "provider-verifier-verifier.pem")
    port = agent.listen.port
    guest = Interposed(
        "guest-agent", ("/v2.1/quotes/integrity", "/v2.1/keys/vkey"), agent.tls, asks, f"https://{HERE}:{port}"
    )
    provider = Interposed("provider-verifier", ("/v1/verifier",), own, asks, alice.provider_verifier)
    with guest.serving(Listen(host=ELSEWHERE, port=port)), provider.serving(Listen()):
        lab.do("provider", "guest", "start", "vm1")
        lab.act("tenant", "guest", "remove", "vm1", "--tenant", "alice")
        order = ("--provider-verifier", provider.url, "--interval", "1", "--allow-reboots")
        lab.do("tenant", "guest", "add", "vm1", *order, "--tenant", "alice")
        lab.settled(*lab.alarms("alice"))
        yield Between(provider, guest)


def _certificate_of(tls: TlsSettings, certificate: Path) -> TlsSettings:
    """The same authorities with another certificate and its key, which lies beside it."""
    return tls.model_copy(update={"certificate": certificate, "key": certificate.with_suffix(".key")})


@pytest.mark.parametrize("lie", LIES, ids=[f"{lie.kind}-{lie.layer}" for lie in LIES])
@raises(*(lie.kind for lie in LIES))
def test_a_changed_answer(lab: WaysBack, path: Between, lie: Lie) -> None:
    """The first check that it fails is the finding; honest again, the guest goes on when its operator says so."""
    path.of(lie.layer).change = lie.change
    lab.stopped("vm1", check=lie.check, error=lie.kind)
    lab.advised("vm1", "alice", "harness tenant guest resume vm1")
    path.of(lie.layer).honest()
    lab.act("tenant", "guest", "resume", "vm1", "--tenant", "alice")
    lab.settled(lie.kind)


@raises("SelectionNotCovered")
def test_a_guest_that_quotes_less_than_it_was_asked_for(lab: WaysBack, path: Between) -> None:
    """Only what was signed counts (check 7)."""
    path.guest.query = _less
    lab.stopped("vm1", check=7, error="SelectionNotCovered")
    path.guest.honest()
    lab.act("tenant", "guest", "resume", "vm1", "--tenant", "alice")
    lab.settled("SelectionNotCovered")
