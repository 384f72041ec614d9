"""Data files of the simulation: found by name in the package or by path, checked against a model.

Invariants:
    1. A file that is used is valid: unknown keys and wrong types are refused with file, key and reason (`config`).
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from harness import config
from harness.errors import ConfigError

M = TypeVar("M", bound=BaseModel)


def names(folder: str) -> list[str]:
    """Names of the files that the package brings in this folder, sorted."""
    entries = resources.files("harness.sim").joinpath(folder).iterdir()
    return sorted(entry.name.removesuffix(".yml") for entry in entries if entry.name.endswith(".yml"))


def is_own(name_or_path: str | Path) -> bool:
    """Whether this is the path of an own file (anything with a slash or a suffix), and not a name from `names`."""
    text = str(name_or_path)
    return "/" in text or bool(Path(text).suffix)


def load(folder: str, name_or_path: str | Path, model: type[M]) -> M:
    """Content of one file.

    Args:
        folder: ``profiles`` or ``scenarios``.
        name_or_path: a name from `names`, or the path of an own file (`is_own`).
        model: what it must contain.

    Raises:
        ConfigError: unknown name, unreadable file, not YAML, or not this model.
    """
    text = str(name_or_path)
    if is_own(text):
        return config.load(Path(text), model)
    if text not in names(folder):
        raise ConfigError(f"{folder}: {text!r} is not one of {', '.join(names(folder))}")
    with resources.as_file(resources.files("harness.sim").joinpath(folder, f"{text}.yml")) as path:
        return config.load(path, model)
