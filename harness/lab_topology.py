"""``lab.yml``: what a lab consists of, as a person writes it down.

::

    hosts:
      host1: {}
    tenants:
      alice:
        guests:
          alice-vm1: {}

Everything else has a default; the example of `EXAMPLE` shows each key. The same file describes the embedded lab and the
one of virtual machines.

Invariants:
    1. What a lab cannot be is refused with file and key, before anything is started.
    2. Names are unique where people type them: hosts, tenants, and guests over all tenants.

Spec: DESIGN 6.
"""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, Strict, ValidationInfo, model_validator

from harness import config
from harness.config import FilePath, Settings, Whole
from harness.errors import ConfigError, MalformedMessage
from harness.lab_names import FOLDER, SITE_FILE, TOPOLOGY_FILE
from harness.sim.boot import Scenario, reference_values
from harness.sim.profiles import load_profile
from harness.tenant.policy import Policy, parse_policy
from harness.values import HashAlg, PcrSelection, mask_of

DEFAULT_CHIP = "ifx-slb9670"
BANK = HashAlg.SHA256
MOST_TENANTS, MOST_GUESTS, MOST_HOSTS = 64, 256, 16

EXAMPLE = """\
# A lab: hosts, tenants and their guests. `harness lab up` starts it, `harness lab down` ends it.
# Only the names are needed; what is commented out shows the defaults.

# folder: .lab              # where its state lives, beside this file
hosts:
  host1:
    # chip: ifx-slb9670     # latency of its hardware TPM; `harness demo --chip swtpm` shows one without delay
    # scenario: good        # what it boots: a name, or a file
    # ak: rsa2048           # or ecc256
tenants:
  alice:
    # allowlist: {sha256: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]}  # PCRs of hosts it may see
    # allow_reboots: true   # report a reset of a host or guest instead of refusing it
    # quote_interval_s: 5   # seconds between two rounds
    # provider_quote_interval: 1   # a host quote in every Nth round
    # host_policy: good            # reference values: a scenario, or a file {bank: {pcr: [hex, ...]}}
    # guest_policy: guest-good
    # payload: secret.txt          # released to each guest when both layers were accepted
    guests:
      alice-vm1:
        # host: host1       # may be left out when there is one host
        # scenario: guest-good
      alice-vm2: {}
  bob:
    guests:
      bob-vm1: {}
"""


def _beside_the_file(stated: str, info: ValidationInfo) -> str:
    folder = (info.context or {}).get("folder")
    is_file = "/" in stated or Path(stated).suffix in {".yml", ".yaml", ".json"}
    return str(folder / stated) if folder is not None and is_file else stated


NameOrFile = Annotated[str, AfterValidator(_beside_the_file)]
"""Something that the package brings, by name, or a file of one's own beside ``lab.yml``."""


def _mapping(value: Any) -> Any:
    return {} if value is None else value  # a key with nothing but comments below it


class HostTopology(Settings):
    """A host: the chip of its hardware TPM, what it boots, the kind of its AK."""

    chip: NameOrFile = DEFAULT_CHIP
    scenario: NameOrFile = "good"
    ak: Literal["rsa2048", "ecc256"] = "rsa2048"


Bank = Literal["sha256", "sha384", "sha512"]


def _all_boot_pcrs() -> dict[Bank, list[int]]:
    return {"sha256": list(range(16))}


class GuestTopology(Settings):
    """A guest: where it runs, what it boots, its UUID (a new one when left out)."""

    host: config.Name | None = None
    scenario: NameOrFile = "guest-good"
    agent_id: uuid.UUID | None = None


class TenantTopology(Settings):
    """A tenant: what it may see of hosts, how it attests, and its guests."""

    allowlist: dict[Bank, list[Annotated[Whole, Field(ge=0, le=23)]]] = Field(default_factory=_all_boot_pcrs)
    allow_reboots: Annotated[bool, Strict()] = True
    quote_interval_s: Annotated[float, Field(gt=0, le=86_400)] = 5.0
    provider_quote_interval: Annotated[Whole, Field(ge=1, le=1_000)] = 1
    host_policy: NameOrFile = "good"
    guest_policy: NameOrFile = "guest-good"
    payload: FilePath | None = None
    guests: dict[config.Name, GuestTopology] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _empty_guests(cls, data: Any) -> Any:
        return _with_defaults(data, "guests")


def _short_enough(hosts: dict[str, HostTopology]) -> dict[str, HostTopology]:
    for name in hosts:
        if len(name) > 32:  # part of the path of its guests' sockets
            raise ValueError(f"{name}: a host's name has at most 32 characters")
    return hosts


class Topology(Settings):
    """A whole lab."""

    folder: FilePath | None = None
    hosts: Annotated[
        dict[config.Name, HostTopology], Field(min_length=1, max_length=MOST_HOSTS), AfterValidator(_short_enough)
    ]
    tenants: Annotated[dict[config.Name, TenantTopology], Field(default_factory=dict, max_length=MOST_TENANTS)]

    def folder_beside(self, path: Path) -> Path:
        """Folder of the lab, when this is what the file says."""
        return self.folder or path.parent / FOLDER

    @model_validator(mode="before")
    @classmethod
    def _empty_parts(cls, data: Any) -> Any:
        for part in ("hosts", "tenants"):
            data = _with_defaults(data, part)
        return data

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        seen: dict[str, str] = {}
        for tenant, of in self.tenants.items():
            if tenant == "provider":
                raise ValueError("tenants.provider: this name is the provider's own")
            for name, guest in of.guests.items():
                if name in seen:
                    raise ValueError(f"tenants.{tenant}.guests.{name}: tenant {seen[name]} has a guest of this name")
                seen[name] = tenant
                if guest.host is None and len(self.hosts) > 1:
                    raise ValueError(f"tenants.{tenant}.guests.{name}: host must be one of {', '.join(self.hosts)}")
                if guest.host is not None and guest.host not in self.hosts:
                    raise ValueError(f"tenants.{tenant}.guests.{name}.host: {guest.host} is not among the hosts")
        if len(seen) > MOST_GUESTS:
            raise ValueError(f"a lab has at most {MOST_GUESTS} guests")
        given = [guest.agent_id for of in self.tenants.values() for guest in of.guests.values() if guest.agent_id]
        if len(given) != len(set(given)):
            raise ValueError("two guests have the same agent_id")
        return self


def _with_defaults(data: Any, part: str) -> Any:
    """``name:`` with nothing behind it is an entry with defaults."""
    if not isinstance(data, dict) or not isinstance(_mapping(data.get(part)), dict):
        return data
    return {**data, part: {name: _mapping(entry) for name, entry in _mapping(data.get(part)).items()}}


def load_topology(path: Path) -> Topology:
    """A lab from its file.

    Raises:
        ConfigError: the file cannot be used; file and key are named, also of a chip, a scenario, a policy or a payload
            that it refers to.
    """
    topology = config.load(path, Topology)
    for name, host in topology.hosts.items():
        with _key(path, f"hosts.{name}.chip"):
            load_profile(host.chip)
        with _key(path, f"hosts.{name}.scenario"):
            Scenario.load(host.scenario)
    for name, tenant in topology.tenants.items():
        for part in ("host_policy", "guest_policy"):
            with _key(path, f"tenants.{name}.{part}"):
                policy_of(getattr(tenant, part))
        with _key(path, f"tenants.{name}.payload"):
            payload_of(tenant)
        for guest, of in tenant.guests.items():
            with _key(path, f"tenants.{name}.guests.{guest}.scenario"):
                Scenario.load(of.scenario)
    return topology


class _key:  # noqa: N801 - used as a function
    """Puts file and key in front of an error's sentence."""

    def __init__(self, path: Path, key: str) -> None:
        self._where = f"{path}: {key}"

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, ConfigError):
            raise ConfigError(f"{self._where}: {error.detail}") from None


def policy_of(stated: str) -> Policy:
    """Reference values: those of a boot scenario, or of a file ``{bank: {pcr: [hex, ...]}}`` (``.json``).

    Raises:
        ConfigError: it is neither.
    """
    path = Path(stated)
    if path.suffix != ".json":
        return Policy.of(BANK, reference_values(Scenario.load(stated), BANK))
    try:
        return parse_policy(config.read_yaml(path))
    except MalformedMessage as error:
        raise ConfigError(error.detail) from None


def payload_of(tenant: TenantTopology) -> bytes | None:
    """The secret for a tenant's guests; None when there is none. Raises ConfigError when it cannot be read."""
    if tenant.payload is None:
        return None
    try:
        return tenant.payload.read_bytes()
    except OSError as error:
        raise ConfigError(f"{tenant.payload}: cannot be read: {error.strerror}") from error


def allowlist_of(tenant: TenantTopology) -> PcrSelection:
    """What a tenant may see of hosts."""
    banks = [PcrSelection.of(HashAlg.parse(bank), mask_of(pcrs)) for bank, pcrs in tenant.allowlist.items() if pcrs]
    return PcrSelection(banks=tuple(part for one in banks for part in one.banks))


def folder_of(stated: Path) -> Path:
    """Folder of a lab: the one that is stated, or that of the lab.yml that is stated.

    Raises:
        ConfigError: a lab.yml that cannot be used.
    """
    path = stated.absolute()
    if path.is_dir() and not (path / SITE_FILE).exists() and (path / TOPOLOGY_FILE).is_file():
        path = path / TOPOLOGY_FILE
    if not path.is_file():
        return path
    return config.load(path, Topology).folder_beside(path)
