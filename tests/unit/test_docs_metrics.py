"""docs/metrics.md: its tables are those of the code, its rules can be read, and every metric has a test."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import pytest
import yaml

from harness.metrics import ABANDONED, ANSWERED, FAILED, INTERNAL_FAULT, REFUSED, Described
from harness.wire_errors import reasons
from tests.support import docs

PAGE = docs.ROOT / "docs" / "metrics.md"
TEXT = PAGE.read_text(encoding="utf-8")
TOOL = runpy.run_path(str(docs.ROOT / "tools" / "metrics_docs.py"))
TABLES = cast("Mapping[str, Sequence[Described]]", TOOL["tables"]())
METRICS = {each.name: each for table in TABLES.values() for each in table}
_NAME = re.compile(r"\bharness_[a-z_]+")
_OF_HISTOGRAMS = re.compile(r"_(bucket|count|sum)$")
_UNITS = ("_total", "_seconds", "_size", "_info", "_ok")
_STATES = re.compile(r"harness_(waiting_requests|tenant_\w+|pools_open|streams_open|hosts\w*|guests|attested_guests)")
_SELECTOR = re.compile(r"\b(harness_[a-z_]+)\{([^}]*)\}")
_MATCHER = re.compile(r'(\w+)(=~|!~|!=|=)"([^"]*)"')
_FORBIDDEN = {"agent_id", "guest", "host_id", "host", "nonce", "requester", "url", "peer", "uuid"}


def block(name: str) -> Any:
    """A YAML block of the page, by its file name."""
    [found] = [each for each in docs.blocks_of(PAGE) if each.target == name]
    return yaml.safe_load(found.body)


def rules() -> list[dict[str, Any]]:
    """All alert rules."""
    return [rule for group in block("harness.rules.yml")["groups"] for rule in group["rules"]]


def base(name: str) -> str:
    """The metric that a name in an expression belongs to."""
    return name if name in METRICS else _OF_HISTOGRAMS.sub("", name)


def unknown(text: str) -> set[str]:
    """Names in a text that no service exposes."""
    return {name for name in _NAME.findall(text) if base(name) not in METRICS}


def test_the_tables_are_those_of_the_code() -> None:
    """The page is what `python tools/metrics_docs.py` makes of it now."""
    assert TOOL["page"](TEXT) == TEXT


def test_every_metric_that_the_page_names_exists() -> None:
    """Dashboard and rules name no metric that no service has."""
    assert unknown(TEXT) == set()
    assert unknown("look at harness_nonsense_total") == {"harness_nonsense_total"}
    assert unknown("harness_batch_size_sum") == set()


@pytest.mark.parametrize("name", METRICS)
def test_names_are_prometheus_conventions(name: str) -> None:
    """Counters end in _total, times in _seconds; what waits or is open is counted by its own name."""
    about = METRICS[name]
    assert re.fullmatch(r"harness(_[a-z]+)+", name)
    assert name.endswith(_UNITS) or _STATES.fullmatch(name)
    assert (about.kind == "counter") == name.endswith("_total")
    assert not set(about.labels) & _FORBIDDEN
    assert about.text.endswith(".")


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_has_a_test_that_drives_it(name: str) -> None:
    """Its name stands in a test other than this one."""
    files = [*docs.ROOT.glob("tests/unit/test_*.py"), *docs.ROOT.glob("tests/e2e/test_*.py")]
    assert [file for file in files if file.name != "test_docs_metrics.py" and named(name, file.read_text("utf-8"))]


def named(name: str, text: str) -> bool:
    """Whether a text names the metric, by itself or by a part of its histogram."""
    return any(base(found) == name for found in _NAME.findall(text))


def test_a_symptom_names_errors_that_exist() -> None:
    """Each 5xx and 4xx of the dashboard is an error with a status."""
    symptoms = [line.split("|")[1] for line in TEXT.splitlines() if re.match(r"\| [45]\d\d ", line)]
    shown = {name for symptom in symptoms for name in re.findall(r"`(\w+)`", symptom)}
    assert shown
    assert shown <= set(reasons())


def test_the_scrape_configuration_is_mutual_tls() -> None:
    """Each job asks over https, with a certificate, and holds the service against an authority."""
    found = block("prometheus.yml")
    assert found["rule_files"] == ["harness.rules.yml"]
    for job in found["scrape_configs"]:
        assert job["scheme"] == "https"
        assert {"ca_file", "cert_file", "key_file"} <= job["tls_config"].keys()
        assert "insecure_skip_verify" not in job["tls_config"]
        assert job["job_name"].startswith("harness-")  # the rule ServiceDown goes by it
        assert all(":" in target for static in job["static_configs"] for target in static["targets"])


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_an_alert_rule_has_the_form_of_one(rule: dict[str, Any]) -> None:
    """Known members, balanced brackets, a severity and a sentence whose labels the expression keeps."""
    assert (
        {"alert", "expr", "labels", "annotations"} <= rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
    )
    assert re.fullmatch(r"[A-Z][A-Za-z]+", rule["alert"])
    assert rule["labels"]["severity"] in {"warning", "critical"}
    assert re.fullmatch(r"\d+[smhd]", rule.get("for", "1m"))
    assert balanced(rule["expr"])
    kept = set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", rule["expr"])))) | {"instance", "job"}
    kept |= set().union(
        *(METRICS[base(name)].labels for name in _NAME.findall(rule["expr"]) if "by (" not in rule["expr"])
    )
    assert set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"])) <= kept


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_an_alert_rule_selects_labels_and_values_that_exist(rule: dict[str, Any]) -> None:
    """No rule waits for a series that is never exposed."""
    for name, label, value in selected(rule["expr"]):
        assert label in METRICS[base(name)].labels
        if (values := known_values(base(name), label)) is not None:
            assert value in values, f"{name} has no {label} {value}"


def selected(expr: str) -> Iterator[tuple[str, str, str]]:
    """Metric, label and value of each selector."""
    for name, matchers in _SELECTOR.findall(expr):
        for label, _, values in _MATCHER.findall(matchers):
            for value in values.split("|"):
                yield name, label, value


def known_values(name: str, label: str) -> set[str] | None:
    """Values that a label may have; None where there is no list of them."""
    if label == "reason":
        return {*reasons(), INTERNAL_FAULT}
    if label != "outcome":
        return None
    return {
        "harness_requests_total": {ANSWERED, REFUSED, FAILED, ABANDONED},
        "harness_tenant_requests_total": {ANSWERED, REFUSED, FAILED, ABANDONED},
        "harness_batches_total": {"quoted", "nobody_left", *reasons(), "TpmError"},
        "harness_rounds_total": {"accepted", "rejected", "unanswered", "restarted", "fault"},
        "harness_enrolments_total": {"enrolled", REFUSED, FAILED, ABANDONED},
    }[name]


def balanced(expr: str) -> bool:
    """Whether brackets are closed in the order in which they were opened."""
    pairs, opened = {")": "(", "]": "[", "}": "{"}, []
    for sign in re.sub(r'"[^"]*"', "", expr):
        if sign in pairs.values():
            opened.append(sign)
        elif sign in pairs and (not opened or opened.pop() != pairs[sign]):
            return False
    return not opened


def test_the_checks_of_rules_can_fail() -> None:
    """An open bracket, an unknown value and a metric without a test are seen."""
    assert not balanced("sum(rate(x[5m])")
    assert not balanced("sum(rate(x[5m)])")
    assert list(selected('harness_rounds_total{outcome=~"a|b"}')) == [
        ("harness_rounds_total", "outcome", "a"),
        ("harness_rounds_total", "outcome", "b"),
    ]
    assert "lost" not in (known_values("harness_rounds_total", "outcome") or set())
    assert not named("harness_hosts", 'value("harness_hosts_connected")')
