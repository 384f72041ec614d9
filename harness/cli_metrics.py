"""`harness provider metrics` and `harness tenant metrics`: what services count, as a table or for programs.

Prometheus reads the same figures by itself (docs/metrics.md); the commands are for looking at a lab.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from harness import cli_site
from harness.cli_help import AsJson, Lab, Tenant, examples
from harness.errors import ConfigError, HarnessError, PeerUnreachable

if TYPE_CHECKING:
    from harness.config import TlsSettings
    from harness.pki import Role

_COLUMNS = ("service", "metric", "labels", "value")
Service = Annotated[
    str | None, typer.Option("--service", metavar="NAME", help="Of this service only; a host agent by its host's name.")
]
Everything = Annotated[bool, typer.Option("--all", help="Also what is 0, and what every process has.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Service:
    """A service that is asked.

    Args:
        url: where.
        tls: with its operator's certificate.
        role: its own.
    """

    url: str
    tls: TlsSettings
    role: Role


def register_provider(parent: typer.Typer) -> None:
    """Adds `metrics` to the provider's group."""
    epilog = examples("harness provider metrics", "harness provider metrics --service verifier --json")
    parent.command("metrics", epilog=epilog)(_provider_metrics)


def register_tenant(parent: typer.Typer) -> None:
    """Adds `metrics` to the tenant's group."""
    epilog = examples("harness tenant metrics", "harness tenant metrics --tenant alice --service verifier --all")
    parent.command("metrics", epilog=epilog)(_tenant_metrics)


def _provider_metrics(
    service: Service = None, everything: Everything = False, lab: Lab = None, as_json: AsJson = False
) -> None:
    """Show what registrar, verifier and host agents count: requests, refusals, batches, the TPM's time.

    Exits 1 when a service does not answer; it is named on standard error.
    """
    from harness.pki import Role

    site = cli_site.site_of(lab)
    tls = site.provider.operator
    services = {
        "registrar": _Service(url=site.provider.registrar, tls=tls, role=Role.PROVIDER_REGISTRAR),
        "verifier": _Service(url=site.provider.verifier, tls=tls, role=Role.PROVIDER_VERIFIER),
    }
    for name, host in site.hosts.items():
        services[name] = _Service(url=host.agent, tls=tls, role=Role.HOST_AGENT)
    _show(_chosen(services, service), everything=everything, as_json=as_json)


def _tenant_metrics(
    service: Service = None,
    everything: Everything = False,
    tenant: Tenant = None,
    lab: Lab = None,
    as_json: AsJson = False,
) -> None:
    """Show what registrars and verifiers of all tenants count, or those of one: rounds, findings, enrolments.

    Exits 1 when a service does not answer; it is named on standard error.
    """
    from harness.pki import Role

    tenants = cli_site.tenants_of(cli_site.site_of(lab), tenant)
    services: dict[str, _Service] = {}
    for name, own in tenants.items():
        kinds = {
            "registrar": _Service(url=own.registrar, tls=own.operator, role=Role.TENANT_REGISTRAR),
            "verifier": _Service(url=own.verifier, tls=own.operator, role=Role.TENANT_VERIFIER),
        }
        services |= {f"{name} {kind}": each for kind, each in _chosen(kinds, service).items()}
    _show(services, everything=everything, as_json=as_json)


def _chosen(services: Mapping[str, _Service], name: str | None) -> Mapping[str, _Service]:
    if name is None:
        return services
    if name not in services:
        raise ConfigError(f"--service {name}: is not one of {', '.join(services)}")
    return {name: services[name]}


def _show(services: Mapping[str, _Service], *, everything: bool, as_json: bool) -> None:
    from harness.console import print_json, say

    answers = cli_site.asked(_read(services))
    silent = {name: answer for name, answer in answers.items() if isinstance(answer, HarnessError)}
    texts = {name: answer for name, answer in answers.items() if isinstance(answer, str)}
    for name, error in silent.items():
        say(f"harness: the metrics of {name} cannot be read: {error.detail}")
    if as_json:
        print_json(_samples(texts))
    else:
        _table(texts, everything=everything)
    raise typer.Exit(1 if silent else 0)


async def _read(services: Mapping[str, _Service]) -> dict[str, str | HarnessError]:
    import asyncio

    from harness.peer import PeerClient

    async def one(service: _Service) -> str | HarnessError:
        try:
            async with PeerClient(service.tls, service.url, roles={service.role}) as client:
                return await client.text("/metrics")
        except HarnessError as error:
            return error

    answers = await asyncio.gather(*map(one, services.values()))
    if answers and all(isinstance(answer, PeerUnreachable) for answer in answers):
        raise answers[0]  # type: ignore[misc]
    return dict(zip(services, answers, strict=True))


def _samples(texts: Mapping[str, str]) -> list[dict[str, object]]:
    from harness.metrics_view import families_of, samples

    return [{"service": name, **each} for name, text in texts.items() for each in samples(families_of(text))]


def _table(texts: Mapping[str, str], *, everything: bool) -> None:
    from harness.console import print_table
    from harness.metrics_view import families_of, rows

    shown = [
        (name, row.name, row.labels, row.value)
        for name, text in texts.items()
        for row in rows(families_of(text))
        if everything or (row.name.startswith("harness_") and not row.nothing)
    ]
    print_table(_COLUMNS, shown, empty="nothing was counted yet")
