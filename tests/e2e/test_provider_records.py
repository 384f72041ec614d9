"""The provider registrar's database as the provider verifier reads it."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import update

from harness.audit import AuditEntry
from harness.errors import StoreError
from harness.provider.admission import GuestRecord
from harness.provider.hosts_store import HostStore
from harness.provider.proxy import open_records
from harness.provider.registrar_store import RegistrarStore
from harness.provider.tables import SCHEMA, Allowlist, Base
from harness.store import Store, open_store
from harness.values import HostId
from tests.support.databases import sqlite_url
from tests.support.pendings import agent, allow

HOST = HostId(agent(7))
ACT = AuditEntry(at=1.0, who="provider/provider-operator/op", action="act", subject="x", reason="r")


async def filled(url: str) -> Store:
    """A database as the provider registrar leaves it."""
    store = await open_store(url, Base.metadata, component="provider", version=SCHEMA)
    registrar = RegistrarStore(store)
    await registrar.add_tenant("alice", "PEM", ACT)
    await HostStore(store).announce(HOST, "h", "https://h")
    await registrar.allow("alice", HOST, allow([0, 7]), ACT)
    await registrar.define_guest(agent(1), "alice", HOST, "g", ACT)
    return store


async def test_a_snapshot_holds_what_the_registrar_wrote(database_url: str) -> None:
    """Tenants, hosts, allowlists and guests; and it follows changes."""
    store = await filled(database_url)
    async with open_records(database_url) as records:
        snapshot = await records.load()
        assert snapshot.tenants == {"alice": "PEM"}
        assert snapshot.hosts == {HOST: "https://h"}
        assert snapshot.allowlists == {("alice", HOST): allow([0, 7])}
        assert snapshot.guests == {agent(1): GuestRecord(tenant="alice", host_id=HOST)}
        await RegistrarStore(store).remove_guest(agent(1), ACT)
        assert (await records.load()).guests == {}
    await store.close()


@pytest.mark.parametrize("banks", ['{"sha1": [0]}', '{"sha256": [24]}'])
async def test_a_row_that_is_not_understood_admits_nobody(database_url: str, banks: str) -> None:
    """The registrar does not write such rows: rights are not guessed from them."""
    store = await filled(database_url)
    async with store.begin() as session:
        await session.execute(update(Allowlist).values(banks=banks))
    async with open_records(database_url) as records:
        with pytest.raises(StoreError, match="not understood"):
            await records.load()
    await store.close()


async def test_a_database_that_cannot_be_opened_is_a_store_error(tmp_path: Path) -> None:
    """The service does not start without knowing whom to admit."""
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError):
        async with open_records(sqlite_url(tmp_path / "file" / "provider.db")):
            pass
