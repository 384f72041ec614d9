"""How long an answer of the provider is of use to a session: what is left of the attempt, and of its round."""

from __future__ import annotations

import asyncio

import pytest

from harness.errors import PeerUnreachable
from harness.tenant.plan import Timing
from harness.tenant.ports import Progress
from harness.tenant.session import Session
from harness.tenant.states import State
from tests.support.manual_time import settle
from tests.support.tenant_wire import Wire


async def waits_of(wire: Wire, seconds: float) -> list[float]:
    """What the provider was told by a session that ran for so long."""
    session = Session(wire.plan, wire.ports, Progress(state=State.SAVED))
    task = asyncio.get_running_loop().create_task(session.run())
    await settle()
    await wire.time.advance(seconds)
    task.cancel()
    await asyncio.wait({task})
    return wire.provider.waits_s


@pytest.mark.parametrize(
    ("timing", "wait_s"),
    [
        (Timing(quote_interval_s=100.0), 30.0),
        (Timing(quote_interval_s=100.0, attempt_deadline_s=12.0), 12.0),
        (Timing(quote_interval_s=100.0, round_deadline_s=7.5), 7.5),
    ],
)
async def test_a_first_question_has_the_attempt_or_the_round(timing: Timing, wait_s: float) -> None:
    """Whichever of the two ends first bounds the wait."""
    assert await waits_of(Wire(v=None, timing=timing), 1.0) == [wait_s]


async def test_a_repeated_question_has_what_is_left_of_the_round() -> None:
    """The round goes on during a back-off: an answer after its deadline would be of no use, and nobody waits for it."""
    wire = Wire(v=None, timing=Timing(quote_interval_s=100.0, round_deadline_s=20.0))
    wire.provider.script = [PeerUnreachable("no connection")]
    first, second = await waits_of(wire, 10.0)
    assert first == 20.0
    assert second == pytest.approx(20.0 - wire.time.slept[0])
