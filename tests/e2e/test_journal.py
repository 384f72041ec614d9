"""The host agent's journal in a real database: what it allows, what a release does, and that it survives."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import select

from harness.audit import AuditEntry
from harness.errors import CloneSuspected, Conflict, NotFound
from harness.provider.journal import ECC_EK, PLATFORM, RSA_EK, Journal, Seen
from harness.provider.tables import HOST_SCHEMA, HostBase, IssuedCertificate
from harness.store import Store, open_store
from tests.support.pendings import agent

GUEST, OTHER = agent(1), agent(2)
KEY, ECC_KEY, SECOND_KEY = (bytes([number]) * 32 for number in (1, 2, 3))

FILE = os.stat_result((0o600, 7, 8, 1, 0, 0, 0, 0, 0, 0))


async def opened(url: str) -> Store:
    return await open_store(url, HostBase.metadata, component="host-agent", version=HOST_SCHEMA)


@pytest.fixture
async def store(database_url: str) -> AsyncIterator[Store]:
    store = await opened(database_url)
    yield store
    await store.close()


@pytest.fixture
def journal(store: Store) -> Journal:
    return Journal(store, now=lambda: 1234.5)


async def rows(store: Store) -> list[IssuedCertificate]:
    async with store.begin() as session:
        found = list(await session.scalars(select(IssuedCertificate).order_by(IssuedCertificate.id)))
        session.expunge_all()
        return found


async def test_a_guest_has_one_key_of_each_kind(journal: Journal) -> None:
    """The RSA EK is what residency is checked with; the platform certificate is for the same key."""
    await journal.record(GUEST, RSA_EK, KEY, 1)
    await journal.record(GUEST, PLATFORM, KEY, 2)
    await journal.record(GUEST, ECC_EK, ECC_KEY, 3)
    assert await journal.rsa_eks() == {GUEST: KEY}


@pytest.mark.parametrize("kind", [RSA_EK, ECC_EK, PLATFORM])
@pytest.mark.parametrize("key", [KEY, SECOND_KEY])
async def test_a_second_key_of_a_kind_is_a_conflict(journal: Journal, store: Store, kind: str, key: bytes) -> None:
    """Even the same one again; nothing is written."""
    await journal.record(GUEST, kind, KEY, 1)
    with pytest.raises(Conflict, match=f"guest {GUEST} has a certified {kind} already"):
        await journal.record(GUEST, kind, key, 2)
    assert [row.serial for row in await rows(store)] == ["1"]


@pytest.mark.parametrize("kind", [RSA_EK, ECC_EK, PLATFORM])
async def test_a_key_of_another_guest_is_a_clone(journal: Journal, store: Store, kind: str) -> None:
    """Under any kind; the guest that has it is named, nothing is written."""
    await journal.record(GUEST, RSA_EK, KEY, 1)
    with pytest.raises(CloneSuspected, match=str(GUEST)):
        await journal.record(OTHER, kind, KEY, 2)
    assert await journal.rsa_eks() == {GUEST: KEY}
    assert len(await rows(store)) == 1


async def test_two_guests_with_their_own_keys(journal: Journal) -> None:
    """They do not touch each other."""
    await journal.record(GUEST, RSA_EK, KEY, 1)
    await journal.record(OTHER, RSA_EK, SECOND_KEY, 2)
    assert await journal.rsa_eks() == {GUEST: KEY, OTHER: SECOND_KEY}


async def test_of_two_records_at_once_one_wins(journal: Journal) -> None:
    """Two swtpm_setup runs for one guest get one certificate."""
    records = (journal.record(GUEST, RSA_EK, bytes([number]) * 32, number) for number in range(1, 9))
    outcomes = await asyncio.gather(*records, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes if outcome is not None] == [Conflict] * 7
    assert len(await journal.rsa_eks()) == 1


async def test_of_two_guests_with_one_key_at_once_one_wins(journal: Journal) -> None:
    """A race does not make a clone."""
    outcomes = await asyncio.gather(
        journal.record(GUEST, RSA_EK, KEY, 1), journal.record(OTHER, RSA_EK, KEY, 2), return_exceptions=True
    )
    assert [type(outcome) for outcome in outcomes if outcome is not None] == [CloneSuspected]
    assert len(await journal.rsa_eks()) == 1


async def test_a_batch_is_told_of_its_own_guests(journal: Journal, tmp_path: Path) -> None:
    """What is certified and what was seen, of the guests that are asked for and of no other."""
    for agent_id, key in ((GUEST, KEY), (OTHER, SECOND_KEY)):
        await journal.record(agent_id, RSA_EK, key, 1)
        await journal.record(agent_id, ECC_EK, key[::-1], 2)
    await journal.saw(OTHER, tmp_path / "tpm2-00.permall", FILE, SECOND_KEY, "run1")
    seen = {OTHER: Seen(ek=SECOND_KEY, run="run1")}
    assert await journal.residents({GUEST}) == ({GUEST: KEY}, {})
    assert await journal.residents({OTHER}) == ({OTHER: SECOND_KEY}, seen)
    assert await journal.residents([OTHER, GUEST]) == (await journal.rsa_eks(), await journal.seen_in_runs())
    await journal.release(GUEST, "disk lost", who="uid 0")
    assert await journal.residents({GUEST, OTHER}) == ({OTHER: SECOND_KEY}, seen)
    assert await journal.residents(()) == ({}, {})


async def test_a_release_lets_a_new_vtpm_be_made_and_stays_in_the_journal(journal: Journal, store: Store) -> None:
    """All kinds of the guest at once, with time and reason; other guests keep theirs."""
    await journal.record(GUEST, RSA_EK, KEY, 1)
    await journal.record(GUEST, ECC_EK, ECC_KEY, 2)
    await journal.record(OTHER, RSA_EK, SECOND_KEY, 3)
    await journal.release(GUEST, "disk lost", who="uid 0")
    assert await journal.rsa_eks() == {OTHER: SECOND_KEY}
    assert [(row.released_at, row.reason) for row in await rows(store)] == [
        (1234.5, "disk lost"),
        (1234.5, "disk lost"),
        (None, None),
    ]
    await journal.record(GUEST, RSA_EK, bytes(32), 4)
    assert len(await rows(store)) == 4


async def test_a_release_is_audited_with_who_and_why(journal: Journal) -> None:
    """In the same transaction; a release of nothing is not in the audit trail."""
    await journal.record(GUEST, RSA_EK, KEY, 1)
    await journal.release(GUEST, "disk lost", who="uid 0")
    with pytest.raises(NotFound):
        await journal.release(GUEST, "again", who="uid 0")
    entry = AuditEntry(at=1234.5, who="uid 0", action="vtpm-release", subject=str(GUEST), reason="disk lost")
    assert await journal.audit() == [entry]
    renewed = AuditEntry(at=1.0, who="op", action="certificate-renew", subject="host-agent/h", reason="due")
    await journal.keep(renewed)
    assert await journal.audit() == [entry, renewed]


async def test_a_released_key_may_be_certified_again(journal: Journal) -> None:
    """For the same guest: the operator has said so. Never for another one: the first certificate is still valid."""
    await journal.record(GUEST, RSA_EK, KEY, 1)
    await journal.release(GUEST, "moved", who="uid 0")
    with pytest.raises(CloneSuspected):
        await journal.record(OTHER, RSA_EK, KEY, 2)
    await journal.record(GUEST, RSA_EK, KEY, 3)
    assert await journal.rsa_eks() == {GUEST: KEY}


async def test_releasing_nothing_is_not_found(journal: Journal) -> None:
    """Before anything was recorded, for another guest, and a second time."""
    with pytest.raises(NotFound):
        await journal.release(GUEST, "?", who="uid 0")
    await journal.record(GUEST, RSA_EK, KEY, 1)
    with pytest.raises(NotFound):
        await journal.release(OTHER, "?", who="uid 0")
    await journal.release(GUEST, "!", who="uid 0")
    with pytest.raises(NotFound):
        await journal.release(GUEST, "?", who="uid 0")


async def test_the_last_start_of_a_guest_is_what_counts(journal: Journal, tmp_path: Path) -> None:
    """One record per guest; a later one replaces it."""
    state = tmp_path / "tpm2-00.permall"
    await journal.saw(GUEST, state, FILE, KEY)
    await journal.saw(OTHER, state, FILE, ECC_KEY)
    await journal.saw(GUEST, state, FILE, SECOND_KEY)
    assert await journal.seen() == {GUEST: SECOND_KEY, OTHER: ECC_KEY}


async def test_large_device_and_inode_numbers_are_kept(journal: Journal, tmp_path: Path) -> None:
    """64 bits without a sign, more than an SQL integer holds."""
    large = os.stat_result((0o600, 2**64 - 1, 2**64 - 2, 1, 0, 0, 0, 0, 0, 0))
    await journal.saw(GUEST, tmp_path / "tpm2-00.permall", large, KEY)
    assert await journal.seen() == {GUEST: KEY}


async def test_a_serial_of_160_bits_is_kept(journal: Journal, store: Store) -> None:
    """As hex: it is longer than an SQL integer."""
    await journal.record(GUEST, RSA_EK, KEY, 2**159 + 1)
    assert int((await rows(store))[0].serial, 16) == 2**159 + 1


async def test_the_journal_survives_a_restart(database_url: str, tmp_path: Path) -> None:
    """Certified keys, seen keys and releases are in the file."""
    store = await opened(database_url)
    journal = Journal(store)
    await journal.record(GUEST, RSA_EK, KEY, 1)
    await journal.record(OTHER, RSA_EK, SECOND_KEY, 2)
    await journal.release(OTHER, "gone", who="uid 0")
    await journal.saw(GUEST, tmp_path / "tpm2-00.permall", FILE, KEY)
    await store.close()
    store = await opened(database_url)
    again = Journal(store)
    assert (await again.rsa_eks(), await again.seen()) == ({GUEST: KEY}, {GUEST: KEY})
    with pytest.raises(Conflict):
        await again.record(GUEST, RSA_EK, bytes(32), 3)
    await store.close()
