"""``bench appraise``: what is timed is the whole appraisal, and a missing yardstick is no success."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from harness import bench_appraise
from harness.bench import BenchOptions
from harness.bench_soft import BANK, SoftTpm
from harness.errors import SimulationError
from harness.keylime_wire import parse_quote
from harness.tenant.appraisal import Accepted, Rejected
from harness.tpm_templates import KeyTemplate
from harness.values import PcrSelection

QUICK = BenchOptions(quick=True, repetitions=3)
TEMPLATES = [KeyTemplate.AK_RSA2048, KeyTemplate.AK_P256]


@pytest.mark.parametrize("template", TEMPLATES)
def test_both_appraisals_accept(template: KeyTemplate) -> None:
    """Every check is passed to its end, for a host's answer and a guest's."""
    case = bench_appraise.make_case(template)
    assert isinstance(case.host(), Accepted)
    assert isinstance(case.guest(), Accepted)


@pytest.mark.parametrize("template", TEMPLATES)
def test_keylime_is_given_an_equal_quote_and_policy(template: KeyTemplate) -> None:
    """The same PCRs, each with one allowed value, and a clock before that of the quote."""
    given = bench_appraise.make_case(template).keylime
    pcrs = parse_quote(given["quote"]).pcrs[BANK]
    policy = json.loads(given["policy"])
    assert policy.pop("mask") == "0xff"
    assert policy == {str(pcr): [value.hex()] for pcr, value in pcrs.items()}
    assert sorted(pcrs) == list(range(8))


def test_without_keylime_no_row_is_ok(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each row has its figure, says that the yardstick is missing and which command makes it, and fails the run."""
    monkeypatch.setattr(bench_appraise, "ENVIRONMENT", tmp_path / ".keylime")
    result = bench_appraise.run(QUICK)
    rows = [each.row for each in result.measured]
    assert len(rows) == 4
    for row in rows:
        assert row.value > 0
        assert (row.baseline, row.ratio, row.ok) == (None, None, False)
        assert "missing" in row.target
        assert "make keylime" in row.target
    assert not result.ok


def test_a_quote_that_is_not_accepted_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A benchmark of refusals would be fast, and of no use."""
    honest = bench_appraise.make_case(KeyTemplate.AK_P256)
    refused = Rejected(check=9, error="ReferenceValueMismatch", detail="a value")
    monkeypatch.setattr(bench_appraise, "make_case", lambda _: replace(honest, host=lambda: refused))
    with pytest.raises(SimulationError, match="not accepted"):
        bench_appraise.run(QUICK)


@pytest.mark.parametrize("template", TEMPLATES)
def test_each_quote_of_the_soft_tpm_has_a_later_clock(template: KeyTemplate) -> None:
    """As a TPM's: otherwise the second round would be refused."""
    tpm = SoftTpm(template)
    before = tpm.baseline.clock
    tpm.quote(b"n" * 20, PcrSelection.of(BANK, 1))
    assert tpm.baseline.clock > before


def environment(folder: Path, says: str) -> Path:
    """An environment whose interpreter is a script that says this at its begin, and 0.5 to each question."""
    (folder / "bin").mkdir(parents=True)
    (folder / ".ready").touch()
    python = folder / "bin" / "python"
    python.write_text(f'#!/bin/sh\nread -r cases\necho "{says}"\nwhile read -r question; do echo 0.5; done\n')
    python.chmod(0o755)
    return folder


def test_with_keylime_the_verdict_is_on_the_ratio(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ours and Keylime's are repeated equally often, in one run."""
    monkeypatch.setattr(bench_appraise, "ENVIRONMENT", environment(tmp_path / "k", "ready"))
    result = bench_appraise.run(QUICK)
    for each in result.measured:
        assert each.baseline is not None
        assert len(each.sample.values) == len(each.baseline.values) == 3
        assert each.row.baseline == pytest.approx(0.5 / 10 * 1e6)
        assert each.row.ok
    assert result.ok


@pytest.mark.parametrize("says", ["refused RSA-2048", ""])
def test_a_keylime_that_refuses_is_no_yardstick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, says: str) -> None:
    """One sentence that says what to do; no row is made of it."""
    monkeypatch.setattr(bench_appraise, "ENVIRONMENT", environment(tmp_path / "k", says))
    with pytest.raises(SimulationError, match="make keylime makes it anew"):
        bench_appraise.run(QUICK)
