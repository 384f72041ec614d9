"""The load generator and its yardstick, as processes over real sockets: counts, bounds, and times from the schedule."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from harness.bench_orders import Burst, Closed, Load, Order, Poisson
from harness.bench_run import BareServer, Loader, run_load
from harness.config import TlsSettings
from harness.errors import SimulationError
from harness.pki import Role
from tests.support.provider_lab import Pki

BODY = 1500
HELD_S = 2.0


def an_order(folder: Path, port: int, *loads: Load, tls: TlsSettings | None, path: str = "/fixed") -> Order:
    return Order(
        host="127.0.0.1",
        port=port,
        certificates=[] if tls is None else [(tls.certificate, tls.key)],
        authority=None if tls is None else tls.authorities["provider"],
        path=path,
        loads=list(loads),
        drain_s=30.0,
        result=folder / "result.json",
    )


async def test_a_load_over_mutual_tls_is_answered_and_counted(tmp_path: Path) -> None:
    """Every request of an open loop, a closed loop and a burst is answered; the body's size comes back."""
    pki = Pki.make(tmp_path / "pki", "alice")
    server = pki.tls("provider", Role.PROVIDER_VERIFIER, "v", trusts=["alice"])
    client = pki.tls("alice", Role.TENANT_VERIFIER, "a", trusts=["provider"])
    loads: list[Load] = [
        Poisson(rate=100, seconds=0.3, connections=4, tenants=[0]),
        Closed(connections=2, requests=20, tenants=[0]),
        Burst(connections=3, rounds=2, tenants=[0]),
    ]
    async with BareServer(tmp_path, body_bytes=BODY, tls=server) as bare:
        results = await run_load(an_order(tmp_path, bare.port, *loads, tls=client))
    counts = [len(outcome.status) for outcome in results.outcomes]
    assert counts[1:] == [20, 6]
    assert counts[0] > 0
    assert {status for outcome in results.outcomes for status in outcome.status} == {200}
    assert all(latency > 0 for outcome in results.outcomes for latency in outcome.latency_s)
    assert results.body_bytes == BODY


async def test_what_waits_is_measured_from_its_scheduled_time(tmp_path: Path) -> None:
    """Requests that a slow service keeps back count from when they were due, also those that could not be sent yet."""
    load = Poisson(rate=200, seconds=0.2, connections=1, tenants=[0])
    async with (
        BareServer(tmp_path, body_bytes=BODY, tls=None) as bare,
        Loader(an_order(tmp_path, bare.port, load, tls=None, path="/wait")) as loader,
    ):
        loader.go()
        await asyncio.sleep(HELD_S)  # the load is over by then: all but one request queue in the generator
        released_s = time.monotonic()
        bare.release()
        await loader.done()
        outcome = (await loader.results()).outcomes[0]
    due = [at for at in outcome.scheduled_s if at < released_s]
    assert len(due) > 5
    assert max(due) - min(due) > 0.05
    assert set(outcome.status) == {200}
    ended = [at + latency for at, latency in zip(outcome.scheduled_s, outcome.latency_s, strict=True)]
    assert min(ended) >= released_s


async def test_an_unanswered_load_ends_at_its_deadline(tmp_path: Path) -> None:
    """What is never answered is counted as that, and the run ends."""
    order = an_order(tmp_path, 1, Burst(connections=2, rounds=1, tenants=[0]), tls=None, path="/wait")
    async with BareServer(tmp_path, body_bytes=BODY, tls=None) as bare:
        results = await run_load(order.model_copy(update={"port": bare.port, "drain_s": 0.2}))
    assert results.outcomes[0].refused == {"not answered": 2}
    assert results.outcomes[0].status == [-1, -1]


async def test_a_server_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    """A load that cannot be made is no result."""
    async with BareServer(tmp_path, body_bytes=BODY, tls=None) as bare:
        port = bare.port
    with pytest.raises(SimulationError, match="did not get ready"):
        await run_load(an_order(tmp_path, port, Burst(connections=1, rounds=1, tenants=[0]), tls=None))


def test_a_load_goes_to_loopback_only(tmp_path: Path) -> None:
    """An order for another machine is refused before anything is opened."""
    with pytest.raises(ValueError, match="loopback only"):
        Order(host="192.0.2.1", port=1, certificates=[], loads=[], result=tmp_path / "r")
