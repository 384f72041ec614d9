"""The invariant checker: judges every answer that was delivered, from what its own requester knows."""

from __future__ import annotations

import hmac
from collections.abc import Mapping

from harness import merkle, protocol
from harness.attest import Public, QuoteInfo, parse_attest, parse_signature, verify_signature
from harness.provider.batch import Answer, PendingQuote, SharedAnswer
from harness.values import AgentId, HashAlg, PcrSelection


class AnswerChecker:
    """Asserts that answers are evidence for exactly their requests, and show nobody a PCR that it may not see.

    1. The leaf, rebuilt from the request, leads with the proof to the root that the quote signs.
    2. The AK signed the quote.
    3. The signed selection covers the request and lies inside the tenant's allowlist.
    4. The values are those of the signed selection, and hash to the signed digest.

    What all answers of a batch share is looked at once.

    Args:
        ak: the key that must have signed.
    """

    def __init__(self, ak: Public) -> None:
        self._ak = ak
        self._shared: dict[int, tuple[SharedAnswer, bytes, PcrSelection]] = {}
        self.checked = 0

    def check(self, answer: Answer, pending: PendingQuote, vtpm_eks: Mapping[AgentId, bytes]) -> PcrSelection:
        """The signed selection.

        Args:
            answer: as delivered.
            pending: what was asked.
            vtpm_eks: digest of the vTPM's EK of each guest when the batch was sealed.
        """
        _, extra_data, signed = self._shared.get(id(answer.shared)) or self._open(answer.shared)
        agent_id = pending.request.agent_id
        vtpm_ek = None if agent_id is None else vtpm_eks[agent_id]
        data = protocol.leaf_data(pending.request, requester=pending.requester, vtpm_ek=vtpm_ek)
        root = merkle.root_from_proof(merkle.leaf_hash(data), answer.proof)
        expected = protocol.qualifying_data(answer.proof.tree_size, root)
        assert hmac.compare_digest(extra_data, expected), "the quote is not over this request's batch"
        assert pending.request.selection.within(signed), "the quote does not cover the request"
        assert signed.within(pending.allowlist), "the tenant was shown a PCR that it may not see"
        self.checked += 1
        return signed

    def _open(self, shared: SharedAnswer) -> tuple[SharedAnswer, bytes, PcrSelection]:
        quote = shared.quote
        attest = parse_attest(quote.attest)
        verify_signature(self._ak, parse_signature(quote.signature), quote.attest)
        assert isinstance(attest.attested, QuoteInfo)
        signed = PcrSelection(
            tuple((HashAlg(entry.hash_alg), entry.mask) for entry in attest.attested.selection if entry.mask)
        )
        assert {(bank, pcr) for bank, values in quote.pcrs.items() for pcr in values} == set(signed)
        values = b"".join(quote.pcrs[bank][pcr] for bank, pcr in signed)
        assert (self._ak.scheme_hash or HashAlg.SHA256).digest(values) == attest.attested.pcr_digest
        self._shared[id(shared)] = opened = (shared, attest.extra_data, signed)  # kept: its id stays its own
        return opened


def verify_answer(
    answer: Answer, pending: PendingQuote, ak: Public, vtpm_eks: Mapping[AgentId, bytes] | None = None
) -> PcrSelection:
    """The signed selection of one answer; see `AnswerChecker`."""
    return AnswerChecker(ak).check(answer, pending, vtpm_eks or {})
