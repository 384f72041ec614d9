"""Reads the metrics of a service as Prometheus does."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from harness.metrics import Metrics
from harness.peer import PeerClient


@dataclass(frozen=True, slots=True)
class Figures:
    """One scrape."""

    samples: dict[tuple[str, frozenset[tuple[str, str]]], float]

    def value(self, name: str, **labels: str) -> float | None:
        """One number; None where it is not exposed."""
        return self.samples.get((name, frozenset(labels.items())))

    def sum(self, name: str, **labels: str) -> float:
        """Sum over the series that have these labels, whatever others they have."""
        wanted = labels.items()
        return sum(value for (of, having), value in self.samples.items() if of == name and wanted <= having)

    def refusals(self) -> dict[str, float]:
        """How many calls were refused or failed, by reason."""
        found = {
            labels["reason"]: self.sum("harness_refusals_total", **labels)
            for labels in self.labels("harness_refusals_total")
        }
        return {reason: count for reason, count in found.items() if count}

    def labels(self, name: str) -> list[dict[str, str]]:
        """Labels of all series of a metric."""
        return [dict(having) for of, having in self.samples if of == name]


def parse(text: str) -> Figures:
    """What a reader makes of the text format."""
    families = text_string_to_metric_families(text)
    return Figures({(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples})


def figures(metrics: Metrics) -> Figures:
    """What a reader would see now."""
    return parse(metrics.text().decode())


async def scrape(client: PeerClient) -> Figures:
    """What the service behind a client answers."""
    return parse(await client.text("/metrics"))
