"""Data files of the simulation: found by name in the package or by path, checked against a model.

Invariants:
    1. A file that is used is valid: unknown keys and wrong types are refused with file, key and reason.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from harness.errors import ConfigError

M = TypeVar("M", bound=BaseModel)
_LIMIT = 1 << 20


def names(folder: str) -> list[str]:
    """Names of the files that the package brings in this folder, sorted."""
    return sorted(entry.name[:-4] for entry in _folder(folder).iterdir() if entry.name.endswith(".yml"))


def load(folder: str, name_or_path: str | Path, model: type[M]) -> M:
    """Content of one file.

    Args:
        folder: ``profiles`` or ``scenarios``.
        name_or_path: a name from `names`, or the path of an own file (anything with a slash or a suffix).
        model: what it must contain.

    Raises:
        ConfigError: unknown name, unreadable file, not YAML, or not this model.
    """
    text = str(name_or_path)
    try:
        if "/" in text or Path(text).suffix:
            data = Path(text).read_bytes()[:_LIMIT]
        elif text in names(folder):
            data = (_folder(folder) / f"{text}.yml").read_bytes()
        else:
            raise ConfigError(f"{folder}: {text!r} is not one of {', '.join(names(folder))}")
        return model.model_validate(yaml.safe_load(data))
    except OSError as error:
        raise ConfigError(f"{text}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{text}: not YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{text}: {key or 'file'}: {first['msg']}") from error


def _folder(folder: str) -> resources.abc.Traversable:
    return resources.files("harness.sim") / folder
