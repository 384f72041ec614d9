"""How the operators' commands reach a running lab: its `site.yml`, and clients with the operator's certificate.

Invariants:
    1. Which lab and which tenant is stated (option or environment) or there is only one; nothing is guessed.
    2. Libraries are imported when a command runs, for the sake of `--help`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from harness import cli_names
from harness.errors import CertificateExpired, ConfigError, HarnessError, PeerUnreachable
from harness.lab_names import RECORD_FILE, SITE_FILE, TOPOLOGY_FILE

if TYPE_CHECKING:
    import uuid

    from harness.config import HostSite, SiteSettings, TenantSite
    from harness.lab_control import LabControl
    from harness.provider.operator import ProviderOperator
    from harness.tenant.kept_orders import KeptOrders
    from harness.tenant.operator import TenantOperator
    from harness.tenant.policy import Policy
    from harness.values import AgentId, HostId

T = TypeVar("T")
_folder: ContextVar[Path | None] = ContextVar("folder", default=None)
"""Of the lab that the command has found, for the sentence that says that it is down."""
_START = "`harness lab up` starts one"


class LabDown(ConfigError):
    """No service of the lab answers, because it is down."""


def site_of(lab: Path | None) -> SiteSettings:
    """Settings of the running lab.

    Args:
        lab: as stated: its folder or its topology file; None: the topology file in the current folder.

    Raises:
        ConfigError: no lab is stated, none was started there, or its file cannot be used.
    """
    from harness import config

    folder = _folder_of(lab)
    if not (folder / SITE_FILE).is_file():
        raise ConfigError(f"{folder}: holds no lab that was started; {_START}")
    _folder.set(folder.absolute())
    return config.load(folder / SITE_FILE, config.SiteSettings)


def topology_of(lab: Path | None) -> Path:
    """The topology file of a lab, running or not.

    Args:
        lab: as for `site_of`.

    Raises:
        ConfigError: there is none.
    """
    path = (lab or Path(TOPOLOGY_FILE)).absolute()
    if path.is_dir():
        path /= TOPOLOGY_FILE
    if not path.is_file():
        raise ConfigError(f"{path}: is not there; `harness lab init` writes one, --lab names another")
    return path


def control_of(lab: Path | None) -> LabControl:
    """A lab from outside, running or not.

    Args:
        lab: as for `site_of`.

    Raises:
        ConfigError: none is stated, or its file cannot be used.
    """
    from harness.lab_control import LabControl

    return LabControl(_folder_of(lab))


def _folder_of(lab: Path | None) -> Path:
    from harness.lab_topology import folder_of

    if lab is None and not Path(TOPOLOGY_FILE).is_file():
        raise ConfigError(f"which lab? give its folder or {TOPOLOGY_FILE} with --lab or HARNESS_LAB; {_START}")
    return folder_of(lab or Path(TOPOLOGY_FILE))


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


def tenants_of(site: SiteSettings, name: str | None) -> Mapping[str, TenantSite]:
    """The stated tenant, or all. Raises ConfigError when there is no such tenant."""
    return site.tenants if name is None else {name: tenant_of(site, name)}


def to_state(site: SiteSettings, name: str | None) -> str | None:
    """The name of a tenant where a command must state it; None where the lab has only one."""
    return name if len(site.tenants) > 1 else None


def orders_of(lab: Path | None, site: SiteSettings, tenant: TenantSite) -> KeptOrders:
    """How guests of a tenant were attested whose re-enrolment is under way: beside its other files in the lab.

    Args:
        lab: as for `site_of`.
        site: of the lab.
        tenant: from `tenant_of`.
    """
    from harness.tenant.kept_orders import KeptOrders

    name = next(name for name, each in site.tenants.items() if each is tenant)
    return KeptOrders(_folder_of(lab) / "t" / name / "orders")


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
        async with tenant_operator(tenant) as operator:
            return await act(operator)

    return asked(run())


def as_tenants(
    tenants: Mapping[str, TenantSite], act: Callable[[str, TenantOperator], Awaitable[T]]
) -> dict[str, T | HarnessError]:
    """Results of what the operators of several tenants do at once; an error of one does not touch the others."""
    import asyncio

    async def run() -> dict[str, T | HarnessError]:
        results: list[T | HarnessError] = await asyncio.gather(*(one(name) for name in tenants))
        down = await _down() if results and all(isinstance(each, PeerUnreachable) for each in results) else None
        if down is not None:
            results = [down for _ in results]
        return dict(zip(tenants, results, strict=True))

    async def one(name: str) -> T | HarnessError:
        try:
            async with tenant_operator(tenants[name]) as operator:
                return await act(name, operator)
        except HarnessError as error:
            return error

    return asked(run())


def as_provider(site: SiteSettings, act: Callable[[ProviderOperator], Awaitable[T]]) -> T:
    """Result of what the provider's operator does."""

    async def run() -> T:
        from harness.peer import PeerClient
        from harness.pki import Role
        from harness.provider.operator import ProviderOperator

        roles = {Role.PROVIDER_REGISTRAR}
        async with PeerClient(site.provider.operator, site.provider.registrar, roles=roles) as registrar:
            return await act(ProviderOperator(registrar))

    return asked(run())


@asynccontextmanager
async def tenant_operator(tenant: TenantSite) -> AsyncIterator[TenantOperator]:
    """The tenant's operator, connected to both services with the certificate from the site."""
    from harness.peer import PeerClient
    from harness.pki import Role
    from harness.tenant.operator import TenantOperator

    async with (
        PeerClient(tenant.operator, tenant.registrar, roles={Role.TENANT_REGISTRAR}) as registrar,
        PeerClient(tenant.operator, tenant.verifier, roles={Role.TENANT_VERIFIER}) as verifier,
    ):
        yield TenantOperator(registrar, verifier, tenant.operator)


def asked(work: Coroutine[object, object, T]) -> T:
    """Result of work that asks the services of a lab. Raises LabDown for one that is down and cannot be reached."""
    import asyncio

    async def run() -> T:
        try:
            return await work
        except PeerUnreachable:
            down = await _down()
            if down is None:
                raise
            raise down from None

    return asyncio.run(run())


async def _down() -> LabDown | None:
    """The error that says that the lab of the command is down; None when it is up, or this is no lab."""
    from harness.lab_control import LabControl

    folder = _folder.get()
    if folder is None or not (folder / RECORD_FILE).is_file():
        return None  # services of which no supervisor knows
    try:
        is_up = await LabControl(folder).status() is not None
    except HarnessError:
        return None
    return None if is_up else LabDown(f"the lab in {folder} is down; `harness lab up` starts it")


def is_expired(error: HarnessError) -> bool:
    """Whether the certificate of either side has expired."""
    return isinstance(error, CertificateExpired) or "certificate has expired" in error.detail


def reason_of(error: HarnessError, service: str) -> str:
    """Why a service cannot be asked; for a certificate of its own that has expired with the way to renew it."""
    if is_expired(error) and not isinstance(error, CertificateExpired):
        return f"its certificate has expired; renew it with `harness lab renew {service} --reason TEXT`"
    return error.detail


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


async def guest_of(site: SiteSettings, operator: TenantOperator, text: str, *, stated: bool = True) -> AgentId:
    """A tenant's guest from what was typed: an id, the beginning of one, or a name.

    Args:
        site: knows the names.
        operator: knows the guests that the tenant has stated.
        text: as typed.
        stated: whether it must be one of those, unless its id is complete; else any guest of the lab will do.

    Raises:
        NotFound, ConfigError: it fits none, or several (`cli_names.pick`).
        HarnessError: the registrar does not answer.
    """
    from harness.values import parse_agent_id

    if cli_names.is_id(text):
        return parse_agent_id(text)
    names = cli_names.guest_names(site)
    known = [str(guest["agent_id"]) for guest in await operator.stated()] if stated else list(names)
    listing = "harness tenant guest list" if stated else "harness provider guest list"
    return parse_agent_id(cli_names.pick(text, known, names, what="guest", listing=listing))


async def enrolled_host(operator: TenantOperator, text: str) -> HostId:
    """A tenant's host from its id, or the beginning of it. Raises as `guest_of`."""
    from harness.values import parse_host_id

    known = [] if cli_names.is_id(text) else [str(host["host_id"]) for host in await operator.hosts()]
    return parse_host_id(cli_names.pick(text, known, {}, what="host", listing="harness tenant host list"))


def read_policy(path: Path) -> Policy:
    """Reference values from a file.

    Raises:
        ConfigError: it cannot be read, or is no policy; names the file.
    """
    from harness import config
    from harness.errors import MalformedMessage
    from harness.tenant.policy import parse_policy

    try:
        return parse_policy(config.read_yaml(path))
    except MalformedMessage as error:
        raise ConfigError(f"{path}: {error.detail}") from None


def read_file(path: Path, what: str) -> bytes:
    """Content of a file that the command line names.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{what} {path}: cannot be read: {error.strerror}") from error
