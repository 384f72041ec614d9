"""``harness bench tree``: the project's tree and all its proofs beside merklelib and pymerkle.

merklelib is the library of the project's first plan, with the shim without which it does not run; pymerkle (GPL) is
asked here only, in an extra of its own, and never by a service.

Invariants:
    1. All three give the same root over the same leaves, or there is no result.
    2. What is timed begins with leaf hashes and ends with the proof of every leaf in hand.

Spec: RFC 9162, 2.1; docs/performance.md.
"""

from __future__ import annotations

import gc
import importlib
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

from harness import merkle
from harness.bench import BenchOptions, Measured, Result, Sample, Series, at_least, repeat, reported
from harness.errors import ConfigError, SimulationError
from harness.provider.merklelib_tree import MerklelibTree

LEAVES = 65_536
_QUICK = 256
FACTOR = 5.0
_SIZES = (16, 256, 4_096, 16_384, 65_536)
_US = 1e6

Build = Callable[[Sequence[bytes]], bytes]
"""Builds the tree, makes every proof, and gives the root."""


def run(options: BenchOptions) -> Result:
    """Times all three.

    Raises:
        ConfigError: merklelib or pymerkle is not installed.
        SimulationError: two of them do not agree on the root.
    """
    count = _QUICK if options.quick else LEAVES
    ours, theirs = _ours, {"merklelib": _merklelib, "pymerkle": _pymerkle()}
    leaves = _leaves(count, options.seed)
    roots = {build(leaves[:_QUICK]) for build in (ours, *theirs.values())}
    if len(roots) != 1:
        raise SimulationError("the trees do not agree on the root")
    times = {}
    for name, build in {"ours": ours, **theirs}.items():
        options.say(f"tree and all proofs, {count:,} leaves: {name}")
        times[name] = _timed(build, leaves, options)
    result = Result(benchmark="tree", method=_method(count))
    result.add(*_rows(count, times))
    sizes = [size for size in _SIZES if size <= count] or [count]
    options.say("growth of the tree's time")
    result.series["tree"] = Series(
        title="Tree and all proofs",
        x="leaves",
        y="us per leaf",
        lines={"ours": [(size, _per_leaf(ours, leaves[:size], options)) for size in sizes]},
        log_x=True,
    )
    return result


def _method(count: int) -> list[str]:
    return [
        f"{count:,} random leaf hashes; from leaf hashes to the proof of every leaf; garbage of earlier repetitions "
        "is collected before each",
        "merklelib 1.0 with the shim of `provider/merklelib_tree.py`, its proofs in the same form as ours "
        "(leaf index, tree size, hashes); pymerkle with its in-memory tree and its own proofs",
        "roots are compared before anything is timed",
    ]


def _rows(count: int, times: dict[str, Sample]) -> list[Measured]:
    ours, slow, fair = (times[name].scaled(1000) for name in ("ours", "merklelib", "pymerkle"))
    name = f"tree and all proofs, {count:,} leaves"
    return [
        reported(f"{name}: ours", ours, unit="ms"),
        _faster(f"{name}: merklelib / ours", slow, ours, FACTOR),
        _faster(f"{name}: pymerkle / ours", fair, ours, 1.0),
    ]


def _faster(name: str, theirs: Sample, ours: Sample, factor: float) -> Measured:
    return at_least(name, theirs, unit="ms", limit=factor, baseline=ours, of="ours")


def _timed(build: Build, leaves: Sequence[bytes], options: BenchOptions) -> Sample:
    def act() -> None:
        build(leaves)

    values = []
    for number in range(options.repetitions + 1):
        gc.collect()
        sample = repeat(act, times=1, warm_up=0)
        if number:  # the first one warms up
            values.append(sample.median)
    return Sample.of(values)


def _per_leaf(build: Build, leaves: Sequence[bytes], options: BenchOptions) -> float:
    rounds = max(1, 4_096 // len(leaves))
    values = []
    for _ in range(options.repetitions):
        begun = time.perf_counter()
        for _ in range(rounds):
            build(leaves)
        values.append(_US * (time.perf_counter() - begun) / rounds / len(leaves))
    return round(Sample.of(values).median, 3)


def _leaves(count: int, seed: int) -> list[bytes]:
    rng = random.Random(seed)  # noqa: S311 - leaves of a benchmark
    return [rng.randbytes(32) for _ in range(count)]


def _ours(leaves: Sequence[bytes]) -> bytes:
    tree = merkle.MerkleTree(leaves)
    tree.paths()
    return tree.root


def _merklelib(leaves: Sequence[bytes]) -> bytes:
    tree = MerklelibTree(leaves)
    tree.paths()
    return tree.root


def _pymerkle() -> Build:
    try:
        pymerkle: Any = importlib.import_module("pymerkle")
    except ImportError as error:
        raise ConfigError("pymerkle is not installed; `make bench` installs it, or the extra `bench`") from error

    def build(leaves: Sequence[bytes]) -> bytes:
        tree = pymerkle.InmemoryTree(algorithm="sha256")
        tree.hash_buff = lambda data: data  # the leaf is hashed already
        for leaf in leaves:
            tree.append_entry(leaf)
        size = tree.get_size()
        for index in range(1, size + 1):
            tree.prove_inclusion(index, size)
        return bytes(tree.get_state())

    return build
