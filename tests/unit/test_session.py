"""A session against an honest and a failing wire: the table of DESIGN 3.8, the baseline rules, deadlines, and V.

Size: every row of the transition table, on one wire.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest

from harness.errors import (
    AccessDenied,
    BatchFailed,
    Conflict,
    DeadlineExceeded,
    DeviceFault,
    GuestNotHere,
    HarnessError,
    MalformedEvidence,
    NotReady,
    NotYourGuest,
    PeerRefusedUs,
    PeerUnreachable,
    PoolFull,
    SelectionNotAllowed,
    ShuttingDown,
    StoreError,
)
from harness.tenant.plan import Timing
from harness.tenant.ports import Progress
from harness.tenant.session import Session
from harness.tenant.states import ACTIVE, State
from tests.support.manual_time import settle
from tests.support.tenant_wire import Wire

pytestmark = pytest.mark.asyncio

BOTH = pytest.mark.parametrize("layer", ["guest", "provider"])


@contextlib.asynccontextmanager
async def running(wire: Wire, progress: Progress | None = None) -> AsyncIterator[Session]:
    """A session whose task runs until the end of the block."""
    session = Session(wire.plan, wire.ports, progress or Progress(state=State.SAVED))
    task = asyncio.get_running_loop().create_task(session.run())
    try:
        await settle()
        yield session
    finally:
        assert not task.done(), "the session's task ended by itself"
        task.cancel()
        await asyncio.wait({task})


def peer(wire: Wire, layer: str) -> Any:
    return {"guest": wire.guest, "provider": wire.provider}[layer]


async def test_an_honest_round_is_accepted_and_v_follows() -> None:
    """Guest, then host bound to it, then V once; then rounds go on at each interval without a further V."""
    wire = Wire()
    async with running(wire) as session:
        assert session.state is State.GET_QUOTE
        assert session.progress.rounds == 1
        assert wire.guest.received == [wire.v]
        assert session.attested()
        await wire.time.advance(2.0)
        assert session.progress.rounds == 2
        assert (len(wire.guest.asked), len(wire.provider.asked)) == (2, 2)
        assert wire.guest.received == [wire.v]
    assert session.progress.state == State.SAVED


async def test_a_plan_without_provider_quote_asks_the_guest_only() -> None:
    """need_provider_quote = false: V follows the guest's evidence."""
    wire = Wire(host=None)
    async with running(wire) as session:
        assert session.attested()
        assert wire.provider.asked == []
        assert wire.guest.received == [wire.v]


# --- the table of DESIGN 3.8 ----------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(
    "error",
    [
        PeerUnreachable("no connection"),
        DeadlineExceeded("late"),
        PoolFull("full", retry_after_s=1.0),
        ShuttingDown("bye", retry_after_s=1.0),
        NotReady("cache", retry_after_s=1.0),
        BatchFailed("tpm", batch_id="b"),
        DeviceFault("tpm", response_code=0x101),
        PeerRefusedUs("slow", status=408),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_a_transport_failure_is_retried_with_a_new_nonce(layer: str, error: HarnessError) -> None:
    """Connection errors, deadlines, 408, 5xx and failed batches: back-off, then a new attempt, then acceptance."""
    wire = Wire()
    peer(wire, layer).script = [error]
    async with running(wire) as session:
        assert session.state in (State.GET_QUOTE_RETRY, State.GET_PROVIDER_QUOTE_RETRY)
        assert not session.attested()
        assert wire.guest.received == []
        await wire.time.advance(2.0)
        assert session.attested()
        assert len(peer(wire, layer).asked) == 2
        assert wire.guest.received == [wire.v]


@BOTH
async def test_retries_end_in_failed(layer: str) -> None:
    """After ten minutes the session fails, with the reason and an alarm, and waits for the operator."""
    wire = Wire(jitter=0.5)
    peer(wire, layer).script = [PeerUnreachable("no connection")] * 1000
    async with running(wire) as session:
        await wire.time.advance(590)
        assert session.state.name != "FAILED"
        await wire.time.advance(30)
        assert session.state is State.FAILED
        assert (session.progress.layer, session.progress.error) == (
            layer.replace("provider", "host"),
            "PeerUnreachable",
        )
        assert [alarm.kind for alarm in wire.records.alarms] == ["PeerUnreachable"]
        asked = len(peer(wire, layer).asked)
        await wire.time.advance(1000)
        assert len(peer(wire, layer).asked) == asked
        assert wire.guest.received == []


@BOTH
@pytest.mark.parametrize("away_s", [5, 60, 595])
async def test_a_peer_that_comes_back_is_asked_again_without_an_operator(layer: str, away_s: int) -> None:
    """Away for a minute, or for almost as long as our patience: rounds go on by themselves, within one longest wait."""
    wire = Wire(v=None, jitter=0.5)
    async with running(wire) as session:
        peer(wire, layer).script = [PeerUnreachable("no connection")] * 1000
        await wire.time.advance(away_s)
        peer(wire, layer).script = []
        done = session.progress.rounds
        await wire.time.advance(10)
        assert session.progress.rounds > done
        assert session.attested()


async def test_patience_is_a_setting_and_starts_anew_with_each_answer() -> None:
    """A peer that is away again and again, each time for less than our patience, fails nothing."""
    wire = Wire(v=None, timing=Timing(transport_patience_s=20.0))
    async with running(wire) as session:
        for _ in range(5):
            wire.provider.script = [PeerUnreachable("no connection")] * 4
            await wire.time.advance(15)
            assert session.attested()
        wire.provider.script = [PeerUnreachable("no connection")] * 100
        await wire.time.advance(40)
        assert session.state is State.FAILED


async def test_back_off_doubles_and_follows_retry_after() -> None:
    """The interval of the waits doubles up to the bound, and lies behind a peer's Retry-After."""
    wire = Wire(timing=Timing(backoff_longest_s=4.0), jitter=0.5)
    wire.guest.script = [PeerUnreachable("x")] * 5 + [PoolFull("full", retry_after_s=20.0)]
    async with running(wire):
        await wire.time.advance(60)
        assert wire.time.slept[:6] == [0.375, 0.625, 1.125, 2.125, 2.125, 22.0]


async def test_a_retry_after_without_end_fails() -> None:
    """A peer cannot put a session to sleep for a day."""
    wire = Wire()
    wire.provider.script = [PoolFull("full", retry_after_s=86_400.0)]
    async with running(wire) as session:
        assert session.state is State.FAILED


@BOTH
async def test_absent_is_retried_three_times(layer: str) -> None:
    """404: three retries, then FAILED."""
    wire = Wire()
    peer(wire, layer).script = [GuestNotHere("not here")] * 100
    async with running(wire) as session:
        await wire.time.advance(100)
        assert session.state is State.FAILED
        assert session.progress.error == "GuestNotHere"
        assert len(peer(wire, layer).asked) == 4


async def test_an_absent_guest_that_comes_is_accepted() -> None:
    """404 three times and then an answer: accepted."""
    wire = Wire()
    wire.provider.script = [GuestNotHere("not here")] * 3
    async with running(wire) as session:
        assert wire.provider.asked
        await wire.time.advance(3 + 6 + 12)
        assert session.attested()


@BOTH
@pytest.mark.parametrize("error", [NotYourGuest("x"), SelectionNotAllowed("x"), AccessDenied("x")])
async def test_a_refusal_fails_with_the_reason(layer: str, error: HarnessError) -> None:
    """403 is final."""
    wire = Wire()
    peer(wire, layer).script = [error]
    async with running(wire) as session:
        assert session.state is State.FAILED
        assert session.progress.error == type(error).__name__
        assert len(peer(wire, layer).asked) == 1


@BOTH
@pytest.mark.parametrize("error", [PeerRefusedUs("bad", status=400), PeerRefusedUs("gone", status=410), Conflict("x")])
async def test_any_other_4xx_is_our_bug(layer: str, error: HarnessError) -> None:
    """Other 4xx: FAILED at once."""
    wire = Wire()
    peer(wire, layer).script = [error]
    async with running(wire) as session:
        assert session.state is State.FAILED
        assert len(peer(wire, layer).asked) == 1


def _other_pcr(answer: Any) -> Any:
    pcrs = {bank: dict(values) | {0: bytes(32)} for bank, values in answer.evidence.pcrs.items()}
    return replace(answer, evidence=replace(answer.evidence, pcrs=pcrs))


GUEST_LIES: list[tuple[str, int, Callable[[Any], Any]]] = [
    ("NotATpmQuote", 4, lambda a: replace(a, evidence=replace(a.evidence, attest=b"\0" + a.evidence.attest[1:]))),
    ("QuoteSignatureInvalid", 6, lambda a: replace(a, evidence=replace(a.evidence, signature=b""))),
    ("PcrDigestMismatch", 8, _other_pcr),
    ("ReferenceValueMismatch", 9, lambda a: replace(a, transport_key_pem=b"another key")),
]
HOST_LIES: list[tuple[str, int, Callable[[Any], Any]]] = [
    ("MalformedEvidence", 1, lambda r: []),
    ("WrongHost", 2, lambda r: r | {"host_id": "d432fbb3-d2f1-8a97-9ef7-75bd81c00000"}),
    ("InclusionProofInvalid", 3, lambda r: r | {"proof": r["proof"] | {"tree_size": 0}}),
    ("QualifyingDataMismatch", 5, lambda r: r | {"proof": r["proof"] | {"leaf_index": 1}}),
    ("QuoteSignatureInvalid", 6, lambda r: r | {"signature": ""}),
    ("PcrDigestMismatch", 8, lambda r: r | {"pcrs": {"sha256": {"0": "00" * 32, "4": "00" * 32}}}),
]


@pytest.mark.parametrize(("error", "check", "lie"), GUEST_LIES)
async def test_a_guest_that_lies_is_invalid_at_once(error: str, check: int, lie: Callable[[Any], Any]) -> None:
    """A failed check of guest evidence: INVALID_QUOTE, an alarm, no retry, no host quote, no V."""
    wire = Wire()
    wire.guest.script = [lie]
    async with running(wire) as session:
        await wire.time.advance(100)
        assert session.state is State.INVALID_QUOTE
        assert (session.progress.layer, session.progress.failed_check, session.progress.error) == (
            "guest",
            check,
            error,
        )
        assert (len(wire.guest.asked), len(wire.provider.asked), wire.guest.received) == (1, 0, [])
        assert [alarm.kind for alarm in wire.records.alarms] == [error]


@pytest.mark.parametrize(("error", "check", "lie"), HOST_LIES)
async def test_a_provider_that_lies_is_invalid_at_once(error: str, check: int, lie: Callable[[Any], Any]) -> None:
    """A failed check of host evidence: INVALID_QUOTE, no retry, no V."""
    wire = Wire()
    wire.provider.script = [lie]
    async with running(wire) as session:
        await wire.time.advance(100)
        assert session.state is State.INVALID_QUOTE
        assert (session.progress.layer, session.progress.failed_check, session.progress.error) == ("host", check, error)
        assert (len(wire.provider.asked), wire.guest.received) == (1, [])


@BOTH
async def test_an_answer_that_is_no_evidence_is_check_1(layer: str) -> None:
    """What the client cannot read as evidence is a finding, not a network fault."""
    wire = Wire()
    peer(wire, layer).script = [MalformedEvidence("not JSON")]
    async with running(wire) as session:
        assert session.state is State.INVALID_QUOTE
        assert session.progress.failed_check == 1


async def test_a_host_with_another_kernel_keeps_v_locked() -> None:
    """Check 9 at the host: the guest's own evidence does not help."""
    wire = Wire()
    wire.provider.tpm.pcrs[4] = bytes(32)
    async with running(wire) as session:
        assert (session.state, session.progress.failed_check) == (State.INVALID_QUOTE, 9)
        assert wire.guest.received == []


# --- check 10 and the baseline ----------------------------------------------------------------------------------


@BOTH
async def test_a_reboot_is_refused_by_default(layer: str) -> None:
    """Counters that differ from the baseline: INVALID_QUOTE, and the stored baseline stays."""
    wire = Wire()
    async with running(wire) as session:
        before = dict(wire.records.baselines)
        peer(wire, layer).tpm.reboot()
        await wire.time.advance(2.0)
        assert (session.state, session.progress.error) == (State.INVALID_QUOTE, "HostRebooted")
        name = peer(wire, layer).tpm.ak.name
        assert wire.records.baselines[name] == before[name]
        assert not session.attested()


@BOTH
async def test_an_allowed_reboot_is_reported_and_the_round_starts_anew(layer: str) -> None:
    """The round that saw the reboot is not accepted; the next one, of new nonces, is."""
    wire = Wire(allow_reboots=True)
    async with running(wire) as session:
        peer(wire, layer).tpm.reboot()
        await wire.time.advance(2.0)
        assert [alarm.kind for alarm in wire.records.alarms] == ["HostRebooted"]
        assert session.progress.rounds == 2
        assert len(wire.guest.asked) == 3  # first round, the round that saw the reboot, the round after it
        assert wire.records.baselines[peer(wire, layer).tpm.ak.name].reset_count == 8
        assert session.attested()


async def test_a_tpm_that_reboots_for_ever_fails() -> None:
    """Restarts of the round are bounded."""
    wire = Wire(allow_reboots=True)

    async def reboot() -> None:
        wire.provider.tpm.reboot()

    async with running(wire) as session:
        wire.provider.on_ask = reboot
        await wire.time.advance(4.0)
        assert session.state is State.FAILED
        assert session.progress.error == "HostRebooted"


async def test_a_reset_between_guest_and_host_quote_is_never_accepted() -> None:
    """The host is reset after the guest nonce, and another guest's round accepts that reboot meanwhile: start anew."""
    wire = Wire(allow_reboots=True)
    stored: list[int] = []

    async def reset_in_between() -> None:
        if not stored:
            wire.provider.tpm.reboot()
            wire.records.baselines[wire.provider.tpm.ak.name] = wire.provider.tpm.baseline
            stored.append(len(wire.provider.asked))

    wire.guest.on_ask = reset_in_between
    async with running(wire) as session:
        assert len(wire.guest.asked) == 2
        assert len(wire.provider.asked) == 1
        assert session.progress.rounds == 1
        assert stored == [0]


async def test_another_guests_policy_does_not_let_a_reboot_in() -> None:
    """A guest whose policy refuses reboots refuses one that another guest's policy has accepted for the shared AK."""
    wire = Wire()
    async with running(wire) as session:
        wire.provider.tpm.reboot()
        wire.records.baselines[wire.provider.tpm.ak.name] = wire.provider.tpm.baseline
        await wire.time.advance(2.0)
        assert (session.state, session.progress.error) == (State.INVALID_QUOTE, "HostRebooted")
        session.resume()
        await settle()
        assert session.attested()  # the operator knows, and the shared baseline is the new one


async def test_accepting_raises_the_clock_and_never_lowers_it() -> None:
    """An answer that was overtaken is accepted by its own baseline, and leaves the higher stored clock alone."""
    wire = Wire()
    wire.provider.gate.clear()
    async with running(wire) as session:
        overtaking = replace(wire.host_baseline, clock=wire.provider.tpm.clock + 1000)
        wire.records.baselines[wire.provider.tpm.ak.name] = overtaking
        wire.provider.gate.set()
        await settle()
        assert session.attested()
        assert wire.host_baseline == overtaking


async def test_a_clock_that_went_back_is_refused() -> None:
    """Equal counters and a lower clock: state was rolled back."""
    wire = Wire()
    async with running(wire) as session:
        wire.guest.tpm.clock = 1
        await wire.time.advance(2.0)
        assert (session.state, session.progress.error) == (State.INVALID_QUOTE, "ClockWentBack")
        assert [alarm.kind for alarm in wire.records.alarms] == ["ClockWentBack"]


@BOTH
async def test_an_unsafe_clock_is_retried_and_never_accepted(layer: str) -> None:
    """ClockNotSafe: retries until the clock is safe again."""
    wire = Wire()
    peer(wire, layer).tpm.safe = False
    async with running(wire) as session:
        await wire.time.advance(30)
        assert session.state in (State.GET_QUOTE_RETRY, State.GET_PROVIDER_QUOTE_RETRY)
        assert session.progress.rounds == 0
        assert session.trouble is not None
        assert session.trouble.layer == ("guest" if layer == "guest" else "host")
        assert session.trouble.error == "ClockNotSafe"
        peer(wire, layer).tpm.safe = True
        await wire.time.advance(15)
        assert session.progress.rounds >= 1
        assert session.trouble is None


@BOTH
async def test_an_unsafe_clock_fails_after_its_limit(layer: str) -> None:
    """ClockNotSafe for clock_unsafe_limit_s: FAILED, which an operator can resume; never accepted."""
    wire = Wire()
    peer(wire, layer).tpm.safe = False
    async with running(wire) as session:
        await wire.time.advance(119)
        assert session.state.name != "FAILED"
        await wire.time.advance(60)
        assert (session.state, session.progress.error) == (State.FAILED, "ClockNotSafe")
        assert wire.guest.received == []
        peer(wire, layer).tpm.safe = True
        session.resume()
        await settle()
        assert session.attested()


# --- deadlines --------------------------------------------------------------------------------------------------


@BOTH
async def test_an_attempt_ends_after_30_seconds_and_its_late_answer_is_discarded(layer: str) -> None:
    """A peer that hangs: the attempt is abandoned, a new one has a new nonce."""
    wire = Wire(timing=Timing(quote_interval_s=100.0))
    peer(wire, layer).gate.clear()
    async with running(wire) as session:
        await wire.time.advance(29.9)
        assert session.state in (State.GET_QUOTE, State.GET_PROVIDER_QUOTE)
        await wire.time.advance(0.2)
        assert session.state in (State.GET_QUOTE_RETRY, State.GET_PROVIDER_QUOTE_RETRY)
        peer(wire, layer).gate.set()
        await settle()
        assert session.progress.rounds == 0
        await wire.time.advance(1)
        assert session.progress.rounds == 1
        assert len(peer(wire, layer).asked) == 2


@BOTH
async def test_an_answer_after_a_stall_of_the_process_is_late(layer: str) -> None:
    """The event loop stood still for 31 s and the answer is there: it is discarded all the same."""
    wire = Wire()

    async def stall() -> None:
        wire.time.jump(31.0)

    peer(wire, layer).on_ask = stall
    async with running(wire) as session:
        peer(wire, layer).on_ask = None
        assert session.state in (State.GET_QUOTE_RETRY, State.GET_PROVIDER_QUOTE_RETRY)
        assert session.progress.rounds == 0


async def test_a_round_that_is_not_over_in_time_starts_anew() -> None:
    """The host's answer would come after round_deadline_s: new guest evidence is taken."""
    wire = Wire(timing=Timing(round_deadline_s=10.0, quote_interval_s=100.0))
    wire.provider.gate.clear()
    async with running(wire) as session:
        await wire.time.advance(9.9)
        assert len(wire.guest.asked) == 1
        await wire.time.advance(0.2)
        assert len(wire.guest.asked) == 2
        wire.provider.gate.set()
        await settle()
        assert session.progress.rounds == 1


async def test_a_back_off_beyond_the_round_deadline_starts_anew() -> None:
    """Guest evidence does not age in a retry: after a long Retry-After the guest is asked again first."""
    wire = Wire()
    wire.provider.script = [PoolFull("full", retry_after_s=61.0)]
    async with running(wire) as session:
        await wire.time.advance(62)
        assert len(wire.guest.asked) == 2
        assert session.progress.rounds == 1


async def test_rounds_that_never_end_in_time_fail() -> None:
    """Restarts by the round's deadline are bounded like any transport failure."""
    wire = Wire(timing=Timing(round_deadline_s=5.0))
    wire.provider.gate.clear()
    async with running(wire) as session:
        await wire.time.advance(590)
        assert session.state.name != "FAILED"
        await wire.time.advance(30)
        assert session.state is State.FAILED


# --- V ------------------------------------------------------------------------------------------------------------


async def test_v_is_retried_and_delivered_once() -> None:
    """A guest agent that is away when V comes gets it by a retry, without a new round."""
    wire = Wire(timing=Timing(quote_interval_s=100.0))
    wire.guest.v_script = [PeerUnreachable("x"), PeerUnreachable("x"), None]
    async with running(wire) as session:
        assert session.state is State.PROVIDE_V_RETRY
        await wire.time.advance(5)
        assert wire.guest.received == [wire.v]
        assert session.progress.v_released
        assert len(wire.guest.asked) == 1


async def test_v_is_not_released_on_aged_evidence() -> None:
    """A delivery that is still open after round_deadline_s needs a new round first."""
    wire = Wire(timing=Timing(round_deadline_s=10.0))
    wire.guest.v_script = [PoolFull("x", retry_after_s=11.0), None]
    async with running(wire):
        wire.provider.tpm.pcrs[4] = bytes(32)
        await wire.time.advance(20)
        assert wire.guest.received == []


async def test_v_deliveries_are_bounded() -> None:
    """An agent that passes every round and never takes V fails in the end."""
    wire = Wire(timing=Timing(round_deadline_s=1.0, transport_patience_s=60.0))
    wire.guest.v_script = [PeerUnreachable("x")] * 1000
    async with running(wire) as session:
        await wire.time.advance(200)
        assert session.state is State.FAILED
        assert session.progress.layer == "payload"


@pytest.mark.parametrize(("error", "state"), [(AccessDenied("x"), State.FAILED), (PeerRefusedUs("x", status=400), 7)])
async def test_a_refused_v_fails(error: HarnessError, state: State) -> None:
    """403 and other 4xx on delivery: FAILED."""
    wire = Wire()
    wire.guest.v_script = [error]
    async with running(wire) as session:
        assert session.state == state
        assert not session.progress.v_released


async def test_the_first_v_needs_the_host_even_between_provider_quotes() -> None:
    """provider_quote_interval does not weaken the release: V waits for a round with both layers."""
    wire = Wire(timing=Timing(provider_quote_interval=5))
    wire.provider.script = [PeerUnreachable("x")]
    async with running(wire) as session:
        assert wire.guest.received == []
        await wire.time.advance(1)
        assert wire.guest.received == [wire.v]
        assert session.progress.rounds == 1


async def test_provider_quotes_come_every_nth_round() -> None:
    """provider_quote_interval = 3: rounds 1, 4, 7 ask the host."""
    wire = Wire(timing=Timing(provider_quote_interval=3))
    async with running(wire) as session:
        await wire.time.advance(12.5)
        assert session.progress.rounds == 7
        assert len(wire.provider.asked) == 3


async def test_a_guest_agent_that_restarts_is_vouched_for_anew() -> None:
    """A new NK is fine as long as PCR 16 vouches for it."""
    wire = Wire()
    async with running(wire) as session:
        wire.guest.restart()
        await wire.time.advance(2.0)
        assert session.progress.rounds == 2


# --- attested, resume, faults ---------------------------------------------------------------------------------------


async def test_attested_expires_after_three_intervals() -> None:
    """While retries go on, the last success counts for three intervals and no longer."""
    wire = Wire()
    async with running(wire) as session:
        wire.guest.script = [PeerUnreachable("x")] * 100
        await wire.time.advance(5.9)
        assert session.attested()
        await wire.time.advance(0.2)
        assert not session.attested()
        assert session.state is State.GET_QUOTE_RETRY


async def test_resume_starts_anew_at_get_quote() -> None:
    """Only an operator leaves FAILED; the first thing is a guest quote, and earlier failures are forgotten."""
    wire = Wire()
    wire.provider.script = [NotYourGuest("x")]
    async with running(wire) as session:
        await wire.time.advance(1000)
        assert session.state is State.FAILED
        session.resume()
        await settle()
        assert len(wire.guest.asked) == 2
        assert session.attested()
        assert session.progress.error is None
        with pytest.raises(Conflict):
            session.resume()


async def test_a_stored_failure_waits_for_the_operator_after_a_restart() -> None:
    """A session that was FAILED when the service stopped asks nobody until it is resumed."""
    wire = Wire()
    async with running(wire, Progress(state=State.INVALID_QUOTE, error="ReferenceValueMismatch")) as session:
        await wire.time.advance(100)
        assert wire.guest.asked == []
        session.resume()
        await settle()
        assert session.attested()


async def test_v_that_was_delivered_before_a_restart_is_not_sent_again() -> None:
    """v_released is stored."""
    wire = Wire()
    async with running(wire, Progress(state=State.SAVED, v_released=True)) as session:
        assert session.attested()
        assert wire.guest.received == []


async def test_a_fault_of_ours_ends_in_tenant_failed() -> None:
    """An exception that nobody foresaw is no verdict and no success."""
    wire = Wire()

    def broken(_: Any) -> Any:
        raise RuntimeError("bug")

    wire.guest.script = [broken]
    async with running(wire) as session:
        assert (session.state, session.progress.error) == (State.TENANT_FAILED, "RuntimeError")
        assert not session.attested()
        session.resume()
        await settle()
        assert session.attested()


async def test_a_database_that_fails_keeps_nothing_attested() -> None:
    """Nothing can be stored: V is not released, nobody is attested, and it goes on by itself when the database is."""
    wire = Wire(jitter=0.5)
    wire.records.fault = StoreError("disk full")
    async with running(wire) as session:
        await wire.time.advance(3600)
        assert session.state in ACTIVE
        assert session.store_fault is wire.records.fault
        assert wire.guest.received == []
        assert not session.attested()
        wire.records.fault = None
        await wire.time.advance(10)
        assert session.attested()
        assert session.store_fault is None
        assert wire.guest.received == [wire.v]


async def test_delete_ends_a_session_for_good() -> None:
    """TERMINATED has no exit."""
    wire = Wire()
    async with running(wire) as session:
        pass
    session.delete()
    assert session.state is State.TERMINATED
    assert not session.attested()


async def test_a_finding_is_stored_although_the_service_stops() -> None:
    """Stopped while INVALID_QUOTE is being stored: it is stored, with its alarm, before the task ends."""
    wire = Wire()
    wire.guest.tpm.pcrs[0] = bytes(32)
    wire.records.gate.clear()
    session = Session(wire.plan, wire.ports, Progress(state=State.SAVED))
    task = asyncio.get_running_loop().create_task(session.run())
    await settle()
    assert session.state is State.INVALID_QUOTE
    task.cancel()
    await settle()
    assert not task.done()
    wire.records.gate.set()
    await asyncio.wait({task}, timeout=5)
    assert task.cancelled()
    assert [progress.state for progress in wire.records.saved] == [State.INVALID_QUOTE]
    assert [alarm.kind for alarm in wire.records.alarms] == ["ReferenceValueMismatch"]


async def test_a_stop_is_not_hidden_by_a_database_that_fails() -> None:
    """The service stops while a record is being stored, and storing it fails: the session ends all the same."""
    wire = Wire()
    wire.records.gate.clear()
    wire.records.fault = StoreError("disk full")
    task = asyncio.get_running_loop().create_task(Session(wire.plan, wire.ports, Progress(state=State.SAVED)).run())
    await settle()
    task.cancel()
    await settle()
    wire.records.gate.set()
    await asyncio.wait({task}, timeout=5)
    assert task.cancelled()
