"""The requests of a load, and the verification of their answers after it.

Invariants:
    1. No nonce is used twice.
    2. An answer is verified as a tenant does it (`tenant.appraisal`), against reference values of the host's boot.

Spec: DESIGN 3.1, 3.5.
"""

from __future__ import annotations

import base64
import json
import os
import random
from collections import Counter
from collections.abc import Sequence
from typing import Protocol
from urllib.parse import urlencode

from harness.attest import owner_qualified_name, parse_public
from harness.bench_orders import Order, Quotes
from harness.errors import HarnessError
from harness.messages import VerifierQuery, parse_json, verifier_query
from harness.pki import load_certificate
from harness.protocol import QuoteRequest
from harness.sim.boot import Scenario, reference_values
from harness.tenant.appraisal import HostTrust, Rejected, SentRequest, appraise_host
from harness.tenant.policy import Policy
from harness.tls import certificate_requester
from harness.values import HashAlg, HostId, Nonce, parse_host_id, pcrs_in

_BANK = HashAlg.SHA256
_ANSWER_LIMIT = 1 << 20
_COUNTER_SIZE = 8
_PREFIX_SIZE = 24

Kept = tuple[Sequence[int], Sequence[bytes], Sequence[tuple[int, int]]]
"""Of one load: status, body, and (tenant, number of the nonce) of each request."""


class RequestMaker(Protocol):
    """Makes the requests of a load."""

    def request(self) -> tuple[bytes, int]:
        """The next request, and the number of its nonce."""


class FixedRequests:
    """The same request again and again.

    Args:
        order: where it goes.
    """

    def __init__(self, order: Order) -> None:
        self._bytes = _head(order, order.path, prefer=False)

    def request(self) -> tuple[bytes, int]:
        """See `RequestMaker`."""
        return self._bytes, 0


class QuoteRequests:
    """Requests for a quote, each with a nonce of its own.

    Args:
        order: where they go.
        quotes: which host is asked.
    """

    def __init__(self, order: Order, quotes: Quotes) -> None:
        self.host_id: HostId = parse_host_id(quotes.host_id)
        self._mask = quotes.mask
        self._prefix = os.urandom(_PREFIX_SIZE)
        self._made = 0
        head = _head(order, f"/v1/verifier?{urlencode(self.query(0))}", prefer=True)
        self._before, self._after = head.split(self.of(0).nonce.value.hex().encode())

    def request(self) -> tuple[bytes, int]:
        """See `RequestMaker`."""
        self._made += 1
        nonce = self._prefix + self._made.to_bytes(_COUNTER_SIZE, "big")
        return self._before + nonce.hex().encode() + self._after, self._made

    def of(self, number: int) -> QuoteRequest:
        """The request with this nonce."""
        nonce = Nonce(self._prefix + number.to_bytes(_COUNTER_SIZE, "big"))
        return QuoteRequest(nonce=nonce, bank=_BANK, mask=self._mask)

    def query(self, number: int) -> list[tuple[str, str]]:
        """Parameters of the request with this nonce, for another client."""
        return verifier_query(VerifierQuery(request=self.of(number), host_id=self.host_id))


def body_of(results: object) -> bytes:
    """Body of an answer with these results, as a load generator keeps it."""
    return json.dumps({"results": results}).encode()


def maker_of(order: Order) -> FixedRequests | QuoteRequests:
    """What makes the requests of an order. Raises MalformedMessage for a host id that is none."""
    return FixedRequests(order) if order.quotes is None else QuoteRequests(order, order.quotes)


def _head(order: Order, path: str, *, prefer: bool) -> bytes:
    lines = [f"GET {path} HTTP/1.1", f"Host: {order.host}:{order.port}", "Accept: application/json"]
    lines += ["Prefer: wait=30"] if prefer else []
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def verified(order: Order, make: RequestMaker, loads: Sequence[Kept]) -> tuple[int, list[str]]:
    """Appraises answers as the tenants do.

    Args:
        order: says how many.
        make: made their requests.
        loads: what was kept.

    Returns:
        How many were accepted, and why the others were not, each reason with its count.
    """
    if order.quotes is None or not isinstance(make, QuoteRequests):
        return 0, []
    answers = [
        (body, tenant, nonce)
        for statuses, bodies, sent in loads
        for status, body, (tenant, nonce) in zip(statuses, bodies, sent, strict=True)
        if status == 200
    ]
    if len(answers) > order.quotes.verify:
        answers = random.Random(order.seed).sample(answers, order.quotes.verify)  # noqa: S311 - repeatable on purpose
    trust = _trust(order.quotes, make.host_id)
    requesters = [certificate_requester(load_certificate(certificate)) for certificate, _ in order.certificates]
    wrong: Counter[str] = Counter()
    for body, tenant, nonce in answers:
        sent = SentRequest(request=make.of(nonce), requester=requesters[tenant], vtpm_ek=None)
        if reason := _why_not(body, sent, trust):
            wrong[reason] += 1
    return len(answers) - wrong.total(), [f"{count} x {reason}" for reason, count in wrong.items()]


def _trust(quotes: Quotes, host_id: HostId) -> HostTrust:
    ak = parse_public(base64.b64decode(quotes.ak))
    values = reference_values(Scenario.load(quotes.scenario), _BANK)
    return HostTrust(
        host_id=host_id,
        ak=ak,
        ak_qualified_name=owner_qualified_name(ak),
        policy=Policy.of(_BANK, {pcr: values[pcr] for pcr in pcrs_in(quotes.mask)}),
        baseline=None,
    )


def _why_not(body: bytes, sent: SentRequest, trust: HostTrust) -> str | None:
    try:
        answer = parse_json(body, limit=_ANSWER_LIMIT)
    except HarnessError as error:
        return error.detail
    if not isinstance(answer, dict) or "results" not in answer:
        return "an answer without results"
    verdict = appraise_host(answer["results"], sent, trust, guest_binding=None)
    return f"{verdict.error}: {verdict.detail}" if isinstance(verdict, Rejected) else None
