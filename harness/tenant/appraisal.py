"""Appraisal of evidence: the numbered checks, in their order; the first failure is the verdict.

Checks (DESIGN 3.5):
    1. JSON types and bounds.
    2. ``host_id`` is the host that this guest is enrolled under.
    3. Leaf rebuilt from our own request; index, size and length of the inclusion path.
    4. The attest parses completely as a quote made inside a TPM; its selection has the allowed form.
    5. extraData is the qualifying data of the root that the path gives, and of that tree size.
    6. The pinned AK is acceptable, the signature is its own over the received bytes, qualifiedSigner is the pinned one,
       and for a host that of a primary of the owner hierarchy (DESIGN 3.6).
    7. The signed selection covers every requested PCR.
    8. The values are exactly the signed selection, and hash to the signed digest.
    9. The policy names at least one PCR, only ones we requested, and each has an allowed value.
    10. Clock and counters against the baseline that was stored when our nonce was created.
    11. The request's binding is that of the guest evidence of this round.

Guest evidence passes 4 to 10 with the guest's nonce as extraData.

Invariants:
    1. No check can be switched off; a missing key or reference value is a refusal.
    2. Pure: nothing is stored or asked here. The caller owes the deadline, one use per nonce, and the storing of an
       accepted clock (`advance`).
    3. Accepted evidence is another type than received evidence.

Spec: DESIGN 3.5; RFC 9334 (appraisal).
"""

from __future__ import annotations

import hmac

from harness import protocol
from harness.attest import (
    ST_ATTEST_QUOTE,
    TPM_GENERATED_VALUE,
    Attest,
    Public,
    QuoteInfo,
    owner_qualified_name,
    parse_attest,
    parse_signature,
    verify_signature,
)
from harness.credential import check_ak
from harness.errors import (
    AppraisalError,
    BindingMismatch,
    ClockNotSafe,
    ClockWentBack,
    HostRebooted,
    MalformedMessage,
    NotATpmQuote,
    PcrDigestMismatch,
    QualifyingDataMismatch,
    QuoteSignatureInvalid,
    ReferenceValueMismatch,
    SelectionNotCovered,
    UnacceptableKey,
    UntrustedKey,
    WrongHost,
)
from harness.keylime_wire import GuestEvidence
from harness.merkle import leaf_hash, root_from_proof
from harness.messages import ProviderEvidence, parse_provider_evidence
from harness.tenant.policy import Policy
from harness.tenant.verdict import (
    Accepted,
    AppraisedEvidence,
    GuestTrust,
    HostTrust,
    Rejected,
    SentRequest,
    Verdict,
    advance,
)
from harness.values import HASH_ALGS, SIZE_OF_SELECT, ClockBaseline, HashAlg, PcrSelection, PcrValues, pcrs_in

__all__ = [
    "TRANSPORT_KEY_PCR",
    "Accepted",
    "AppraisedEvidence",
    "GuestTrust",
    "HostTrust",
    "Rejected",
    "SentRequest",
    "Verdict",
    "advance",
    "appraise_guest",
    "appraise_host",
    "verify_transport_key",
]

TRANSPORT_KEY_PCR = 16
"""Keylime extends the digest of its transport key here (facts of Keylime's agent protocol)."""
_BANK_LIMIT = 3


def appraise_host(results: object, sent: SentRequest, trust: HostTrust, *, guest_binding: bytes | None) -> Verdict:
    """Appraises a provider's answer.

    Args:
        results: as received.
        sent: our own request.
        trust: what is pinned and expected.
        guest_binding: binding of the guest evidence that was appraised in this round; None exactly for a host-only
            request. Whoever has no guest evidence to hold a bound request against gives the request's own binding, and
            then owes check 11.

    Returns:
        The verdict. Everything but an AppraisalError propagates: it is a fault, not a finding.
    """
    proven: PcrValues | None = None
    try:
        evidence = parse_provider_evidence(results)  # 1
        if evidence.host_id != str(trust.host_id):  # 2
            raise WrongHost("the answer is of another host than the one this guest is enrolled under")
        root = _root(evidence, sent)  # 3
        attest, quote = _quote(evidence.attest)  # 4
        expected = protocol.qualifying_data(evidence.proof.tree_size, root)
        _check_extra_data(attest, expected)  # 5
        _check_signature(attest, evidence.signature, trust.ak)  # 6
        _check_signer(attest, trust)  # 6
        _check_coverage(quote, sent.request.selection)  # 7
        _check_values(quote, evidence.pcrs, trust.ak)  # 8
        proven = evidence.pcrs
        _check_policy(trust.policy, sent.request.selection, evidence.pcrs)  # 9
        seen = _check_clock(attest, trust.baseline)  # 10
        _check_binding(sent.request.binding, guest_binding)  # 11
    except HostRebooted as error:
        return _rejected(error, proven, _baseline_of(attest))
    except AppraisalError as error:
        return _rejected(error, proven)
    return Accepted(_appraised(seen, evidence.pcrs, sent.request.selection, trust.policy))


def appraise_guest(evidence: GuestEvidence, nonce: bytes, trust: GuestTrust, requested: PcrSelection) -> Verdict:
    """Appraises a guest agent's quote: checks 4 to 10.

    Args:
        evidence: as received.
        nonce: our guest nonce; extraData must be exactly these bytes.
        trust: what is pinned and expected.
        requested: the PCRs we asked for, PCR 16 not among them.

    Returns:
        The verdict; ClockWentBack with equal counters means that vTPM state was cloned or rolled back.
    """
    proven: PcrValues | None = None
    try:
        attest, quote = _quote(evidence.attest)  # 4
        _check_extra_data(attest, nonce)  # 5
        # A guest's AK is pinned by its Name alone: stock agents keep theirs under other parents than the owner.
        _check_signature(attest, evidence.signature, trust.ak)  # 6
        _check_coverage(quote, requested)  # 7
        _check_values(quote, evidence.pcrs, trust.ak)  # 8
        proven = evidence.pcrs
        if trust.transport_key_pem is not None:
            _check_transport_key(evidence.pcrs, requested, trust.transport_key_pem)  # 9
        _check_policy(trust.policy, requested, evidence.pcrs)  # 9
        seen = _check_clock(attest, trust.baseline)  # 10
    except HostRebooted as error:
        return _rejected(error, proven, _baseline_of(attest))
    except AppraisalError as error:
        return _rejected(error, proven)
    return Accepted(_appraised(seen, evidence.pcrs, requested, trust.policy))


def verify_transport_key(evidence: GuestEvidence, nonce: bytes, ak: Public, transport_key_pem: bytes) -> None:
    """Checks that a guest's TPM vouches for a transport key: checks 4 to 8, and PCR 16 in the SHA-256 bank.

    For Keylime's identity quote, which is asked for before there is a policy.

    Raises:
        AppraisalError: the failed check.
    """
    attest, quote = _quote(evidence.attest)
    _check_extra_data(attest, nonce)
    _check_signature(attest, evidence.signature, ak)
    _check_values(quote, evidence.pcrs, ak)
    _check_transport_key(evidence.pcrs, PcrSelection.of(HashAlg.SHA256, 1), transport_key_pem)


# --- the checks -------------------------------------------------------------------------------------------------------


def _root(evidence: ProviderEvidence, sent: SentRequest) -> bytes:
    data = protocol.leaf_data(sent.request, requester=sent.requester, vtpm_ek=sent.vtpm_ek)
    return root_from_proof(leaf_hash(data), evidence.proof)


def _quote(data: bytes) -> tuple[Attest, QuoteInfo]:
    try:
        attest = parse_attest(data)
    except MalformedMessage as error:
        raise NotATpmQuote(error.detail) from error
    if attest.magic != TPM_GENERATED_VALUE:
        raise NotATpmQuote("magic is not TPM_GENERATED_VALUE: this was not made inside a TPM")
    if attest.type != ST_ATTEST_QUOTE or not isinstance(attest.attested, QuoteInfo):
        raise NotATpmQuote("the attest is not a quote")
    entries = attest.attested.selection
    if not 1 <= len(entries) <= _BANK_LIMIT:
        raise NotATpmQuote(f"the quote selects {len(entries)} banks, not 1 to {_BANK_LIMIT}")
    if any(entry.hash_alg not in HASH_ALGS or entry.size_of_select != SIZE_OF_SELECT for entry in entries):
        raise NotATpmQuote("the quote selects a bank that is not allowed, or not by three bytes")
    if len({entry.hash_alg for entry in entries}) != len(entries):
        raise NotATpmQuote("the quote selects a bank twice")
    return attest, attest.attested


def _check_extra_data(attest: Attest, expected: bytes) -> None:
    if not _equal(attest.extra_data, expected):
        raise QualifyingDataMismatch("the quote was not made for this request: extraData differs")


def _check_signature(attest: Attest, signature: bytes, ak: Public) -> None:
    try:
        check_ak(ak)
    except UnacceptableKey as error:
        raise UntrustedKey(error.detail) from error
    try:
        parsed = parse_signature(signature)
    except MalformedMessage as error:
        raise QuoteSignatureInvalid(error.detail) from error
    verify_signature(ak, parsed, attest.raw)


def _check_signer(attest: Attest, trust: HostTrust) -> None:
    if not _equal(attest.qualified_signer, trust.ak_qualified_name):
        raise UntrustedKey("qualifiedSigner is not the pinned one")
    # TPM2_Clear must destroy the AK: else a clear could hide a reboot from its counters.
    if not _equal(trust.ak_qualified_name, owner_qualified_name(trust.ak)):
        raise UntrustedKey("the AK is not a primary of the owner hierarchy")


def _check_coverage(quote: QuoteInfo, requested: PcrSelection) -> None:
    signed = {HASH_ALGS[entry.hash_alg]: entry.mask for entry in quote.selection}
    for bank, mask in requested.banks:
        missing = mask & ~signed.get(bank, 0)
        if missing:
            raise SelectionNotCovered(f"the signed selection lacks PCR {next(pcrs_in(missing))} of {bank.text}")


def _check_values(quote: QuoteInfo, pcrs: PcrValues, ak: Public) -> None:
    signed = {HASH_ALGS[entry.hash_alg]: list(pcrs_in(entry.mask)) for entry in quote.selection if entry.mask}
    if pcrs.keys() != signed.keys() or any(pcrs[bank].keys() != set(chosen) for bank, chosen in signed.items()):
        raise PcrDigestMismatch("the values are not exactly those of the signed selection")
    if any({len(value) for value in values.values()} != {bank.digest_size} for bank, values in pcrs.items()):
        raise PcrDigestMismatch("a value does not have the length of its bank's digests")
    if ak.scheme_hash is None:
        raise UntrustedKey("the AK's scheme fixes no hash")
    digest = ak.scheme_hash.digest(b"".join(pcrs[bank][pcr] for bank, chosen in signed.items() for pcr in chosen))
    if not _equal(digest, quote.pcr_digest):
        raise PcrDigestMismatch("the values do not hash to the signed pcrDigest")


def _check_transport_key(pcrs: PcrValues, requested: PcrSelection, pem: bytes) -> None:
    for bank, _ in requested.banks:
        expected = bank.digest(bytes(bank.digest_size) + bank.digest(pem))
        if not _equal(pcrs.get(bank, {}).get(TRANSPORT_KEY_PCR, b""), expected):
            raise ReferenceValueMismatch(f"PCR {TRANSPORT_KEY_PCR} does not vouch for the transport key")


def _check_policy(policy: Policy | None, requested: PcrSelection, pcrs: PcrValues) -> None:
    if policy is None or not policy.selection.banks:
        raise ReferenceValueMismatch("the policy names no PCR")
    if not policy.selection.within(requested):
        raise ReferenceValueMismatch("the policy names a PCR that was not requested")
    for bank, mask in policy.selection.banks:
        allowed, values = policy.allowed[bank], pcrs[bank]
        for pcr in pcrs_in(mask):
            if not allowed[pcr]:
                raise ReferenceValueMismatch(f"the policy allows no value for PCR {pcr} of {bank.text}")
            if values[pcr] not in allowed[pcr]:
                raise ReferenceValueMismatch(f"PCR {pcr} of {bank.text} does not have an allowed value")


def _check_clock(attest: Attest, baseline: ClockBaseline | None) -> ClockBaseline:
    seen = _baseline_of(attest)
    if baseline is not None:
        if (seen.reset_count, seen.restart_count) != (baseline.reset_count, baseline.restart_count):
            raise HostRebooted("the TPM was reset or restarted since the baseline")
        # None only in a saved trust file, whose form has no firmware version (DESIGN 3.9).
        if baseline.firmware_version not in {None, seen.firmware_version}:
            raise HostRebooted("the TPM's firmware version changed since the baseline")
    if not attest.clock_info.safe:
        raise ClockNotSafe("the TPM's clock is not safe: it may have gone back after a loss of power")
    if baseline is not None and seen.clock <= baseline.clock:
        raise ClockWentBack("equal counters and a clock that is not greater: state was replayed or rolled back")
    return seen


def _check_binding(requested: bytes | None, appraised: bytes | None) -> None:
    if (requested is None) != (appraised is None) or not _equal(requested or b"", appraised or b""):
        raise BindingMismatch("the host quote is bound to other guest evidence than that of this round")


def _baseline_of(attest: Attest) -> ClockBaseline:
    info = attest.clock_info
    return ClockBaseline(
        clock=info.clock,
        reset_count=info.reset_count,
        restart_count=info.restart_count,
        firmware_version=attest.firmware_version,
    )


def _appraised(
    seen: ClockBaseline, pcrs: PcrValues, requested: PcrSelection, policy: Policy | None
) -> AppraisedEvidence:
    judged = policy.selection if policy else PcrSelection()
    unjudged = ((bank, mask & ~judged.mask(bank)) for bank, mask in requested.banks)
    left = PcrSelection(tuple((bank, mask) for bank, mask in unjudged if mask))
    return AppraisedEvidence(baseline=seen, values=pcrs, unjudged=left)


def _rejected(error: AppraisalError, proven: PcrValues | None, new_baseline: ClockBaseline | None = None) -> Rejected:
    return Rejected(
        check=error.check,
        error=type(error).__name__,
        detail=error.detail,
        new_baseline=new_baseline,
        proven=proven,
    )


def _equal(left: bytes, right: bytes) -> bool:
    return hmac.compare_digest(left, right)
