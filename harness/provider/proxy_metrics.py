"""What a provider verifier tells its operators of its tenants and its hosts.

A tenant's name is a label here, and only here and in `host_metrics`: the provider's operator gave that name when it
onboarded the tenant, is the only one who may read the figures, and needs them to see who floods whom. There are as many
series as tenants that were onboarded, times the four outcomes; a tenant that is removed takes its series with it.

Invariants:
    1. A call of a tenant is counted once, under its name and how the call ended.
    2. A tenant that the provider's records do not know has no series.

Owner: `proxy_routes.Proxy`.

Spec: docs/metrics.md.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from types import TracebackType

from harness.health import OK
from harness.metrics import Metrics, outcome_of


class ProxyFigures:
    """Calls by tenant, and connections to hosts.

    Args:
        metrics: of the service; takes the new ones.
        hosts: state of the link to each host (`HostLinks.states`).
    """

    def __init__(self, metrics: Metrics, hosts: Callable[[], Mapping[str, str]]) -> None:
        self._tenants: Collection[str] = ()
        self._in_work: dict[str, int] = {}
        self._calls = metrics.counter(
            "harness_tenant_requests_total", "Calls of a tenant that have ended, by how.", labels=("tenant", "outcome")
        )
        metrics.states(
            "harness_tenant_requests_in_work",
            "Calls of a tenant that have not ended; tenants without any are left out.",
            lambda: {(tenant,): float(count) for tenant, count in self._in_work.items()},
            labels=("tenant",),
        )
        metrics.gauge("harness_hosts", "Hosts in the provider's records.", lambda: float(len(hosts())))
        metrics.gauge(
            "harness_hosts_connected",
            "Hosts whose agent is connected.",
            lambda: float(sum(state == OK for state in hosts().values())),
        )

    def follow(self, tenants: Collection[str]) -> None:
        """Takes over the names of the tenants; what was counted of others is forgotten."""
        self._tenants = frozenset(tenants)
        self._calls.forget(lambda labels: labels[0] in self._tenants)

    def call(self, tenant: str) -> AbstractContextManager[None]:
        """Counts the block as a call of this tenant."""
        return _Call(self, tenant)

    def began(self, tenant: str) -> None:
        """A call has begun."""
        self._in_work[tenant] = self._in_work.get(tenant, 0) + 1

    def ended(self, tenant: str, error: BaseException | None) -> None:
        """A call has ended, with an answer or with this error."""
        self._in_work[tenant] -= 1
        if not self._in_work[tenant]:
            del self._in_work[tenant]
        if tenant in self._tenants:
            self._calls.add(tenant, outcome_of(error)[0])


class _Call(AbstractContextManager[None]):
    """See `ProxyFigures.call`."""

    __slots__ = ("_figures", "_tenant")

    def __init__(self, figures: ProxyFigures, tenant: str) -> None:
        self._figures = figures
        self._tenant = tenant

    def __enter__(self) -> None:
        self._figures.began(self._tenant)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._figures.ended(self._tenant, error)
