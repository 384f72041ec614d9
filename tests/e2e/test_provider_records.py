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
from tests.support.pendings import agent, allow

HOST = HostId(agent(7))
ACT = AuditEntry(at=1.0, who="provider/provider-operator/op", action="act", subject="x", reason="r")


def url_in(folder: Path) -> str:
    return f"sqlite+aiosqlite:///{folder / 'provider.db'}"


async def filled(folder: Path) -> Store:
    """A database as the provider registrar leaves it."""
    store = await open_store(url_in(folder), Base.metadata, component="provider", version=SCHEMA)
    registrar = RegistrarStore(store)
    await registrar.add_tenant("alice", "PEM", ACT)
    await HostStore(store).announce(HOST, "h", "https://h")
    await registrar.allow("alice", HOST, allow([0, 7]), ACT)
    await registrar.define_guest(agent(1), "alice", HOST, "g", ACT)
    return store


async def test_a_snapshot_holds_what_the_registrar_wrote(tmp_path: Path) -> None:
    """Tenants, hosts, allowlists and guests; and it follows changes."""
    store = await filled(tmp_path)
    async with open_records(url_in(tmp_path)) as load:
        snapshot = await load()
        assert snapshot.tenants == {"alice": "PEM"}
        assert snapshot.hosts == {HOST: "https://h"}
        assert snapshot.allowlists == {("alice", HOST): allow([0, 7])}
        assert snapshot.guests == {agent(1): GuestRecord(tenant="alice", host_id=HOST)}
        await RegistrarStore(store).remove_guest(agent(1), ACT)
        assert (await load()).guests == {}
    await store.close()


@pytest.mark.parametrize("banks", ['{"sha1": [0]}', '{"sha256": [24]}'])
async def test_a_row_that_is_not_understood_admits_nobody(tmp_path: Path, banks: str) -> None:
    """The registrar does not write such rows: rights are not guessed from them."""
    store = await filled(tmp_path)
    async with store.begin() as session:
        await session.execute(update(Allowlist).values(banks=banks))
    async with open_records(url_in(tmp_path)) as load:
        with pytest.raises(StoreError, match="not understood"):
            await load()
    await store.close()


async def test_a_database_that_cannot_be_opened_is_a_store_error(tmp_path: Path) -> None:
    """The service does not start without knowing whom to admit."""
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError):
        async with open_records(url_in(tmp_path / "file")):
            pass
