"""Any tenants, banks, allowlists and orders of arrival: every answer that is delivered is read and judged.

The judge of the bench asserts for each that it verifies for its own request, that the signed selection covers what was
asked, and that it shows no PCR outside the tenant's allowlist; and that no union of a batch would have, to anybody.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from harness.errors import PoolFull, SelectionNotAllowed
from harness.provider.batch import Answer
from harness.values import HashAlg, PcrSelection, mask_of
from tests.support.batching import settle
from tests.support.bench import Bench, Bounds, Entry, bench
from tests.support.pendings import a_request, agent

BANKS = (HashAlg.SHA256, HashAlg.SHA384)
PCRS = st.sets(st.sampled_from([0, 1, 2, 7, 14]), min_size=1, max_size=4)
ALLOWLISTS = st.lists(st.tuples(st.sampled_from(BANKS), PCRS), min_size=1, max_size=2, unique_by=lambda bank: bank[0])


@dataclass(frozen=True, slots=True)
class Coming:
    """A request of one tenant; asks may lie outside its allowlist."""

    tenant: int
    bank: HashAlg
    asked: frozenset[int]
    guest: int | None


ACTS = st.one_of(
    st.builds(
        Coming,
        st.integers(0, 5),
        st.sampled_from(BANKS),
        PCRS.map(frozenset),
        st.one_of(st.none(), st.integers(0, 2)),
    ),
    st.sampled_from(["quote", "quote", "leave", "extend", "replace"]),
)


@settings(max_examples=150)
@given(
    st.lists(ALLOWLISTS, min_size=6, max_size=6),
    st.lists(ACTS, max_size=40),
    st.sampled_from(["batched", "single"]),
    st.integers(1, 8),
    st.randoms(use_true_random=False),
)
def test_nobody_is_shown_what_it_may_not_see(
    allowed: list[list[tuple[HashAlg, set[int]]]],
    acts: list[Coming | str],
    strategy: str,
    max_pools: int,
    rng: random.Random,
) -> None:
    """Whatever comes, leaves, moves or is exchanged between two quotes; and what may be served is served."""
    allowlists = [PcrSelection(tuple((bank, mask_of(pcrs)) for bank, pcrs in banks)) for banks in allowed]
    asyncio.run(_play(allowlists, acts, Bounds(strategy=strategy, max_pools=max_pools), rng))


async def _play(allowlists: list[PcrSelection], acts: list[Coming | str], bounds: Bounds, rng: random.Random) -> None:
    async with bench(bounds=bounds, rng=rng) as made:
        made.residency.states |= {agent(number): bytes([number + 1]) * 32 for number in range(2)}  # the third is absent
        made.quoter.hold()
        entries: list[Entry] = []
        for act in acts:
            if isinstance(act, Coming):
                entries.append(_come(made, act, allowlists[act.tenant]))
            else:
                _act(made, act, entries, rng)
            await settle(rng.randrange(6))
        made.quoter.let_go()
        await settle(60 * (len(entries) + 1))
        for entry in entries:
            _expect(entry)


def _come(made: Bench, act: Coming, allowlist: PcrSelection) -> Entry:
    guest = None if act.guest is None else agent(act.guest)
    return made.enter(a_request(f"t{act.tenant}", act.asked, bank=act.bank, allowlist=allowlist, agent_id=guest))


def _act(made: Bench, act: str, entries: list[Entry], rng: random.Random) -> None:
    waiting = [entry for entry in entries if entry.outcome is None and not entry.left]
    if act == "quote":
        made.quoter.step()
    elif act == "extend":
        made.quoter.tpm.extend(rng.choice([0, 7]), rng.randbytes(8))
    elif act == "replace":
        made.residency.states[agent(0)] = rng.randbytes(32)
    elif waiting:
        made.leave(rng.choice(waiting))


def _expect(entry: Entry) -> None:
    """Refused for what it asks, or for want of a pool; else answered, unless its guest is absent or it left."""
    request = entry.pending.request
    if not request.selection.within(entry.pending.allowlist):
        assert isinstance(entry.outcome, SelectionNotAllowed)
    elif not entry.left and not isinstance(entry.outcome, PoolFull):
        assert isinstance(entry.outcome, Answer) is (request.agent_id != agent(2))
