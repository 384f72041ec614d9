"""docs/deployment.md: certificates made as it says serve as they should; systemd accepts the units of `deploy`."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from harness import pki
from harness.config import TlsSettings
from harness.own_certificate import OwnCertificate
from harness.tls import role_and_name
from tests.support import docs
from tests.support.tours import BIN, run_blocks

PAGE = docs.ROOT / "docs" / "deployment.md"
UNITS = sorted((docs.ROOT / "deploy" / "systemd").glob("*.service"))
NEWER = ("RestartSteps", "RestartMaxDelaySec")
"""Keys that systemd knows from version 254 on, and ignores before."""


def own(folder: Path, authority: Path) -> OwnCertificate:
    """The verifier's certificate as its service loads it."""
    files = TlsSettings(
        certificate=folder / "service.pem", key=folder / "service.key", authorities={"alice": authority}
    )
    return OwnCertificate(files)


def test_certificates_of_the_projects_own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first example issues them, the second one renews one on its key: the service takes it into use."""
    issue, renewal = [block.body for block in docs.blocks_of(PAGE) if block.language == "python"]
    monkeypatch.chdir(tmp_path)
    exec(compile(issue, str(PAGE), "exec"), {})  # noqa: S102 - this project's documentation
    certificate = own(tmp_path / "verifier", tmp_path / "alice" / "ca.pem")
    assert certificate.name == "tenant-verifier/alice"
    first = certificate.certificate
    exec(compile(renewal, str(PAGE), "exec"), {})  # noqa: S102
    certificate.refresh()
    assert certificate.certificate != first
    assert certificate.certificate.public_key() == first.public_key()
    operator = pki.load_certificate(tmp_path / "operator" / "operator.pem")
    assert role_and_name(operator) == (pki.Role.TENANT_OPERATOR, "operator")


@pytest.mark.needs_openssl
def test_certificates_of_another_authority(tmp_path: Path) -> None:
    """Those that openssl signs as the page says have role, name and authority."""
    blocks = [block for block in docs.blocks_of(PAGE) if block.language == "console"]
    run_blocks(blocks, tmp_path, at_most_s=60)
    certificate = own(tmp_path, tmp_path / "ca.pem")
    assert (certificate.name, certificate.authority) == ("tenant-verifier/alice", "alice")
    assert certificate.operator == pki.Role.TENANT_OPERATOR


def verified(units: list[Path], folder: Path) -> tuple[int, list[str]]:
    """What ``systemd-analyze verify`` says of units, whose program is where it is here."""
    for path in units:
        text = path.read_text(encoding="utf-8").replace("/opt/harness/.venv/bin/harness", str(BIN / "harness"))
        (folder / path.name).write_text(text, encoding="utf-8")
    command = ["systemd-analyze", "verify", "--man=no", *(str(folder / path.name) for path in units)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env={**os.environ})
    lines = [line for line in done.stderr.splitlines() if str(folder) in line or "harness-" in line]
    return done.returncode, [line for line in lines if not any(f"'{key}'" in line for key in NEWER)]


@pytest.mark.needs_systemd
def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    """No unknown key, no bad value, no program that is not there."""
    assert verified(UNITS, tmp_path) == (0, [])


@pytest.mark.needs_systemd
def test_a_unit_with_a_fault_is_not_accepted(tmp_path: Path) -> None:
    """A key that systemd does not know is named."""
    bad = tmp_path / "harness-bad.service"
    bad.write_text(UNITS[0].read_text(encoding="utf-8").replace("ProtectHome=", "ProtectHouse="), encoding="utf-8")
    (tmp_path / "copies").mkdir()
    _, lines = verified([bad], tmp_path / "copies")
    assert any("ProtectHouse" in line for line in lines)
