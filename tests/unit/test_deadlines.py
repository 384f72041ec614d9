"""Deadlines and forecasts of the batcher, without a batcher."""

from __future__ import annotations

import random

import pytest

from harness.provider.batch import Waiter
from harness.provider.deadlines import SWEEP_S, Deadlines
from harness.provider.forecast import Forecast
from tests.support.manual_clock import ManualClock
from tests.support.pendings import a_request


class Waiting:
    """Waiters of one clock, and how often they were looked at."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.waiters: list[Waiter] = []
        self.looks: list[float] = []
        self.expired: list[tuple[Waiter, float]] = []
        self.deadlines = Deadlines(self.clock, self.look, self.expire)

    def look(self) -> list[Waiter]:
        self.looks.append(self.clock.now_s)
        return list(self.waiters)

    def expire(self, waiter: Waiter) -> None:
        self.waiters.remove(waiter)
        self.expired.append((waiter, self.clock.now_s))

    def come(self, wait_s: float) -> None:
        now_s = self.clock.now_s
        self.waiters.append(Waiter(pending=a_request(), arrived_s=now_s, due_s=now_s + wait_s))
        self.deadlines.watch(now_s + wait_s)


def test_many_deadlines_are_looked_at_together(rng: random.Random) -> None:
    """However many there are: at most one look per `SWEEP_S`, and nobody waits for that longer than so much."""
    waiting = Waiting()
    for _ in range(500):
        waiting.come(rng.uniform(0.0, 2.0))
    waiting.clock.advance(3.0)
    assert waiting.waiters == []
    assert all(0 <= at_s - waiter.due_s <= SWEEP_S + 1e-6 for waiter, at_s in waiting.expired)
    pauses = [after - before for before, after in zip(waiting.looks, waiting.looks[1:], strict=False)]
    assert min(pauses) >= SWEEP_S - 1e-6


def test_a_nearer_deadline_comes_first() -> None:
    """Who comes later with less time does not wait for the timer of the others."""
    waiting = Waiting()
    waiting.come(10.0)
    waiting.come(1.0)
    waiting.clock.advance(1.0)
    assert len(waiting.expired) == 1
    waiting.clock.advance(9.0)
    assert len(waiting.expired) == 2


def test_nobody_is_looked_at_while_no_deadline_is_near() -> None:
    """A thousand waiters cost one look, when the first of them may be late."""
    waiting = Waiting()
    for _ in range(1000):
        waiting.come(5.0)
    waiting.clock.advance(4.9)
    assert waiting.looks == []
    waiting.clock.advance(0.1)
    assert len(waiting.looks) == 1


def test_after_a_stop_nobody_is_looked_at() -> None:
    """The timer is gone."""
    waiting = Waiting()
    waiting.come(1.0)
    waiting.deadlines.stop()
    waiting.clock.advance(5.0)
    assert waiting.looks == []


def forecast_after(*times_s: float, pause_s: float = 0.0) -> Forecast:
    """What is forecast after batches that took so long, at moment 0 when idle."""
    forecast = Forecast(pause_s)
    for seconds in times_s:
        forecast.begun(-seconds)
        forecast.ended(0.0, quoted=True)
    return forecast


@pytest.mark.parametrize(
    ("times_s", "batch_s"),
    [((), 0.0), ((0.2,), 0.2), ((0.2, 30.0), 0.2), ((0.2, 0.3, 30.0), 0.3), ((9.0, *[0.2] * 9), 0.2)],
)
def test_a_batch_is_forecast_from_the_last_nine(times_s: tuple[float, ...], batch_s: float) -> None:
    """By their lower median: one that hung does not count, and what is long ago is forgotten."""
    assert forecast_after(*times_s).batch_s == batch_s
    assert forecast_after(*times_s).answer_in_s(2, 0.0) == 2 * batch_s


def test_the_sleep_of_a_window_counts() -> None:
    """Idle, the whole of it; while it sleeps, what is left of it; and after a batch in work, again."""
    forecast = forecast_after(1.0, pause_s=10.0)
    assert forecast.answer_in_s(1, 0.0) == 11.0
    forecast.pausing(0.0)
    assert forecast.answer_in_s(1, 4.0) == 7.0
    forecast.begun(10.0)
    assert forecast.answer_in_s(1, 10.5) == 0.5 + 10.0 + 1.0
    assert forecast.working_s(10.5) == 0.5
