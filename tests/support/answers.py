"""The invariant checker: judges every answer that was delivered, from what its own requester knows."""

from __future__ import annotations

import hmac
from collections.abc import Mapping

from harness import merkle, protocol
from harness.attest import Public, QuoteInfo, parse_attest, parse_signature, verify_signature
from harness.provider.batch import PendingQuote
from harness.provider.batcher import Answer
from harness.values import AgentId, HashAlg, PcrSelection


def verify_answer(
    answer: Answer, pending: PendingQuote, ak: Public, vtpm_eks: Mapping[AgentId, bytes] | None = None
) -> PcrSelection:
    """Asserts that ``answer`` is evidence for exactly this request, and shows it no PCR that it may not see.

    1. The leaf, rebuilt from the request, leads with the proof to the root that the quote signs.
    2. The AK signed the quote.
    3. The signed selection covers the request and lies inside the tenant's allowlist.
    4. The values are those of the signed selection, and hash to the signed digest.

    Returns:
        The signed selection.
    """
    agent_id = pending.request.agent_id
    vtpm_ek = None if agent_id is None else (vtpm_eks or {})[agent_id]
    data = protocol.leaf_data(pending.request, requester=pending.requester, vtpm_ek=vtpm_ek)
    root = merkle.root_from_proof(merkle.leaf_hash(data), answer.proof)
    quote = answer.shared.quote
    attest = parse_attest(quote.attest)
    expected = protocol.qualifying_data(answer.proof.tree_size, root)
    assert hmac.compare_digest(attest.extra_data, expected), "the quote is not over this request's batch"
    verify_signature(ak, parse_signature(quote.signature), quote.attest)
    assert isinstance(attest.attested, QuoteInfo)
    signed = PcrSelection(
        tuple((HashAlg(entry.hash_alg), entry.mask) for entry in attest.attested.selection if entry.mask)
    )
    assert pending.request.selection.within(signed), "the quote does not cover the request"
    assert signed.within(pending.allowlist), "the tenant was shown a PCR that it may not see"
    assert {(bank, pcr) for bank, values in quote.pcrs.items() for pcr in values} == set(signed)
    values = b"".join(quote.pcrs[bank][pcr] for bank, pcr in signed)
    assert (ak.scheme_hash or HashAlg.SHA256).digest(values) == attest.attested.pcr_digest
    return signed
