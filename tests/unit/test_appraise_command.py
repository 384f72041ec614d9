"""`harness appraise`, from the command line to the exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harness import cli
from tests.support import vectors

CASES = vectors.load("appraisal.json")


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case["name"]))
def test_the_command_prints_that_verdict(
    case: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`harness appraise` prints one JSON object and exits 0 or 1; it exits 2, silent on standard output, or else."""
    paths = vectors.save(tmp_path, **{name: case[name] for name in ("request", "response", "trust")})
    options = [part for name, path in paths.items() for part in (f"--{name}", str(path))]
    monkeypatch.setattr("sys.argv", ["harness", "appraise", *options])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed, expected = capsys.readouterr().out, case["expect"]
    if expected == {"exit": 2}:
        assert (ended.value.code, printed) == (2, "")
        return
    assert ended.value.code == (0 if expected["accepted"] else 1)
    verdict = json.loads(printed)
    assert {name: verdict[name] for name in expected} == expected
    assert verdict.keys() == ({"accepted"} if expected["accepted"] else {"accepted", "failed_check", "error", "detail"})
