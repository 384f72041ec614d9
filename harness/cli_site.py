"""How the operators' commands reach a running lab: its `site.yml`, and clients with the operator's certificate.

Invariants:
    1. Which lab and which tenant is stated (option or environment) or there is only one; nothing is guessed.
    2. Libraries are imported when a command runs, for the sake of `--help`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from harness.errors import ConfigError

if TYPE_CHECKING:
    import uuid

    from harness.config import HostSite, SiteSettings, TenantSite
    from harness.provider.operator import ProviderOperator
    from harness.tenant.operator import TenantOperator

T = TypeVar("T")
SITE_FILE = "site.yml"


def site_of(lab: Path | None) -> SiteSettings:
    """Settings of the running lab.

    Raises:
        ConfigError: no lab is stated, or its file cannot be used.
    """
    from harness import config

    if lab is None:
        raise ConfigError("which lab? give its folder with --lab DIR or HARNESS_LAB; `harness demo --keep` starts one")
    return config.load(lab / SITE_FILE, config.SiteSettings)


def tenant_of(site: SiteSettings, name: str | None) -> TenantSite:
    """The stated tenant, or the only one.

    Raises:
        ConfigError: there is no such tenant, or none was stated and there are several.
    """
    known = ", ".join(site.tenants)
    if name is None and len(site.tenants) == 1:
        name = next(iter(site.tenants))
    if name is None:
        raise ConfigError(f"which tenant? give --tenant NAME or HARNESS_TENANT: {known}")
    if name not in site.tenants:
        raise ConfigError(f"--tenant {name}: this lab has {known}")
    return site.tenants[name]


def host_of(site: SiteSettings, name: str | None) -> tuple[str, HostSite]:
    """The stated host (by name), or the only one. Raises ConfigError as `tenant_of`."""
    known = ", ".join(site.hosts)
    if name is None and len(site.hosts) == 1:
        name = next(iter(site.hosts))
    if name is None:
        raise ConfigError(f"which host? give --host NAME: {known}")
    if name not in site.hosts:
        raise ConfigError(f"--host {name}: this lab has {known}")
    return name, site.hosts[name]


def as_tenant(tenant: TenantSite, act: Callable[[TenantOperator], Awaitable[T]]) -> T:
    """Result of what a tenant's operator does."""

    async def run() -> T:
        async with _tenant_operator(tenant) as operator:
            return await act(operator)

    return _run(run())


def as_provider(site: SiteSettings, act: Callable[[ProviderOperator], Awaitable[T]]) -> T:
    """Result of what the provider's operator does."""

    async def run() -> T:
        from harness.peer import PeerClient
        from harness.pki import Role
        from harness.provider.operator import ProviderOperator

        roles = {Role.PROVIDER_REGISTRAR}
        async with PeerClient(site.provider.operator, site.provider.registrar, roles=roles) as registrar:
            return await act(ProviderOperator(registrar))

    return _run(run())


@asynccontextmanager
async def _tenant_operator(tenant: TenantSite) -> AsyncIterator[TenantOperator]:
    from harness.peer import PeerClient
    from harness.pki import Role
    from harness.tenant.operator import TenantOperator

    async with (
        PeerClient(tenant.operator, tenant.registrar, roles={Role.TENANT_REGISTRAR}) as registrar,
        PeerClient(tenant.operator, tenant.verifier, roles={Role.TENANT_VERIFIER}) as verifier,
    ):
        yield TenantOperator(registrar, verifier, tenant.operator)


def _run(work: Coroutine[object, object, T]) -> T:
    import asyncio

    return asyncio.run(work)


def parse_id(text: str, what: str) -> uuid.UUID:
    """UUID from the command line.

    Raises:
        ConfigError: it is none in canonical form; names the argument.
    """
    from harness.errors import MalformedMessage
    from harness.values import parse_uuid

    try:
        return parse_uuid(text, what)
    except MalformedMessage as error:
        raise ConfigError(error.detail) from None


def read_file(path: Path, what: str) -> bytes:
    """Content of a file that the command line names.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{what} {path}: cannot be read: {error.strerror}") from error
