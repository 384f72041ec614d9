"""Each strategy and each tree through the real services: host agent, provider verifier, sockets, a simulated TPM."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest

from harness.provider.batch import PendingQuote, SealedBatch
from harness.provider.batcher import Batcher
from harness.provider.keys import HostKeys
from harness.tenant.appraisal import Accepted
from tests.support.provider_site import TIME_S, bound, new_site, provider

pytestmark = pytest.mark.needs_swtpm

ROUNDS = 12


class Counted:
    """Holds the quotes until all requests of the test wait, and counts them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[SealedBatch] = []
        self.expected = 0
        self.all_wait = asyncio.Event()
        self._entered = 0
        enter, quote_batch = Batcher.enter, HostKeys.quote_batch

        def entering(batcher: Batcher, pending: PendingQuote, deliver: Any) -> Any:
            waiter = enter(batcher, pending, deliver)
            self._entered += 1
            if self._entered >= self.expected:
                self.all_wait.set()
            return waiter

        async def quoting(keys: HostKeys, batch: SealedBatch) -> Any:
            self.batches.append(batch)
            async with asyncio.timeout(TIME_S):
                await self.all_wait.wait()
            return await quote_batch(keys, batch)

        monkeypatch.setattr(Batcher, "enter", entering)
        monkeypatch.setattr(HostKeys, "quote_batch", quoting)

    def expect(self, requests: int) -> None:
        """From now on: that many requests are to wait."""
        self.batches.clear()
        self.all_wait.clear()
        self._entered, self.expected = 0, requests


@pytest.mark.parametrize("tree", ["rfc9162", "merklelib"])
@pytest.mark.parametrize(("strategy", "quotes"), [("batched", {2}), ("single", {ROUNDS}), ("window", {1, 2})])
async def test_every_answer_is_accepted(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tree: str,
    strategy: str,
    quotes: set[int],
) -> None:
    """Whoever shares a quote, whatever builds the tree: the tenant accepts what it gets; costly settings are named."""
    with bound() as sockets:
        async with new_site() as site:
            counted = Counted(monkeypatch)
            batch = {"tree": tree, "strategy": strategy, "window_s": 0.2}
            async with provider(site, sockets, batch=batch) as (alice, _):
                await alice.until(Accepted)
                counted.expect(ROUNDS)
                asking = [dataclasses.replace(alice) for _ in range(ROUNDS)]  # each with the baseline of now
                async with asyncio.timeout(TIME_S):
                    verdicts = await asyncio.gather(*(each.round() for each in asking))
            assert [verdict for verdict in verdicts if not isinstance(verdict, Accepted)] == []
            assert len(counted.batches) in quotes
            assert sum(len(each.members) for each in counted.batches) == ROUNDS
    warned = capfd.readouterr().err.count("costly_setting")
    assert warned == (tree == "merklelib") + (strategy != "batched")
