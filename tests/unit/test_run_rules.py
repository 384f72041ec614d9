"""The rules of conftest.py: what may be skipped, what must fail, and which run is not green."""

from __future__ import annotations

import contextlib
import os
import random
import re
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.support import requirements
from tests.support.stop_lab import Overdue, once_more_if_overdue

pytest_plugins = ["pytester"]
THIS = Path(__file__)
ROOT = THIS.parents[2]

NEEDS = """
import pytest

@pytest.mark.needs_swtpm
def test_with_swtpm():
    pass
"""
NEEDS_POSTGRES = NEEDS.replace("swtpm", "postgres")
PLAIN = """
def test_plain():
    pass
"""


@pytest.fixture
def elsewhere(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A test folder with this project's rules, on a machine without swtpm and PostgreSQL."""
    probe_again()
    monkeypatch.setattr(requirements, "program", lambda _: None)  # Debian's are beside their version, not in PATH
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    monkeypatch.delenv("HARNESS_REQUIRE", raising=False)
    pytester.makeini(
        "[pytest]\nmarkers =\n  needs_swtpm: x\n  needs_postgres: x\nasyncio_default_fixture_loop_scope = function\n"
    )
    pytester.makeconftest((ROOT / "tests" / "conftest.py").read_text(encoding="utf-8"))
    return pytester


def probe_again() -> None:
    for missing, _ in requirements.NEEDS.values():
        getattr(missing, "cache_clear", lambda: None)()


@pytest.fixture(autouse=True)
def _probe_again() -> object:
    yield
    probe_again()


def test_a_test_that_needs_swtpm_is_skipped_with_the_reason(elsewhere: pytest.Pytester) -> None:
    """On a laptop without swtpm the test is skipped, the reason names swtpm, and the others run."""
    elsewhere.makepyfile(test_a=NEEDS, test_b=PLAIN)
    result = elsewhere.runpytest_inprocess("-rs")
    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines(["*swtpm, swtpm_setup not found*"])
    assert result.ret == pytest.ExitCode.OK


def test_a_required_swtpm_that_is_missing_fails(elsewhere: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where HARNESS_REQUIRE names swtpm a missing swtpm is a failure, not a skip."""
    monkeypatch.setenv("HARNESS_REQUIRE", "other, swtpm")
    elsewhere.makepyfile(test_a=NEEDS, test_b=PLAIN)
    result = elsewhere.runpytest_inprocess()
    result.assert_outcomes(passed=1, errors=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED


def test_a_database_server_is_skipped_or_required_by_its_own_name(
    elsewhere: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is required of swtpm says nothing of PostgreSQL."""
    elsewhere.makepyfile(test_a=NEEDS_POSTGRES, test_b=PLAIN)
    monkeypatch.setenv("HARNESS_REQUIRE", "swtpm")
    result = elsewhere.runpytest_inprocess("-rs")
    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines(["*initdb, postgres, psql*not found; `tools/setup.sh --tests` installs it*"])
    monkeypatch.setenv("HARNESS_REQUIRE", "swtpm,postgres")
    elsewhere.runpytest_inprocess().assert_outcomes(passed=1, errors=1)


def test_a_run_that_skipped_everything_is_not_green(elsewhere: pytest.Pytester) -> None:
    """When every test was skipped the run fails and says so."""
    elsewhere.makepyfile(test_a=NEEDS)
    result = elsewhere.runpytest_inprocess()
    result.stdout.fnmatch_lines(["every test was skipped*"])
    assert result.ret == pytest.ExitCode.TESTS_FAILED


@pytest.mark.parametrize(
    ("counts", "verdict"),
    [
        ({"skipped": 3}, True),
        ({"skipped": 3, "passed": 1}, False),
        ({"skipped": 3, "failed": 1}, False),
        ({"skipped": 3, "error": 1}, False),
        ({"deselected": 2}, False),
        ({}, False),
    ],
)
def test_what_counts_as_skipping_everything(counts: Mapping[str, int], verdict: bool) -> None:
    """Only a run with skips and without any result counts as skipped as a whole."""
    assert requirements.skipped_everything(counts) is verdict


@pytest.mark.parametrize(
    ("value", "names"),
    [("", set()), ("swtpm", {"swtpm"}), (" swtpm , kvm,", {"swtpm", "kvm"})],
)
def test_required_names_are_a_comma_separated_list(value: str, names: set[str]) -> None:
    """HARNESS_REQUIRE is a comma-separated list; blanks and empty entries do not count."""
    assert requirements.required({"HARNESS_REQUIRE": value}) == names


def test_each_marker_has_its_rule() -> None:
    """What `pyproject.toml` names as ``needs_X`` is looked for, and nothing else is."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    markers = project["tool"]["pytest"]["ini_options"]["markers"]
    needed = [marker.partition(":")[0].removeprefix("needs_") for marker in markers if marker.startswith("needs_")]
    assert sorted(needed) == sorted(requirements.NEEDS)


@pytest.mark.parametrize("file", ["tox.ini", ".ci/run"])
def test_what_a_test_may_need_is_required_in_full_runs(file: str) -> None:
    """For each marker ``needs_X`` the end-to-end run names X: there no such test is skipped."""
    lists = re.findall(r"HARNESS_REQUIRE *= *(\S+)", (ROOT / file).read_text(encoding="utf-8"))
    assert requirements.NEEDS.keys() <= requirements.required({"HARNESS_REQUIRE": lists[0]})


def test_no_test_skips_itself() -> None:
    """A skip that no marker stands for would be silent in a full run too; only conftest.py, which knows, skips."""
    skips = re.compile(r"pytest\.skip\b|mark\.skip|importorskip|SkipTest")
    files = [path for path in (ROOT / "tests").rglob("*.py") if path not in (ROOT / "tests" / "conftest.py", THIS)]
    assert [str(path) for path in files if skips.search(path.read_text(encoding="utf-8"))] == []


def test_each_requirement_is_missed_on_a_machine_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is nobody, and has no program, has nothing of what a test may need; what it lacks is named."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(requirements, "program", lambda _: None)
    monkeypatch.setattr(os, "geteuid", lambda: 65534)
    probe_again()
    for name, (missing, step) in requirements.NEEDS.items():
        assert missing(), name
        assert step


@pytest.mark.parametrize(
    ("ends", "runs", "fault"),
    [
        ([None], 1, None),
        ([Overdue("late"), None], 2, None),
        ([Overdue("late"), Overdue("late")], 2, Overdue),
        ([AssertionError("wrong"), None], 1, AssertionError),
    ],
)
async def test_a_stop_that_is_overdue_has_a_second_try(
    ends: list[Exception | None], runs: int, fault: type[Exception] | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once, with what was late in the report; nothing else that fails has one."""
    ran: list[int] = []

    @once_more_if_overdue
    async def test() -> None:
        ran.append(len(ran))
        end = ends[ran[-1]]
        if end is not None:
            raise end

    with contextlib.nullcontext() if fault is None else pytest.raises(fault):
        await test()
    assert len(ran) == runs
    assert ("once more: late" in capsys.readouterr().out) == (runs == 2)


def test_the_rng_of_a_test_follows_from_its_name_and_the_seed(
    rng: random.Random, request: pytest.FixtureRequest
) -> None:
    """Two generators made for the same test in the same run give the same numbers."""
    again: random.Random = request.getfixturevalue("rng")
    assert again is rng
    from tests.conftest import SEED

    assert random.Random(f"{SEED}:{request.node.nodeid}").random() == rng.random()
