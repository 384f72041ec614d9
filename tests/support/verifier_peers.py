"""All sessions of a verifier on a real database; the wire's parties are the peers, and a test changes the registrar."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from harness.attest import owner_qualified_name
from harness.errors import HarnessError, NotFound
from harness.store import Store, open_store
from harness.tenant.agent_request import Contact, Snapshot
from harness.tenant.agents import Act, Agents
from harness.tenant.ports import GuestPort, ProviderPort, Told, nobody_is_told
from harness.tenant.tables import SCHEMA, Base
from harness.tenant.verifier_store import VerifierStore
from harness.values import AgentId
from tests.support.enrolment_parties import SoftVtpm
from tests.support.tenant_wire import AGENT, REQUESTER, Wire

OTHER = AgentId(uuid.UUID(int=3 << 64))
WAIT_S = 240.0
ACT = Act(who="alice/tenant-operator/op", reason="kernel update")


class FakePeers:
    """Hands out the wire's parties; the registrar knows one guest."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.guests: dict[tuple[str, str], GuestPort] = {("https://127.0.0.1:9002", "pem"): wire.guest}
        self.released: list[GuestPort] = []
        self.looks = 0
        self.looking_fails: HarnessError | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        host = wire.provider.tpm
        self.known = Snapshot(
            host_id=wire.provider.host_id,
            guest_ek=SoftVtpm().ek.marshal(),
            guest_ak=wire.guest.tpm.ak.marshal(),
            mtls_cert="pem",
            ip="127.0.0.1",
            port=9002,
            host_ak=host.ak.marshal(),
            host_ak_qualified_name=owner_qualified_name(host.ak),
            host_baseline=host.baseline,
            host_enrolled_at=1.0,
        )

    def guest(self, url: str, mtls_cert: str) -> GuestPort:
        return self.guests[url, mtls_cert]

    def provider(self, url: str | None) -> ProviderPort:
        return self.wire.provider

    async def snapshot(self, agent_id: AgentId) -> Snapshot:
        await self.gate.wait()
        if agent_id != AGENT:
            raise NotFound("not registered")
        return self.known

    async def contact(self, agent_id: AgentId) -> Contact:
        self.looks += 1
        await self.gate.wait()
        if self.looking_fails is not None:
            raise self.looking_fails
        known = self.known
        return Contact(
            guest_ek=known.guest_ek, guest_ak=known.guest_ak, mtls_cert=known.mtls_cert, ip=known.ip, port=known.port
        )

    async def release(self, guest: GuestPort) -> None:
        self.released.append(guest)


@asynccontextmanager
async def opened(folder: Path) -> AsyncIterator[Store]:
    """The tenant's database."""
    store = await open_store(f"sqlite+aiosqlite:///{folder}/a.db", Base.metadata, component="tenant", version=SCHEMA)
    try:
        yield store
    finally:
        await store.close()


@asynccontextmanager
async def verifier(database: Store, peers: FakePeers, told: Told = nobody_is_told) -> AsyncIterator[Agents]:
    """Agents of one run of the service; their tasks end with the block."""
    try:
        async with asyncio.TaskGroup() as group:
            store = VerifierStore(database, lambda: 0.0)
            agents = Agents(store, peers, peers.wire.time, requester=REQUESTER, group=group, told=told)
            await agents.load()
            yield agents
            raise _Stop  # noqa: TRY301 - a task group ends its tasks by an exception
    except* _Stop:
        pass


class _Stop(Exception):
    """Ends a run of the service."""


def body(wire: Wire, **changes: Any) -> dict[str, Any]:
    guest, host = wire.guest.tpm, wire.provider.tpm
    return {
        "cloudagent_ip": "127.0.0.1",
        "cloudagent_port": 9002,
        "provider_verifier": "https://provider",
        "need_provider_quote": False,
        "guest_mask": "0x11",
        "host_mask": "0x11",
        "guest_policy": {"sha256": {"0": [guest.pcrs[0].hex()]}},
        "host_policy": {"sha256": {"4": [host.pcrs[4].hex()]}},
    } | changes


async def until(agents: Agents, agent_id: AgentId, **expected: Any) -> dict[str, object]:
    """The agent's view, once it shows what is expected."""
    async with asyncio.timeout(WAIT_S):
        while True:
            view = agents.view(agent_id)
            if expected.items() <= view.items():
                return view
            await asyncio.sleep(0.005)
