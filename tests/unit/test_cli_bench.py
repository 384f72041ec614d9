"""The commands of `harness bench`: rows as documented, exit codes, and what is said when one cannot be run."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from harness import bench_all, cli, cli_complete, cli_exit
from harness.bench import BenchOptions, Result, Sample, at_most
from harness.errors import ConfigError
from harness.merkle import MerkleTree

MEMBERS = {"name", "target", "value", "unit", "baseline", "ratio", "ok"}
runner = CliRunner()


def harness(*words: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command."""
    done: list[Any] = []
    code = cli_exit.guarded(lambda: done.append(runner.invoke(cli.app, list(words), catch_exceptions=False)))
    if not done:
        return code, "", ""
    return done[0].exit_code, done[0].stdout, done[0].stderr


class InmemoryTree:
    """Stands for pymerkle's: the same calls, on the project's own tree."""

    def __init__(self, algorithm: str) -> None:
        assert algorithm == "sha256"
        self._leaves: list[bytes] = []
        self.hash_buff: Callable[[bytes], bytes] = lambda data: b""

    def append_entry(self, data: bytes) -> None:
        self._leaves.append(self.hash_buff(data))

    def get_size(self) -> int:
        return len(self._leaves)

    def prove_inclusion(self, index: int, size: int) -> None:
        assert 1 <= index <= size == len(self._leaves)

    def get_state(self) -> bytes:
        return MerkleTree(self._leaves).root


@pytest.fixture
def pymerkle(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A library that is not among the project's dependencies, as if it were installed."""
    module = types.ModuleType("pymerkle")
    module.InmemoryTree = InmemoryTree  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pymerkle", module)
    return module


@pytest.mark.usefixtures("pymerkle")
def test_a_quick_benchmark_prints_the_documented_json_and_keeps_it(tmp_path: Path) -> None:
    """Rows with their seven members, machine facts, progress on standard error, and the same in the file."""
    kept = tmp_path / "new" / "tree.json"
    code, out, err = harness("bench", "tree", "--quick", "--json", "--output", str(kept))
    shown = json.loads(out)
    assert code == (0 if all(row["ok"] is not False for row in shown["rows"]) else 1)
    assert [set(row) for row in shown["rows"]] == [MEMBERS] * 3
    assert shown["machine"].keys() >= {"cpu", "cores", "memory_gib", "kernel", "python", "aiohttp", "load_before"}
    assert shown["benchmarks"][0]["spreads"].keys() == {row["name"] for row in shown["rows"]}
    assert json.loads(kept.read_text()) == shown
    assert "merklelib" in err


@pytest.mark.usefixtures("pymerkle")
def test_trees_that_do_not_agree_give_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library with another root is not compared with."""
    monkeypatch.setattr(InmemoryTree, "get_state", lambda _: bytes(32))
    assert harness("bench", "tree", "--quick")[:2] == (2, "")


def test_a_missing_library_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without pymerkle the benchmark cannot be run: exit code 2, and what installs it."""
    monkeypatch.setitem(sys.modules, "pymerkle", None)
    assert harness("bench", "tree", "--quick")[0] == 2
    assert "harness: pymerkle is not installed; `make bench` installs it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--chip", "nonsense"), "--chip nonsense: "),
        (("--tenants", "5000"), "--tenants 5000: a load has 2 to 1000 tenants"),
    ],
)
def test_a_load_that_cannot_be_is_refused_before_anything_starts(
    words: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2 and the option, in one sentence."""
    assert harness("bench", "batching", "--quick", *words)[0] == 2
    assert capsys.readouterr().err.startswith(f"harness: {sentence}")


def a_benchmark(value: float) -> bench_all.Benchmark:
    def run(_: BenchOptions) -> Result:
        result = Result(benchmark="made-up")
        result.add(at_most("time", Sample.of([value]), unit="s", limit=1.0))
        return result

    return run


def cannot_run(_: BenchOptions) -> Result:
    raise ConfigError("it is not installed")


@pytest.mark.parametrize(
    ("benchmarks", "code"),
    [
        ({"a": a_benchmark(1.0)}, 0),
        ({"a": a_benchmark(1.0), "b": a_benchmark(2.0)}, 1),
        ({"a": cannot_run, "b": a_benchmark(1.0)}, 2),
        ({"a": cannot_run, "b": a_benchmark(2.0)}, 2),
    ],
)
def test_the_exit_code_says_how_the_targets_were_met(
    benchmarks: dict[str, bench_all.Benchmark], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """0 all, 1 one missed, 2 one could not be run; the others were, and are shown."""
    ran = bench_all.run(list(benchmarks), BenchOptions(), output=None, as_json=False, find=benchmarks.__getitem__)
    assert ran == code
    shown = capsys.readouterr().out
    assert shown.count("time") == sum(each is not cannot_run for each in benchmarks.values())


def test_the_only_benchmark_that_cannot_be_run_is_an_error() -> None:
    """There is nothing else to show."""
    with pytest.raises(ConfigError, match="not installed"):
        bench_all.run(["a"], BenchOptions(), output=None, as_json=False, find={"a": cannot_run}.__getitem__)


def test_chips_are_completed() -> None:
    """The profiles of the package that begin with what was typed."""
    assert "ifx-slb9670" in cli_complete.chips("ifx")
    assert cli_complete.chips("nothing-like-it") == []
