"""Settings: one frozen class per service, read from a YAML file.

Invariants:
    1. An unknown key, a wrong type or a missing file is refused with the file and the key; nothing is guessed.
    2. Relative paths are relative to the file that names them.
    3. No setting turns a check off.

Spec: DESIGN 7 (mTLS everywhere, nothing hard-coded).
"""

from __future__ import annotations

import re
import uuid
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr, Strict, ValidationError, ValidationInfo

from harness.errors import ConfigError
from harness.log_file import KEEP, MAX_BYTES
from harness.private_file import write_private

_SQLITE_FILE = re.compile(r"(sqlite(?:\+[a-z]+)?:///)(?!/|:memory:|file:)(.+)")

M = TypeVar("M", bound=BaseModel)


def _beside_the_file(path: Path, info: ValidationInfo) -> Path:
    folder = (info.context or {}).get("folder")
    return path if folder is None or path.is_absolute() else folder / path


def _database_beside_the_file(url: str, info: ValidationInfo) -> str:
    found = _SQLITE_FILE.fullmatch(url)
    return url if found is None else f"{found[1]}{_beside_the_file(Path(found[2]), info)}"


FilePath = Annotated[Path, AfterValidator(_beside_the_file)]
DatabaseUrl = Annotated[str, Field(pattern=r"^[a-z0-9+]+://"), AfterValidator(_database_beside_the_file)]
Whole = Annotated[int, Strict()]
Port = Annotated[int, Strict(), Field(ge=0, le=65535)]
Url = Annotated[str, Field(pattern=r"^https://[^/\s]+(/.*)?$")]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]


class Settings(BaseModel):
    """Base of all settings: immutable, and nothing unknown."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class LogSettings(Settings):
    """Where a service writes its events, and how large that file gets; without ``file``: standard error."""

    file: FilePath | None = None
    max_bytes: Annotated[Whole, Field(ge=4096)] = MAX_BYTES
    keep: Annotated[Whole, Field(ge=1, le=1000)] = KEEP


class ServiceSettings(Settings):
    """What the settings of every service have in common."""

    log: LogSettings = LogSettings()


class Listen(Settings):
    """Where a service listens; port 0 takes a free one."""

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    port: Port = 0
    _origin: str = PrivateAttr(default="")

    def model_post_init(self, context: Any, /) -> None:
        """Notes the file, so that a port in use is reported with it."""
        self._origin = f"{context['file']}: " if context else ""

    def refused(self, reason: str) -> ConfigError:
        """Error for an address that cannot be listened on, with the file and the key that name it."""
        return ConfigError(f"{self._origin}listen.port: {self.host} port {self.port}: {reason}")


class TlsSettings(Settings):
    """A service's certificate and key, and the authorities whose certificates it accepts, by name."""

    certificate: FilePath
    key: FilePath
    authorities: dict[Name, FilePath]


class BatchSettings(Settings):
    """Bounds of the batcher (DESIGN 4): waiters in all pools, pools, waiters per tenant, and an optional linger.

    ``strategy`` says who shares a quote: ``batched`` (all who wait when the TPM is free), and for comparison ``single``
    (nobody) and ``window`` (all who come while it sleeps ``window_s``).
    """

    pool_size: Annotated[Whole, Field(ge=1, le=1 << 19)] = 65_536
    max_pools: Annotated[Whole, Field(ge=1, le=64)] = 8
    tenant_share: Annotated[Whole, Field(ge=1)] = 1_024
    linger_s: Annotated[float, Strict(), Field(ge=0, le=60)] = 0.0
    tree: Literal["rfc9162", "merklelib"] = "rfc9162"
    strategy: Literal["batched", "single", "window"] = "batched"
    window_s: Annotated[float, Strict(), Field(gt=0, le=60)] = 10.0


class HostAgentSettings(ServiceSettings):
    """Host agent: ``tcti`` of the hardware TPM, sockets on the host, and who may use the local one (user ids)."""

    listen: Listen = Listen()
    tls: TlsSettings
    name: Name
    tcti: str
    state_dir: FilePath
    database: DatabaseUrl
    local_socket: FilePath
    guest_manager: FilePath
    peer_uids: list[Annotated[Whole, Field(ge=0)]]
    ak: Literal["rsa2048", "ecc256"] = "rsa2048"
    batch: BatchSettings = BatchSettings()
    registrar: Url | None = None
    public_url: Url | None = None


class ProviderVerifierSettings(ServiceSettings):
    """Provider verifier; its database is the provider registrar's.

    ``connections`` are those that all tenants may have open together, ``tenant_connections`` those of one of them.
    """

    listen: Listen = Listen()
    tls: TlsSettings
    database: DatabaseUrl
    connections: Annotated[Whole, Field(ge=1, le=65_536)] = 4_096
    tenant_connections: Annotated[Whole, Field(ge=1, le=65_536)] = 1_024


class ProviderRegistrarSettings(ServiceSettings):
    """Provider registrar."""

    listen: Listen = Listen()
    tls: TlsSettings
    database: DatabaseUrl


class NotifySettings(Settings):
    """Somebody who is told of alarms: where, in which form, and the authority of an https receiver.

    Without ``authority`` the system's authorities vouch for it.
    """

    url: Annotated[str, Field(pattern=r"^https?://[^/\s]+(/\S*)?$", max_length=2048)]
    format: Literal["native", "keylime"] = "native"
    authority: FilePath | None = None


class TenantRegistrarSettings(ServiceSettings):
    """Tenant registrar: ``vendor_roots`` are the TPM vendors' root certificates that the tenant pins.

    ``notify`` and ``revocation_key`` are for its alarms, as those of the verifier are for the verifier's.
    """

    listen: Listen = Listen()
    tls: TlsSettings
    tenant: Name
    database: DatabaseUrl
    vendor_roots: Annotated[list[FilePath], Field(min_length=1)]
    notify: Annotated[list[NotifySettings], Field(max_length=16)] = []
    revocation_key: FilePath | None = None


class TenantVerifierSettings(ServiceSettings):
    """Tenant verifier; it fetches pinned keys from ``registrar``.

    ``transport_patience_s`` is how long a peer may be away before a session fails. ``revocation_key`` signs Keylime's
    notifications; made where it is missing, beside a SQLite database unless named.
    """

    listen: Listen = Listen()
    tls: TlsSettings
    tenant: Name
    database: DatabaseUrl
    registrar: Url
    transport_patience_s: Annotated[float, Field(gt=0, le=604_800)] = 600.0
    notify: Annotated[list[NotifySettings], Field(max_length=16)] = []
    revocation_key: FilePath | None = None


class GuestAgentSettings(ServiceSettings):
    """Guest agent: whose it is, its vTPM, and the registrars (tenant's and provider's) where it registers.

    Every ``register_again_s`` seconds at most it looks whether they still know it.
    """

    listen: Listen = Listen()
    tls: TlsSettings
    tenant: Name
    agent_id: uuid.UUID
    tcti: str
    state_dir: FilePath
    registrars: Annotated[list[Url], Field(min_length=1)]
    public_host: str = "127.0.0.1"
    payload_dir: FilePath
    register_again_s: Annotated[float, Strict(), Field(ge=0.1, le=86_400)] = 30.0


class HardwareTpmSettings(ServiceSettings):
    """Simulated hardware TPM (`harness.sim.hardware`)."""

    state_dir: FilePath
    socket: FilePath
    control: FilePath
    chip: str
    scenario: str = "good"
    seed: Whole = 0
    vendor_ca: FilePath


class GuestManagerSettings(ServiceSettings):
    """Guest manager of the lab: its socket, the host agent's local socket, and the tool that certifies its vTPMs.

    ``logs`` is the folder for the guest agents' output.
    """

    state_dir: FilePath
    socket: FilePath
    host_agent: FilePath
    create_certs_tool: FilePath
    create_certs_config: FilePath
    logs: FilePath


class HostileProviderSettings(ServiceSettings):
    """A provider that lies (`harness.attacks`): how, and what a provider has: hosts, records and power switches."""

    tls: TlsSettings
    operator: TlsSettings
    registrar: Url
    mode: Literal["wrong-ak", "replay", "strip", "reboot"]
    state_dir: FilePath
    host_agent: Url
    hardware_control: FilePath


class HostSite(Settings):
    """A host of a lab: where its agent (also its local socket), guest manager and hardware TPM are reached."""

    agent: Url
    guest_manager: FilePath
    guests: FilePath
    hardware_control: FilePath
    tpm_socket: FilePath
    local_socket: FilePath | None = None
    chip: str = ""


class ProviderSite(Settings):
    """The provider's services and its operator's certificate."""

    registrar: Url
    verifier: Url
    operator: TlsSettings


class TenantSite(Settings):
    """A tenant's services, its operator's certificate, where its rounds go, its reference values, and its guests.

    ``client`` is a certificate for asking the provider verifier oneself; ``host`` is where the first guest runs.
    """

    registrar: Url
    verifier: Url
    provider_verifier: Url
    operator: TlsSettings
    guest_policy: FilePath
    host_policy: FilePath
    client: TlsSettings | None = None
    host: Name | None = None
    guests: dict[Name, uuid.UUID] = Field(default_factory=dict)


class SiteSettings(Settings):
    """A running lab as the command line reaches it: ``site.yml`` in the lab's folder.

    ``pki`` holds the authorities of all parties: a lab plays every part.
    """

    pki: FilePath
    provider: ProviderSite
    hosts: dict[Name, HostSite]
    tenants: dict[Name, TenantSite]


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML without repeated keys: the last one would silently win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for place, key in enumerate(keys):
            if key in keys[:place]:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is repeated", node.start_mark)
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: Path) -> object:
    """YAML file as plain data.

    Raises:
        ConfigError: the file cannot be read or is not YAML; names the file and the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
        return yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506 - a SafeLoader
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8") from error
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}:" if error.problem_mark else ""
        raise ConfigError(f"{path}:{line} {error.problem}") from error
    except (yaml.YAMLError, RecursionError, TypeError) as error:
        raise ConfigError(f"{path}: is not YAML") from error


def load(path: Path, model: type[M]) -> M:
    """Settings from a YAML file.

    Args:
        path: the file; relative paths in it are relative to its folder.
        model: a class of this module.

    Raises:
        ConfigError: missing file, not YAML, unknown or missing key, wrong type: one line each, with file and key.
    """
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: must hold keys and values")
    try:
        return model.model_validate(data, context={"file": path, "folder": path.resolve().parent})
    except ValidationError as error:
        raise ConfigError("\n".join(_sentence(path, problem) for problem in error.errors())) from None


def _sentence(path: Path, problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"] if part != "[key]")
    text = {"extra_forbidden": "unknown key", "missing": "is missing"}.get(problem["type"], problem["msg"])
    text = text.removeprefix("Value error, ")
    return f"{path}: {key}: {text}" if key else f"{path}: {text}"


def dump(settings: BaseModel, path: Path) -> None:
    """Writes settings to a YAML file that `load` reads back; whole, mode 0600."""
    data = settings.model_dump(mode="json", exclude_none=True)
    write_private(path, yaml.safe_dump(data, sort_keys=False).encode())
