"""Evidence in the wrong place or time, and evidence with any one byte changed."""

from __future__ import annotations

import base64
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.tenant.appraisal import Accepted, GuestTrust, Rejected, advance, appraise_guest, appraise_host
from harness.tenant.policy import Policy
from harness.values import HashAlg, Nonce, PcrSelection
from tests.support.forge import ecc_key, rsa_key, value_of
from tests.support.rounds import BASELINE, GuestRound, HostRound, drop, recode, refused
from tests.support.soft_tpm import sized

ATTESTED_AT = 4 + 2 + 36 + 34 + 25  # magic, type, signer, extraData, clockInfo with firmwareVersion


def judged(results: dict[str, Any], asked: HostRound, **trust: Any) -> Accepted | Rejected:
    """These results, held against what another round asked and trusts."""
    sent = asked.sent_request()
    return appraise_host(results, sent, replace(asked.host_trust(), **trust), guest_binding=sent.request.binding)


# --- replay -----------------------------------------------------------------------------------------------------------


def test_an_answer_is_believed_once() -> None:
    """What was accepted raised the clock: the same answer to the same request is rolled-back state now."""
    asked = HostRound()
    results = asked.results()
    first = judged(results, asked)
    assert isinstance(first, Accepted)
    later = advance(BASELINE, first.evidence.baseline)
    assert refused(judged(results, asked, baseline=later)) == (10, "ClockWentBack")


@pytest.mark.parametrize(
    "asked",
    [
        pytest.param(HostRound(requester=bytes(32)), id="of-another-tenant"),
        pytest.param(HostRound(vtpm_ek=bytes(32)), id="for-another-vtpm"),
        pytest.param(HostRound(guest=(b"\x00\x0b" + bytes(32), b"a later attest")), id="for-later-guest-evidence"),
        pytest.param(HostRound(guest=(b"\x00\x0c" + bytes(32), b"guest attest")), id="for-another-guest-ak"),
        pytest.param(HostRound(guest=None), id="for-a-guest-when-none-was-named"),
        pytest.param(HostRound(requested=(0, 4, 7)), id="for-more-pcrs"),
    ],
)
def test_an_honest_answer_to_another_request_is_none_to_ours(asked: HostRound) -> None:
    """Signature, values and proof are good; it was not made for us."""
    assert isinstance(HostRound().verdict(), Accepted)
    assert isinstance(judged(asked.results(), asked), Accepted)
    assert refused(judged(HostRound().results(), asked)) == (5, "QualifyingDataMismatch")


def test_a_replayed_batch_is_not_for_a_new_nonce() -> None:
    """An older answer, everything else equal."""
    asked = HostRound()
    sent = replace(asked.sent_request(), request=replace(asked.sent_request().request, nonce=Nonce(bytes(32))))
    verdict = appraise_host(asked.results(), sent, asked.host_trust(), guest_binding=sent.request.binding)
    assert refused(verdict) == (5, "QualifyingDataMismatch")


@pytest.mark.parametrize("part", ["attest", "signature", "proof"])
def test_parts_of_two_answers_are_not_one(part: str) -> None:
    """Another batch's quote, signature or proof does not fit this one's rest."""
    mixed, other = HostRound().results(), HostRound(place=(4, 7), attest={"clock": 2000}).results()
    mixed[part] = other[part]
    check, _ = refused(judged(mixed, HostRound()))
    assert check == {"attest": 5, "signature": 6, "proof": 5}[part]


# --- another structure ------------------------------------------------------------------------------------------------


def certification_instead(results: dict[str, Any]) -> None:
    """A well-formed certification by the AK, with the right extraData."""
    quote, key = base64.b64decode(results["attest"]), ecc_key()
    attest = quote[:4] + b"\x80\x17" + quote[6:ATTESTED_AT] + sized(key.public.name) * 2
    results["attest"] = base64.b64encode(attest).decode()
    results["signature"] = base64.b64encode(key.sign(attest)).decode()


def test_a_certification_is_no_quote() -> None:
    """The AK certifies too; that says nothing about PCRs."""
    verdict = HostRound(edits=[certification_instead]).verdict()
    assert refused(verdict) == (4, "NotATpmQuote")
    assert isinstance(verdict, Rejected)
    assert verdict.detail == "the attest is not a quote"


def test_a_cut_attest_is_no_quote_at_any_length() -> None:
    """Nor is one with more behind it."""
    whole = len(base64.b64decode(HostRound().results()["attest"]))
    for size in range(whole):
        verdict = HostRound(edits=[recode("attest", lambda data, size=size: data[:size])]).verdict()  # type: ignore[misc]
        assert refused(verdict) == (4, "NotATpmQuote")
    assert refused(HostRound(edits=[recode("attest", lambda data: data * 2)]).verdict()) == (4, "NotATpmQuote")


def test_a_cut_signature_is_none_at_any_length() -> None:
    """RSA and ECDSA."""
    for key in (ecc_key(), rsa_key()):
        whole = HostRound(key=key).results()
        honest = base64.b64decode(whole["signature"])
        for size in range(len(honest)):
            cut = whole | {"signature": base64.b64encode(honest[:size]).decode()}
            assert refused(judged(cut, HostRound(key=key))) == (6, "QuoteSignatureInvalid")


@pytest.mark.parametrize("name", ["host_id", "attest", "signature", "pcrs", "proof"])
def test_a_missing_member_is_malformed(name: str) -> None:
    """Nothing stands for what is not there."""
    assert refused(HostRound(edits=[drop(name)]).verdict()) == (1, "MalformedEvidence")


# --- any byte ---------------------------------------------------------------------------------------------------------

HONEST = {"ecdsa": HostRound(), "rsassa": HostRound(key=rsa_key())}
RESULTS = {name: made.results() for name, made in HONEST.items()}


def flipped(data: bytes, where: int, flip: int) -> bytes:
    """The bytes with one of them changed."""
    spoilt = bytearray(data)
    spoilt[where % len(spoilt)] ^= flip
    return bytes(spoilt)


@given(
    st.sampled_from(list(HONEST)), st.sampled_from(["attest", "signature"]), st.integers(0, 4095), st.integers(1, 255)
)
def test_any_changed_byte_of_what_is_signed_is_refused(name: str, member: str, where: int, flip: int) -> None:
    """Attest and signature, each byte of them; by checks 4 to 6, never later."""
    spoilt = base64.b64encode(flipped(base64.b64decode(RESULTS[name][member]), where, flip)).decode()
    check, _ = refused(judged(RESULTS[name] | {member: spoilt}, HONEST[name]))
    assert check in ({4, 5, 6} if member == "attest" else {6})


@given(st.sampled_from(sorted(RESULTS["ecdsa"]["pcrs"]["sha256"])), st.integers(0, 31), st.integers(1, 255))
def test_any_changed_byte_of_a_value_is_refused(pcr: str, where: int, flip: int) -> None:
    """Also of a PCR that we did not ask for and do not judge."""
    values = RESULTS["ecdsa"]["pcrs"]["sha256"]
    spoilt = {"sha256": values | {pcr: flipped(bytes.fromhex(values[pcr]), where, flip).hex()}}
    assert refused(judged(RESULTS["ecdsa"] | {"pcrs": spoilt}, HONEST["ecdsa"])) == (8, "PcrDigestMismatch")


@given(st.integers(0, 2), st.integers(0, 31), st.integers(1, 255))
def test_any_changed_byte_of_a_proof_is_refused(level: int, where: int, flip: int) -> None:
    """Every sibling leads to the signed root, or the quote is not for us."""
    proof = RESULTS["ecdsa"]["proof"]
    hashes = [
        flipped(bytes.fromhex(text), where, flip).hex() if place == level else text
        for place, text in enumerate(proof["hashes"])
    ]
    spoilt = RESULTS["ecdsa"] | {"proof": proof | {"hashes": hashes}}
    assert refused(judged(spoilt, HONEST["ecdsa"])) == (5, "QualifyingDataMismatch")


@given(st.integers(0, 1 << 21), st.integers(0, 1 << 21))
def test_no_other_place_in_the_tree_is_believed(index: int, size: int) -> None:
    """Index and size are under the signature, directly or through the path."""
    proof = RESULTS["ecdsa"]["proof"]
    if (index, size) == (proof["leaf_index"], proof["tree_size"]):
        return
    moved = RESULTS["ecdsa"] | {"proof": proof | {"leaf_index": index, "tree_size": size}}
    assert refused(judged(moved, HONEST["ecdsa"]))[0] in {3, 5}


# --- the guest's own evidence -----------------------------------------------------------------------------------------

GUEST = GuestRound()
GUEST_EVIDENCE = GUEST.evidence()
REQUESTED = PcrSelection.of(HashAlg.SHA256, 0x81)
TRUST = GuestTrust(
    ak=GUEST.key.public,
    policy=Policy.of(HashAlg.SHA256, {0: value_of(HashAlg.SHA256, 0)}),
    baseline=BASELINE,
    transport_key_pem=GUEST.pem,
)


@given(st.sampled_from(["attest", "signature"]), st.integers(0, 4095), st.integers(1, 255))
def test_any_changed_byte_of_guest_evidence_is_refused(member: str, where: int, flip: int) -> None:
    """The same for a guest."""
    changes: dict[str, Any] = {member: flipped(getattr(GUEST_EVIDENCE, member), where, flip)}
    spoilt = replace(GUEST_EVIDENCE, **changes)
    verdict = appraise_guest(spoilt, GUEST.nonce, TRUST, REQUESTED)
    assert refused(verdict)[0] in {4, 5, 6}


def test_guest_evidence_is_believed_once() -> None:
    """A second time its clock is no later: a clone or rolled-back state."""
    first = appraise_guest(GUEST_EVIDENCE, GUEST.nonce, TRUST, REQUESTED)
    assert isinstance(first, Accepted)
    trust = replace(TRUST, baseline=advance(BASELINE, first.evidence.baseline))
    assert refused(appraise_guest(GUEST_EVIDENCE, GUEST.nonce, trust, REQUESTED)) == (10, "ClockWentBack")


def test_guest_and_host_evidence_do_not_stand_for_each_other() -> None:
    """A host's quote is none of the guest's, even where one key had signed both."""
    results = HostRound().results()
    as_guests = replace(
        GUEST_EVIDENCE,
        attest=base64.b64decode(results["attest"]),
        signature=base64.b64decode(results["signature"]),
    )
    assert refused(appraise_guest(as_guests, GUEST.nonce, TRUST, REQUESTED))[0] == 5
    as_hosts = results | {
        "attest": base64.b64encode(GUEST_EVIDENCE.attest).decode(),
        "signature": base64.b64encode(GUEST_EVIDENCE.signature).decode(),
    }
    assert refused(judged(as_hosts, HostRound()))[0] == 5
