"""The host agent: the measured process on the host that owns the hardware TPM.

It provisions the TPM's keys, quotes batches for provider verifiers, and runs the guests' side (residency, vTPM CA).

Invariants:
    1. It is the only user of the TPM's AK and CA key; what it signs for others it computed itself (`keys`, `batcher`).
    2. When it ends, whatever the reason, every waiter has been released and every stream closed.
    3. A TPM client that was given up ends the service: a supervisor starts it anew, with a new client.

Owner: itself.

Spec: DESIGN 3.2 (who may compute it), 4; docs/protocol.md, stream.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Protocol

from harness import events
from harness.audit import AuditEntry
from harness.config import HostAgentSettings
from harness.health import Health
from harness.metrics import Metrics
from harness.peer import PeerClient
from harness.pki import Role
from harness.provider.announcement import keep_announced
from harness.provider.batching import Residency
from harness.provider.clock import SystemClock
from harness.provider.guest_side import open_guest_side
from harness.provider.keys import HostKeys
from harness.provider.stream_routes import Quoting
from harness.tls import identities_of
from harness.web import application, serve


class GuestSide(Residency, Protocol):
    """What the host agent needs of its guests' side."""

    @property
    def ca_certificate(self) -> bytes:
        """Self-signed certificate of the vTPM CA key, DER."""

    async def report(self) -> list[dict[str, str]]:
        """State and vTPM of every guest, for the provider registrar. Raises NotReady while it is not known."""

    async def changed(self) -> None:
        """Returns at the next change of what `report` gives."""

    def add_checks(self, health: Health) -> None:
        """Adds its checks to the health of the service."""

    async def keep_audit(self, entry: AuditEntry) -> None:
        """Keeps an entry in the audit trail of this host. Raises StoreError when it cannot."""

    async def run(self) -> None:
        """Watches the guests and serves the local socket. *Cancellation:* stops in order."""


OpenGuestSide = Callable[[HostAgentSettings, HostKeys], AbstractAsyncContextManager[GuestSide]]
"""Opens what the guests' side keeps on this host."""


class HostAgent:
    """The service.

    Args:
        settings: from its file.
        open_guest_side: journal, residency and vTPM CA of this host.
    """

    def __init__(self, settings: HostAgentSettings, open_guest_side: OpenGuestSide = open_guest_side) -> None:
        self._settings = settings
        self._open_guest_side = open_guest_side

    async def run(self, sock: socket.socket | None = None) -> None:
        """Serves until it is cancelled.

        Args:
            sock: bound and listening; else the settings say where.

        Raises:
            ConfigError: unusable settings, files or address.
            TpmError: the TPM, or a key in it, cannot be used, now or any more.

        *Cancellation:* waiters are released, their answers sent, streams closed; the TPM's last command is awaited.
        """
        from harness.tpm import Tpm

        settings = self._settings
        async with AsyncExitStack() as stack:
            tpm = await stack.enter_async_context(await Tpm.open(settings.tcti))
            keys = await HostKeys.provision(tpm, settings.state_dir, ak=settings.ak)
            guests = await stack.enter_async_context(self._open_guest_side(settings, keys))
            metrics = Metrics("host-agent")
            quoting = Quoting(keys, guests, settings.batch, guests.ca_certificate, metrics)
            health = Health()
            quoting.add_checks(health)
            guests.add_checks(health)
            identities = identities_of(settings.tls)
            app = application(
                "host-agent", quoting.routes, identities, health=health, audit=guests.keep_audit, metrics=metrics
            )
            server = await stack.enter_async_context(serve(app, settings.tls, sock or settings.listen))
            stack.push_async_callback(quoting.stop)
            events.emit("ready", host_id=str(keys.identity.host_id), url=server.url, ak=settings.ak)
            await self._work(quoting, guests, keys, settings.public_url or server.url)

    async def _work(self, quoting: Quoting, guests: GuestSide, keys: HostKeys, url: str) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(quoting.run())
                tasks.create_task(guests.run())
                tasks.create_task(self._announce(keys, guests, url))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from failures

    async def _announce(self, keys: HostKeys, guests: GuestSide, url: str) -> None:
        registrar = self._settings.registrar
        if registrar is None:
            return
        path, record = f"/v1/hosts/{keys.identity.host_id}", {"url": url, "name": self._settings.name}
        async with PeerClient(self._settings.tls, registrar, roles={Role.PROVIDER_REGISTRAR}) as client:

            async def announce() -> None:
                await client.put(path, record)
                await client.put(f"{path}/guests", {"guests": await guests.report()})

            await keep_announced(announce, guests.changed, SystemClock())
