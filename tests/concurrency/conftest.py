"""A bench for each test of the batcher, under each seed of the run."""

from __future__ import annotations

import functools
import random

import pytest

from tests.support.bench import NewBench
from tests.support.bench import bench as a_bench


@pytest.fixture
def bench(seed: int, rng: random.Random) -> NewBench:
    """Makes benches whose random numbers follow from run, test and ``seed``."""
    return functools.partial(a_bench, rng=rng)
