"""A provider over real sockets: swtpm, host agent's stream, provider verifier, and tenants with certificates."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding

from harness.attest import owner_qualified_name
from harness.config import BatchSettings, Listen, TlsSettings
from harness.door import Bounds
from harness.errors import StoreError
from harness.messages import VerifierQuery, verifier_query
from harness.metrics import Metrics
from harness.peer import PeerClient
from harness.pki import Authority, Role, load_certificate
from harness.protocol import QuoteRequest
from harness.provider.admission import Admission, GuestRecord, Snapshot
from harness.provider.authorities import TenantAuthorities
from harness.provider.host_links import HostLinks, over_tls
from harness.provider.keys import HostKeys
from harness.provider.proxy_routes import Proxy
from harness.provider.stream_routes import Quoting
from harness.sim.tpm_proxy import TpmProxy
from harness.tenant.appraisal import Accepted, HostTrust, Rejected, SentRequest, appraise_host
from harness.tenant.policy import Policy
from harness.tls import certificate_requester, identities_of
from harness.tpm import Tpm
from harness.values import AgentId, ClockBaseline, HashAlg, HostId, PcrSelection
from harness.web import application, serve
from tests.support.batching import WAIT_S, FakeResidency
from tests.support.pendings import a_request
from tests.support.tpms import blank_swtpm

TpmUser = Callable[[Path], AbstractAsyncContextManager[TpmProxy]]
"""Starts something between a TPM's socket and its users."""
CA_CERTIFICATE = b"stands for the vTPM CA's certificate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pki:
    """Authorities and settings of TLS, in files."""

    folder: Path
    authorities: Mapping[str, Authority]

    @classmethod
    def make(cls, folder: Path, *tenants: str) -> Pki:
        authorities = {name: Authority.create(name) for name in ("provider", *tenants)}
        for name, authority in authorities.items():
            authority.write(folder / name)
        return cls(folder=folder, authorities=authorities)

    def tls(self, authority: str, role: Role, name: str, *, trusts: Sequence[str], days: float = 30) -> TlsSettings:
        """Settings of somebody with a new certificate."""
        issued = self.authorities[authority].issue(role, name, days=days)
        certificate, key = issued.write(self.folder / authority, f"{role.value}-{name}")
        trusted = {other: self.folder / other / "ca.pem" for other in trusts}
        return TlsSettings(certificate=certificate, key=key, authorities=trusted)

    def pem(self, tenant: str) -> str:
        return self.authorities[tenant].certificate.public_bytes(Encoding.PEM).decode()


@dataclass(slots=True, kw_only=True)
class ProviderLab:
    """The running parts. ``records`` is what the provider's database would hold; a test may replace it.

    With a ``fault`` it cannot be read.
    """

    pki: Pki
    tpm: Tpm
    keys: HostKeys
    residency: FakeResidency
    quoting: Quoting
    agent_metrics: Metrics
    metrics: Metrics
    agent_url: str
    verifier_url: str = ""
    records: Snapshot
    proxy: Proxy
    admission: Admission
    fault: StoreError | None = None

    @property
    def host_id(self) -> HostId:
        return self.keys.identity.host_id

    def add_guest(self, agent_id: AgentId, tenant: str, ek: bytes | None) -> None:
        """A guest of a tenant; runs here when its vTPM's EK digest is given."""
        guests = {**self.records.guests, agent_id: GuestRecord(tenant=tenant, host_id=self.host_id)}
        self.records = Snapshot(
            tenants=self.records.tenants,
            hosts=self.records.hosts,
            allowlists=self.records.allowlists,
            guests=guests,
        )
        if ek is not None:
            self.residency.states[agent_id] = ek


class Tenant:
    """A tenant's verifier, with what it pinned of the host."""

    def __init__(self, lab: ProviderLab, name: str, role: Role = Role.TENANT_VERIFIER) -> None:
        tls = lab.pki.tls(name, role, name, trusts=["provider"])
        self.lab = lab
        self.name = name
        self.client = PeerClient(tls, lab.verifier_url)
        self.requester = certificate_requester(load_certificate(tls.certificate))
        self.baseline: ClockBaseline | None = None

    async def ask(self, request: QuoteRequest) -> object:
        """Results of ``GET /v1/verifier``."""
        host_id = self.lab.host_id if request.agent_id is None else None
        return await self.client.get("/v1/verifier", verifier_query(VerifierQuery(request=request, host_id=host_id)))

    async def round(self, pcrs: Sequence[int] = (0, 7), agent_id: AgentId | None = None) -> Accepted | Rejected:
        """One request and its appraisal, against the clock that was stored when its nonce was made."""
        baseline = self.baseline
        request = a_request(self.name, pcrs, agent_id=agent_id).request
        results = await self.ask(request)
        verdict = self.appraise(request, results, baseline)
        if isinstance(verdict, Accepted):
            seen = verdict.evidence.baseline
            if self.baseline is None or seen.clock > self.baseline.clock:
                self.baseline = seen
        return verdict

    def appraise(
        self, request: QuoteRequest, results: object, baseline: ClockBaseline | None = None
    ) -> Accepted | Rejected:
        """Verdict on an answer to this tenant's request; blank PCRs are the reference."""
        ek = None if request.agent_id is None else self.lab.residency.states[request.agent_id]
        assert ek is None or isinstance(ek, bytes)
        identity = self.lab.keys.identity
        trust = HostTrust(
            host_id=identity.host_id,
            ak=identity.ak,
            ak_qualified_name=owner_qualified_name(identity.ak),
            policy=Policy.of(HashAlg.SHA256, {pcr: bytes(32) for _, pcr in request.selection}),
            baseline=baseline,
        )
        sent = SentRequest(request=request, requester=self.requester, vtpm_ek=ek)
        return appraise_host(results, sent, trust, guest_binding=request.binding)


@asynccontextmanager
async def provider_lab(
    folder: Path,
    *tenants: str,
    ak: str = "ecc256",
    allowlists: Mapping[str, PcrSelection] | None = None,
    batch: BatchSettings | None = None,
    tpm_user: TpmUser | None = None,
    bounds: Bounds | None = None,
) -> AsyncIterator[ProviderLab]:
    """A provider with one host and these tenants, each with an allowlist of PCR 0 to 15 unless given.

    With a ``tpm_user``, that is between the host agent and its TPM. ``bounds`` are of the provider verifier's
    connections.
    """
    pki = Pki.make(folder / "pki", *tenants)
    async with AsyncExitStack() as stack:
        process = await stack.enter_async_context(blank_swtpm(folder))
        tcti = process.tcti
        if tpm_user is not None:
            tcti = (await stack.enter_async_context(tpm_user(folder / "back"))).tcti
        tpm = await stack.enter_async_context(await Tpm.open(tcti))
        keys = await HostKeys.provision(tpm, folder / "agent", ak=ak)
        residency = FakeResidency()
        agent_metrics = Metrics("host-agent")
        quoting = Quoting(keys, residency, batch or BatchSettings(), CA_CERTIFICATE, agent_metrics)
        agent_tls = pki.tls("provider", Role.HOST_AGENT, "host-1", trusts=["provider"])
        tasks = await stack.enter_async_context(_tasks())
        tasks.append(asyncio.create_task(quoting.run()))
        agent = application("host-agent", quoting.routes, identities_of(agent_tls), metrics=agent_metrics)
        agent_server = await stack.enter_async_context(serve(agent, agent_tls, Listen()))
        stack.push_async_callback(quoting.stop)

        verifier_tls = pki.tls("provider", Role.PROVIDER_VERIFIER, "v", trusts=["provider"])
        links = await stack.enter_async_context(HostLinks(over_tls(verifier_tls, stack)))

        async def load() -> Snapshot:
            if lab.fault is not None:
                raise lab.fault
            return lab.records

        authorities: list[TenantAuthorities] = []

        def changed(snapshot: Snapshot) -> None:
            links.follow(snapshot.hosts)
            for each in authorities:
                each.follow(snapshot.tenants)
            proxy.follow(snapshot.tenants)

        admission = Admission(load, changed=changed)
        metrics = Metrics("provider-verifier")
        proxy = Proxy(admission, links, metrics=metrics)
        everything = PcrSelection.of(HashAlg.SHA256, 0xFFFF)
        lab = ProviderLab(
            pki=pki,
            tpm=tpm,
            keys=keys,
            residency=residency,
            quoting=quoting,
            agent_metrics=agent_metrics,
            agent_url=agent_server.url,
            proxy=proxy,
            metrics=metrics,
            admission=admission,
            records=Snapshot(
                tenants={tenant: pki.pem(tenant) for tenant in tenants},
                hosts={keys.identity.host_id: agent_server.url},
                allowlists={
                    (tenant, keys.identity.host_id): (allowlists or {}).get(tenant, everything) for tenant in tenants
                },
            ),
        )
        identities = identities_of(verifier_tls)
        app = application("provider-verifier", proxy.routes, identities, metrics=metrics)
        server = await stack.enter_async_context(serve(app, verifier_tls, Listen(), bounds=bounds or Bounds()))
        authorities.append(TenantAuthorities(identities, server.context))
        lab.verifier_url = server.url
        await admission.refresh(0)
        tasks.append(asyncio.create_task(admission.run()))
        yield lab


@asynccontextmanager
async def _tasks() -> AsyncIterator[list[asyncio.Task[None]]]:
    tasks: list[asyncio.Task[None]] = []
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        async with asyncio.timeout(WAIT_S):
            await asyncio.gather(*tasks, return_exceptions=True)
