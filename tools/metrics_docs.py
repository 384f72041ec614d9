"""Writes the tables of `docs/metrics.md` from the metrics themselves: `python tools/metrics_docs.py`.

What stands between the two marks is replaced; the rest of the page is written by hand. A test compares.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from harness.enrolment_metrics import GUEST, HOST, Enrolments
from harness.metrics import Described, Metrics
from harness.provider.host_metrics import HostFigures
from harness.provider.proxy_metrics import ProxyFigures
from harness.tenant.states import State
from harness.tenant.verifier_metrics import RoundFigures

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"
BEGIN, END = "<!-- metrics: begin -->", "<!-- metrics: end -->"


class _Nothing:
    """Stands for batcher, keys and sessions, of which only the names of the metrics are wanted."""

    waiting = open_pools = quotes_made = races = asked_again = 0
    waiting_by_tenant: Mapping[str, int] = {}

    def states(self) -> Counter[State]:
        """No sessions."""
        return Counter()

    def attested(self) -> int:
        """Nobody."""
        return 0


def tables() -> dict[str, Sequence[Described]]:
    """Metrics by the services that have them."""
    host, verifier, registrar, tenant = (Metrics("x") for _ in range(4))
    HostFigures(host, _Nothing(), _Nothing(), lambda: 0)
    ProxyFigures(verifier, dict)
    Enrolments(registrar, HOST, GUEST)
    RoundFigures(tenant, lambda: 0.0).watch(_Nothing())
    common = Metrics("x").described
    own = {
        "Host agent": host,
        "Provider verifier": verifier,
        "Registrars of provider and tenant": registrar,
        "Tenant verifier": tenant,
    }
    return {"Every service": common} | {name: each.described[len(common) :] for name, each in own.items()}


def page(text: str) -> str:
    """The page with the tables as they are now.

    Raises:
        ValueError: a mark is missing.
    """
    before, found, rest = text.partition(BEGIN)
    _, found_too, after = rest.partition(END)
    if not found or not found_too:
        raise ValueError(f"{BEGIN} or {END} is missing")
    return f"{before}{BEGIN}\n\n" + "\n".join(_lines()) + f"\n{END}{after}"


def _lines() -> Iterator[str]:
    for service, metrics in tables().items():
        yield f"### {service}\n"
        yield "| metric | kind | labels | what it says |\n|---|---|---|---|"
        for each in metrics:
            labels = ", ".join(f"`{label}`" for label in each.labels)
            yield f"| `{each.name}` | {each.kind} | {labels} | {each.text} |"
        yield ""


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
