"""Host evidence, from the signing key to the binding (checks 6 to 11): one change, and the named check refuses it."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from harness.tenant.appraisal import Rejected
from harness.tenant.policy import Policy
from harness.values import HashAlg
from tests.support.forge import (
    AK_ATTRIBUTES,
    NULL,
    P521,
    SHA1,
    SHA256,
    SHA384,
    SHA512,
    ecc_key,
    ecdsa_signature,
    endorsement_name,
    rsa_key,
    value_of,
)
from tests.support.rounds import BASELINE, TWO_BANKS, HostRound, digest_of, drop, put, recode, refused, selection_of

B256, B384 = HashAlg.SHA256, HashAlg.SHA384
ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551


# --- 6: key and signature ---------------------------------------------------------------------------------------------

OTHER_KEY = (6, "UntrustedKey")
UNSIGNED = (6, "QuoteSignatureInvalid")
OTHER = ecc_key(name_alg=SHA384)


def with_key(**changes: Any) -> HostRound:
    """A round whose quote a key with other properties signed, and is pinned."""
    return HostRound(key=ecc_key(**changes))


def attribute(bit: int) -> HostRound:
    """A key whose attributes differ in one bit."""
    return with_key(attributes=AK_ATTRIBUTES ^ 1 << bit)


def signed_by(sign: Callable[[bytes], bytes]) -> HostRound:
    """The honest quote with another signature."""

    def edit(results: dict[str, Any]) -> None:
        results["signature"] = base64.b64encode(sign(base64.b64decode(results["attest"]))).decode()

    return HostRound(edits=[edit])


ATTRIBUTES = {
    "fixedTPM": 1,
    "stClear": 2,
    "fixedParent": 4,
    "sensitiveDataOrigin": 5,
    "encryptedDuplication": 11,
    "restricted": 16,
    "decrypt": 17,
    "sign": 18,
    "x509sign": 19,
    "reserved-0": 0,
    "reserved-3": 3,
    "reserved-8": 8,
    "reserved-12": 12,
    "reserved-31": 31,
}
ROUNDS = [pytest.param(attribute(bit), OTHER_KEY, id=f"ak-{name}-flipped") for name, bit in ATTRIBUTES.items()]
ROUNDS += [
    pytest.param(with_key(scheme=NULL), OTHER_KEY, id="ak-without-scheme"),
    pytest.param(with_key(scheme=0x001C), OTHER_KEY, id="ak-ecschnorr"),
    pytest.param(with_key(curve=P521, hash_alg=SHA512), OTHER_KEY, id="ak-p521"),
    pytest.param(HostRound(key=rsa_key(bits=1024)), OTHER_KEY, id="ak-rsa-1024"),
    pytest.param(HostRound(key=rsa_key(exponent=3)), OTHER_KEY, id="ak-exponent-3"),
    pytest.param(HostRound(key=rsa_key(scheme=0x0016)), OTHER_KEY, id="ak-rsapss"),
    pytest.param(
        HostRound(attest={"signer": endorsement_name(ecc_key())}), OTHER_KEY, id="signed-in-another-hierarchy"
    ),
    pytest.param(HostRound(attest={"signer": b""}), OTHER_KEY, id="no-signer"),
    pytest.param(HostRound(attest={"signer": ecc_key().public.name}), OTHER_KEY, id="name-instead-of-qualified-name"),
    pytest.param(
        HostRound(
            attest={"signer": endorsement_name(ecc_key())}, trust={"ak_qualified_name": endorsement_name(ecc_key())}
        ),
        OTHER_KEY,
        id="pinned-in-another-hierarchy",
    ),
    pytest.param(HostRound(trust={"ak_qualified_name": b"\x00\x0b" + bytes(32)}), OTHER_KEY, id="other-name-pinned"),
    pytest.param(HostRound(trust={"ak": OTHER.public}), UNSIGNED, id="other-ak-pinned"),
    pytest.param(HostRound(trust={"ak": rsa_key().public}), UNSIGNED, id="other-kind-of-ak-pinned"),
    pytest.param(signed_by(OTHER.sign), UNSIGNED, id="signed-by-another-key"),
    pytest.param(signed_by(rsa_key().sign), UNSIGNED, id="signed-by-an-rsa-key"),
    pytest.param(signed_by(lambda attest: ecc_key().sign(attest, hash_alg=SHA384)), UNSIGNED, id="signed-with-sha384"),
    pytest.param(signed_by(lambda attest: ecc_key().sign(attest, hash_alg=SHA1)), UNSIGNED, id="signed-with-sha1"),
    pytest.param(signed_by(lambda attest: ecc_key().sign(attest + b"x")), UNSIGNED, id="signature-of-something-else"),
    pytest.param(signed_by(lambda attest: ecc_key().sign(attest) + b"\x00"), UNSIGNED, id="signature-trailing-byte"),
    pytest.param(signed_by(lambda attest: ecc_key().sign(attest)[:-1]), UNSIGNED, id="signature-cut"),
    pytest.param(signed_by(lambda _: b""), UNSIGNED, id="no-signature"),
    pytest.param(signed_by(lambda _: b"\x00\x10"), UNSIGNED, id="null-signature"),
    pytest.param(signed_by(lambda _: b"\x00\x05\x00\x0b" + bytes(32)), UNSIGNED, id="hmac-signature"),
    pytest.param(signed_by(lambda _: ecdsa_signature(0, 0)), UNSIGNED, id="r-and-s-are-0"),
    pytest.param(signed_by(lambda _: ecdsa_signature(ORDER, 1)), UNSIGNED, id="r-is-n"),
    pytest.param(signed_by(lambda _: ecdsa_signature(1, ORDER)), UNSIGNED, id="s-is-n"),
    pytest.param(signed_by(lambda _: b"\x00\x16" + rsa_key().sign(b"")[2:]), UNSIGNED, id="rsapss-signature"),
    pytest.param(
        HostRound(edits=[recode("signature", lambda d: d[:-1] + bytes([d[-1] ^ 1]))]), UNSIGNED, id="bit-flip"
    ),
    pytest.param(
        HostRound(key=rsa_key(), edits=[recode("signature", lambda d: d[:4] + b"\x01\x01\x00" + d[6:])]),
        UNSIGNED,
        id="rsa-signature-longer-than-the-modulus",
    ),
]


# --- 7, 8: selection and values ---------------------------------------------------------------------------------------

NOT_COVERED = (7, "SelectionNotCovered")
OTHER_VALUES = (8, "PcrDigestMismatch")

ROUNDS += [
    pytest.param(HostRound(selection=selection_of((B256, (0, 4, 7)))), NOT_COVERED, id="one-pcr-less"),
    pytest.param(HostRound(selection=selection_of((B384, (0, 4, 7, 14)))), NOT_COVERED, id="another-bank-signed"),
    pytest.param(HostRound(selection=selection_of((B256, ()))), NOT_COVERED, id="all-zero-selection"),
    pytest.param(
        HostRound(selection=selection_of((B384, (0, 4, 7, 14)), (B256, ()))),
        NOT_COVERED,
        id="all-zero-entry-of-our-bank",
    ),
    pytest.param(HostRound(selection=selection_of((B256, (0, 4, 7, 8)))), NOT_COVERED, id="as-many-pcrs-but-others"),
    pytest.param(HostRound(edits=[drop("pcrs", "sha256", "1")]), OTHER_VALUES, id="unrequested-value-missing"),
    pytest.param(HostRound(edits=[drop("pcrs", "sha256")]), OTHER_VALUES, id="no-values"),
    pytest.param(HostRound(edits=[put("pcrs", "sha256", "8", value="00" * 32)]), OTHER_VALUES, id="value-not-signed"),
    pytest.param(HostRound(edits=[put("pcrs", "sha384", value={})]), OTHER_VALUES, id="empty-bank"),
    pytest.param(
        HostRound(selection=selection_of((B256, (0, 4, 7, 14)), (B384, ())), edits=[put("pcrs", "sha384", value={})]),
        OTHER_VALUES,
        id="values-for-an-all-zero-entry",
    ),
    pytest.param(HostRound(edits=[put("pcrs", "sha256", "1", value="00" * 32)]), OTHER_VALUES, id="value-changed"),
    pytest.param(HostRound(edits=[put("pcrs", "sha256", "1", value="")]), OTHER_VALUES, id="value-empty"),
    pytest.param(HostRound(edits=[put("pcrs", "sha256", "1", value="00" * 48)]), OTHER_VALUES, id="value-too-long"),
    pytest.param(
        HostRound(edits=[lambda r: r["pcrs"]["sha256"].update({"0": r["pcrs"]["sha256"]["1"]})]),
        OTHER_VALUES,
        id="value-relabelled",
    ),
    pytest.param(
        HostRound(edits=[lambda r: r["pcrs"].update(sha384=r["pcrs"].pop("sha256"))]),
        OTHER_VALUES,
        id="bank-relabelled",
    ),
    pytest.param(HostRound(attest={"pcr_digest": bytes(32)}), OTHER_VALUES, id="other-digest-signed"),
    pytest.param(HostRound(attest={"pcr_digest": b""}), OTHER_VALUES, id="no-digest-signed"),
    pytest.param(
        HostRound(
            bank=B384, requested=(0, 4), selection=TWO_BANKS, attest={"pcr_digest": digest_of(SHA384, TWO_BANKS)}
        ),
        OTHER_VALUES,
        id="digest-by-the-banks-hash",
    ),
    pytest.param(
        HostRound(selection=TWO_BANKS[::-1], requested=(0, 1), attest={"pcr_digest": digest_of(SHA256, TWO_BANKS)}),
        OTHER_VALUES,
        id="digest-in-another-order",
    ),
]


# --- 9, 10, 11: policy, clock, binding --------------------------------------------------------------------------------

NOT_ALLOWED = (9, "ReferenceValueMismatch")
REBOOTED, UNSAFE, BACK = (10, "HostRebooted"), (10, "ClockNotSafe"), (10, "ClockWentBack")
UNBOUND = (11, "BindingMismatch")


def policy(**banks: dict[int, list[bytes]]) -> dict[str, Any]:
    """Trust with this policy."""
    allowed = {
        HashAlg.parse(bank): {pcr: frozenset(values) for pcr, values in pcrs.items()} for bank, pcrs in banks.items()
    }
    return {"policy": Policy(allowed)}


def baseline(**changes: Any) -> dict[str, Any]:
    """Trust with another baseline."""
    return {"baseline": replace(BASELINE, **changes)}


GOOD = [value_of(B256, 0)]
ROUNDS += [
    pytest.param(HostRound(trust={"policy": None}), NOT_ALLOWED, id="no-policy"),
    pytest.param(HostRound(trust=policy()), NOT_ALLOWED, id="empty-policy"),
    pytest.param(HostRound(trust=policy(sha256={})), NOT_ALLOWED, id="policy-of-an-empty-bank"),
    pytest.param(HostRound(trust=policy(sha256={0: []})), NOT_ALLOWED, id="nothing-allowed"),
    pytest.param(HostRound(trust=policy(sha256={0: GOOD, 4: []})), NOT_ALLOWED, id="nothing-allowed-for-one"),
    pytest.param(HostRound(trust=policy(sha256={0: [bytes(32)]})), NOT_ALLOWED, id="other-value"),
    pytest.param(HostRound(trust=policy(sha256={0: [GOOD[0][:31]]})), NOT_ALLOWED, id="shorter-value"),
    pytest.param(
        HostRound(trust=policy(sha256={0: GOOD, 1: [value_of(B256, 1)]})), NOT_ALLOWED, id="in-the-union-not-requested"
    ),
    pytest.param(HostRound(trust=policy(sha256={0: GOOD, 16: [bytes(32)]})), NOT_ALLOWED, id="resettable"),
    pytest.param(
        HostRound(
            selection=selection_of((B256, (0, 4, 7, 14)), (B384, (0,))), trust=policy(sha384={0: [value_of(B384, 0)]})
        ),
        NOT_ALLOWED,
        id="in-another-bank-of-the-union",
    ),
    pytest.param(HostRound(trust=baseline(reset_count=6)), REBOOTED, id="reset-since"),
    pytest.param(HostRound(trust=baseline(reset_count=8)), REBOOTED, id="fewer-resets"),
    pytest.param(HostRound(trust=baseline(restart_count=2)), REBOOTED, id="restarted-since"),
    pytest.param(HostRound(trust=baseline(restart_count=4)), REBOOTED, id="fewer-restarts"),
    pytest.param(HostRound(trust=baseline(firmware_version=0)), REBOOTED, id="other-firmware"),
    pytest.param(HostRound(attest={"safe": 0}), UNSAFE, id="clock-not-safe"),
    pytest.param(HostRound(attest={"safe": 0}, trust={"baseline": None}), UNSAFE, id="clock-not-safe-at-first"),
    pytest.param(HostRound(trust=baseline(clock=1000)), BACK, id="clock-equal"),
    pytest.param(HostRound(trust=baseline(clock=1001)), BACK, id="clock-went-back"),
    pytest.param(HostRound(attest={"safe": 0}, trust=baseline(reset_count=6)), REBOOTED, id="reset-before-safe"),
    pytest.param(HostRound(attest={"safe": 0}, trust=baseline(clock=1000)), UNSAFE, id="safe-before-clock"),
    pytest.param(HostRound(trust=baseline(reset_count=6, clock=2000)), REBOOTED, id="reset-before-clock"),
    pytest.param(HostRound(appraised_binding=bytes(32)), UNBOUND, id="other-guest-evidence"),
    pytest.param(HostRound(appraised_binding=None), UNBOUND, id="no-guest-evidence"),
    pytest.param(HostRound(guest=None, appraised_binding=bytes(32)), UNBOUND, id="guest-evidence-never-bound"),
]


@pytest.mark.parametrize(("spoilt", "expected"), ROUNDS)
def test_one_change_is_refused_by_its_check(spoilt: HostRound, expected: tuple[int, str]) -> None:
    """Exactly the check that DESIGN 3.5 gives for the defect refuses the evidence."""
    assert refused(spoilt.verdict()) == expected


def test_only_a_reboot_offers_a_new_baseline() -> None:
    """The counters of believable evidence come with HostRebooted, and with nothing else."""
    rebooted = HostRound(trust=baseline(reset_count=6)).verdict()
    assert isinstance(rebooted, Rejected)
    assert rebooted.new_baseline == replace(BASELINE, clock=1000)
    for other in (HostRound(attest={"safe": 0}), HostRound(trust=baseline(clock=1000)), HostRound(trust=policy())):
        verdict = other.verdict()
        assert isinstance(verdict, Rejected)
        assert verdict.new_baseline is None


def test_an_unbelievable_reboot_offers_nothing() -> None:
    """Counters that no pinned key signed never become a baseline."""
    forged = HostRound(trust={"ak": OTHER.public, **baseline(reset_count=6)}).verdict()
    assert isinstance(forged, Rejected)
    assert (forged.check, forged.new_baseline) == (6, None)
