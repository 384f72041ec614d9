"""`harness serve` with settings that cannot be used: one sentence that names file and key, and code 2."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from harness.pki import Authority, Role

OF_PROVIDER = {"provider-verifier": Role.PROVIDER_VERIFIER, "provider-registrar": Role.PROVIDER_REGISTRAR}
OF_TENANT = {"tenant-registrar": Role.TENANT_REGISTRAR, "tenant-verifier": Role.TENANT_VERIFIER}
SERVICES = OF_PROVIDER | OF_TENANT


def settings_of(service: str, folder: Path, *, port: int) -> dict[str, object]:
    """Usable settings, but for what the test changes."""
    provider, tenant = Authority.create("provider"), Authority.create("alice")
    certificate, key = (provider if service in OF_PROVIDER else tenant).issue(SERVICES[service], "a").write(folder, "a")
    authorities = {
        name: str(authority.write(folder / name)) for name, authority in (("provider", provider), ("alice", tenant))
    }
    settings: dict[str, object] = {
        "listen": {"host": "127.0.0.1", "port": port},
        "tls": {"certificate": str(certificate), "key": str(key), "authorities": authorities},
        "database": f"sqlite+aiosqlite:///{folder / 'records.db'}",
    }
    if service in OF_TENANT:
        settings["tenant"] = "alice"
    if service == "tenant-verifier":
        settings["registrar"] = "https://127.0.0.1:1"
    if service == "tenant-registrar":
        settings["vendor_roots"] = [authorities["provider"]]
    return settings


def serve(service: str, folder: Path, settings: dict[str, object]) -> subprocess.CompletedProcess[str]:
    file = folder / "service.yml"
    file.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "harness", "serve", service, "--config", str(file)]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.parametrize("service", sorted(SERVICES))
def test_a_port_in_use_is_named_with_file_and_key(tmp_path: Path, service: str) -> None:
    """Another program listens there: the service ends at once."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = serve(service, tmp_path, settings_of(service, tmp_path, port=port))
    said = f"harness: {tmp_path / 'service.yml'}: listen.port: 127.0.0.1 port {port}: Address already in use"
    assert (ended.returncode, ended.stderr.splitlines()[-1]) == (2, said)


@pytest.mark.parametrize("service", sorted(SERVICES))
def test_a_missing_key_file_is_named(tmp_path: Path, service: str) -> None:
    """The private key is not there."""
    settings = settings_of(service, tmp_path, port=0)
    (tmp_path / "a.key").unlink()
    ended = serve(service, tmp_path, settings)
    assert (ended.returncode, "Traceback" in ended.stderr) == (2, False)
    assert f"{tmp_path / 'a.key'}: cannot be read" in ended.stderr
