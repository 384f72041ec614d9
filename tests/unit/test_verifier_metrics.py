"""What a tenant verifier counts, driven by real sessions on an honest, a failing and a lying wire."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from harness.errors import BatchFailed, GuestNotHere, HarnessError, PeerUnreachable, PoolFull, StoreError
from harness.metrics import Metrics
from harness.tenant.plan import Timing
from harness.tenant.ports import Progress
from harness.tenant.session import Session
from harness.tenant.states import State
from harness.tenant.verifier_metrics import RoundFigures
from tests.support.figures import Figures, figures
from tests.support.manual_time import settle
from tests.support.tenant_wire import AGENT, Wire
from tests.support.verifier_peers import ACT, FakePeers, body, opened, until, verifier

pytestmark = pytest.mark.asyncio

ROUNDS = "harness_rounds_total"
NOBODY = {"layer": "none", "check": "none"}
LAYERS = pytest.mark.parametrize("layer", ["guest", "host"])


class Counted:
    """A session that is counted."""

    def __init__(self, wire: Wire) -> None:
        self.metrics = Metrics("tenant-verifier")
        self.rounds = RoundFigures(self.metrics, wire.time.monotonic)
        self.session = Session(wire.plan, replace(wire.ports, told=self.rounds.told), Progress(state=State.SAVED))

    @property
    def found(self) -> Figures:
        """One scrape."""
        return figures(self.metrics)


@contextlib.asynccontextmanager
async def counted(wire: Wire) -> AsyncIterator[Counted]:
    """A session that runs until the end of the block."""
    made = Counted(wire)
    task = asyncio.create_task(made.session.run())
    try:
        await settle()
        yield made
    finally:
        task.cancel()
        await asyncio.wait({task})


async def test_a_round_that_is_accepted_is_counted_with_its_time() -> None:
    """Each accepted round once, from the guest's nonce on; V is no further round."""
    wire = Wire()

    async def slow() -> None:
        await wire.time.sleep(0.4)

    wire.provider.on_ask = slow
    async with counted(wire) as made:
        assert made.found.sum(ROUNDS) == 0
        await wire.time.advance(0.5)
        assert made.found.value(ROUNDS, outcome="accepted", **NOBODY) == 1
        await wire.time.advance(2.5)
        assert made.found.value(ROUNDS, outcome="accepted", **NOBODY) == 2
    assert made.found.value("harness_round_seconds_count") == 2
    assert made.found.value("harness_round_seconds_sum") == pytest.approx(0.8)
    assert made.found.sum("harness_back_offs_total") == 0


@LAYERS
async def test_a_rejected_round_names_layer_and_check(layer: str) -> None:
    """Evidence of another boot fails check 9 in its layer; the alarm that follows is counted by its kind."""
    wire = Wire()
    (wire.guest if layer == "guest" else wire.provider).tpm.pcrs[4] = bytes(32)
    async with counted(wire) as made:
        assert made.session.state is State.INVALID_QUOTE
    assert made.found.value(ROUNDS, outcome="rejected", layer=layer, check="9") == 1
    assert made.found.sum(ROUNDS) == 1
    assert made.found.value("harness_alarms_total", kind="ReferenceValueMismatch") == 1


@LAYERS
@pytest.mark.parametrize(
    "error",
    [PeerUnreachable("x"), PoolFull("x", retry_after_s=1.0), BatchFailed("x", batch_id="b"), GuestNotHere("x")],
    ids=lambda error: type(error).__name__,
)
async def test_a_peer_without_an_answer_is_counted_with_the_back_off(layer: str, error: HarnessError) -> None:
    """Layer and error of what was not answered, and one wait before it is asked again."""
    wire, name = Wire(), type(error).__name__
    (wire.guest if layer == "guest" else wire.provider).script = [error]
    async with counted(wire) as made:
        await wire.time.advance(10)
        assert made.session.attested()
    assert made.found.value("harness_unanswered_total", layer=layer, reason=name) == 1
    assert made.found.value(ROUNDS, outcome="unanswered", layer=layer, check="none") == 1
    assert made.found.value("harness_back_offs_total", reason=name) == 1
    assert (made.found.value(ROUNDS, outcome="accepted", **NOBODY) or 0) >= 1


async def test_what_v_meets_is_no_round() -> None:
    """A guest agent that is away when V comes is counted as such; the round was accepted."""
    wire = Wire(timing=Timing(quote_interval_s=100.0))
    wire.guest.v_script = [PeerUnreachable("x"), None]
    async with counted(wire) as made:
        await wire.time.advance(5)
        assert wire.guest.received == [wire.v]
    assert made.found.value("harness_unanswered_total", layer="payload", reason="PeerUnreachable") == 1
    assert made.found.sum(ROUNDS) == made.found.value(ROUNDS, outcome="accepted", **NOBODY) == 1


async def test_a_database_of_our_own_that_fails_is_no_fault_of_a_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be read or stored is counted as that, whatever a peer did before."""
    wire = Wire()

    async def broken(*_: object) -> None:
        raise StoreError("disk full")

    wire.guest.script = [PeerUnreachable("x")]
    async with counted(wire) as made:
        monkeypatch.setattr(wire.records, "baseline", broken)
        await wire.time.advance(10)
        assert made.session.store_fault is not None
    assert (made.found.value("harness_unanswered_total", layer="store", reason="StoreError") or 0) >= 1
    assert made.found.value("harness_unanswered_total", layer="guest", reason="PeerUnreachable") == 1
    assert made.found.sum(ROUNDS, outcome="accepted") == 0


async def test_a_round_that_is_begun_anew_is_counted_as_restarted() -> None:
    """The host's answer came after the round's deadline: a restart, and nobody's failure."""
    wire = Wire(timing=Timing(round_deadline_s=10.0, quote_interval_s=100.0))
    wire.provider.gate.clear()
    async with counted(wire) as made:
        await wire.time.advance(10.5)
        wire.provider.gate.set()
        await settle()
        assert made.session.progress.rounds == 1
    assert made.found.value(ROUNDS, outcome="restarted", layer="host", check="none") == 1
    assert made.found.sum("harness_back_offs_total") == 0


async def test_an_allowed_reboot_is_a_rejected_round_with_an_alarm() -> None:
    """Check 10 is counted whether the policy goes on or not, also when it happens again and again."""
    wire = Wire(allow_reboots=True)

    async def reboot() -> None:
        wire.provider.tpm.reboot()

    async with counted(wire) as made:
        wire.provider.on_ask = reboot
        await wire.time.advance(4.0)
        assert made.session.state is State.FAILED
    rejected = made.found.value(ROUNDS, outcome="rejected", layer="host", check="10")
    assert rejected == made.found.value("harness_alarms_total", kind="HostRebooted")
    assert (rejected or 0) > 1
    assert made.found.sum("harness_unanswered_total") == 0


async def test_a_fault_of_the_verifier_is_counted_as_its_own() -> None:
    """An exception that is nobody's refusal is a fault, and no finding."""
    wire = Wire()

    def broken(_: object) -> object:
        raise RuntimeError("a bug")

    wire.guest.script = [broken]
    async with counted(wire) as made:
        assert made.session.state is State.TENANT_FAILED
    assert made.found.value(ROUNDS, outcome="fault", **NOBODY) == 1
    assert made.found.sum(ROUNDS) == 1


async def test_guests_are_counted_by_state_and_as_attested(tmp_path: Path) -> None:
    """How many sessions are in which state, and how many guests are attested, as of the scrape."""
    wire = Wire()
    metrics = Metrics("tenant-verifier")
    rounds = RoundFigures(metrics, wire.time.monotonic)
    async with opened(tmp_path) as database, verifier(database, FakePeers(wire), rounds.told) as agents:
        rounds.watch(agents)
        assert figures(metrics).value("harness_attested_guests") == 0
        assert figures(metrics).labels("harness_guests") == []
        await agents.add(AGENT, body(wire), ACT)
        await until(agents, AGENT, attested=True)
        found = figures(metrics)
        assert found.value("harness_attested_guests") == 1
        assert found.value("harness_guests", state="GET_QUOTE") == 1
        assert found.value(ROUNDS, outcome="accepted", **NOBODY) == 1
        wire.guest.tpm.pcrs[0] = bytes(32)
        await wire.time.advance(3.0)
        await until(agents, AGENT, state="INVALID_QUOTE")
        found = figures(metrics)
        assert found.value("harness_attested_guests") == 0
        assert found.value("harness_guests", state="INVALID_QUOTE") == 1
