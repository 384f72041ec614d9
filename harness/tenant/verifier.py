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

from harness import events
from harness.config import TenantVerifierSettings
from harness.errors import StoreError
from harness.health import Health, check_database
from harness.metrics import Metrics
from harness.peer import PeerClient
from harness.pki import Role, load_certificate
from harness.store import Store, open_store
from harness.tenant.agent_request import Contact, Snapshot
from harness.tenant.agent_routes import agent_routes
from harness.tenant.agents import Agents
from harness.tenant.alarm_routes import alarm_routes
from harness.tenant.alarms_store import AlarmStore
from harness.tenant.client import (
    GuestClient,
    ProviderClient,
    RegistrarClient,
    only_authority,
    parse_pem,
    without_authority,
)
from harness.tenant.notices_store import NoticeStore
from harness.tenant.notifier import Notifier
from harness.tenant.ports import Chance, GuestPort, ProviderPort, SystemClock
from harness.tenant.receivers import receivers_of
from harness.tenant.tables import SCHEMA, Base
from harness.tenant.verifier_metrics import RoundFigures
from harness.tenant.verifier_store import VerifierStore
from harness.tls import certificate_requester, identities_of
from harness.values import AgentId
from harness.web import application, serve

_SETTLE_S = 1.0


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

    async def contact(self, agent_id: AgentId) -> Contact:
        """See `harness.tenant.agents.Peers`. *Cancellation:* nothing has changed."""
        return await RegistrarClient(self._registrar).contact(agent_id)

    async def release(self, guest: GuestPort) -> None:
        """See `harness.tenant.agents.Peers`. *Cancellation:* connections are being closed all the same."""
        peer = self._guests.pop(guest, None)
        if peer is not None:
            await peer.close()

    async def close(self) -> None:
        """Closes everything. *Cancellation:* connections are being closed all the same."""
        peers = [self._registrar, *self._guests.values(), *self._providers.values()]
        await asyncio.gather(*(peer.close() for peer in peers), return_exceptions=True)


def _health(store: Store) -> Health:
    health = Health()
    health.check("database", lambda: check_database(store))
    return health


async def _settle(records: VerifierStore) -> None:
    """Stores clocks of rounds that the stop cut off; evidence that counted for nothing may also be forgotten."""
    try:
        async with asyncio.timeout(_SETTLE_S):
            await records.settle()
    except (StoreError, TimeoutError) as error:
        events.emit("not_stored", level="warning", detail=f"clocks of unfinished rounds: {error}")


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
        receivers = receivers_of(settings, "tenant-verifier")
        connections = Connections(settings)
        store = await open_store(settings.database, Base.metadata, component="tenant", version=SCHEMA)
        records = VerifierStore(store, time.time)
        try:
            async with asyncio.TaskGroup() as group:
                clock, metrics = SystemClock(), Metrics("tenant-verifier")
                rounds = RoundFigures(metrics, clock.monotonic)
                agents = Agents(
                    records,
                    connections,
                    clock,
                    requester=requester,
                    group=group,
                    patience_s=settings.transport_patience_s,
                    told=rounds.told,
                )
                rounds.watch(agents)
                await agents.load()
                if receivers:
                    notifier = Notifier(NoticeStore(store), receivers, SystemClock(), Chance(), records.alarmed)
                    group.create_task(notifier.run(), name="notifier")
                app = application(
                    "tenant-verifier",
                    [*agent_routes(agents), *alarm_routes(AlarmStore(store))],
                    identities_of(own_tls),
                    health=_health(store),
                    audit=AlarmStore(store).keep,
                    metrics=metrics,
                )
                async with serve(app, own_tls, sock or settings.listen) as server:
                    events.emit("ready", url=server.url, tenant=settings.tenant)
                    await asyncio.Event().wait()
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from failures
        finally:
            await _settle(records)
            await connections.close()
            await store.close()
