"""`harness doctor`: what counts as missing, and the one command that mends it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from harness import doctor

COMPLETE = {
    "swtpm": "TPM emulator version 0.7.1, Copyright (c)",
    "swtpm_setup": '{ "type": "swtpm_setup", "features": [ "tpm-1.2", "tpm-2.0" ], "version": "0.7.1" }',
    "tpm2_getrandom": 'tool="tpm2_getrandom" version="5.4" tctis="libtss2-tctildr"',
    "pkg-config": "3.2.1",
    "cc": "cc (Debian 12.2.0-14) 12.2.0",
    "python": "3.0.0",
}


@dataclass
class FakeMachine:
    """A machine on which some programs answer."""

    answers: dict[str, str] = field(default_factory=lambda: dict(COMPLETE))
    headers: bool = True
    manager: str | None = "apt-get"
    root: bool = False

    def answer(self, command: Sequence[str]) -> str | None:
        name = Path(command[0]).name
        return self.answers.get("python" if name.startswith("python") else name)

    def has_file(self, path: Path) -> bool:
        assert path.name == "Python.h"
        return self.headers

    def package_manager(self) -> str | None:
        return self.manager

    def is_root(self) -> bool:
        return self.root


def without(*names: str) -> FakeMachine:
    """A Debian machine that lacks these programs."""
    return FakeMachine(answers={name: said for name, said in COMPLETE.items() if name not in names})


def test_a_complete_machine_lacks_nothing() -> None:
    """Where everything answers there is no remedy, and the version of each thing is shown."""
    diagnosis = doctor.examine(FakeMachine())
    assert diagnosis.ok
    assert diagnosis.remedy is None
    found = {check.name: check.found for check in diagnosis.checks}
    assert found["swtpm"] == found["swtpm_setup"] == "0.7.1"
    assert (found["tpm2-tools"], found["C compiler"], found["tpm2-pytss"]) == ("5.4", "12.2.0", "3.0.0")


@pytest.mark.parametrize(
    ("program", "name", "package"),
    [
        ("swtpm", "swtpm", "swtpm"),
        ("swtpm_setup", "swtpm_setup", "swtpm-tools"),
        ("tpm2_getrandom", "tpm2-tools", "tpm2-tools"),
        ("pkg-config", "libtss2 headers and library", "libtss2-dev pkg-config"),
        ("cc", "C compiler", "gcc"),
    ],
)
def test_each_missing_program_is_named_with_its_package(program: str, name: str, package: str) -> None:
    """One program that does not answer is one missing check, mended by its own package."""
    diagnosis = doctor.examine(without(program))
    assert [check.name for check in diagnosis.checks if not check.ok] == [name]
    assert diagnosis.remedy == f"sudo apt-get update && sudo apt-get install -y {package}"


def test_missing_python_headers_are_named() -> None:
    """Without Python.h the compiled dependency cannot be built: the headers' package is the remedy."""
    machine = FakeMachine(headers=False, manager="dnf", root=True)
    assert doctor.examine(machine).remedy == "dnf install -y python3-devel"


def test_everything_missing_is_mended_by_one_command() -> None:
    """System packages come before the Python package, joined into one command; root needs no sudo."""
    diagnosis = doctor.examine(FakeMachine(answers={}, headers=False, root=True))
    assert not diagnosis.ok
    assert diagnosis.remedy is not None
    assert diagnosis.remedy.startswith("apt-get update && apt-get install -y gcc ")
    assert diagnosis.remedy.endswith(" -m pip install tpm2-pytss")
    assert "\n" not in diagnosis.remedy


def test_a_machine_without_a_known_package_manager_gets_a_sentence() -> None:
    """Where neither apt-get nor dnf exists the missing things are named instead of a wrong command."""
    machine = without("swtpm", "cc")
    machine.manager = None
    assert doctor.examine(machine).remedy == "install with this system's package manager: swtpm, C compiler"


def test_the_json_form_says_the_same() -> None:
    """Programs get each check with its outcome, and the remedy."""
    told = doctor.examine(without("swtpm")).as_json()
    assert told["ok"] is False
    checks = told["checks"]
    assert isinstance(checks, list)
    assert checks[0] == {
        "name": "swtpm",
        "ok": False,
        "found": None,
        "why": "simulates the hardware TPM and the guests' vTPMs",
    }
    assert told["remedy"] == "sudo apt-get update && sudo apt-get install -y swtpm"
