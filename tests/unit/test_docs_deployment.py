"""docs/deployment.md and the units of `deploy`: settings load, and each service has its unit, user and folder."""

from __future__ import annotations

import configparser
import re
from pathlib import Path
from typing import Any

import pytest

from harness import config
from harness.errors import ConfigError
from harness.serve import SERVICES
from tests.support import docs

PAGE = docs.ROOT / "docs" / "deployment.md"
UNITS = docs.ROOT / "deploy" / "systemd"
SYSUSERS = docs.ROOT / "deploy" / "sysusers.d" / "harness.conf"
BLOCKS = [block for block in docs.blocks_of(PAGE) if block.settings]
WITH_TPM = {"host-agent", "guest-agent"}


def loaded(block: docs.Block, folder: Path) -> Any:
    """The block as a settings file."""
    path = folder / "settings.yml"
    path.write_text(block.body, encoding="utf-8")
    return config.load(path, getattr(config, str(block.settings)))


def unit(service: str) -> configparser.SectionProxy:
    """``[Service]`` of a service's unit; of a repeated key the last line."""
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(UNITS / f"harness-{service}.service", encoding="utf-8")
    return parser["Service"]


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_each_example_of_settings_loads(block: docs.Block, tmp_path: Path) -> None:
    """Whoever copies it gets no unknown key and no wrong type."""
    loaded(block, tmp_path)


def test_an_example_that_does_not_load_is_found(tmp_path: Path) -> None:
    """A key that the settings do not have."""
    with pytest.raises(ConfigError, match="unknown key"):
        loaded(docs.Block("p", 1, "yaml", ("settings=LogSettings",), "files: x\n"), tmp_path)


def test_each_service_has_an_example_and_a_unit() -> None:
    """And nothing has a unit that is no service."""
    assert {entry.settings for entry in SERVICES.values()} <= {block.settings for block in BLOCKS}
    assert {path.name for path in UNITS.iterdir()} == {f"harness-{service}.service" for service in SERVICES}


@pytest.mark.parametrize("service", SERVICES)
def test_a_unit_runs_its_service_as_a_user_of_its_own(service: str) -> None:
    """With the settings that the page names; restarted after a fault, given time to stop, and without privileges."""
    section = unit(service)
    assert section["ExecStart"].endswith(f"/harness serve {service} --config /etc/harness/{service}.yml")
    assert re.search(rf"^u {section['User']} ", SYSUSERS.read_text(encoding="utf-8"), re.MULTILINE)
    assert section["User"] == section["Group"] != "root"
    assert f"`{section['User']}`" in PAGE.read_text(encoding="utf-8")
    assert (section["Restart"], section["TimeoutStopSec"]) == ("on-failure", "10")
    assert (section["ProtectSystem"], section["NoNewPrivileges"]) == ("strict", "yes")


@pytest.mark.parametrize("service", SERVICES)
def test_devices_are_for_the_services_with_a_tpm(service: str) -> None:
    """The others see none."""
    section = unit(service)
    if service in WITH_TPM:
        assert (section["DevicePolicy"], section["DeviceAllow"]) == ("closed", "/dev/tpmrm0 rw")
    else:
        assert (section["PrivateDevices"], section["CapabilityBoundingSet"]) == ("yes", "")
        assert "DeviceAllow" not in section


@pytest.mark.parametrize("service", SERVICES)
def test_what_a_service_writes_is_in_its_state_folder(service: str, tmp_path: Path) -> None:
    """Certificate (it is renewed in place), databases, keys and payload: the rest of the system is read-only for it."""
    [block] = [block for block in BLOCKS if block.settings == SERVICES[service].settings]
    settings = loaded(block, tmp_path)
    state = f"/var/lib/{unit(service)['StateDirectory']}/"
    written = [settings.tls.certificate, settings.tls.key]
    written += [getattr(settings, name) for name in ("revocation_key", "payload_dir") if hasattr(settings, name)]
    assert [str(path) for path in written if path is not None and not str(path).startswith(state)] == []
    database = getattr(settings, "database", f"sqlite+aiosqlite:///{state}")
    assert not database.startswith("sqlite") or f"///{state}" in database
