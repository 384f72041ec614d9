"""Renews certificates of a lab's services and operators: what `harness lab renew` does.

A certificate is issued anew on the same key by the authority of the lab that issued it, and given to the running
service (``PUT /v1/certificate``), which audits who did it and why. A service that does not answer, for example because
its certificate has expired already, gets it through its file, which it takes into use within a few seconds; its audit
trail says so (who ``file``), for the reason cannot be told there. What is not running, and operators, who have no audit
trail, find theirs at their next start. `Renewed.by` says which went which way.

Invariants:
    1. Key, role, name and addresses stay: nothing has to be enrolled or pinned anew.
    2. Operators come first: their certificates are shown when those of the services are replaced.

Spec: DESIGN 3.2 (requester); docs/architecture.md (certificates).
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding

from harness import config
from harness.errors import ConfigError, DeadlineExceeded, PeerUnreachable
from harness.lab_names import SITE_FILE
from harness.lab_record import LabRecord
from harness.peer import PeerClient
from harness.pki import Authority, Issued, load_certificate, load_issued, now
from harness.pki import renew as renewed
from harness.private_file import write_private
from harness.tls import authority_of, role_and_name

_CALL_S = 10.0
_SETTINGS: tuple[tuple[str, str, type[config.ServiceSettings]], ...] = (
    ("p/registrar.yml", "provider-registrar", config.ProviderRegistrarSettings),
    ("p/verifier.yml", "provider-verifier", config.ProviderVerifierSettings),
    ("h/*/agent.yml", "{}-agent", config.HostAgentSettings),
    ("t/*/registrar.yml", "{}-registrar", config.TenantRegistrarSettings),
    ("t/*/verifier.yml", "{}-verifier", config.TenantVerifierSettings),
    ("x/hostile.yml", "hostile-provider", config.HostileProviderSettings),
)
_GUESTS = "h/*/guests/*/image/agent.yml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Renewed:
    """One renewed certificate.

    Args:
        name: of the service or operator.
        expires: end of the new certificate.
        by: ``call`` when the service took it, and audited the reason; ``file`` when it was written to its file.
    """

    name: str
    expires: datetime.datetime
    by: str

    def as_json(self) -> dict[str, object]:
        """Members as the command shows them."""
        return {"name": self.name, "expires": self.expires.isoformat(), "by": self.by}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Owner:
    name: str
    tls: config.TlsSettings
    url: str | None = None


async def renew(folder: Path, services: Sequence[str], days: float, reason: str) -> list[Renewed]:
    """Renews certificates.

    Args:
        folder: of the lab.
        services: names as `harness lab status` shows them, ``agent-GUEST``, ``provider-operator``,
            ``TENANT-operator`` or ``TENANT-client``; all of them when empty.
        days: length of validity.
        reason: for the audit trail of those who take it by a call.

    Raises:
        ConfigError: no lab there, an unknown name, or a file that cannot be used.
        HarnessError: what a service refused it with; those before it are renewed.

    *Cancellation:* those before are renewed.
    """
    if days <= 0:
        raise ConfigError(f"--days {days:g}: must be more than 0")
    site = config.load(folder / SITE_FILE, config.SiteSettings)
    owners = {owner.name: owner for owner in _owners(folder, site)}
    if unknown := set(services) - owners.keys():
        raise ConfigError(f"{min(unknown)}: this lab has {', '.join(owners)}")
    return [
        await _renew(site, owner, days, reason) for name, owner in owners.items() if not services or name in services
    ]


def names(folder: Path) -> list[str]:
    """Whose certificates `renew` can renew.

    Raises:
        ConfigError: no lab there, or a file that cannot be used.
    """
    return [owner.name for owner in _owners(folder, config.load(folder / SITE_FILE, config.SiteSettings))]


def days_left(folder: Path) -> dict[str, float]:
    """How many days each certificate that `renew` can renew is still valid; less than 0 when it has expired.

    Raises:
        ConfigError: no lab there, or a file that cannot be used.
    """
    site, at = config.load(folder / SITE_FILE, config.SiteSettings), now()
    return {
        owner.name: (load_certificate(owner.tls.certificate).not_valid_after_utc - at) / datetime.timedelta(days=1)
        for owner in _owners(folder, site)
    }


def _owners(folder: Path, site: config.SiteSettings) -> Iterator[_Owner]:
    yield _Owner(name="provider-operator", tls=site.provider.operator)
    for tenant, settings in site.tenants.items():
        yield _Owner(name=f"{tenant}-operator", tls=settings.operator)
        if settings.client is not None:
            yield _Owner(name=f"{tenant}-client", tls=settings.client)
    for pattern, name, model in _SETTINGS:
        for path in sorted(folder.glob(pattern)):
            yield _owner(name.format(path.parent.name), path, model)
    guests = {str(agent_id): name for name, agent_id in LabRecord(folder).guests().items()}
    for path in sorted(folder.glob(_GUESTS)):
        agent_id = path.parent.parent.name
        yield _owner(f"agent-{guests.get(agent_id, agent_id)}", path, config.GuestAgentSettings)


def _owner(name: str, path: Path, model: type[config.ServiceSettings]) -> _Owner:
    settings = config.load(path, model)
    listen = getattr(settings, "listen", None)
    url = None if listen is None or listen.port == 0 else f"https://{listen.host}:{listen.port}"
    tls: config.TlsSettings = settings.tls  # type: ignore[attr-defined]
    return _Owner(name=name, tls=tls, url=url)


async def _renew(site: config.SiteSettings, owner: _Owner, days: float, reason: str) -> Renewed:
    old = load_issued(owner.tls.certificate, owner.tls.key)
    authorities = {path.parent.name: load_certificate(path) for path in site.pki.glob("*/ca.pem")}
    signer = authority_of(old.certificate, authorities)
    if signer is None:
        raise ConfigError(f"{owner.tls.certificate}: no authority of this lab signed it")
    new = renewed(Authority.load(site.pki / signer), old, days=days)
    by = "call" if await _given(site, owner, signer, new, reason) else "file"
    if by == "file":
        _write(owner.tls.certificate, new)
    return Renewed(name=owner.name, expires=new.certificate.not_valid_after_utc, by=by)


async def _given(site: config.SiteSettings, owner: _Owner, signer: str, new: Issued, reason: str) -> bool:
    """Whether the running service took the certificate."""
    operator = site.tenants[signer].operator if signer in site.tenants else site.provider.operator
    if owner.url is None:
        return False
    role, _ = role_and_name(new.certificate)
    try:
        async with PeerClient(operator, owner.url, roles={role}, deadline_s=_CALL_S) as client:
            await client.put("/v1/certificate", {"certificate": _pem(new).decode(), "reason": reason})
    except (PeerUnreachable, DeadlineExceeded):
        return False
    return True


def _pem(issued: Issued) -> bytes:
    return issued.certificate.public_bytes(Encoding.PEM)


def _write(path: Path, issued: Issued) -> None:
    try:
        write_private(path, _pem(issued))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error
