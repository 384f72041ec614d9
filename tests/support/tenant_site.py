"""A tenant's services over real mutual TLS, a guest agent on a real vTPM, and a provider played by the test.

The provider has a soft TPM; everything else is what runs in production.
"""

from __future__ import annotations

import asyncio
import base64
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from aiohttp import web
from cryptography.hazmat.primitives.serialization import Encoding

from harness import protocol
from harness.attest import Public
from harness.config import (
    GuestAgentSettings,
    Listen,
    TenantRegistrarSettings,
    TenantVerifierSettings,
    TlsSettings,
)
from harness.errors import GuestNotHere, HarnessError
from harness.merkle import MerkleTree, leaf_hash
from harness.messages import encode_proof, encode_shared, parse_verifier_query
from harness.peer import PeerClient
from harness.pki import Role, now
from harness.tenant.guest_agent import GuestAgent
from harness.tenant.operator import TenantOperator
from harness.tenant.order import Order
from harness.tenant.policy import Policy
from harness.tenant.registrar import TenantRegistrar
from harness.tenant.verifier import TenantVerifier
from harness.tenant.vtpm import EK_CERTIFICATE_INDEX
from harness.tls import identities_of
from harness.tpm import KeyTemplate, Tpm
from harness.values import AgentId, HashAlg, PcrSelection, mask_of
from harness.web import Route, application, peer_of, read_json, serve
from tests.support.enrolment_parties import EK_USE, SoftHost, Vendor, certificate, der
from tests.support.provider_lab import Pki
from tests.support.tenant_wire import AGENT, SoftTpm
from tests.support.tpms import blank_swtpm, short_folder

TENANT, STRANGER = "alice", "bob"
SHA256 = HashAlg.SHA256
GUEST_PCRS = (0, 4)
WAIT_S = 120.0


class Runnable(Protocol):
    async def run(self, sock: socket.socket | None = None) -> None: ...


class TestProvider:
    """A provider verifier with one host; a test changes the host's TPM, or makes it refuse."""

    __test__ = False

    def __init__(self) -> None:
        self.vendor = Vendor(at=now())
        self.host = SoftHost(self.vendor, b"")
        self.tpm = SoftTpm()
        self.host.ak_key, self.host.ak = self.tpm.key, self.tpm.ak
        self.tpm.resets, self.tpm.restarts, self.tpm.firmware, self.tpm.clock = self.host.resets, 1, 77, 6000
        self.vtpm_ek: bytes | None = None
        self.refusal: HarnessError | None = None
        self.rounds = 0

    @property
    def routes(self) -> list[Route]:
        registrar, verifier = {Role.TENANT_REGISTRAR}, {Role.TENANT_VERIFIER}
        return [
            Route("GET", "/v1/hosts", self._hosts, roles=registrar),
            Route("GET", "/v1/hosts/{host_id}/identity", self._identity, roles=registrar),
            Route("POST", "/v1/hosts/{host_id}/activate", self._activate, roles=registrar),
            Route("POST", "/v1/hosts/{host_id}/certify", self._certify, roles=registrar),
            Route("GET", "/v1/verifier", self._verifier, roles=verifier),
        ]

    async def _hosts(self, _: web.Request) -> object:
        return {"hosts": [str(self.host.host_id)]}

    async def _identity(self, _: web.Request) -> object:
        identity = await self.host.identity(self.host.host_id)
        members: dict[str, object] = {
            name: _b64(getattr(identity, name)) for name in ("ek", "ak", "ca", "ca_certificate")
        }
        certificates = [_b64(data) for data in identity.ek_certificates]
        return members | {"host_id": str(identity.host_id), "ek_certificates": certificates, "banks": ["sha256"]}

    async def _activate(self, request: web.Request) -> object:
        self.host.requester = peer_of(request).requester
        body: Any = await read_json(request)
        answer = await self.host.activate(self.host.host_id, base64.b64decode(body["credential"]))
        return {"answer": answer.hex()}

    async def _certify(self, request: web.Request) -> object:
        body: Any = await read_json(request)
        attest, signature = await self.host.certify(self.host.host_id, bytes.fromhex(body["nonce"]))
        return {"attest": _b64(attest), "signature": _b64(signature)}

    async def _verifier(self, request: web.Request) -> object:
        self.rounds += 1
        if self.refusal is not None:
            raise self.refusal
        if self.vtpm_ek is None:
            raise GuestNotHere("nobody runs here")
        asked = parse_verifier_query(list(request.query.items())).request
        leaf = protocol.leaf_data(asked, requester=peer_of(request).requester, vtpm_ek=self.vtpm_ek)
        tree = MerkleTree([leaf_hash(leaf), *(leaf_hash(bytes([n])) for n in range(15))])
        attest, signature, pcrs = self.tpm.quote(protocol.qualifying_data(tree.size, tree.root), asked.mask)
        shared = encode_shared(
            host_id=self.host.host_id,
            attest=attest,
            signature=signature,
            pcrs=pcrs,
            batch_id="b",
            sealed_at="2026-01-01T00:00:00Z",
        )
        return shared | {"proof": encode_proof(tree.proof(0))}


@dataclass(slots=True, kw_only=True)
class TenantSite:
    """The running parts; services start and stop with `running`, on ``database`` or with a file each."""

    folder: Path
    pki: Pki
    provider: TestProvider
    provider_url: str
    tcti: str
    ek: Public
    sockets: dict[str, socket.socket] = field(default_factory=dict)
    verifier_extra: dict[str, Any] = field(default_factory=dict)
    guest_extra: dict[str, Any] = field(default_factory=dict)
    database: str | None = None

    def url(self, name: str) -> str:
        host, port = self._socket(name).getsockname()
        return f"https://{host}:{port}"

    def _socket(self, name: str) -> socket.socket:
        if name not in self.sockets:
            self.sockets[name] = socket.create_server(("127.0.0.1", 0))
        return self.sockets[name]

    def tls(self, role: Role, name: str, authority: str = TENANT) -> TlsSettings:
        return self.pki.tls(authority, role, name, trusts=(TENANT, "provider"))

    def client(self, service: str, role: Role, name: str = "somebody", authority: str = TENANT) -> PeerClient:
        return PeerClient(self.tls(role, name, authority), self.url(service))

    def registrar(self) -> TenantRegistrar:
        root = self.folder / "root.pem"
        root.write_bytes(self.provider.vendor.root.public_bytes(Encoding.PEM))
        return TenantRegistrar(
            TenantRegistrarSettings(
                tls=self.tls(Role.TENANT_REGISTRAR, "registrar"),
                tenant=TENANT,
                database=self.database or f"sqlite+aiosqlite:///{self.folder}/registrar.db",
                vendor_roots=[root],
            )
        )

    def verifier(self) -> TenantVerifier:
        return TenantVerifier(
            TenantVerifierSettings(
                tls=self.tls(Role.TENANT_VERIFIER, "verifier"),
                tenant=TENANT,
                database=self.database or f"sqlite+aiosqlite:///{self.folder}/verifier.db",
                registrar=self.url("registrar"),
                **self.verifier_extra,
            )
        )

    def guest_agent(self) -> GuestAgent:
        return GuestAgent(
            GuestAgentSettings(
                tls=self.tls(Role.GUEST_AGENT, str(AGENT)),
                tenant=TENANT,
                agent_id=AGENT,
                tcti=self.tcti,
                state_dir=self.folder / "agent",
                registrars=[self.url("registrar")],
                payload_dir=self.folder / "payload",
                **self.guest_extra,
            )
        )

    @asynccontextmanager
    async def running(self, *names: str) -> AsyncIterator[None]:
        """Services run during the block; each must stop within its bound when it is told to."""
        make: dict[str, Callable[[], Runnable]] = {
            "registrar": self.registrar,
            "verifier": self.verifier,
            "guest": self.guest_agent,
        }
        tasks = []
        for name in names:
            listening = self._socket(name).dup()
            tasks.append(asyncio.create_task(make[name]().run(listening), name=name))
        try:
            yield
            for task in tasks:
                assert not task.done(), f"{task.get_name()} ended by itself: {task}"
        finally:
            for task in tasks:
                task.cancel()
            _, left = await asyncio.wait(tasks, timeout=WAIT_S)
            assert not left, "a service did not stop"

    @asynccontextmanager
    async def operator(self) -> AsyncIterator[TenantOperator]:
        tls = self.tls(Role.TENANT_OPERATOR, "op")
        async with (
            PeerClient(tls, self.url("registrar")) as registrar,
            PeerClient(tls, self.url("verifier")) as verifier,
        ):
            yield TenantOperator(registrar, verifier, tls)

    async def certify_vtpm(self, *, signer: SoftHost | None = None, agent_id: AgentId = AGENT) -> None:
        """Writes the vTPM's EK certificate, as the vTPM CA or somebody else makes it."""
        key: Any = self.ek.key()
        made = certificate(
            key,
            (signer or self.provider.host).ca_key,
            subject="vtpm",
            issuer="ca",
            uris=(f"urn:uuid:{agent_id}",),
            use=EK_USE,
            begin=now() - timedelta(days=1),
            end=now() + timedelta(days=1),
        )
        async with await Tpm.open(self.tcti) as tpm:
            await tpm.nv_write(EK_CERTIFICATE_INDEX, der(made) + bytes(100))

    async def order(self, **changes: Any) -> Order:
        """What the honest guest and host satisfy."""
        async with await Tpm.open(self.tcti) as tpm:
            values = await tpm.pcr_read(PcrSelection.of(SHA256, mask_of(GUEST_PCRS)))
        members: dict[str, Any] = {
            "guest_policy": Policy.of(SHA256, values[SHA256]),
            "host_policy": Policy.of(SHA256, {4: self.provider.tpm.pcrs[4]}),
            "provider_verifier": self.provider_url,
            "payload": b"the secret",
            "quote_interval_s": 0.2,
        }
        return Order(**(members | changes))


@contextmanager
def _closed(sockets: dict[str, socket.socket]) -> Iterator[None]:
    try:
        yield
    finally:
        for each in sockets.values():
            each.close()


@asynccontextmanager
async def new_tenant_site() -> AsyncIterator[TenantSite]:
    """A provider and a vTPM that its host's CA key certified; no service runs yet."""
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(short_folder())
        vtpm = await stack.enter_async_context(blank_swtpm(folder))
        async with await Tpm.open(vtpm.tcti) as tpm:
            transient = await tpm.create_primary(KeyTemplate.EK_RSA2048, b"")
            ek = await tpm.read_public(transient)
            assert ek is not None
            await tpm.flush(transient)
        pki = Pki.make(folder / "pki", TENANT, STRANGER)
        provider = TestProvider()
        provider.vtpm_ek = ek.spki_digest()
        tls = pki.tls("provider", Role.PROVIDER_VERIFIER, "verifier", trusts=(TENANT, STRANGER, "provider"))
        app = application("provider-verifier", provider.routes, identities_of(tls))
        server = await stack.enter_async_context(serve(app, tls, Listen()))
        site = TenantSite(
            folder=folder,
            pki=pki,
            provider=provider,
            provider_url=server.url,
            tcti=vtpm.tcti,
            ek=ek,
        )
        stack.enter_context(_closed(site.sockets))
        await site.certify_vtpm()
        yield site


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()
