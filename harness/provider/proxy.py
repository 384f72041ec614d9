"""The provider verifier as a service: proxy, admission, links and tenants' authorities put together.

Invariants:
    1. No request is judged before the provider's records were read once.
    2. When it ends, calls in work are answered first (503), then connections are closed.

Owner: itself.

Spec: DESIGN 3.1; docs/architecture.md.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from harness import events
from harness.config import ProviderVerifierSettings
from harness.door import Bounds
from harness.errors import ProtocolError, StoreError
from harness.health import Health
from harness.metrics import Metrics
from harness.own_certificate import Audit, to_events
from harness.provider.admission import Admission, Load, Snapshot
from harness.provider.authorities import TenantAuthorities
from harness.provider.host_links import HostLinks, over_tls
from harness.provider.proxy_routes import Proxy
from harness.provider.registrar_store import RegistrarStore, load_snapshot
from harness.provider.tables import SCHEMA, Base
from harness.store import open_store
from harness.tls import identities_of
from harness.web import application, serve


@dataclass(frozen=True, slots=True, kw_only=True)
class Records:
    """What the provider verifier needs of the provider's database.

    Args:
        load: reads a snapshot.
        audit: keeps an entry of the audit trail.
    """

    load: Load
    audit: Audit = to_events


OpenRecords = Callable[[str], AbstractAsyncContextManager[Records]]
"""Opens the provider's database at a URL."""


@asynccontextmanager
async def open_records(url: str) -> AsyncIterator[Records]:
    """Opens the provider registrar's database.

    Raises:
        StoreError: it cannot be opened, or a newer program has written it.

    *Cancellation:* the database is closed.
    """
    store = await open_store(url, Base.metadata, component="provider", version=SCHEMA)

    async def load() -> Snapshot:
        try:
            return await load_snapshot(store)
        except ProtocolError as error:  # a row that nobody of ours wrote: better no rights than guessed ones
            raise StoreError(f"the provider's database holds a row that is not understood: {error.detail}") from error

    try:
        yield Records(load=load, audit=RegistrarStore(store).keep)
    finally:
        await store.close()


def _health(admission: Admission, links: HostLinks) -> Health:
    async def fresh() -> None:
        admission.current()

    health = Health()
    health.check("records", fresh)
    health.parts("host", links.states)  # the guests of the others are attested all the same
    return health


class ProviderVerifier:
    """The service.

    Args:
        settings: from its file.
        open_records: the provider's database.
    """

    def __init__(self, settings: ProviderVerifierSettings, open_records: OpenRecords = open_records) -> None:
        self._settings = settings
        self._open_records = open_records

    async def run(self, sock: socket.socket | None = None) -> None:
        """Serves until it is cancelled.

        Args:
            sock: bound and listening; else the settings say where.

        Raises:
            ConfigError: unusable settings, files or address.
            StoreError: the provider's database cannot be read at the start.

        *Cancellation:* calls in work are answered, then everything is closed.
        """
        settings = self._settings
        async with AsyncExitStack() as stack:
            records = await stack.enter_async_context(self._open_records(settings.database))
            clients = await stack.enter_async_context(AsyncExitStack())
            links = HostLinks(over_tls(settings.tls, clients))
            followers: list[Callable[[Snapshot], None]] = [lambda snapshot: links.follow(snapshot.hosts)]

            def changed(snapshot: Snapshot) -> None:
                for follow in followers:
                    follow(snapshot)

            admission = Admission(records.load, changed=changed)
            identities = identities_of(settings.tls)
            metrics = Metrics("provider-verifier")
            proxy = Proxy(admission, links, metrics=metrics)
            app = application(
                "provider-verifier",
                proxy.routes,
                identities,
                health=_health(admission, links),
                audit=records.audit,
                metrics=metrics,
            )
            bounds = Bounds(connections=settings.connections, per_authority=settings.tenant_connections)
            server = await stack.enter_async_context(serve(app, settings.tls, sock or settings.listen, bounds=bounds))
            await stack.enter_async_context(links)  # left before the server is: its waiters are answered
            tenants = TenantAuthorities(identities, server.context)
            followers.append(lambda snapshot: tenants.follow(snapshot.tenants))
            followers.append(lambda snapshot: proxy.follow(snapshot.tenants))
            await admission.refresh(0)
            events.emit("ready", url=server.url)
            await admission.run()
