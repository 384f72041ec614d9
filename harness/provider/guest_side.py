"""The guests' side of a host agent: journal, cache of domains, residency, vTPM CA and the local socket, put together.

Invariants:
    1. The CA certificate is made once and kept while it fits the CA key: what tenants were given stays what it was.

Owner: the host agent.

Spec: DESIGN 3.1 (runs here), 3.6 (vTPM manufacture).
"""

from __future__ import annotations

import asyncio
import datetime
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from harness.attest import Public
from harness.audit import AuditEntry
from harness.config import HostAgentSettings
from harness.errors import ConfigError, GuestNotHere, NotReady
from harness.health import Health, check_database
from harness.provider import scratch
from harness.provider.guests import GuestCache, SocketGuestSource
from harness.provider.journal import Journal
from harness.provider.keys import HostKeys
from harness.provider.local_socket import LocalSocket
from harness.provider.residency import GuestResidency
from harness.provider.tables import HOST_SCHEMA, HostBase
from harness.provider.vtpm_ca import VtpmCa
from harness.store import Store, open_store
from harness.values import AgentId

COMPONENT = "host-agent"
CA_FILE = "vtpm-ca.der"
_RENEW = datetime.timedelta(days=30)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostRecords:
    """The host agent's database, and the journal in it."""

    store: Store
    journal: Journal


class GuestParts:
    """Implements `host_agent.GuestSide`. Made by `open_guest_side`.

    Args:
        cache: of domains.
        residency: which guests run here.
        local_socket: for swtpm_setup's tool and the guest manager.
        ca_certificate: self-signed, DER.
        records: of this host.
    """

    def __init__(
        self,
        cache: GuestCache,
        residency: GuestResidency,
        local_socket: LocalSocket,
        ca_certificate: bytes,
        records: HostRecords,
    ) -> None:
        self._cache = cache
        self._residency = residency
        self._local_socket = local_socket
        self._ca_certificate = ca_certificate
        self._records = records

    @property
    def ca_certificate(self) -> bytes:
        """Self-signed certificate of the vTPM CA key, DER."""
        return self._ca_certificate

    async def check(self, agent_ids: frozenset[AgentId]) -> Mapping[AgentId, bytes | GuestNotHere | NotReady]:
        """See `GuestResidency.check`. *Cancellation:* nothing has changed."""
        return await self._residency.check(agent_ids)

    async def report(self) -> list[dict[str, str]]:
        """See `GuestResidency.report`. *Cancellation:* nothing has changed."""
        return await self._residency.report()

    async def changed(self) -> None:
        """See `GuestCache.changed`. *Cancellation:* nothing is lost."""
        await self._cache.changed()

    def add_checks(self, health: Health) -> None:
        """Adds database and guest manager. Without the guest manager the host is attested, and no guest."""

        async def manager() -> None:
            self._cache.domains()

        health.check("database", lambda: check_database(self._records.store))
        health.check("guest manager", manager, vital=False)

    async def keep_audit(self, entry: AuditEntry) -> None:
        """See `Journal.keep`. *Cancellation:* it is kept or not."""
        await self._records.journal.keep(entry)

    async def run(self) -> None:
        """Follows the guest manager and serves the local socket.

        Raises:
            SimulationError: the socket cannot be made.

        *Cancellation:* the socket is closed.
        """
        await self._local_socket.start()
        try:
            await self._cache.follow()
        finally:
            await self._local_socket.stop()


@asynccontextmanager
async def open_guest_side(settings: HostAgentSettings, keys: HostKeys) -> AsyncIterator[GuestParts]:
    """Opens the host agent's database and makes the parts around it.

    Raises:
        StoreError: the database cannot be used.
        ConfigError: the CA certificate cannot be kept.
        TpmError: the TPM did not sign the CA certificate.

    *Cancellation:* the database is closed.
    """
    store = await open_store(settings.database, HostBase.metadata, component=COMPONENT, version=HOST_SCHEMA)
    try:
        journal = Journal(store)
        cache = GuestCache(SocketGuestSource(settings.guest_manager))
        residency = GuestResidency(cache, journal, scratch.read_ek)
        ca = VtpmCa(keys.identity.ca, keys.sign_certificate, journal, cache, host=settings.name)
        local_socket = LocalSocket(settings.local_socket, settings.peer_uids, ca, residency, journal)
        certificate = await _ca_certificate(settings.state_dir / CA_FILE, ca, keys.identity.ca)
        yield GuestParts(cache, residency, local_socket, certificate, HostRecords(store=store, journal=journal))
    finally:
        await store.close()


async def _ca_certificate(path: Path, ca: VtpmCa, key: Public) -> bytes:
    kept = await asyncio.to_thread(_kept, path, key)
    if kept is not None:
        return kept
    made = await ca.self_certificate()
    await asyncio.to_thread(_keep, path, made)
    return made


def _kept(path: Path, key: Public) -> bytes | None:
    """The certificate in the file, if it is this key's own and not about to expire."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        certificate = x509.load_der_x509_certificate(data)
        certificate.verify_directly_issued_by(certificate)
    except (ValueError, TypeError, InvalidSignature):
        return None
    fits = certificate.public_key() == key.key()
    expires = certificate.not_valid_after_utc - _RENEW
    return data if fits and datetime.datetime.now(datetime.UTC) < expires else None


def _keep(path: Path, certificate: bytes) -> None:
    half = path.with_name(f".{path.name}.new")
    try:
        half.write_bytes(certificate)
        os.replace(half, path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error
