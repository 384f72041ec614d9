"""What a test needs from the machine, and the rule for runs in which nothing ran."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping

from tests.support.postgres import program


def required(environ: Mapping[str, str]) -> frozenset[str]:
    """Names in ``HARNESS_REQUIRE``: a comma-separated list of what must not be missing."""
    return frozenset(name.strip() for name in environ.get("HARNESS_REQUIRE", "").split(",") if name.strip())


@functools.cache
def missing_for_swtpm() -> tuple[str, ...]:
    """Programs and modules that tests with a real swtpm need and this machine lacks."""
    programs = [name for name in ("swtpm", "swtpm_setup") if shutil.which(name) is None]
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
    programs = [name for name in ("mount", "umount", "unshare") if shutil.which(name) is None]
    if programs:
        return tuple(programs)
    with tempfile.TemporaryDirectory() as name:
        tried = subprocess.run(
            ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", name], capture_output=True, timeout=30, check=False
        )
    return () if tried.returncode == 0 else ("the right to mount",)


@functools.cache
def missing_for_cc() -> tuple[str, ...]:
    """What tests that compile something need and this machine lacks."""
    return () if shutil.which("cc") is not None else ("cc",)


def skipped_everything(counts: Mapping[str, int]) -> bool:
    """Whether tests were collected and none of them ran.

    Args:
        counts: number of reports by outcome, as pytest's terminal reporter keeps them.
    """
    ran = sum(counts.get(outcome, 0) for outcome in ("passed", "failed", "error", "xfailed", "xpassed"))
    return ran == 0 and counts.get("skipped", 0) > 0
