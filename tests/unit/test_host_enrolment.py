"""Enrolment of a host: the honest one passes; each single change has its own error; challenges are bounded."""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from harness.attest import owner_qualified_name
from harness.errors import (
    CertificateRefused,
    ChallengeFailed,
    HarnessError,
    MalformedMessage,
    NotFound,
    PeerUnreachable,
    ShareExhausted,
    UnacceptableKey,
)
from harness.tenant.challenges import Challenges
from harness.tenant.enrolment import EnrolledHost, HostEnroller
from harness.tpm_templates import KeyTemplate
from harness.values import HostId
from tests.support.enrolment_parties import NOW, SoftHost, Vendor, changed_attributes, der, ek_public
from tests.support.soft_tpm import public_of

REQUESTER = hashlib.sha256(b"registrar").digest()
RESTRICTED, FIXED_TPM, DECRYPT = 1 << 16, 1 << 1, 1 << 17


class Site:
    """A vendor, its host, and a registrar that pins the vendor's root."""

    def __init__(self) -> None:
        self.vendor = Vendor()
        self.host = SoftHost(self.vendor, REQUESTER)
        self.time = 0.0
        self.challenges = Challenges(lambda: self.time)
        self.enroller = HostEnroller([self.vendor.root], REQUESTER, self.challenges, challenge_s=0.05, now=lambda: NOW)

    async def enrol(self) -> EnrolledHost:
        return await self.enroller.enrol("https://provider", self.host.host_id, self.host)


@pytest.fixture
def site() -> Site:
    return Site()


async def test_an_honest_host_is_enrolled(site: Site) -> None:
    """Keys, recomputed id and qualified name, and the certification's clock as first baseline."""
    enrolled = await site.enrol()
    host = site.host
    assert (enrolled.ek, enrolled.ak, enrolled.ca) == (host.ek, host.ak, host.ca)
    assert enrolled.host_id == host.host_id
    assert enrolled.ak_qualified_name == owner_qualified_name(host.ak)
    assert enrolled.baseline == host.baseline
    assert enrolled.enrolled_at == NOW.timestamp()


def _new_ec() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def _other_ek(host: SoftHost) -> dict[str, Any]:
    return {"ek": ek_public(rsa.generate_private_key(public_exponent=65537, key_size=2048)).marshal()}


IDENTITY_LIES: list[tuple[str, type[HarnessError], Any]] = [
    ("another vendor", CertificateRefused, lambda h: {"ek_certificates": _foreign_chain(h)}),
    ("no certificate", CertificateRefused, lambda h: {"ek_certificates": ()}),
    ("no issuing CA", CertificateRefused, lambda h: {"ek_certificates": (h.vendor.certify(h.ek_key.public_key()),)}),
    ("EK of another TPM", CertificateRefused, _other_ek),
    ("another id", CertificateRefused, lambda h: {"host_id": HostId(uuid.uuid4())}),
    ("AK not restricted", UnacceptableKey, lambda h: {"ak": changed_attributes(h.ak, flip=RESTRICTED)}),
    ("AK not fixedTPM", UnacceptableKey, lambda h: {"ak": changed_attributes(h.ak, flip=FIXED_TPM)}),
    ("AK decrypts", UnacceptableKey, lambda h: {"ak": changed_attributes(h.ak, flip=DECRYPT)}),
    ("EK signs", UnacceptableKey, lambda h: {"ek": changed_attributes(h.ek, flip=1 << 18)}),
    ("CA key restricted", UnacceptableKey, lambda h: {"ca": changed_attributes(h.ca, flip=RESTRICTED)}),
    ("CA key not fixedTPM", UnacceptableKey, lambda h: {"ca": changed_attributes(h.ca, flip=FIXED_TPM)}),
    ("AK as CA key", UnacceptableKey, lambda h: {"ca": h.ak.marshal()}),
    ("CA key as AK", UnacceptableKey, lambda h: {"ak": h.ca.marshal()}),
    ("AK cut short", MalformedMessage, lambda h: {"ak": h.ak.marshal()[:-1]}),
    ("AK with trailing bytes", MalformedMessage, lambda h: {"ak": h.ak.marshal() + b"\0"}),
    ("CA certificate of another key", CertificateRefused, lambda h: {"ca_certificate": der(h.vendor.issuing)}),
    ("CA certificate is no DER", CertificateRefused, lambda h: {"ca_certificate": b"0"}),
    ("another AK, not in this TPM", ChallengeFailed, lambda h: {"ak": public_of(_new_ec()).marshal()}),
    ("another CA key", UnacceptableKey, lambda h: {"ca": public_of(_new_ec(), KeyTemplate.CA_P256).marshal()}),
]


def _foreign_chain(host: SoftHost) -> tuple[bytes, ...]:
    foreign = Vendor()
    return foreign.certify(host.ek_key.public_key()), der(foreign.issuing)


@pytest.mark.parametrize(("lie", "error", "changes"), IDENTITY_LIES, ids=[lie for lie, _, _ in IDENTITY_LIES])
async def test_one_lie_in_the_identity_is_refused(
    site: Site, lie: str, error: type[HarnessError], changes: Any
) -> None:
    """Each change of what the provider says of its host is one named error; nothing is returned."""
    site.host.identity_changes = changes(site.host)
    if error is ChallengeFailed:  # a TPM does not open a challenge for a Name that is not in it
        site.host.activate_fault = PeerUnreachable("TPM_RC_INTEGRITY")
    with pytest.raises(error):
        await site.enrol()


CERTIFY_LIES: list[tuple[str, dict[str, Any]]] = [
    ("magic", {"magic": bytes(4)}),
    ("type", {"type": bytes.fromhex("8018")}),
    ("trailing bytes", {"trailing": b"\0"}),
    ("another nonce", {"extra_data": bytes(32)}),
    ("no extraData", {"extra_data": b""}),
    ("another key", {"name": b"\x00\x0b" + bytes(32)}),
    ("another parent", {"qualified_name": b"\x00\x0b" + bytes(32)}),
    ("another signer's name", {"signer": b"\x00\x0b" + bytes(32)}),
    ("another signer", {"key": _new_ec()}),
]


@pytest.mark.parametrize(("what", "changes"), CERTIFY_LIES, ids=[what for what, _ in CERTIFY_LIES])
async def test_one_lie_in_the_certification_is_refused(site: Site, what: str, changes: dict[str, Any]) -> None:
    """TPM2_Certify of the CA key: each of the six checks refuses by UnacceptableKey."""
    site.host.attest_changes = changes
    with pytest.raises(UnacceptableKey):
        await site.enrol()


async def test_a_quote_is_no_certification(site: Site) -> None:
    """A signature that does not parse is refused as well."""

    async def certify(host_id: HostId, nonce: bytes) -> tuple[bytes, bytes]:
        attest, signature = await SoftHost.certify(site.host, host_id, nonce)
        return attest, signature[:-1]

    site.host.certify = certify  # type: ignore[method-assign]
    with pytest.raises(UnacceptableKey):
        await site.enrol()


@pytest.mark.parametrize("answer", [b"", bytes(32), b"x" * 31])
async def test_a_wrong_answer_is_the_one_error(site: Site, answer: bytes) -> None:
    """Wrong answers of any form are ChallengeFailed, and the next enrolment succeeds."""
    site.host.answer_change = answer
    with pytest.raises(ChallengeFailed) as wrong:
        await site.enrol()
    site.host.answer_change = None
    site.host.activate_fault = NotFound("no such host")
    with pytest.raises(ChallengeFailed) as refused:
        await site.enrol()
    assert wrong.value.detail == refused.value.detail
    site.host.activate_fault = None
    assert (await site.enrol()).host_id == site.host.host_id


async def test_an_answer_for_another_tenant_is_wrong(site: Site) -> None:
    """The answer is bound to the requester: what the host answers to another tenant's certificate does not pass."""
    site.host.requester = hashlib.sha256(b"another tenant").digest()
    with pytest.raises(ChallengeFailed):
        await site.enrol()


async def test_a_late_answer_is_the_one_error(site: Site) -> None:
    """No answer within the bound: ChallengeFailed."""

    async def activate(host_id: HostId, credential: bytes) -> bytes:
        await asyncio.Event().wait()
        return b""

    site.host.activate = activate  # type: ignore[method-assign]
    with pytest.raises(ChallengeFailed):
        await site.enrol()


async def test_each_challenge_has_its_own_secret(site: Site) -> None:
    """The recorded answer to one challenge is wrong for the next."""
    answers: list[bytes] = []
    honest = site.host.activate

    async def activate(host_id: HostId, credential: bytes) -> bytes:
        answers.append(await honest(host_id, credential))
        return answers[0]

    site.host.activate = activate  # type: ignore[method-assign]
    await site.enrol()
    with pytest.raises(ChallengeFailed):
        await site.enrol()
    assert answers[0] != answers[1]


def test_one_challenge_per_host_is_open() -> None:
    """A second challenge for the same host waits; another host's does not; closing frees the host."""
    challenges = Challenges(lambda: 0.0)
    one, other = HostId(uuid.uuid4()), HostId(uuid.uuid4())
    with challenges.open(one):
        with pytest.raises(ShareExhausted), challenges.open(one):
            pass
        with challenges.open(other):
            pass
    with challenges.open(one):
        pass


def test_six_challenges_are_made_in_a_minute() -> None:
    """The seventh says when it may come, and may come then."""
    time = [0.0]
    challenges = Challenges(lambda: time[0])
    for _ in range(6):
        with challenges.open(HostId(uuid.uuid4())):
            time[0] += 1
    with pytest.raises(ShareExhausted) as refused, challenges.open(HostId(uuid.uuid4())):
        pass
    assert refused.value.retry_after_s == 54.0
    time[0] += 54.0
    with challenges.open(HostId(uuid.uuid4())):
        pass


async def test_a_flood_of_enrolments_is_bounded(site: Site) -> None:
    """Six failed enrolments use up the minute; the host is not asked a seventh time."""
    site.host.answer_change = b""
    for _ in range(6):
        with pytest.raises(ChallengeFailed):
            await site.enrol()
    with pytest.raises(ShareExhausted):
        await site.enrol()
    assert site.host.activations == 6
