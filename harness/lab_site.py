"""The folder of an embedded lab: authorities, certificates, settings of every service, reference values.

A lab plays every part, so the keys of all parties lie in one folder; the services themselves get only their own.

::

    L/pki/<authority>/     ca.pem, ca.key, and what it issued
    L/vendor/              the simulated TPM vendor; tenants pin root.pem
    L/h/<host>/            a host: hardware TPM, agent, sockets (t: TPM, c: its control, l: agent, g: guest manager)
    L/h/<host>/guests/<uuid>/   a guest: definition, vTPM, and its image (agent settings and certificate)
    L/p/  L/t/<tenant>/    databases and settings of the provider and of each tenant
    L/log/                 one log per process
    L/run/                 the supervisor's socket
    L/lab.json             ports and UUIDs (`lab_record`)
    L/site.yml             what the command line reads

Invariants:
    1. What is there stays: keys, certificates and databases are made once; settings are written anew from the plan.

Spec: DESIGN 6 (labs), 7.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from harness import config
from harness.errors import ConfigError
from harness.lab_folder import open_folder
from harness.lab_names import SITE_FILE
from harness.lab_plan import GuestPlan, HostPlan, LabPlan, TenantPlan
from harness.lab_record import LabRecord
from harness.pki import Authority, Role, now
from harness.private_file import write_private
from harness.sim.vendor import ROOT_CERTIFICATE, open_vendor

PROVIDER = "provider"
_ADDRESS = "127.0.0.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceFile:
    """A service of the lab.

    Args:
        name: in the lab, unique.
        service: for `harness.serve`.
        config: its settings file.
        text: what is in that file: a change of it is a change of the service.
        state_dir: where it keeps what must survive.
        url: where it answers; None for one with UNIX sockets only.
        powered: control socket of the hardware TPM that must be on before it starts.
        stop_s: how long it may take to end in order.
    """

    name: str
    service: str
    config: Path
    text: str
    state_dir: Path
    url: str | None = None
    powered: Path | None = None
    stop_s: float = 6.0


class LabSite:
    """Writes the folder. Outside of this file a lab's folder is had from `open`.

    Args:
        folder: of the lab, as `lab_folder.open_folder` gives it.
        plan: what the lab consists of.

    Raises:
        ConfigError: the folder holds something that cannot be used.
    """

    @classmethod
    def open(cls, folder: Path, plan: LabPlan) -> LabSite:
        """A lab's folder under a name that is short enough for the sockets in it.

        Args:
            folder: of the lab; made where it is missing.
            plan: what the lab consists of.

        Raises:
            ConfigError: the folder cannot be made, has no name that is short enough, or holds something that cannot be
                used.
        """
        return cls(open_folder(folder, longest_host=max(len(host.name) for host in plan.hosts)), plan)

    def __init__(self, folder: Path, plan: LabPlan) -> None:
        self.folder = folder
        self.plan = plan
        self._record = LabRecord(folder)
        for part in ("log", "run", "p"):
            (folder / part).mkdir(parents=True, exist_ok=True, mode=0o700)
        names = (PROVIDER, *(tenant.name for tenant in plan.tenants))
        self.authorities = {name: _authority(folder / "pki" / name, name) for name in names}
        open_vendor(folder / "vendor", name="Simulated TPM vendor", now=now())

    def log(self, name: str) -> Path:
        """Log of a process."""
        return self.folder / "log" / f"{name}.log"

    def url(self, name: str) -> str:
        """Where a service of the lab answers, now and after each restart."""
        return f"https://{_ADDRESS}:{self._record.port(name)}"

    def host(self, name: str) -> config.HostSite:
        """Where the parts of a host are reached."""
        h = self.folder / "h" / name
        return config.HostSite(
            agent=self.url(f"{name}-agent"),
            guest_manager=h / "g",
            guests=h / "guests",
            hardware_control=h / "c",
            tpm_socket=h / "t",
            local_socket=h / "l",
            chip=next((host.chip for host in self.plan.hosts if host.name == name), ""),
        )

    @property
    def provider_verifier(self) -> str:
        """Where the tenants' host rounds go; a hostile provider sits in between."""
        return self.url("hostile-provider" if self.plan.hostile else "provider-verifier")

    def tls(self, authority: str, role: Role, name: str, *, trusts: tuple[str, ...]) -> config.TlsSettings:
        """Certificate of one party, issued once, and the authorities that it trusts."""
        folder, stem = self.folder / "pki" / authority, f"{role.value}-{name}"
        certificate, key = folder / f"{stem}.pem", folder / f"{stem}.key"
        if not (certificate.exists() and key.exists()):
            certificate, key = self.authorities[authority].issue(role, name).write(folder, stem)
        trusted = {other: self.folder / "pki" / other / "ca.pem" for other in trusts}
        return config.TlsSettings(certificate=certificate, key=key, authorities=trusted)

    # --- services -----------------------------------------------------------------------------------------

    def services(self) -> list[ServiceFile]:
        """Writes the settings of all services; in the order in which they are started."""
        hosts = [self._host_services(host) for host in self.plan.hosts]
        tenants = [service for tenant in self.plan.tenants for service in self._tenant_services(tenant)]
        hardware = [services[0] for services in hosts]
        others = [service for services in hosts for service in services[1:]]
        return [*hardware, *self._provider_services(), *tenants, *self._hostile(), *others]

    def _provider_services(self) -> list[ServiceFile]:
        p = self.folder / "p"
        database = f"sqlite+aiosqlite:///{p / 'provider.db'}"
        registrar = config.ProviderRegistrarSettings(
            listen=self._listen("provider-registrar"),
            tls=self.tls(PROVIDER, Role.PROVIDER_REGISTRAR, "registrar", trusts=(PROVIDER,)),
            database=database,
        )
        verifier = config.ProviderVerifierSettings(
            listen=self._listen("provider-verifier"),
            tls=self.tls(PROVIDER, Role.PROVIDER_VERIFIER, "verifier", trusts=(PROVIDER,)),
            database=database,
        )
        return [
            self._file("provider-registrar", "provider-registrar", p / "registrar.yml", registrar, p),
            self._file("provider-verifier", "provider-verifier", p / "verifier.yml", verifier, p),
        ]

    def _host_services(self, host: HostPlan) -> list[ServiceFile]:
        """Hardware TPM, host agent and guest manager of one host."""
        h, name = self.folder / "h" / host.name, host.name
        for part in (h / "agent", h / "guests"):
            part.mkdir(parents=True, exist_ok=True, mode=0o700)
        hardware = config.HardwareTpmSettings(
            state_dir=h,
            socket=h / "t",
            control=h / "c",
            chip=host.chip,
            scenario=host.scenario,
            vendor_ca=self.folder / "vendor",
        )
        agent = config.HostAgentSettings(
            listen=self._listen(f"{name}-agent"),
            tls=self.tls(PROVIDER, Role.HOST_AGENT, name, trusts=(PROVIDER,)),
            name=name,
            tcti=f"swtpm:path={h / 't'}",
            state_dir=h / "agent",
            database=f"sqlite+aiosqlite:///{h / 'agent' / 'host.db'}",
            local_socket=h / "l",
            guest_manager=h / "g",
            peer_uids=[os.getuid()],
            ak="ecc256" if host.ak == "ecc256" else "rsa2048",
            registrar=self.url("provider-registrar"),
            public_url=self.url(f"{name}-agent"),
        )
        tool, tool_config = self._certificate_tool(h)
        manager = config.GuestManagerSettings(
            state_dir=h / "guests",
            socket=h / "g",
            host_agent=h / "l",
            create_certs_tool=tool,
            create_certs_config=tool_config,
            logs=self.folder / "log",
        )
        return [
            self._file(f"{name}-tpm", "hardware-tpm", h / "hardware.yml", hardware, h),
            self._file(f"{name}-agent", "host-agent", h / "agent.yml", agent, h / "agent", powered=h / "c"),
            self._file(f"{name}-guests", "guest-manager", h / "manager.yml", manager, h / "guests", stop_s=30.0),
        ]

    def _tenant_services(self, tenant: TenantPlan) -> list[ServiceFile]:
        """Registrar and verifier of one tenant, and its reference values."""
        name = tenant.name
        t = self.folder / "t" / name
        t.mkdir(parents=True, exist_ok=True, mode=0o700)
        trusts = (name, PROVIDER)
        registrar = config.TenantRegistrarSettings(
            listen=self._listen(f"{name}-registrar"),
            tls=self.tls(name, Role.TENANT_REGISTRAR, name, trusts=trusts),
            tenant=name,
            database=f"sqlite+aiosqlite:///{t / 'registrar.db'}",
            vendor_roots=[self.folder / "vendor" / ROOT_CERTIFICATE],
        )
        verifier = config.TenantVerifierSettings(
            listen=self._listen(f"{name}-verifier"),
            tls=self.tls(name, Role.TENANT_VERIFIER, name, trusts=trusts),
            tenant=name,
            database=f"sqlite+aiosqlite:///{t / 'verifier.db'}",
            registrar=self.url(f"{name}-registrar"),
        )
        return [
            self._file(f"{name}-registrar", "tenant-registrar", t / "registrar.yml", registrar, t),
            self._file(f"{name}-verifier", "tenant-verifier", t / "verifier.yml", verifier, t),
        ]

    def _hostile(self) -> list[ServiceFile]:
        """The provider that lies, where the plan has one; it plays with the first host."""
        if self.plan.hostile is None:
            return []
        x, host = self.folder / "x", self.plan.hosts[0].name
        trusts = (PROVIDER, *(tenant.name for tenant in self.plan.tenants))
        settings = config.HostileProviderSettings.model_validate(
            {
                "tls": self.tls(PROVIDER, Role.PROVIDER_VERIFIER, "hostile", trusts=trusts),
                "mode": self.plan.hostile,
                "state_dir": x,
                "host_agent": self.url(f"{host}-agent"),
                "registrar": self.url("provider-registrar"),
                "operator": self.tls(PROVIDER, Role.PROVIDER_OPERATOR, "hostile", trusts=(PROVIDER,)),
                "hardware_control": self.folder / "h" / host / "c",
            }
        )
        return [self._file("hostile-provider", "hostile-provider", x / "hostile.yml", settings, x, listens=True)]

    # --- what commands read -------------------------------------------------------------------------------

    def site(self) -> config.SiteSettings:
        """Writes ``site.yml`` and returns it."""
        settings = config.SiteSettings(
            pki=self.folder / "pki",
            provider=config.ProviderSite(
                registrar=self.url("provider-registrar"),
                verifier=self.url("provider-verifier"),
                operator=self.tls(PROVIDER, Role.PROVIDER_OPERATOR, "operator", trusts=(PROVIDER,)),
            ),
            hosts={host.name: self.host(host.name) for host in self.plan.hosts},
            tenants={tenant.name: self._tenant_site(tenant) for tenant in self.plan.tenants},
        )
        config.dump(settings, self.folder / SITE_FILE)
        return settings

    def _tenant_site(self, tenant: TenantPlan) -> config.TenantSite:
        name = tenant.name
        t = self.folder / "t" / name
        policies = {"guest-policy.json": tenant.guest_policy, "host-policy.json": tenant.host_policy}
        for file, policy in policies.items():
            write_private(t / file, json.dumps(policy.encode()).encode())
        return config.TenantSite(
            registrar=self.url(f"{name}-registrar"),
            verifier=self.url(f"{name}-verifier"),
            provider_verifier=self.provider_verifier,
            operator=self.tls(name, Role.TENANT_OPERATOR, "operator", trusts=(name,)),
            guest_policy=t / "guest-policy.json",
            host_policy=t / "host-policy.json",
            client=self.tls(name, Role.TENANT_VERIFIER, "client", trusts=(PROVIDER,)),
            host=next((guest.host for guest in self.plan.guests if guest.tenant == name), self.plan.hosts[0].name),
            guests={guest.name: guest.agent_id for guest in self.plan.guests if guest.tenant == name},
        )

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

    @staticmethod
    def _certificate_tool(h: Path) -> tuple[Path, Path]:
        """A host's create_certs_tool and its configuration: `provider.localca` under this interpreter."""
        import harness.provider.localca as localca

        tool, tool_config = h / "localca", h / "localca.conf"
        tool.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S {localca.__file__} "$@"\n')
        tool.chmod(0o700)
        tool_config.write_text(f"socket = {h / 'l'}\n")
        return tool, tool_config

    def _listen(self, name: str) -> config.Listen:
        return config.Listen(host=_ADDRESS, port=self._record.port(name))

    def _file(
        self,
        name: str,
        service: str,
        path: Path,
        settings: config.Settings,
        state_dir: Path,
        *,
        powered: Path | None = None,
        stop_s: float = 6.0,
        listens: bool = False,
    ) -> ServiceFile:
        config.dump(settings, path)
        url = self.url(name) if listens or hasattr(settings, "listen") else None
        text = path.read_text(encoding="utf-8")
        return ServiceFile(
            name=name,
            service=service,
            config=path,
            text=text,
            state_dir=state_dir,
            url=url,
            powered=powered,
            stop_s=stop_s,
        )


def _authority(folder: Path, name: str) -> Authority:
    if (folder / "ca.pem").exists():
        return Authority.load(folder)
    made = Authority.create(f"{name} CA")
    made.write(folder)
    return made


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
        listen=config.Listen(host=_ADDRESS, port=LabRecord(site.pki.parent).port(f"agent-{guest.name}")),
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
