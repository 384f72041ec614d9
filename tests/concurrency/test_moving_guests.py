"""Guests that are found again where they registered last: same keys, another address or certificate."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness.errors import NotFound, PeerUnreachable, StoreError
from harness.store import Store
from harness.tenant.alarms_store import AlarmStore
from harness.tenant.states import State
from tests.support.enrolment_parties import SoftVtpm
from tests.support.manual_time import settle
from tests.support.tenant_wire import AGENT, FakeGuest, SoftTpm, Wire
from tests.support.verifier_peers import ACT, FakePeers, body, opened, until, verifier

ELSEWHERE = ("https://10.0.0.7:9010", "renewed")


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Store]:
    async with opened(tmp_path) as store:
        yield store


async def unreachable(peers: FakePeers, *, turns: int = 3) -> None:
    """The client that the session has fails from now on, as often."""
    peers.wire.guest.script = [PeerUnreachable("no connection")] * turns


async def advance_until(peers: FakePeers, done: Callable[[], object], *, limit_s: int = 60) -> None:
    """Time moves in small steps, with room for the real database, until it is so."""
    for _ in range(limit_s * 4):
        if done():
            return
        await peers.wire.time.advance(0.25)
        await asyncio.sleep(0.005)
    pytest.fail("it never came")


@pytest.mark.parametrize(
    ("ip", "port", "mtls_cert"),
    [
        ("10.0.0.7", 9010, "renewed"),
        ("127.0.0.1", 9002, "renewed"),
        ("10.0.0.7", 9002, "pem"),
        ("127.0.0.1", 9010, "pem"),
    ],
)
async def test_a_guest_that_moved_is_found_by_its_keys(database: Store, ip: str, port: int, mtls_cert: str) -> None:
    """One failed attempt, one look: the new contact is used, stored, and what was left is closed."""
    peers = FakePeers(Wire())
    async with verifier(database, peers) as agents:
        await agents.add(AGENT, body(peers.wire), ACT)
        await until(agents, AGENT, attested=True)
        peers.guests[f"https://{ip}:{port}", mtls_cert] = moved = FakeGuest(peers.wire.guest.tpm)
        peers.known = replace(peers.known, ip=ip, port=port, mtls_cert=mtls_cert)
        peers.wire.guest.script = [PeerUnreachable("no connection")] * 1000
        asked = len(peers.wire.guest.asked)
        await advance_until(peers, lambda: moved.asked)
        await until(agents, AGENT, attested=True, ip=ip, port=port, attestation_count=2)
        assert len(peers.wire.guest.asked) == asked + 1
        assert (peers.looks, peers.released) == (1, [peers.wire.guest])
    async with verifier(database, peers) as agents:
        assert (agents.view(AGENT)["ip"], agents.view(AGENT)["port"]) == (ip, port)
        await advance_until(peers, lambda: len(moved.asked) > 1)


@pytest.mark.parametrize("key", ["guest_ak", "guest_ek"])
async def test_a_guest_of_other_keys_is_not_followed(database: Store, key: str) -> None:
    """The registrar has another key for it: FAILED with KeyChanged, one alarm; nobody at the new address is asked."""
    peers = FakePeers(Wire())
    async with verifier(database, peers) as agents:
        await agents.add(AGENT, body(peers.wire), ACT)
        await until(agents, AGENT, attested=True)
        peers.guests[ELSEWHERE] = impostor = FakeGuest(SoftTpm())
        keys = {"guest_ak": impostor.tpm.ak.marshal(), "guest_ek": SoftVtpm().ek.marshal()}
        honest = peers.known
        changes: dict[str, Any] = {key: keys[key], "ip": "10.0.0.7", "port": 9010, "mtls_cert": "renewed"}
        peers.known = replace(honest, **changes)
        await unreachable(peers, turns=1)
        await advance_until(peers, lambda: agents.view(AGENT)["state"] == "FAILED")
        view = await until(agents, AGENT, error="KeyChanged", layer="guest", ip="127.0.0.1")
        assert not view["attested"]
        assert impostor.asked == []
        peers.known = honest
        await agents.resume(AGENT, ACT)
        await until(agents, AGENT, attested=True)
    assert [record.alarm.kind for record in await AlarmStore(database).alarms()] == ["KeyChanged"]


async def test_a_registrar_that_is_away_or_knows_nobody_stops_nothing(database: Store) -> None:
    """Retries go on at the old address; the guest that comes back there is attested again."""
    peers = FakePeers(Wire())
    async with verifier(database, peers) as agents:
        await agents.add(AGENT, body(peers.wire), ACT)
        await until(agents, AGENT, attested=True)
        for trouble in (PeerUnreachable("registrar"), NotFound("not registered")):
            peers.looking_fails = trouble
            looks = peers.looks
            await unreachable(peers, turns=3)
            await advance_until(peers, lambda: not peers.wire.guest.script)
            await advance_until(peers, lambda: agents.view(AGENT)["attested"])
            assert peers.looks > looks
        assert agents.view(AGENT)["state"] != State.FAILED.name


async def test_a_registrar_that_hangs_delays_one_attempt_and_no_more(database: Store) -> None:
    """Looking has a deadline of its own, within the attempt's."""
    peers = FakePeers(Wire())
    async with verifier(database, peers) as agents:
        await agents.add(AGENT, body(peers.wire), ACT)
        await until(agents, AGENT, attested=True)
        peers.gate.clear()
        await unreachable(peers, turns=1)
        rounds = agents.view(AGENT)["attestation_count"]
        await advance_until(peers, lambda: agents.view(AGENT)["attestation_count"] != rounds)
        assert peers.looks == 1


async def test_nobody_is_looked_for_while_the_guest_answers(database: Store) -> None:
    """The registrar is not part of a round that works."""
    peers = FakePeers(Wire())
    async with verifier(database, peers) as agents:
        await agents.add(AGENT, body(peers.wire), ACT)
        await until(agents, AGENT, attested=True)
        peers.known = replace(peers.known, ip="10.0.0.7")
        for _ in range(5):
            await peers.wire.time.advance(2.0)
            await asyncio.sleep(0.01)
        assert peers.looks == 0


async def test_an_address_that_the_operator_gave_stays_while_the_registered_one_does(database: Store) -> None:
    """Added under another name than the guest registered: an outage does not change that; a new certificate does."""
    peers = FakePeers(Wire())
    peers.guests["https://guest.example:9002", "pem"] = peers.wire.guest
    peers.guests["https://guest.example:9002", "renewed"] = peers.wire.guest
    async with verifier(database, peers) as agents:
        await agents.add(AGENT, body(peers.wire, cloudagent_ip="guest.example"), ACT)
        await until(agents, AGENT, attested=True)
        await unreachable(peers, turns=2)
        await advance_until(peers, lambda: peers.looks == 2)
        await advance_until(peers, lambda: agents.view(AGENT)["attested"])
        assert peers.released == []
        peers.known = replace(peers.known, mtls_cert="renewed")
        await unreachable(peers, turns=1)
        await advance_until(peers, lambda: peers.released)
        assert agents.view(AGENT)["ip"] == "guest.example"


async def test_a_guest_that_moves_while_its_values_are_changed_is_still_followed(database: Store) -> None:
    """Policy and contact are both stored; neither is lost to the other."""
    peers = FakePeers(Wire())
    asked = body(peers.wire)
    async with verifier(database, peers) as agents:
        await agents.add(AGENT, asked, ACT)
        await until(agents, AGENT, attested=True)
        peers.guests[ELSEWHERE] = moved = FakeGuest(peers.wire.guest.tpm)
        peers.known = replace(peers.known, ip="10.0.0.7", port=9010, mtls_cert="renewed")
        await unreachable(peers, turns=1000)
        await advance_until(peers, lambda: moved.asked)
        both = {"sha256": {pcr: [moved.tpm.pcrs[int(pcr)].hex()] for pcr in ("0", "4")}}
        await agents.set_policy(AGENT, {"guest_policy": both}, ACT)
        await settle()
        await until(agents, AGENT, attested=True, ip="10.0.0.7")
    async with verifier(database, peers) as agents:
        assert agents.view(AGENT)["ip"] == "10.0.0.7"
        assert agents.policy(AGENT)["guest_policy"] == both


async def test_a_contact_that_cannot_be_stored_ends_nobodys_patience(
    database: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest moved while the database fails, for longer than a peer may be away: our fault, and then attested."""
    peers = FakePeers(Wire())

    async def locked(*_: object) -> None:
        raise StoreError("locked")

    async with verifier(database, peers) as agents:
        await agents.add(AGENT, body(peers.wire), ACT)
        await until(agents, AGENT, attested=True)
        peers.guests[ELSEWHERE] = FakeGuest(peers.wire.guest.tpm)
        peers.known = replace(peers.known, ip="10.0.0.7", port=9010, mtls_cert="renewed")
        await unreachable(peers, turns=1)
        with monkeypatch.context() as patch:
            patch.setattr("harness.tenant.verifier_store.VerifierStore.moved", locked)
            await advance_until(peers, lambda: peers.looks > 1)
            await peers.wire.time.advance(700)
            await settle()
            view = agents.view(AGENT)
            assert (view["state"], view["error"], view["layer"]) == ("GET_QUOTE_RETRY", "StoreError", "verifier")
        await advance_until(peers, lambda: agents.view(AGENT)["attested"])
        assert agents.view(AGENT)["ip"] == "10.0.0.7"
    assert await AlarmStore(database).alarms() == []
