"""Settings from YAML: what is wrong is named with file and key; nothing is guessed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from harness import config
from harness.errors import ConfigError

TLS = {"certificate": "v.pem", "key": "v.key", "authorities": {"provider": "ca.pem"}}
VERIFIER: dict[str, Any] = {
    "listen": {"host": "127.0.0.1", "port": 8881},
    "tls": TLS,
    "tenant": "alice",
    "database": "sqlite+aiosqlite:///state/verifier.db",
    "registrar": "https://127.0.0.1:8891",
}
AGENT: dict[str, Any] = {
    "tls": TLS,
    "name": "host-1",
    "tcti": "swtpm:path=tpm.sock",
    "state_dir": "state",
    "database": "sqlite+aiosqlite:////var/lib/agent.db",
    "local_socket": "agent.sock",
    "guest_manager": "/run/guests.sock",
    "peer_uids": [0],
}


def written(folder: Path, data: object) -> Path:
    path = folder / "service.yml"
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data), encoding="utf-8")
    return path


def changed(data: dict[str, Any], key: str, value: object) -> dict[str, Any]:
    """A copy with one dotted key set, or removed where the value is `...`."""
    first, _, rest = key.partition(".")
    copy = dict(data)
    if rest:
        copy[first] = changed(copy.get(first, {}), rest, value)
    elif value is ...:
        del copy[first]
    else:
        copy[first] = value
    return copy


def test_relative_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    """Paths, and the file in a SQLite URL, do not depend on the folder that a service is started in."""
    settings = config.load(written(tmp_path, VERIFIER), config.TenantVerifierSettings)
    assert settings.tls.certificate == tmp_path / "v.pem"
    assert settings.tls.authorities == {"provider": tmp_path / "ca.pem"}
    assert settings.database == f"sqlite+aiosqlite:///{tmp_path}/state/verifier.db"


def test_absolute_paths_stay(tmp_path: Path) -> None:
    """An absolute path, and the absolute path in a URL, are taken as they are."""
    settings = config.load(written(tmp_path, AGENT), config.HostAgentSettings)
    assert settings.guest_manager == Path("/run/guests.sock")
    assert settings.database == AGENT["database"]


@pytest.mark.parametrize("url", ["sqlite+aiosqlite:///:memory:", "postgresql+asyncpg://u:p@db/x"])
def test_databases_without_a_file_stay(tmp_path: Path, url: str) -> None:
    """Only the path of a SQLite file is resolved."""
    path = written(tmp_path, changed(VERIFIER, "database", url))
    assert config.load(path, config.TenantVerifierSettings).database == url


def test_defaults(tmp_path: Path) -> None:
    """What a file leaves out has the defaults of the design."""
    settings = config.load(written(tmp_path, AGENT), config.HostAgentSettings)
    assert settings.listen == config.Listen()
    assert settings.batch == config.BatchSettings(
        pool_size=65_536,
        max_pools=8,
        tenant_share=1_024,
        linger_s=0.0,
        tree="rfc9162",
        strategy="batched",
        window_s=10.0,
    )
    assert (settings.ak, settings.registrar, settings.public_url) == ("rsa2048", None, None)


def test_settings_are_frozen(tmp_path: Path) -> None:
    """Nobody changes settings after they were read."""
    settings = config.load(written(tmp_path, VERIFIER), config.TenantVerifierSettings)
    with pytest.raises(ValidationError):
        settings.__setattr__("tenant", "mallory")


def test_dump_and_load(tmp_path: Path) -> None:
    """What `dump` writes, `load` reads back; the file is its owner's only."""
    settings = config.load(written(tmp_path, AGENT), config.HostAgentSettings)
    path = tmp_path / "elsewhere" / "again.yml"
    config.dump(settings, path)
    assert config.load(path, config.HostAgentSettings).model_dump() == settings.model_dump()
    assert path.stat().st_mode & 0o777 == 0o600


BAD: list[tuple[str, object, str]] = [
    ("tls", ..., "tls: is missing"),
    ("tls.key", ..., "tls.key: is missing"),
    ("tls.verify", False, "tls.verify: unknown key"),
    ("zeal", 1, "zeal: unknown key"),
    ("listen.port", "8881", "listen.port: "),
    ("listen.port", True, "listen.port: "),
    ("listen.port", 65536, "listen.port: "),
    ("listen.port", -1, "listen.port: "),
    ("listen.host", "", "listen.host: "),
    ("listen", 8881, "listen: "),
    ("name", "Host_1", "name: "),
    ("name", 7, "name: "),
    ("tls.authorities", [], "tls.authorities: "),
    ("tls.authorities.Bad Name", "x.pem", "tls.authorities.Bad Name: "),
    ("tls.authorities.provider", 5, "tls.authorities.provider: "),
    ("peer_uids", 0, "peer_uids: "),
    ("peer_uids", [0, "root"], "peer_uids.1: "),
    ("peer_uids", [-1], "peer_uids.0: "),
    ("ak", "rsa1024", "ak: "),
    ("registrar", "http://127.0.0.1:1", "registrar: "),
    ("registrar", "127.0.0.1:1", "registrar: "),
    ("database", "state.db", "database: "),
    ("batch.pool_size", 0, "batch.pool_size: "),
    ("batch.pool_size", 1.5, "batch.pool_size: "),
    ("batch.max_pools", True, "batch.max_pools: "),
    ("batch.linger_s", -0.1, "batch.linger_s: "),
    ("batch.linger_s", "1", "batch.linger_s: "),
    ("batch.tree", "merkletools", "batch.tree: "),
]


@pytest.mark.parametrize(("key", "value", "sentence"), BAD)
def test_one_bad_value_is_named(tmp_path: Path, key: str, value: object, sentence: str) -> None:
    """A wrong type, a wrong value, an unknown or a missing key: one line with file, key and reason."""
    config.load(written(tmp_path, AGENT), config.HostAgentSettings)
    path = written(tmp_path, changed(AGENT, key, value))
    with pytest.raises(ConfigError) as refused:
        config.load(path, config.HostAgentSettings)
    line = refused.value.detail
    assert "\n" not in line
    assert line.startswith(f"{path}: {sentence}")
    assert len(line) > len(f"{path}: {sentence}") or not sentence.endswith(": ")


def test_every_problem_has_its_line(tmp_path: Path) -> None:
    """Two problems are two lines: nobody mends a file one start at a time."""
    path = written(tmp_path, changed(changed(AGENT, "zeal", 1), "name", ...))
    with pytest.raises(ConfigError) as refused:
        config.load(path, config.HostAgentSettings)
    assert sorted(refused.value.detail.splitlines()) == [f"{path}: name: is missing", f"{path}: zeal: unknown key"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "must hold keys and values"),
        ("- a\n- b\n", "must hold keys and values"),
        ("a: [1\n", "line 2: "),
        ("a: 1\nb: 2\na: 3\n", "line 1: key 'a' is repeated"),
        ("a: {b: 1, b: 2}\n", "line 1: key 'b' is repeated"),
        ("a: !!python/object/apply:os.system ['true']\n", "line 1: "),
        ("a: \x00\n", "is not YAML"),
        ("? [1, 2]\n: 3\n", "line 1: "),
        ("[" * 5000, ""),
    ],
)
def test_what_is_no_yaml_of_ours(tmp_path: Path, text: str, sentence: str) -> None:
    """Broken YAML, a repeated key, a tag that would run code: refused with the file, and the line where known."""
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as refused:
        config.load(path, config.HostAgentSettings)
    assert refused.value.detail.startswith(f"{path}: {sentence}")


def test_missing_file(tmp_path: Path) -> None:
    """A missing file is named."""
    path = tmp_path / "none.yml"
    with pytest.raises(ConfigError, match=r"none\.yml: cannot be read: No such file"):
        config.load(path, config.HostAgentSettings)


def test_not_utf8(tmp_path: Path) -> None:
    """Bytes that are not UTF-8 are refused, not guessed at."""
    path = tmp_path / "latin.yml"
    path.write_bytes(b"name: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"latin\.yml: is not UTF-8"):
        config.read_yaml(path)


def test_a_port_in_use_is_named_with_its_file(tmp_path: Path) -> None:
    """`Listen` remembers where it was read, for the error that only shows when the service starts."""
    path = written(tmp_path, VERIFIER)
    listen = config.load(path, config.TenantVerifierSettings).listen
    assert listen.refused("in use").detail == f"{path}: listen.port: 127.0.0.1 port 8881: in use"
    assert config.Listen(port=7).refused("in use").detail == "listen.port: 127.0.0.1 port 7: in use"


def settings_classes() -> list[type[config.Settings]]:
    made = [value for value in vars(config).values() if isinstance(value, type) and issubclass(value, config.Settings)]
    assert len(made) > 10
    return made


@pytest.mark.parametrize("model", settings_classes(), ids=lambda model: model.__name__)
def test_every_settings_class_is_strict(model: type[config.Settings]) -> None:
    """Each class is frozen and refuses unknown keys, and none has a field that could turn a check off."""
    assert model.model_config["frozen"]
    assert model.model_config["extra"] == "forbid"
    assert not any(word in name for name in model.model_fields for word in ("verify", "insecure", "skip", "disable"))


SITE: dict[str, Any] = {
    "pki": "pki",
    "provider": {"registrar": "https://127.0.0.1:1", "verifier": "https://127.0.0.1:2", "operator": TLS},
    "hosts": {
        "host-1": {
            "agent": "https://127.0.0.1:3",
            "guest_manager": "host-1/guests.sock",
            "guests": "host-1/guests",
            "hardware_control": "host-1/control.sock",
            "tpm_socket": "host-1/tpm.sock",
        }
    },
    "tenants": {
        "alice": {
            "registrar": "https://127.0.0.1:4",
            "verifier": "https://127.0.0.1:5",
            "provider_verifier": "https://127.0.0.1:2",
            "operator": TLS,
            "guest_policy": "alice/guest.yml",
            "host_policy": "alice/host.yml",
        }
    },
}


def test_site(tmp_path: Path) -> None:
    """A lab's ``site.yml`` names provider, hosts and tenants."""
    site = config.load(written(tmp_path, SITE), config.SiteSettings)
    assert site.hosts["host-1"].guest_manager == tmp_path / "host-1" / "guests.sock"
    assert site.hosts["host-1"].guests == tmp_path / "host-1" / "guests"
    assert site.tenants["alice"].operator.key == tmp_path / "v.key"


def test_a_problem_deep_in_a_site_is_named(tmp_path: Path) -> None:
    """The key of a problem is its whole path."""
    path = written(tmp_path, changed(SITE, "tenants.alice.verifier", "http://x"))
    with pytest.raises(ConfigError) as refused:
        config.load(path, config.SiteSettings)
    assert refused.value.detail.startswith(f"{path}: tenants.alice.verifier: ")
