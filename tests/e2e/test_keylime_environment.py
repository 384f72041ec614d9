"""``make keylime``: what is pinned, and that a second run does nothing."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The script of a clone in this folder, without standard input."""
    return subprocess.run(
        [str(folder / "tools" / "keylime.sh"), *options],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone with an environment that counts as made from this list of packages."""
    shutil.copytree(ROOT / "tools", tmp_path / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    packages = (tmp_path / "tools" / "keylime.txt").read_bytes()
    (tmp_path / ".keylime" / "bin").mkdir(parents=True)
    (tmp_path / ".keylime" / "bin" / "python").symlink_to(sys.executable)
    ready = hashlib.sha256(f"{tmp_path}\n".encode() + packages).hexdigest()
    (tmp_path / ".keylime" / ".ready").write_text(ready + "\n", encoding="ascii")
    return tmp_path


def test_every_package_is_pinned() -> None:
    """Stock Keylime 7.14.3, and each thing that it needs, at one version: the yardstick is the same everywhere."""
    lines = (ROOT / "tools" / "keylime.txt").read_text(encoding="utf-8").splitlines()
    packages = [line for line in lines if not line.startswith("#")]
    assert packages[0] == "keylime==7.14.3"
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][A-Za-z0-9.]*", package) for package in packages)


def test_what_is_ready_is_left_alone(clone: Path) -> None:
    """A second run says nothing, installs nothing and keeps the environment."""
    ran = run(clone)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_an_option_is_refused(clone: Path) -> None:
    """One sentence, and nothing is made."""
    ran = run(clone, "--anything")
    assert (ran.returncode, ran.stderr) == (2, "keylime: takes no option\n")


def test_the_environment_is_no_part_of_the_repository() -> None:
    """It is ignored by git, like .venv."""
    assert ".keylime/" in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
