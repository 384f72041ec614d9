"""The provider verifier: authenticates tenants, admits or refuses, forwards to the host, answers.

It can state nothing itself: it forwards fields, and hands back what a host agent's TPM signed.

Invariants:
    1. Whose request it is comes from the client certificate: the tenant from the authority that signed it, the
       requester from its key. Nothing in the request can change either.
    2. Nothing is forwarded that was not parsed and admitted; every refusal is typed, counted and told (`refusal_log`).
    3. A tenant's enrolment orders in work are bounded, so that one tenant cannot keep the others from enrolling.
    4. A tenant that is removed, or gets another authority, gets no answer to what it has asked before.
    5. The host agent is told how long an answer is of use from then on: what has passed here is taken off.

Owner: the service `ProviderVerifier`.

Spec: DESIGN 3.1, 3.3, 3.6; docs/protocol.md (enrolment).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager

from aiohttp import web

from harness.credential import parse_keylime_blob
from harness.errors import AccessDenied, HarnessError, MalformedMessage, ShareExhausted, WouldBeLate
from harness.messages import parse_verifier_query
from harness.metrics import Metrics
from harness.pki import Role
from harness.prefer import HEADER as PREFER
from harness.prefer import parse_wait
from harness.provider.admission import Admission, Admitted
from harness.provider.batch import PendingQuote
from harness.provider.clock import Clock, SystemClock
from harness.provider.host_links import HostLinks
from harness.provider.proxy_metrics import ProxyFigures
from harness.provider.refusal_log import RefusalLog
from harness.provider.stream import ActivateOrder, CertifyOrder, IdentityOrder, decode_base64
from harness.tls import Peer
from harness.values import Nonce, parse_host_id
from harness.web import Route, peer_of, read_object
from harness.web_call import Call, call_of

ENROLMENTS_PER_TENANT = 6


class Proxy:
    """The calls of the provider verifier.

    Args:
        admission: who may ask what.
        links: to the hosts.
        clock: for the time in which an answer is of use.
        metrics: of the service.
    """

    def __init__(
        self,
        admission: Admission,
        links: HostLinks,
        *,
        clock: Clock | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self._admission = admission
        self._links = links
        self._clock = clock or SystemClock()
        self._figures = ProxyFigures(metrics or Metrics("provider-verifier"), links.states)
        self._enrolling: Counter[str] = Counter()
        self._refusals = RefusalLog(self._clock)
        self._tenants: Mapping[str, str] = {}
        self._in_work: dict[str, set[Call]] = {}

    def follow(self, tenants: Mapping[str, str]) -> None:
        """Ends what tenants have in work that are none any more.

        Args:
            tenants: CA certificate (PEM) by tenant.
        """
        for name in [name for name, pem in self._tenants.items() if tenants.get(name) != pem]:
            for call in self._in_work.pop(name, ()):
                call.end(AccessDenied("this tenant was removed"))
        self._tenants = dict(tenants)
        self._figures.follow(tenants)
        self._refusals.follow(tenants)

    @property
    def routes(self) -> list[Route]:
        """Calls of tenants."""
        verifier = {Role.TENANT_VERIFIER}
        tenant = {Role.TENANT_REGISTRAR, Role.TENANT_VERIFIER}  # whichever of its services a tenant enrols hosts with
        return [
            Route("GET", "/v1/verifier", self._counted(self._verifier), roles=verifier),
            Route("GET", "/v1/hosts", self._counted(self._hosts), roles=tenant),
            Route("GET", "/v1/hosts/{host_id}/identity", self._counted(self._identity), roles=tenant),
            Route("POST", "/v1/hosts/{host_id}/activate", self._counted(self._activate), roles=tenant),
            Route("POST", "/v1/hosts/{host_id}/certify", self._counted(self._certify), roles=tenant),
        ]

    def _counted(
        self, handler: Callable[[web.Request, Peer], Awaitable[object]]
    ) -> Callable[[web.Request], Awaitable[object]]:
        async def call(request: web.Request) -> object:
            peer = peer_of(request)
            try:
                with self._figures.call(peer.authority):
                    return await self._while_known(peer.authority, call_of(request), handler(request, peer))
            except HarnessError as error:
                self._refusals.note(peer.authority, error)
                raise

        return call

    async def _while_known(self, tenant: str, call: Call, work: Awaitable[object]) -> object:
        in_work = self._in_work.setdefault(tenant, set())
        in_work.add(call)
        try:
            return await work
        except asyncio.CancelledError as ended:
            if call.refusal is None:
                raise
            raise call.refusal from ended
        finally:
            in_work.discard(call)

    async def _verifier(self, request: web.Request, peer: Peer) -> object:
        until_s = self._clock.monotonic() + parse_wait(request.headers.getall(PREFER, ()))
        query = parse_verifier_query(list(request.query.items()))
        asked = query.request
        if asked.agent_id is not None:
            admitted = await self._admission.admit_guest(peer.authority, asked.agent_id, asked.selection)
        elif query.host_id is not None:
            admitted = await self._admission.admit_host(peer.authority, query.host_id, asked.selection)
        else:
            raise MalformedMessage("one of agent_id and host_id is required")
        left_s = until_s - self._clock.monotonic()
        if left_s <= 0:
            raise WouldBeLate("the request was admitted only when no answer was of use any more")
        pending = PendingQuote(
            request=asked,
            tenant=peer.authority,
            requester=peer.requester,
            allowlist=admitted.allowlist,
            wait_s=left_s,
        )
        return await self._links.link(admitted.host_id).quote(pending)

    async def _hosts(self, _request: web.Request, peer: Peer) -> object:
        return {"hosts": [str(host_id) for host_id in await self._admission.hosts_of(peer.authority)]}

    async def _identity(self, request: web.Request, peer: Peer) -> object:
        admitted = await self._admit(request, peer)
        return await self._links.link(admitted.host_id).ask(IdentityOrder())

    async def _activate(self, request: web.Request, peer: Peer) -> object:
        admitted = await self._admit(request, peer)
        body = await read_object(request, members={"credential"})
        blob = decode_base64(_text(body, "credential"), "credential")
        order = ActivateOrder(credential=parse_keylime_blob(blob), requester=peer.requester)
        with self._share(peer.authority):
            return await self._links.link(admitted.host_id).ask(order)

    async def _certify(self, request: web.Request, peer: Peer) -> object:
        admitted = await self._admit(request, peer)
        body = await read_object(request, members={"nonce"})
        order = CertifyOrder(nonce=Nonce.parse(_text(body, "nonce")))
        with self._share(peer.authority):
            return await self._links.link(admitted.host_id).ask(order)

    async def _admit(self, request: web.Request, peer: Peer) -> Admitted:
        return await self._admission.admit_host(peer.authority, parse_host_id(request.match_info["host_id"]))

    @contextmanager
    def _share(self, tenant: str) -> Iterator[None]:
        if self._enrolling[tenant] >= ENROLMENTS_PER_TENANT:
            raise ShareExhausted(f"tenant has {ENROLMENTS_PER_TENANT} enrolments in work")
        self._enrolling[tenant] += 1
        try:
            yield
        finally:
            self._enrolling[tenant] -= 1


def _text(body: Mapping[str, object], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str):
        raise MalformedMessage(f"{name} must be text")
    return value
