"""Expected values that an independent implementation computed (`tests/vectors`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "vectors"


def load(name: str) -> Any:
    """Content of one JSON file."""
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


def appraisal_case(name: str) -> dict[str, Any]:
    """One case of ``appraisal.json``, fresh each time: a test may change it."""
    return next(case for case in load("appraisal.json") if case["name"] == name)


def save(folder: Path, **files: object) -> dict[str, Path]:
    """Files with these contents: bytes as they are, anything else as JSON.

    Returns:
        Path by name; the name's file ends in ``.json``.
    """
    paths = {}
    for name, content in files.items():
        paths[name] = folder / f"{name}.json"
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        paths[name].write_bytes(data)
    return paths
