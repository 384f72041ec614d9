"""Refusals and failures that a provider answers with: what each does to a session, and how the guest goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import zip_longest

import pytest
import yaml

from harness import errors
from harness.config import Listen, SiteSettings, TlsSettings, load
from harness.errors import HarnessError
from tests.support.interposed import Interposed
from tests.support.ways_back import WaysBack, raises, ways_back

pytestmark = [pytest.mark.needs_swtpm, pytest.mark.timeout(900)]

PATIENCE_S = 2.0
FOR_EVER_S = 3600.0
TOPOLOGY = """\
hosts: {host1: {chip: swtpm}}
tenants:
  alice: {quote_interval_s: 1, guests: {vm1: , vm2: }}
"""
GUESTS = ("vm1", "vm2")


@dataclass(frozen=True)
class Answer:
    """What the provider answers, and the alarm that it becomes."""

    error: HarnessError
    kind: str


def _as_itself(error: HarnessError) -> Answer:
    return Answer(error, type(error).__name__)


ANSWERS = [
    _as_itself(errors.NotYourGuest("unknown, or somebody else's")),
    _as_itself(errors.AccessDenied("not for this certificate")),
    _as_itself(errors.Conflict("in another state")),
    _as_itself(errors.PoolFull("full", retry_after_s=FOR_EVER_S)),
    _as_itself(errors.ShareExhausted("too many waiting", retry_after_s=FOR_EVER_S)),
    _as_itself(errors.WouldBeLate("not in that time", retry_after_s=FOR_EVER_S)),
    _as_itself(errors.TooManyConnections("one too many", retry_after_s=FOR_EVER_S)),
    _as_itself(errors.ShuttingDown("stopping", retry_after_s=FOR_EVER_S)),
    _as_itself(errors.NotReady("not yet", retry_after_s=FOR_EVER_S)),
    _as_itself(errors.BatchFailed("the TPM failed", batch_id="")),
    _as_itself(errors.CertificateExpired("renew it")),
    _as_itself(errors.ChallengeFailed()),
    Answer(errors.MalformedMessage("what is that?"), "PeerRefusedUs"),
    _as_itself(errors.KeyChanged("another key")),
]
PAIRS = list(zip_longest(ANSWERS[::2], ANSWERS[1::2]))


@pytest.fixture(scope="module")
def lab() -> Iterator[WaysBack]:
    """A lab whose tenant has little patience; tests leave its guests attested."""
    with ways_back(TOPOLOGY) as running:
        settings = running.state / "t" / "alice" / "verifier.yml"
        changed = {**yaml.safe_load(settings.read_text()), "transport_patience_s": PATIENCE_S}
        settings.write_text(yaml.safe_dump(changed))
        running.do("lab", "restart", "alice-verifier")
        yield running


@pytest.fixture(scope="module")
def providers(lab: WaysBack) -> Iterator[tuple[Interposed, Interposed]]:
    """For each guest somebody who plays the provider."""
    alice, pki = load(lab.state / "site.yml", SiteSettings).tenants["alice"], lab.state / "pki"
    authorities = {name: pki / name / "ca.pem" for name in ("alice", "provider")}
    asks, own = (
        TlsSettings(certificate=file, key=file.with_suffix(".key"), authorities=authorities)
        for file in (pki / "alice" / "tenant-verifier-alice.pem", pki / "provider" / "provider-verifier-verifier.pem")
    )
    first, second = (
        Interposed("provider-verifier", ("/v1/verifier",), own, asks, alice.provider_verifier) for _ in GUESTS
    )
    with ExitStack() as stack:
        for guest, provider in zip(GUESTS, (first, second), strict=True):
            stack.enter_context(provider.serving(Listen()))
            lab.act("tenant", "guest", "remove", guest, "--tenant", "alice")
            order = ("--provider-verifier", provider.url, "--interval", "1", "--allow-reboots")
            lab.do("tenant", "guest", "add", guest, *order, "--tenant", "alice")
        lab.attested()
        yield first, second


@pytest.mark.parametrize("answers", PAIRS, ids=["-".join(one.kind for one in pair if one) for pair in PAIRS])
@raises(*(answer.kind for answer in ANSWERS))
def test_a_refusal(
    lab: WaysBack, providers: tuple[Interposed, Interposed], answers: tuple[Answer, Answer | None]
) -> None:
    """It fails the session at once, or when the patience is over; the guest goes on when its operator says so."""
    met = [(guest, provider, one) for guest, provider, one in zip(GUESTS, providers, answers, strict=True) if one]
    for _, provider, answer in met:
        provider.error = answer.error
    for guest, _, answer in met:
        lab.stopped(guest, state="FAILED", error=answer.kind)
        step = "re-enrol" if answer.kind == "KeyChanged" else "resume"
        lab.advised(guest, "alice", f"harness tenant guest {step} {guest} ")
    for guest, provider, _ in met:
        provider.honest()
        lab.act("tenant", "guest", "resume", guest, "--tenant", "alice")
    lab.settled(*(answer.kind for _, _, answer in met))


@raises("NotFound", "DeadlineExceeded")
def test_a_provider_that_knows_nothing_and_one_that_says_nothing(
    lab: WaysBack, providers: tuple[Interposed, Interposed]
) -> None:
    """404 is tried four times, silence until the round's time is over; then both are left to the operator."""
    providers[0].error, providers[1].silent = errors.NotFound("nothing here"), True
    lab.stopped("vm1", state="FAILED", error="NotFound")
    lab.stopped("vm2", state="FAILED", error="DeadlineExceeded")
    for guest, provider in zip(GUESTS, providers, strict=True):
        provider.honest()
        lab.act("tenant", "guest", "resume", guest, "--tenant", "alice")
    lab.settled("NotFound", "DeadlineExceeded")
