"""Shell completion: what the lab's site file offers for an option or argument.

Invariants:
    1. Completion asks no service, never fails and never waits: without a lab there is nothing to offer.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from harness import cli_names, cli_site
from harness.errors import HarnessError

if TYPE_CHECKING:
    from harness.config import SiteSettings

SERVICES = (
    "host-agent",
    "provider-verifier",
    "provider-registrar",
    "tenant-registrar",
    "tenant-verifier",
    "guest-agent",
)


def tenants(ctx: typer.Context, incomplete: str) -> list[str]:
    """Tenants of the lab."""
    site = _site(ctx)
    return [] if site is None else _starting(site.tenants, incomplete)


def hosts(ctx: typer.Context, incomplete: str) -> list[str]:
    """Hosts of the lab, by name."""
    site = _site(ctx)
    return [] if site is None else _starting(site.hosts, incomplete)


def guests(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of guests; ids as soon as the beginning of one was typed."""
    site = _site(ctx)
    if site is None:
        return []
    names = cli_names.guest_names(site)
    return _starting(names.values(), incomplete) or _starting(names, incomplete)


def services(incomplete: str) -> list[str]:
    """Services that `harness serve` runs."""
    return _starting(SERVICES, incomplete)


def lab_services(ctx: typer.Context, incomplete: str) -> list[str]:
    """Services of the lab, as `lab status` shows them."""
    site = _site(ctx)
    return [] if site is None else _starting(_services(site, "tpm", "agent", "guests"), incomplete)


def certified(ctx: typer.Context, incomplete: str) -> list[str]:
    """Services and operators of the lab that have a certificate."""
    site = _site(ctx)
    if site is None:
        return []
    operators = [f"{tenant}-{who}" for tenant in site.tenants for who in ("operator", "client")]
    agents = [f"agent-{name}" for name in cli_names.guest_names(site).values()]
    return _starting([*_services(site, "agent"), *operators, *agents, "provider-operator"], incomplete)


def logs(ctx: typer.Context, incomplete: str) -> list[str]:
    """Processes of the lab that have a log."""
    site = _site(ctx)
    return [] if site is None else _starting([path.stem for path in site.pki.parent.glob("log/*.log")], incomplete)


def _services(site: SiteSettings, *of_host: str) -> list[str]:
    hosts = [f"{host}-{part}" for host in site.hosts for part in of_host]
    parties = [f"{party}-{part}" for party in ("provider", *site.tenants) for part in ("registrar", "verifier")]
    return [*hosts, *parties]


def _starting(words: Collection[str], incomplete: str) -> list[str]:
    return sorted({word for word in words if word.startswith(incomplete)})


def _site(ctx: typer.Context) -> SiteSettings | None:
    stated = ctx.params.get("lab")
    try:
        return cli_site.site_of(None if stated is None else Path(stated))
    except (HarnessError, OSError):
        return None


def scenarios(incomplete: str) -> list[str]:
    """Measured-boot scenarios that the package brings."""
    from harness.sim import files

    return _starting(files.names("scenarios"), incomplete)


def chips(incomplete: str) -> list[str]:
    """Latency profiles of TPM chips that the package brings."""
    from harness.sim import files

    return _starting(files.names("profiles"), incomplete)
