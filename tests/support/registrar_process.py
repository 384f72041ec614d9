"""A tenant's registrar in a process of its own, with a provider and a guest that are played by the test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding

from harness.attest import Public
from harness.config import Listen, NotifySettings, TenantRegistrarSettings
from harness.credential import Credential
from harness.peer import PeerClient
from harness.pki import Role, now
from harness.tenant.guest_registration import Contact, Registration
from harness.tls import identities_of
from harness.web import application, serve
from tests.support.enrolment_parties import EK_USE, SoftVtpm, certificate, der
from tests.support.provider_lab import Pki
from tests.support.service_process import ServiceProcess, free_port
from tests.support.tenant_site import TENANT, TestProvider
from tests.support.tenant_wire import AGENT


class SoftGuest:
    """A guest agent's vTPM: implements what a registration needs of `GuestTpm`. ``gate`` holds its answers back."""

    def __init__(self, provider: TestProvider) -> None:
        self._vtpm = SoftVtpm()
        key: Any = self._vtpm.ek.key()
        made = certificate(
            key,
            provider.host.ca_key,
            subject="vtpm",
            issuer="ca",
            uris=(f"urn:uuid:{AGENT}",),
            use=EK_USE,
            begin=now() - timedelta(days=1),
        )
        self.ek_certificate = der(made)
        self.gate = asyncio.Event()
        self.gate.set()
        self.asked = asyncio.Event()

    @property
    def ek(self) -> Public:
        return self._vtpm.ek

    @property
    def ak(self) -> Public:
        return self._vtpm.ak

    async def activate(self, credential: Credential) -> bytes:
        self.asked.set()
        await self.gate.wait()
        return self._vtpm.activate(credential.keylime_blob())


@dataclass(slots=True, kw_only=True)
class RegistrarSite:
    """The running parts."""

    folder: Path
    provider: TestProvider
    provider_url: str
    process: ServiceProcess
    operator: PeerClient
    guest_peer: PeerClient
    guest: SoftGuest
    url: str
    database: Path
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def get(self, path: str) -> Any:
        return await self.operator.get(path)

    async def add_host(self) -> None:
        await self.operator.post("/v1/hosts", {"url": self.provider_url})

    async def hosts(self) -> list[Any]:
        """Ids and AKs of the hosts that are enrolled."""
        return [(host["host_id"], host["ak"]) for host in (await self.get("/v1/hosts"))["hosts"]]

    async def state_guest(self) -> None:
        await self.operator.post("/v1/guests", {"agent_id": str(AGENT), "host_id": str(self.provider.host.host_id)})

    async def guest_state(self) -> str:
        return str((await self.get(f"/v1/guests/{AGENT}"))["state"])

    def registration(self) -> asyncio.Task[None]:
        """The guest's agent registers, again and again until it is accepted."""
        pem = (self.folder / "pki" / TENANT / f"{Role.GUEST_AGENT.value}-{AGENT}.pem").read_text()
        contact = Contact(ip="127.0.0.1", port=9000, mtls_cert=pem)
        registration = Registration(AGENT, self.guest, lambda: contact)  # type: ignore[arg-type]
        task = asyncio.create_task(registration.register(self.url, self.guest_peer))
        self.tasks.append(task)
        return task


@asynccontextmanager
async def registrar_site(
    folder: Path, *, database: Path | None = None, notify: Sequence[NotifySettings] = ()
) -> AsyncIterator[RegistrarSite]:
    """The parts; the registrar does not run yet.

    Args:
        folder: for all files.
        database: of the registrar, if it is elsewhere.
        notify: who is told of its alarms.
    """
    pki, provider = Pki.make(folder / "pki", TENANT), TestProvider()
    root = folder / "root.pem"
    root.write_bytes(provider.vendor.root.public_bytes(Encoding.PEM))
    async with AsyncExitStack() as stack:
        tls = pki.tls("provider", Role.PROVIDER_VERIFIER, "verifier", trusts=(TENANT, "provider"))
        server = await stack.enter_async_context(
            serve(application("provider-verifier", provider.routes, identities_of(tls)), tls, Listen())
        )
        port, file = free_port(), database or folder / "registrar.db"
        url = f"https://127.0.0.1:{port}"

        def client(role: Role, name: str) -> PeerClient:
            made = PeerClient(pki.tls(TENANT, role, name, trusts=(TENANT,)), url, deadline_s=60)
            stack.push_async_callback(made.close)
            return made

        settings = TenantRegistrarSettings(
            listen=Listen(host="127.0.0.1", port=port),
            tls=pki.tls(TENANT, Role.TENANT_REGISTRAR, "registrar", trusts=(TENANT, "provider")),
            tenant=TENANT,
            database=f"sqlite+aiosqlite:///{file}",
            vendor_roots=[root],
            notify=list(notify),
        )
        process = ServiceProcess("tenant-registrar", settings, client(Role.TENANT_OPERATOR, "probe"), folder)
        stack.push_async_callback(process.close)
        site = RegistrarSite(
            folder=folder,
            provider=provider,
            provider_url=server.url,
            process=process,
            operator=client(Role.TENANT_OPERATOR, "op"),
            guest_peer=client(Role.GUEST_AGENT, str(AGENT)),
            guest=SoftGuest(provider),
            url=url,
            database=file,
        )
        try:
            yield site
        finally:
            for task in site.tasks:
                task.cancel()
            await asyncio.gather(*site.tasks, return_exceptions=True)
