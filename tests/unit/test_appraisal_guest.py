"""Guest evidence: the honest quote is accepted; one change, and the one named check refuses it (checks 4 to 10)."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import pytest

from harness.errors import AppraisalError
from harness.tenant.appraisal import Accepted, Rejected, verify_transport_key
from harness.tenant.policy import Policy
from harness.values import HashAlg
from tests.support.forge import AK_ATTRIBUTES, ecc_key, endorsement_name, rsa_key, value_of
from tests.support.rounds import BASELINE, GuestRound, refused

B256 = HashAlg.SHA256
NONCE = b"Abcdefghij0123456789"


def baseline(**changes: Any) -> dict[str, Any]:
    """Trust with another baseline."""
    return {"baseline": replace(BASELINE, **changes)}


def pcr16(pem: bytes) -> bytes:
    """PCR 16 after a reset and one extend with this key."""
    return hashlib.sha256(bytes(32) + hashlib.sha256(pem).digest()).digest()


@pytest.mark.parametrize(
    "honest",
    [
        pytest.param(GuestRound(), id="ecdsa"),
        pytest.param(GuestRound(key=rsa_key()), id="rsassa"),
        pytest.param(GuestRound(attest={"signer": endorsement_name(ecc_key())}), id="ak-below-another-parent"),
        pytest.param(GuestRound(signed=(0, 7), trust={"transport_key_pem": None}), id="no-transport-key"),
        pytest.param(GuestRound(signed=(0, 1, 7, 16)), id="more-than-requested"),
        pytest.param(GuestRound(trust={"baseline": None}), id="first-evidence"),
    ],
)
def test_honest_evidence_is_accepted(honest: GuestRound) -> None:
    """The guest's own nonce is extraData, PCR 16 vouches for the transport key and is outside mask and policy."""
    verdict = honest.verdict()
    assert isinstance(verdict, Accepted), verdict
    assert verdict.evidence.baseline == replace(BASELINE, clock=1000)


@pytest.mark.parametrize(
    ("spoilt", "expected"),
    [
        pytest.param(GuestRound(attest={"magic": 0}), (4, "NotATpmQuote"), id="magic"),
        pytest.param(GuestRound(attest={"type": 0x8017}), (4, "NotATpmQuote"), id="type"),
        pytest.param(GuestRound(attest={"tail": b"x"}), (4, "NotATpmQuote"), id="trailing-byte"),
        pytest.param(GuestRound(nonce=NONCE[:-1] + b"x"), (5, "QualifyingDataMismatch"), id="other-nonce"),
        pytest.param(GuestRound(nonce=NONCE[:-1]), (5, "QualifyingDataMismatch"), id="shorter-nonce"),
        pytest.param(
            GuestRound(nonce=hashlib.sha256(NONCE).digest()), (5, "QualifyingDataMismatch"), id="hashed-nonce"
        ),
        pytest.param(GuestRound(trust={"ak": rsa_key().public}), (6, "QuoteSignatureInvalid"), id="other-ak"),
        pytest.param(
            GuestRound(key=ecc_key(attributes=AK_ATTRIBUTES ^ 1 << 16)), (6, "UntrustedKey"), id="unrestricted-ak"
        ),
        pytest.param(GuestRound(signed=(0, 16)), (7, "SelectionNotCovered"), id="requested-pcr-not-signed"),
        pytest.param(GuestRound(attest={"pcr_digest": bytes(32)}), (8, "PcrDigestMismatch"), id="other-digest"),
        pytest.param(GuestRound(values={8: bytes(32)}), (8, "PcrDigestMismatch"), id="value-not-signed"),
        pytest.param(GuestRound(values={0: bytes(32)}), (9, "ReferenceValueMismatch"), id="other-value"),
        pytest.param(GuestRound(signed=(0, 7)), (9, "ReferenceValueMismatch"), id="pcr-16-not-signed"),
        pytest.param(GuestRound(values={16: pcr16(b"other")}), (9, "ReferenceValueMismatch"), id="other-transport-key"),
        pytest.param(GuestRound(values={16: bytes(32)}), (9, "ReferenceValueMismatch"), id="no-transport-key-measured"),
        pytest.param(GuestRound(trust={"transport_key_pem": b"x"}), (9, "ReferenceValueMismatch"), id="key-swapped"),
        pytest.param(GuestRound(trust={"policy": None}), (9, "ReferenceValueMismatch"), id="no-policy"),
        pytest.param(
            GuestRound(trust={"policy": Policy.of(B256, {16: pcr16(GuestRound().pem)})}),
            (9, "ReferenceValueMismatch"),
            id="policy-names-pcr-16",
        ),
        pytest.param(
            GuestRound(signed=(0, 7, 8, 16), trust={"policy": Policy.of(B256, {8: value_of(B256, 8)})}),
            (9, "ReferenceValueMismatch"),
            id="policy-names-what-was-not-requested",
        ),
        pytest.param(GuestRound(trust=baseline(reset_count=6)), (10, "HostRebooted"), id="guest-reset"),
        pytest.param(GuestRound(attest={"safe": 0}), (10, "ClockNotSafe"), id="clock-not-safe"),
        pytest.param(GuestRound(trust=baseline(clock=1000)), (10, "ClockWentBack"), id="clone"),
        pytest.param(GuestRound(trust=baseline(clock=9000)), (10, "ClockWentBack"), id="rolled-back-state"),
    ],
)
def test_one_change_is_refused_by_its_check(spoilt: GuestRound, expected: tuple[int, str]) -> None:
    """The same checks as for a host, numbered alike."""
    assert refused(spoilt.verdict()) == expected


def test_a_guest_reset_offers_its_counters() -> None:
    """The session decides whether a reset is allowed; the evidence is rejected either way."""
    verdict = GuestRound(trust=baseline(reset_count=6)).verdict()
    assert isinstance(verdict, Rejected)
    assert verdict.new_baseline == replace(BASELINE, clock=1000)


def test_an_identity_quote_vouches_for_its_transport_key() -> None:
    """Before there is a policy the quote is held to checks 4 to 8 and PCR 16."""
    honest = GuestRound(signed=(16,))
    verify_transport_key(honest.evidence(), NONCE, honest.key.public, honest.pem)


@pytest.mark.parametrize(
    ("spoilt", "pem", "check"),
    [
        pytest.param(GuestRound(signed=(16,), attest={"magic": 0}), GuestRound().pem, 4, id="magic"),
        pytest.param(GuestRound(signed=(16,), nonce=b"other"), GuestRound().pem, 5, id="other-nonce"),
        pytest.param(GuestRound(signed=(16,), key=rsa_key()), GuestRound().pem, 6, id="other-ak"),
        pytest.param(GuestRound(signed=(16,), attest={"pcr_digest": b""}), GuestRound().pem, 8, id="other-digest"),
        pytest.param(GuestRound(signed=(16,)), b"other", 9, id="other-key"),
        pytest.param(GuestRound(signed=(0,)), GuestRound().pem, 9, id="pcr-16-not-signed"),
    ],
)
def test_a_spoilt_identity_quote_is_refused(spoilt: GuestRound, pem: bytes, check: int) -> None:
    """A key that the guest's TPM does not vouch for is never used for the payload."""
    with pytest.raises(AppraisalError) as caught:
        verify_transport_key(spoilt.evidence(), NONCE, ecc_key().public, pem)
    assert caught.value.check == check
