"""The page on performance: made from results that were kept, the same each time, and never from tiny counts."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from harness import bench_report
from harness.bench import BenchOptions, Result, Sample, Series, at_most, reported
from harness.bench_all import as_data, keep
from harness.bench_plot import svg
from harness.errors import ConfigError
from tests.support import docs

KEPT = sorted((docs.ROOT / "docs" / bench_report.PLOTS).glob("*.json"))


def results(folder: Path, name: str, *, at: str, value: float = 1.0, quick: bool = False, label: str = "") -> Path:
    """A file with results of one benchmark."""
    result = Result(benchmark="tree", method=["leaves that were made up"])
    result.add(at_most("time", Sample.of([value, value + 1, value + 2]), unit="ms", limit=2.0), *_beside(value))
    result.series["curve"] = Series(title="Curve <1>", x="n", y="ms", lines={"a": [(1, 1), (10, value)]}, log_x=True)
    result.profile["process"] = [("work (harness/x.py)", 0.75)]
    path = folder / name
    keep(as_data([result], {"at": at, "cpu": "one"}, BenchOptions(quick=quick), label=label), path)
    return path


def _beside(value: float) -> list[Any]:
    return [reported("beside", Sample.of([value]), unit="ms", baseline=Sample.of([2.0]), expected="theirs")]


def test_the_committed_page_is_made_from_the_committed_results() -> None:
    """Page and plots in docs/ are what the generator makes of the results beside them."""
    made = bench_report.pages(KEPT)
    for name, text in made.items():
        assert (docs.ROOT / "docs" / name).read_text(encoding="utf-8") == text, (
            f"harness bench report makes another {name}"
        )
    plots = {path.name for path in (docs.ROOT / "docs" / bench_report.PLOTS).glob("*.svg")}
    assert plots == {Path(name).name for name in made if name.endswith(".svg")}


def test_the_newest_run_is_shown_and_the_others_are_history(tmp_path: Path) -> None:
    """In whatever order the files are given: figures of the newest, verdicts of all."""
    old = results(tmp_path, "a.json", at="2026-01-01T00:00:00+00:00", value=5.0)
    new = results(tmp_path, "b.json", at="2026-02-01T00:00:00+00:00", value=0.5)
    page = bench_report.pages([new, old])[bench_report.PAGE]
    assert page == bench_report.pages([old, new])[bench_report.PAGE]
    shown, _, history = page.partition("## History")
    assert "1.5 ms" in shown
    assert "6 ms" not in shown
    assert history.index("1.5 ms | met") < history.index("6 ms | **missed**")
    assert "Leaves that were made up." in shown
    assert "| `work (harness/x.py)` | 75.0 % |" in shown
    assert "(performance/curve.svg)" in shown


def test_another_set_up_stands_apart_beside_the_usual_run(tmp_path: Path) -> None:
    """However new it is, its figures are not those of the page; they stand beside those of the usual run."""
    usual = results(tmp_path, "a.json", at="2026-01-01T00:00:00+00:00", value=0.5)
    other = results(tmp_path, "b.json", at="2026-02-01T00:00:00+00:00", value=5.0, label="another loop")
    shown, _, apart = bench_report.pages([usual, other])[bench_report.PAGE].partition("## Another set-up: another loop")
    assert "1.5 ms | met" in shown
    assert "6 ms" not in shown
    assert "| time | ≤ 2 ms | 6 ms | 1.5 ms | **missed** |" in apart


def test_tiny_counts_are_refused(tmp_path: Path) -> None:
    """Results of a quick run do not get into the page."""
    path = results(tmp_path, "q.json", at="2026-01-01T00:00:00+00:00", quick=True)
    with pytest.raises(ConfigError, match="figures mean nothing"):
        bench_report.pages([path])


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"quick": false, "benchmarks": [], "machine": {}}'])
def test_a_file_that_holds_no_results_is_named(tmp_path: Path, text: str) -> None:
    """Another file is refused, with its name."""
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"other\.json: holds no results"):
        bench_report.pages([path])


def test_results_without_benchmarks_make_no_page(tmp_path: Path) -> None:
    """A run in which nothing could be measured is nothing to write about."""
    path = tmp_path / "none.json"
    keep(as_data([], {"at": "2026-01-01T00:00:00+00:00"}, BenchOptions()), path)
    with pytest.raises(ConfigError, match="no results to write about"):
        bench_report.pages([path])


def test_what_is_written_is_what_was_made(tmp_path: Path) -> None:
    """Page and plots are written below the folder, and named."""
    path = results(tmp_path, "a.json", at="2026-01-01T00:00:00+00:00")
    written = bench_report.write([path], tmp_path / "docs")
    assert {file.relative_to(tmp_path / "docs").as_posix() for file in written} == {
        "performance.md",
        "performance/curve.svg",
    }
    assert (tmp_path / "docs" / "performance.md").read_text() == bench_report.pages([path])["performance.md"]


def test_a_plot_is_xml_with_a_line_for_each_name() -> None:
    """Text is escaped; each line has its points and its name."""
    series = Series(title="a < b & c", x="n", y="t", lines={"one": [(0, 0), (2, 3)], "two": [(1, 1), (2, 2)]})
    root = ElementTree.fromstring(svg(series))  # noqa: S314 - our own text
    lines = [each for each in root.iter() if each.tag.endswith("polyline")]
    assert [len(each.attrib["points"].split()) for each in lines] == [2, 2]
    assert {"a < b & c", "one", "two"} <= {each.text for each in root.iter()}


@pytest.mark.parametrize(("lines", "log_x"), [({}, False), ({"one": []}, False), ({"one": [(0.0, 1.0)]}, True)])
def test_a_plot_without_points_or_with_one_that_cannot_be_shown_is_refused(
    lines: dict[str, list[tuple[float, float]]], log_x: bool
) -> None:
    """Nothing to draw, and zero on a logarithmic axis, are errors."""
    with pytest.raises(ValueError, match=r"points|above zero"):
        svg(Series(title="t", x="n", y="t", lines=lines, log_x=log_x))


def test_results_are_plain_json(tmp_path: Path) -> None:
    """What is kept has the documented members: rows with their seven members, and the machine."""
    data = json.loads(results(tmp_path, "a.json", at="2026-01-01T00:00:00+00:00").read_text())
    assert {"rows", "machine"} <= data.keys()
    assert all(set(row) == {"name", "target", "value", "unit", "baseline", "ratio", "ok"} for row in data["rows"])
