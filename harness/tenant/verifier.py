"""The tenant verifier: Keylime-shaped REST in front of the sessions.

Invariants:
    1. Only certificates of the tenant's own authority are listened to.
    2. A guest agent shows the certificate that it registered, or a renewal on its key; the registrar one of our own
       authority, a provider verifier one of the others, each with its role in it.

Owner: the service `TenantVerifier`.

Spec: DESIGN 3.8; docs/protocol.md (tenant verifier); Keylime verifier API.
"""

from __future__ import annotations

import asyncio
import socket
import time

from aiohttp import web

from harness import events
from harness.config import TenantVerifierSettings
from harness.peer import PeerClient
from harness.pki import Role, load_certificate
from harness.store import open_store
from harness.tenant.agent_request import Snapshot
from harness.tenant.agents import Agents
from harness.tenant.client import (
    GuestClient,
    ProviderClient,
    RegistrarClient,
    only_authority,
    parse_pem,
    without_authority,
)
from harness.tenant.ports import GuestPort, ProviderPort, SystemClock
from harness.tenant.tables import SCHEMA, Base
from harness.tenant.verifier_store import VerifierStore
from harness.tls import certificate_requester, identities_of
from harness.values import AgentId, parse_agent_id
from harness.web import Route, application, read_json, serve

_OPERATOR = frozenset({Role.TENANT_OPERATOR})


class Connections:
    """Connections of all sessions: one client per guest, one per provider verifier.

    Args:
        settings: of the verifier.
    """

    def __init__(self, settings: TenantVerifierSettings) -> None:
        self._own_tls = only_authority(settings.tls, settings.tenant)
        self._provider_tls = without_authority(settings.tls, settings.tenant)
        self._registrar = PeerClient(self._own_tls, settings.registrar, roles={Role.TENANT_REGISTRAR})
        self._guests: dict[GuestPort, PeerClient] = {}
        self._providers: dict[str, PeerClient] = {}

    def guest(self, url: str, mtls_cert: str) -> GuestPort:
        """See `harness.tenant.agents.Peers`."""
        peer = PeerClient(self._own_tls, url, roles={Role.GUEST_AGENT}, pinned=parse_pem(mtls_cert))
        client = GuestClient(peer)
        self._guests[client] = peer
        return client

    def provider(self, url: str | None) -> ProviderPort:
        """See `harness.tenant.agents.Peers`; a session without a provider quote never calls what it is given."""
        address = url or "https://none.invalid"
        if address not in self._providers:
            self._providers[address] = PeerClient(self._provider_tls, address, roles={Role.PROVIDER_VERIFIER})
        return ProviderClient(self._providers[address])

    async def snapshot(self, agent_id: AgentId) -> Snapshot:
        """See `harness.tenant.agents.Peers`. *Cancellation:* nothing has changed."""
        return await RegistrarClient(self._registrar).snapshot(agent_id)

    async def release(self, guest: GuestPort) -> None:
        """See `harness.tenant.agents.Peers`. *Cancellation:* connections are being closed all the same."""
        peer = self._guests.pop(guest, None)
        if peer is not None:
            await peer.close()

    async def close(self) -> None:
        """Closes everything. *Cancellation:* connections are being closed all the same."""
        peers = [self._registrar, *self._guests.values(), *self._providers.values()]
        await asyncio.gather(*(peer.close() for peer in peers), return_exceptions=True)


def routes_of(agents: Agents) -> list[Route]:
    """Calls of the operator."""
    path = r"/{version:v2\.[1-6]}/agents"

    async def add(request: web.Request) -> object:
        await agents.add(_agent_id(request), await read_json(request))
        return {}

    async def show_all(_request: web.Request) -> object:
        return {"uuids": [str(agent_id) for agent_id in agents.ids()]}

    async def show(request: web.Request) -> object:
        return agents.view(_agent_id(request))

    async def resume(request: web.Request) -> object:
        agents.resume(_agent_id(request))
        return {}

    async def delete(request: web.Request) -> object:
        await agents.delete(_agent_id(request))
        return {}

    return [
        Route("GET", path, show_all, roles=_OPERATOR),
        Route("POST", path + "/{agent_id}", add, roles=_OPERATOR),
        Route("GET", path + "/{agent_id}", show, roles=_OPERATOR),
        Route("DELETE", path + "/{agent_id}", delete, roles=_OPERATOR),
        Route("PUT", path + "/{agent_id}/resume", resume, roles=_OPERATOR),
        Route("PUT", path + "/{agent_id}/reactivate", resume, roles=_OPERATOR),
    ]


def _agent_id(request: web.Request) -> AgentId:
    return parse_agent_id(request.match_info["agent_id"])


class TenantVerifier:
    """The service.

    Args:
        settings: from its file.
    """

    def __init__(self, settings: TenantVerifierSettings) -> None:
        self._settings = settings

    async def run(self, sock: socket.socket | None = None) -> None:
        """Serves until it is cancelled.

        Args:
            sock: bound and listening; else the settings say where.

        Raises:
            ConfigError, StoreError: unusable settings, files, address or database.

        *Cancellation:* sessions are suspended, calls in work ended, the database closed.
        """
        settings = self._settings
        own_tls = only_authority(settings.tls, settings.tenant)
        requester = certificate_requester(load_certificate(settings.tls.certificate))
        connections = Connections(settings)
        store = await open_store(settings.database, Base.metadata, component="tenant", version=SCHEMA)
        try:
            async with asyncio.TaskGroup() as group:
                records = VerifierStore(store, time.time)
                agents = Agents(records, connections, SystemClock(), requester=requester, group=group)
                await agents.load()
                app = application("tenant-verifier", routes_of(agents), identities_of(own_tls))
                async with serve(app, own_tls, sock or settings.listen) as server:
                    events.emit("ready", url=server.url, tenant=settings.tenant)
                    await asyncio.Event().wait()
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from failures
        finally:
            await connections.close()
            await store.close()
