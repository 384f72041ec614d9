"""What is missing on this machine, and the one command that mends it.

Invariants:
    1. A thing counts as present only if it answered: programs are run, tpm2-pytss is imported (in another process).
    2. Nothing is changed here; `make demo` and `make setup` do that.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

_PROBE_TIMEOUT_S = 20
_VERSION = re.compile(r"(?:version\W*|\) )(\d+(?:\.\d+)+)")


class Machine(Protocol):
    """What is asked of a machine."""

    def answer(self, command: Sequence[str]) -> str | None:
        """Output of a program (standard error too), or None when it is missing, fails or hangs."""

    def has_file(self, path: Path) -> bool:
        """Whether there is a file at ``path``."""

    def package_manager(self) -> str | None:
        """``apt-get``, ``dnf`` or None."""

    def is_root(self) -> bool:
        """Whether packages can be installed without sudo."""


class ThisMachine:
    """The machine this process runs on."""

    def answer(self, command: Sequence[str]) -> str | None:
        """Run the program without standard input, with a time limit."""
        try:
            ran = subprocess.run(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=_PROBE_TIMEOUT_S,
                check=True,
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return ran.stdout.decode(errors="replace").strip()

    def has_file(self, path: Path) -> bool:
        """Ask the file system."""
        return path.is_file()

    def package_manager(self) -> str | None:
        """Look for the program."""
        return next((name for name in ("apt-get", "dnf") if shutil.which(name)), None)

    def is_root(self) -> bool:
        """Ask the kernel."""
        return os.geteuid() == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing the harness needs.

    Args:
        name: what it is.
        why: what does not work without it.
        found: what answered, usually a version; None when it is missing.
        packages: package to install, by package manager (``pip`` for a Python package).
    """

    name: str
    why: str
    found: str | None
    packages: dict[str, str]

    @property
    def ok(self) -> bool:
        """Whether it is there."""
        return self.found is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """All checks, and what mends the machine.

    Args:
        checks: every check made, in the order in which they depend on each other.
        remedy: the one command; None when nothing is missing.
    """

    checks: tuple[Check, ...]
    remedy: str | None

    @property
    def ok(self) -> bool:
        """Whether nothing is missing."""
        return all(check.ok for check in self.checks)

    def as_json(self) -> dict[str, object]:
        """JSON form for programs."""
        return {
            "ok": self.ok,
            "checks": [
                {"name": check.name, "ok": check.ok, "found": check.found, "why": check.why} for check in self.checks
            ],
            "remedy": self.remedy,
        }


def examine(machine: Machine) -> Diagnosis:
    """Make every check."""
    checks = (*_programs(machine), *_build_inputs(machine), _binding(machine))
    return Diagnosis(checks=checks, remedy=_remedy(machine, checks))


def _programs(machine: Machine) -> list[Check]:
    wanted = [
        ("swtpm", ["swtpm", "--version"], "simulates the hardware TPM and the guests' vTPMs", "swtpm"),
        ("swtpm_setup", ["swtpm_setup", "--tpm2", "--print-capabilities"], "manufactures vTPMs", "swtpm-tools"),
        ("tpm2-tools", ["tpm2_getrandom", "--version"], "a second client in tests, and looking at a TPM", "tpm2-tools"),
    ]
    return [
        Check(name=name, why=why, found=_version(machine.answer(command)), packages=_same(package))
        for name, command, why, package in wanted
    ]


def _build_inputs(machine: Machine) -> list[Check]:
    include = Path(sysconfig.get_path("include")) / "Python.h"
    why = "tpm2-pytss comes as source and is compiled here"
    tss = machine.answer(["pkg-config", "--modversion", "tss2-esys"])
    return [
        Check(
            name="libtss2 headers and library",
            why=why,
            found=tss,
            packages={"apt-get": "libtss2-dev pkg-config", "dnf": "tpm2-tss-devel pkgconf-pkg-config"},
        ),
        Check(name="C compiler", why=why, found=_version(machine.answer(["cc", "--version"])), packages=_same("gcc")),
        Check(
            name="Python headers",
            why=why,
            found=str(include) if machine.has_file(include) else None,
            packages={"apt-get": "python3-dev", "dnf": "python3-devel"},
        ),
    ]


def _binding(machine: Machine) -> Check:
    probe = "import importlib.metadata as m, tpm2_pytss; print(m.version('tpm2-pytss'))"
    found = machine.answer([sys.executable, "-W", "ignore", "-c", probe])
    return Check(
        name="tpm2-pytss",
        why="host agent, guest agent and simulation talk to their TPM through it",
        found=found,
        packages={"pip": "tpm2-pytss"},
    )


def _remedy(machine: Machine, checks: Sequence[Check]) -> str | None:
    missing = [check for check in checks if not check.ok]
    manager = machine.package_manager()
    modules = [check.packages["pip"] for check in missing if "pip" in check.packages]
    system = [check for check in missing if "pip" not in check.packages]
    if system and manager is None:
        return f"install with this system's package manager: {', '.join(check.name for check in system)}"
    steps = []
    if system and manager is not None:
        sudo = "" if machine.is_root() else "sudo "
        if manager == "apt-get":
            steps.append(f"{sudo}apt-get update")
        steps.append(f"{sudo}{manager} install -y {' '.join(sorted(check.packages[manager] for check in system))}")
    if modules:
        steps.append(f"{sys.executable} -m pip install {' '.join(modules)}")
    return " && ".join(steps) or None


def _same(package: str) -> dict[str, str]:
    return {"apt-get": package, "dnf": package}


def _version(output: str | None) -> str | None:
    """Version in what a program said of itself; else its first line."""
    if not output:
        return output
    version = _VERSION.search(output)
    return version[1] if version else output.splitlines()[0]
