"""What a test needs from the machine, and the rule for runs in which nothing ran."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.support.postgres import program

DISK = Path("/var/tmp")
"""On a disk, also where the other temporary files are in memory."""


def required(environ: Mapping[str, str]) -> frozenset[str]:
    """Names in ``HARNESS_REQUIRE``: a comma-separated list of what must not be missing."""
    return frozenset(name.strip() for name in environ.get("HARNESS_REQUIRE", "").split(",") if name.strip())


def _absent(*programs: str) -> tuple[str, ...]:
    return tuple(name for name in programs if shutil.which(name) is None)


@functools.cache
def missing_for_swtpm() -> tuple[str, ...]:
    """Programs and modules that tests with a real swtpm need and this machine lacks."""
    programs = _absent("swtpm", "swtpm_setup")
    modules = [name for name in ("tpm2_pytss",) if importlib.util.find_spec(name) is None]
    return (*programs, *modules)


@functools.cache
def missing_for_postgres() -> tuple[str, ...]:
    """Programs and modules that tests with a real PostgreSQL server need and this machine lacks."""
    programs = [name for name in ("initdb", "postgres", "psql", "pg_isready", "pg_dump") if program(name) is None]
    tools = [] if os.geteuid() != 0 or shutil.which("setpriv") else ["setpriv"]
    modules = [name for name in ("asyncpg",) if importlib.util.find_spec(name) is None]
    return (*programs, *tools, *modules)


@functools.cache
def missing_for_mount() -> tuple[str, ...]:
    """Programs and rights that tests with a disk of their own need and this machine lacks."""
    if programs := _absent("mount", "umount", "unshare"):
        return programs
    with tempfile.TemporaryDirectory() as name:
        tried = subprocess.run(
            ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", name], capture_output=True, timeout=30, check=False
        )
    return () if tried.returncode == 0 else ("the right to mount",)


@functools.cache
def missing_for_chattr() -> tuple[str, ...]:
    """What tests with a file that nobody can change need and this machine lacks.

    In memory (tmpfs) such a file is still written by whoever has it open: it must be on a disk.
    """
    if programs := _absent("chattr"):
        return programs
    with tempfile.NamedTemporaryFile(dir=DISK, buffering=0) as file:
        if subprocess.run(["chattr", "+i", file.name], capture_output=True, timeout=30, check=False).returncode:
            return (f"the right to make files in {DISK} immutable",)
        try:
            file.write(b"x")
        except PermissionError:
            return ()
        finally:
            subprocess.run(["chattr", "-i", file.name], capture_output=True, timeout=30, check=True)
    return (f"a disk below {DISK}",)


def missing_for_root() -> tuple[str, ...]:
    """What tests that become another user, or give a file away, need and this process lacks."""
    return () if os.geteuid() == 0 else ("the rights of root",)


_BY_SETUP = "`tools/setup.sh --tests` installs it"
NEEDS: Mapping[str, tuple[Callable[[], tuple[str, ...]], str]] = {
    "swtpm": (missing_for_swtpm, "`harness doctor` tells how to install it"),
    "tpm2_tools": (functools.partial(_absent, "tpm2_pcrread", "tpm2_quote"), "`tools/setup.sh` installs it"),
    "postgres": (missing_for_postgres, _BY_SETUP),
    "cc": (functools.partial(_absent, "cc"), "`tools/setup.sh` installs it"),
    "openssl": (functools.partial(_absent, "openssl"), _BY_SETUP),
    "systemd": (functools.partial(_absent, "systemd-analyze"), _BY_SETUP),
    "mount": (missing_for_mount, "run as root, in a container with CAP_SYS_ADMIN"),
    "chattr": (missing_for_chattr, "run as root, in a container with CAP_LINUX_IMMUTABLE"),
    "root": (missing_for_root, "run as root"),
}
"""For each marker ``needs_NAME``: what is missing of it on this machine, and what to do about that."""


def skipped_everything(counts: Mapping[str, int]) -> bool:
    """Whether tests were collected and none of them ran.

    Args:
        counts: number of reports by outcome, as pytest's terminal reporter keeps them.
    """
    ran = sum(counts.get(outcome, 0) for outcome in ("passed", "failed", "error", "xfailed", "xpassed"))
    return ran == 0 and counts.get("skipped", 0) > 0
