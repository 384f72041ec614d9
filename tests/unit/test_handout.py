"""Outcomes on their way to waiters, without a batcher."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from harness.errors import BatchFailed
from harness.provider.batch import Outcome, Waiter
from harness.provider.handout import SLICE, Handout
from tests.support.batching import settle
from tests.support.pendings import a_request

WAITER = Waiter(pending=a_request(), arrived_s=0.0)


class Given:
    """What was given, in order."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.made: list[str] = []
        self.handout = Handout(self.give)

    def give(self, waiter: Waiter, outcome: Outcome) -> None:
        assert isinstance(outcome, BatchFailed)
        self.texts.append(outcome.detail)
        if outcome.detail == "broken":
            raise RuntimeError("a receiver that breaks its promise")

    def outcomes(self, *texts: str) -> Iterator[tuple[Waiter, Outcome]]:
        for text in texts:
            self.made.append(text)
            yield WAITER, BatchFailed(text, batch_id="")

    def put(self, name: str, *texts: str) -> None:
        self.handout.put(self.outcomes(*texts), lambda: self.texts.append(name))


async def test_batches_are_told_in_order_and_then_done() -> None:
    """A batch's end comes after the last of its outcomes, and before the first of the next batch."""
    given = Given()
    given.put("done 1", "a", "b")
    given.put("done 2", "c")
    assert given.texts == []
    await settle()
    assert given.texts == ["a", "b", "done 1", "c", "done 2"]


async def test_an_outcome_is_made_when_it_is_given() -> None:
    """Ten thousand answers do not exist at once: a turn makes one slice."""
    given = Given()
    given.put("done", *map(str, range(3 * SLICE)))
    assert given.made == []
    await asyncio.sleep(0)
    assert len(given.made) == len(given.texts) == SLICE


async def test_flush_gives_what_is_left() -> None:
    """At once, without a turn of the loop; nothing comes twice."""
    given = Given()
    given.put("done", *map(str, range(2 * SLICE)))
    await asyncio.sleep(0)
    given.handout.flush()
    assert given.texts == [*map(str, range(2 * SLICE)), "done"]
    await settle()
    assert len(given.texts) == 2 * SLICE + 1


async def test_a_receiver_that_breaks_its_promise_costs_no_other_its_outcome() -> None:
    """The event loop is told of the fault, and the next turn goes on with the next waiter."""
    given, told = Given(), []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    given.put("done", "a", "broken", "b")
    await settle()
    assert given.texts == ["a", "broken", "b", "done"]
    assert [type(context["exception"]) for context in told] == [RuntimeError]


async def test_a_batch_without_members_is_done() -> None:
    """Its end is told like any other's."""
    given = Given()
    given.put("done")
    await settle()
    assert given.texts == ["done"]
