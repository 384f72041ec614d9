"""Metrics as a reader gets them: parsed from the text format, as plain data for programs and as rows for people.

Invariants:
    1. Programs are given every sample as it was exposed; people are given a histogram as one line.

Spec: Prometheus exposition format 0.0.4.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from harness.errors import MalformedMessage

_BUCKET, _COUNT, _SUM = "_bucket", "_count", "_sum"
_QUANTILES = (0.5, 0.99)
Labels = Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A series for people.

    Args:
        name: of the metric.
        labels: ``name=value``, separated by spaces.
        value: a number, or what a histogram says.
        nothing: whether nothing has happened: a count of 0.
    """

    name: str
    labels: str
    value: str
    nothing: bool


def families_of(text: str) -> list[Metric]:
    """What a service exposed.

    Raises:
        MalformedMessage: it is not the text format.
    """
    try:
        return list(text_string_to_metric_families(text))
    except (ValueError, IndexError, KeyError) as error:
        raise MalformedMessage(f"the answer is not in the format of Prometheus: {error}") from error


def samples(families: list[Metric]) -> Iterator[dict[str, object]]:
    """Every sample: name, labels, value; a value that JSON does not know is text."""
    for family in families:
        for sample in family.samples:
            value: object = sample.value if math.isfinite(sample.value) else str(sample.value)
            yield {"name": sample.name, "labels": dict(sample.labels), "value": value}


def rows(families: list[Metric]) -> Iterator[Row]:
    """A line for each series."""
    for family in families:
        if family.type == "histogram":
            yield from _histograms(family)
            continue
        for sample in family.samples:
            yield Row(
                name=sample.name,
                labels=_text(sample.labels),
                value=_number(sample.value),
                nothing=family.type == "counter" and sample.value == 0,
            )


def _histograms(family: Metric) -> Iterator[Row]:
    buckets: dict[str, list[tuple[float, float]]] = {}
    counts: dict[str, float] = {}
    sums: dict[str, float] = {}
    for sample in family.samples:
        labels = _text({name: value for name, value in sample.labels.items() if name != "le"})
        if sample.name.endswith(_BUCKET):
            buckets.setdefault(labels, []).append((float(sample.labels["le"]), sample.value))
        elif sample.name.endswith(_COUNT):
            counts[labels] = sample.value
        elif sample.name.endswith(_SUM):
            sums[labels] = sample.value
    for labels, count in counts.items():
        said = "nothing yet"
        if count:
            within = [f"{part:.0%} within {_reached(buckets.get(labels, []), part * count)}" for part in _QUANTILES]
            said = f"{_number(count)}, mean {sums.get(labels, 0.0) / count:.4g}, {', '.join(within)}"
        yield Row(name=family.name, labels=labels, value=said, nothing=not count)


def _reached(buckets: list[tuple[float, float]], rank: float) -> str:
    """The bound of the bucket in which the value of this rank lies."""
    bound = next((bound for bound, count in sorted(buckets) if count >= rank), math.inf)
    return "more than the last bound" if math.isinf(bound) else _number(bound)


def _text(labels: Labels) -> str:
    return " ".join(f"{name}={value}" for name, value in labels.items())


def _number(value: float) -> str:
    return f"{value:.0f}" if value == math.floor(value) and math.isfinite(value) else f"{value:.4g}"
