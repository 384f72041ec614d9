"""The folder of an embedded lab: authorities, certificates, settings of every service, reference values.

A lab plays every part, so the keys of all parties lie in one folder; the services themselves get only their own.

::

    L/pki/<authority>/     ca.pem, ca.key, and what it issued
    L/vendor/              the simulated TPM vendor; tenants pin root.pem
    L/h/                   the host: hardware TPM, agent, sockets (t: TPM, c: its control, l: agent, g: guest manager)
    L/h/guests/<uuid>/     a guest: definition, vTPM, and its image (agent settings and certificate)
    L/p/  L/t/<tenant>/    databases and settings of the provider and of each tenant
    L/log/                 one log per process
    L/site.yml             what the command line reads

Spec: DESIGN 6 (labs), 7.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path

from harness import config
from harness.errors import ConfigError
from harness.lab_plan import GuestPlan, LabPlan
from harness.lab_processes import bound_socket, url_of
from harness.pki import Authority, Role, now
from harness.sim.boot import Scenario, reference_values
from harness.sim.vendor import ROOT_CERTIFICATE, open_vendor
from harness.swtpm import SOCKET_PATH_LIMIT
from harness.tenant.policy import Policy
from harness.values import HashAlg

PROVIDER = "provider"
HOST = "host1"
SITE = "site.yml"
BANK = HashAlg.SHA256
ALLOWLIST = tuple(range(16))
"""What a tenant of the lab may see of the host (DESIGN 3.1)."""
GOOD_HOST, GOOD_GUEST = "good", "guest-good"
_LONGEST_SOCKET = "/h/guests/00000000-0000-0000-0000-000000000000/s.ctrl"


@dataclass(frozen=True, slots=True)
class ServiceFile:
    """A service to start: its name in the lab, the service, its settings file, and its listening socket."""

    name: str
    service: str
    config: Path
    sock: socket.socket | None = field(default=None, compare=False)


class LabSite:
    """Writes the folder.

    Args:
        folder: of the lab; made when it is not there.
        plan: what the lab consists of.

    Raises:
        ConfigError: the folder's path is too long for the sockets in it, or it holds a lab already.
    """

    def __init__(self, folder: Path, plan: LabPlan) -> None:
        self.folder = folder.resolve()
        self.plan = plan
        if len(os.fsencode(self.folder)) + len(_LONGEST_SOCKET) > SOCKET_PATH_LIMIT:
            raise ConfigError(f"{self.folder}: this path is too long for UNIX sockets; choose a shorter folder")
        if (self.folder / SITE).exists():
            raise ConfigError(f"{self.folder}: holds a lab already; remove it or choose another folder")
        for part in ("log", "h/agent", "h/guests", "p"):
            (self.folder / part).mkdir(parents=True, exist_ok=True, mode=0o700)
        self.authorities = {name: Authority.create(f"{name} CA") for name in (PROVIDER, *plan.tenants)}
        for name, authority in self.authorities.items():
            authority.write(self.folder / "pki" / name)
        open_vendor(self.folder / "vendor", name="Simulated TPM vendor", now=now())
        self._sockets = {name: bound_socket() for name in self._listeners()}
        self.urls = {name: url_of(sock) for name, sock in self._sockets.items()}

    def _listeners(self) -> list[str]:
        shared = ["host-agent", "provider-registrar", "provider-verifier"]
        hostile = ["hostile-provider"] if self.plan.hostile else []
        return (
            shared
            + hostile
            + [f"{tenant}-{part}" for tenant in self.plan.tenants for part in ("registrar", "verifier")]
        )

    @property
    def host(self) -> config.HostSite:
        """Where the parts of the host are reached."""
        h = self.folder / "h"
        return config.HostSite(
            agent=self.urls["host-agent"],
            guest_manager=h / "g",
            guests=h / "guests",
            hardware_control=h / "c",
            tpm_socket=h / "t",
        )

    @property
    def provider_verifier(self) -> str:
        """Where the tenants' host rounds go; a hostile provider sits in between."""
        return self.urls["hostile-provider" if self.plan.hostile else "provider-verifier"]

    def log(self, name: str) -> Path:
        """Log of a process."""
        return self.folder / "log" / f"{name}.log"

    def tls(self, authority: str, role: Role, name: str, *, trusts: tuple[str, ...]) -> config.TlsSettings:
        """Certificate of one party, newly issued, and the authorities that it trusts."""
        issued = self.authorities[authority].issue(role, name)
        certificate, key = issued.write(self.folder / "pki" / authority, f"{role.value}-{name}")
        trusted = {other: self.folder / "pki" / other / "ca.pem" for other in trusts}
        return config.TlsSettings(certificate=certificate, key=key, authorities=trusted)

    # --- settings -----------------------------------------------------------------------------------------

    def hardware(self) -> ServiceFile:
        """The hardware TPM."""
        h = self.folder / "h"
        settings = config.HardwareTpmSettings(
            state_dir=h,
            socket=h / "t",
            control=h / "c",
            chip=self.plan.chip,
            scenario=self.plan.host_scenario,
            vendor_ca=self.folder / "vendor",
        )
        return self._file("hardware-tpm", "hardware-tpm", h / "hardware.yml", settings)

    def provider(self) -> list[ServiceFile]:
        """The provider's services on its own machines."""
        p = self.folder / "p"
        database = f"sqlite+aiosqlite:///{p / 'provider.db'}"
        registrar = config.ProviderRegistrarSettings(
            tls=self.tls(PROVIDER, Role.PROVIDER_REGISTRAR, "registrar", trusts=(PROVIDER,)), database=database
        )
        verifier = config.ProviderVerifierSettings(
            tls=self.tls(PROVIDER, Role.PROVIDER_VERIFIER, "verifier", trusts=(PROVIDER,)), database=database
        )
        return [
            self._file("provider-registrar", "provider-registrar", p / "registrar.yml", registrar),
            self._file("provider-verifier", "provider-verifier", p / "verifier.yml", verifier),
        ]

    def host_services(self) -> list[ServiceFile]:
        """Host agent and guest manager."""
        h = self.folder / "h"
        agent = config.HostAgentSettings(
            tls=self.tls(PROVIDER, Role.HOST_AGENT, HOST, trusts=(PROVIDER,)),
            name=HOST,
            tcti=f"swtpm:path={h / 't'}",
            state_dir=h / "agent",
            database=f"sqlite+aiosqlite:///{h / 'agent' / 'host.db'}",
            local_socket=h / "l",
            guest_manager=h / "g",
            peer_uids=[os.getuid()],
            registrar=self.urls["provider-registrar"],
            public_url=self.urls["host-agent"],
        )
        tool, tool_config = self.certificate_tool()
        manager = config.GuestManagerSettings(
            state_dir=h / "guests",
            socket=h / "g",
            host_agent=h / "l",
            create_certs_tool=tool,
            create_certs_config=tool_config,
            logs=self.folder / "log",
        )
        return [
            self._file("host-agent", "host-agent", h / "agent.yml", agent),
            self._file("guest-manager", "guest-manager", h / "manager.yml", manager),
        ]

    def tenants(self) -> list[ServiceFile]:
        """Registrar and verifier of every tenant."""
        return [file for tenant in self.plan.tenants for file in self._tenant(tenant)]

    def _tenant(self, tenant: str) -> list[ServiceFile]:
        t = self.folder / "t" / tenant
        t.mkdir(parents=True, mode=0o700)
        (t / "guest-policy.json").write_text(json.dumps(policy_of(GOOD_GUEST).encode()))
        (t / "host-policy.json").write_text(json.dumps(policy_of(GOOD_HOST).encode()))
        trusts = (tenant, PROVIDER)
        registrar = config.TenantRegistrarSettings(
            tls=self.tls(tenant, Role.TENANT_REGISTRAR, tenant, trusts=trusts),
            tenant=tenant,
            database=f"sqlite+aiosqlite:///{t / 'registrar.db'}",
            vendor_roots=[self.folder / "vendor" / ROOT_CERTIFICATE],
        )
        verifier = config.TenantVerifierSettings(
            tls=self.tls(tenant, Role.TENANT_VERIFIER, tenant, trusts=trusts),
            tenant=tenant,
            database=f"sqlite+aiosqlite:///{t / 'verifier.db'}",
            registrar=self.urls[f"{tenant}-registrar"],
        )
        return [
            self._file(f"{tenant}-registrar", "tenant-registrar", t / "registrar.yml", registrar),
            self._file(f"{tenant}-verifier", "tenant-verifier", t / "verifier.yml", verifier),
        ]

    def hostile(self) -> list[ServiceFile]:
        """The provider that lies, where the plan has one."""
        if self.plan.hostile is None:
            return []
        settings = config.HostileProviderSettings.model_validate(
            {
                "tls": self.tls(PROVIDER, Role.PROVIDER_VERIFIER, "hostile", trusts=(PROVIDER, *self.plan.tenants)),
                "mode": self.plan.hostile,
                "state_dir": self.folder / "x",
                "host_agent": self.urls["host-agent"],
                "registrar": self.urls["provider-registrar"],
                "operator": self.tls(PROVIDER, Role.PROVIDER_OPERATOR, "hostile", trusts=(PROVIDER,)),
                "hardware_control": self.folder / "h" / "c",
            }
        )
        return [self._file("hostile-provider", "hostile-provider", self.folder / "x" / "hostile.yml", settings)]

    def site(self) -> config.SiteSettings:
        """Writes ``site.yml`` and returns it."""
        settings = config.SiteSettings(
            pki=self.folder / "pki",
            provider=config.ProviderSite(
                registrar=self.urls["provider-registrar"],
                verifier=self.urls["provider-verifier"],
                operator=self.tls(PROVIDER, Role.PROVIDER_OPERATOR, "operator", trusts=(PROVIDER,)),
            ),
            hosts={HOST: self.host},
            tenants={tenant: self._tenant_site(tenant) for tenant in self.plan.tenants},
        )
        config.dump(settings, self.folder / SITE)
        return settings

    def _tenant_site(self, tenant: str) -> config.TenantSite:
        t = self.folder / "t" / tenant
        return config.TenantSite(
            registrar=self.urls[f"{tenant}-registrar"],
            verifier=self.urls[f"{tenant}-verifier"],
            provider_verifier=self.provider_verifier,
            operator=self.tls(tenant, Role.TENANT_OPERATOR, "operator", trusts=(tenant,)),
            guest_policy=t / "guest-policy.json",
            host_policy=t / "host-policy.json",
        )

    def certificate_tool(self) -> tuple[Path, Path]:
        """The host's create_certs_tool and its configuration: `provider.localca` under this interpreter."""
        import harness.provider.localca as localca

        tool, tool_config = self.folder / "h" / "localca", self.folder / "h" / "localca.conf"
        tool.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S {localca.__file__} "$@"\n')
        tool.chmod(0o700)
        tool_config.write_text(f"socket = {self.folder / 'h' / 'l'}\n")
        return tool, tool_config

    def foreign_tool(self) -> dict[str, str]:
        """A create_certs_tool that signs with a CA of its own: a vTPM made elsewhere (`attacks.foreign_ca`)."""
        import harness.attacks.foreign_ca as foreign_ca

        folder = self.folder / "x"
        folder.mkdir(exist_ok=True, mode=0o700)
        tool, tool_config = folder / "foreign-ca", folder / "foreign-ca.conf"
        tool.write_text(f'#!/bin/sh\nexec {sys.executable} {foreign_ca.__file__} "$@"\n')
        tool.chmod(0o700)
        tool_config.write_text("")
        return {"tool": str(tool), "config": str(tool_config)}

    def _file(self, name: str, service: str, path: Path, settings: config.Settings) -> ServiceFile:
        config.dump(settings, path)
        return ServiceFile(name, service, path, self._sockets.get(name))


def write_image(site: config.SiteSettings, guest: GuestPlan, host: str) -> Path:
    """The guest's image as its tenant makes it: agent settings and a certificate of the tenant's authority.

    Args:
        site: of the lab.
        guest: whose image it is.
        host: where it will run.

    Returns:
        The guest agent's settings file.

    Raises:
        ConfigError: the lab has no such tenant or host.
    """
    if guest.tenant not in site.tenants or host not in site.hosts:
        raise ConfigError(f"the lab has no tenant {guest.tenant} or no host {host}")
    folder = site.hosts[host].guests / str(guest.agent_id)
    image = folder / "image"
    issued = Authority.load(site.pki / guest.tenant).issue(Role.GUEST_AGENT, str(guest.agent_id))
    certificate, key = issued.write(image, "agent")
    trusted = {name: site.pki / name / "ca.pem" for name in (guest.tenant, PROVIDER)}
    settings = config.GuestAgentSettings(
        tls=config.TlsSettings(certificate=certificate, key=key, authorities=trusted),
        tenant=guest.tenant,
        agent_id=guest.agent_id,
        tcti=f"swtpm:path={folder / 's'}",
        state_dir=image / "state",
        registrars=[site.tenants[guest.tenant].registrar, site.provider.registrar],
        payload_dir=image / "payload",
    )
    path = image / "agent.yml"
    config.dump(settings, path)
    return path


def policy_of(scenario: str) -> Policy:
    """Reference values that follow from a boot scenario, in the lab's bank."""
    return Policy.of(BANK, reference_values(Scenario.load(scenario), BANK))
