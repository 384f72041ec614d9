"""Files that the program reads from its own package are in the package that is built."""

from __future__ import annotations

import fnmatch
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "harness"
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
PATTERNS: list[str] = SETTINGS["package-data"]["harness"]


def is_packaged(path: Path) -> bool:
    """Whether a file is a module of a package with an ``__init__.py``, or named as package data."""
    name = path.relative_to(PACKAGE).as_posix()
    module = path.suffix == ".py" and (path.parent / "__init__.py").exists()
    return module or any(fnmatch.fnmatchcase(name, pattern) for pattern in PATTERNS)


def test_every_file_of_the_package_is_built_into_it() -> None:
    """Modules, migrations, profiles and scenarios: nothing that lies in the folder is left behind."""
    files = [path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert [path for path in files if not is_packaged(path)] == []
    assert len([path for path in files if "migrations" in path.parts]) > 6


def test_each_pattern_names_something() -> None:
    """No pattern of package data is out of date."""
    assert [pattern for pattern in PATTERNS if not list(PACKAGE.glob(pattern))] == []
