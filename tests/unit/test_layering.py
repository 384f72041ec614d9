"""The import arrows of the package (docs/architecture.md), and that the checker can fail."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.support import layering

PACKAGE = Path(__file__).parents[2] / "harness"


def tree(folder: Path, files: Mapping[str, str]) -> Path:
    """A made-up package ``harness`` with these files."""
    package = folder / "harness"
    for name, source in {"__init__.py": "", **files}.items():
        file = package / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.parent != package:
            (file.parent / "__init__.py").touch()
        file.write_text(source, encoding="utf-8")
    return package


def test_the_package_breaks_no_rule() -> None:
    """Every import in the package follows the arrows, and no file is long without a reason."""
    findings = layering.check(PACKAGE)
    assert not findings, "\n" + "\n".join(map(str, findings))


def test_no_file_of_the_tests_is_long_without_a_reason() -> None:
    """The rule about the size of files holds for tests, too."""
    assert layering.too_long(Path(__file__).parents[1]) == []


def test_the_checker_reads_this_package() -> None:
    """The checker looks at the real files: it finds the modules that every import arrow starts from."""
    names = {file.relative_to(PACKAGE).as_posix() for file in PACKAGE.rglob("*.py")}
    assert {"errors.py", "values.py", "sim/__init__.py", "provider/__init__.py", "tenant/__init__.py"} <= names


HONEST = {
    "errors.py": "",
    "values.py": "from harness.errors import X",
    "merkle.py": "from harness import errors, values",
    "protocol.py": "from harness.merkle import leaf_hash",
    "messages.py": "from harness.protocol import y\nfrom harness.wire_errors import z",
    "wire_errors.py": "import json",
    "tpm.py": "def f():\n    import tpm2_pytss\n",
    "store.py": "import sqlalchemy.ext.asyncio",
    "web.py": "from aiohttp import web\nfrom harness.messages import z",
    "cli.py": "from harness.provider import keys\nfrom harness.tenant import states",
    "cli_extra.py": "",
    "lab_parts.py": "from harness import cli",
    "sim/boot.py": "",
    "provider/keys.py": "from harness import tpm\nfrom .batch import Pool\nfrom ..errors import X",
    "provider/batch.py": "from harness.values import v",
    "provider/tables.py": "import sqlalchemy",
    "provider/merklelib_tree.py": "from merklelib import MerkleTree",
    "provider/localca.py": "import socket, json",
    "tenant/states.py": "import enum",
    "attacks/replay.py": "import aiohttp",
}


def test_an_honest_tree_passes(tmp_path: Path) -> None:
    """Arrows that the rules allow are not findings."""
    assert layering.check(tree(tmp_path, HONEST)) == []


BREAKS = [
    pytest.param("store.py", "import harness.provider", 1, id="core-imports-sub-package"),
    pytest.param("store.py", "from harness.tenant.states import S", 1, id="core-imports-module-of-sub-package"),
    pytest.param("store.py", "from .provider import keys", 1, id="core-imports-sub-package-relatively"),
    pytest.param("store.py", "def f():\n    from harness.sim import boot", 1, id="core-imports-inside-a-function"),
    pytest.param("store.py", "import importlib\nimportlib.import_module('harness.sim')", 1, id="core-imports-by-name"),
    pytest.param("store.py", "from harness import cli", 1, id="core-imports-composition-root"),
    pytest.param("store.py", "from harness import cli_extra", 1, id="core-imports-composition-root-by-pattern"),
    pytest.param(
        "store.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from harness.sim import boot",
        1,
        id="core-imports-for-types",
    ),
    pytest.param("provider/keys.py", "from harness.tenant import states", 2, id="provider-imports-tenant"),
    pytest.param("provider/keys.py", "from ..tenant import states", 2, id="provider-imports-tenant-relatively"),
    pytest.param("tenant/states.py", "import harness.provider.batch", 2, id="tenant-imports-provider"),
    pytest.param("sim/boot.py", "from harness.provider import batch", 2, id="sim-imports-provider"),
    pytest.param("attacks/replay.py", "from harness.provider import batch", 2, id="attack-imports-provider"),
    pytest.param("attacks/replay.py", "from harness import lab_parts", 2, id="attack-imports-composition-root"),
    pytest.param("provider/keys.py", "import tpm2_pytss.types", 3, id="second-home-of-tpm2-pytss"),
    pytest.param("provider/keys.py", "def f():\n    import tpm2_pytss", 3, id="second-home-inside-a-function"),
    pytest.param("merkle.py", "import merklelib", 3, id="second-home-of-merklelib"),
    pytest.param("tenant/states.py", "from sqlalchemy import select", 3, id="second-home-of-sqlalchemy"),
    pytest.param("tenant/states.py", "from aiohttp import web", 3, id="second-home-of-aiohttp"),
    pytest.param("cli.py", "import aiohttp", 3, id="composition-root-is-no-home"),
    pytest.param("errors.py", "from harness import values", 4, id="errors-above-values"),
    pytest.param("merkle.py", "from harness.messages import y", 4, id="merkle-above-messages"),
    pytest.param("messages.py", "from harness.store import s", 4, id="messages-above-store"),
    pytest.param("big.py", "x = 1\n" * 401, 6, id="long-file"),
    pytest.param("provider/localca.py", "import yaml", 7, id="certs-tool-imports-outside-package"),
    pytest.param("provider/localca.py", "from harness import errors", 7, id="certs-tool-imports-the-package"),
]


@pytest.mark.parametrize(("name", "source", "rule"), BREAKS)
def test_one_wrong_import_is_one_finding(tmp_path: Path, name: str, source: str, rule: int) -> None:
    """An honest tree with one wrong file gives a finding of the broken rule in that file (and a cycle at most)."""
    findings = layering.check(tree(tmp_path, {**HONEST, name: source}))
    assert [(finding.rule, finding.path) for finding in findings if finding.rule != 5] == [(rule, name)]


def test_a_cycle_is_found_even_when_one_import_is_inside_a_function(tmp_path: Path) -> None:
    """Two files of one package that import each other are a cycle, wherever the imports stand."""
    files = {
        "tenant/a.py": "from harness.tenant.b import x",
        "tenant/b.py": "from harness.tenant.c import x",
        "tenant/c.py": "def f():\n    from . import a",
    }
    (finding,) = layering.check(tree(tmp_path, files))
    assert (finding.rule, finding.path) == (5, "tenant/a.py")
    assert "tenant/a.py -> tenant/b.py -> tenant/c.py -> tenant/a.py" in finding.text


def test_an_import_for_types_closes_no_cycle(tmp_path: Path) -> None:
    """Two files of which one needs the other for its types only do not import each other."""
    files = {
        "tenant/a.py": "from harness.tenant.b import x",
        "tenant/b.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from harness.tenant.a import X",
    }
    assert layering.check(tree(tmp_path, files)) == []


def test_a_long_file_with_a_reason_is_no_finding(tmp_path: Path) -> None:
    """A file above the limit that says why in its docstring is accepted; one at the limit needs no reason."""
    files = {
        "long.py": '"""Tables.\n\nSize: one table, which is easier to read in one place.\n"""\n' + "x = 1\n" * 400,
        "full.py": "x = 1\n" * layering.LINE_LIMIT,
    }
    assert layering.check(tree(tmp_path, files)) == []


def test_a_long_test_file_without_a_reason_is_named(tmp_path: Path) -> None:
    """By its path; one that is short enough, or has a reason, is not."""
    files = {
        "a/long.py": "x = 1\n" * 401,
        "short.py": "x = 1\n",
        "why.py": '"""A.\n\nSize: b.\n"""\n' + "x = 1\n" * 400,
    }
    assert [finding.path for finding in layering.too_long(tree(tmp_path, files))] == ["a/long.py"]


def test_a_finding_names_file_line_and_rule(tmp_path: Path) -> None:
    """The text of a finding leads to the line."""
    (finding,) = layering.check(tree(tmp_path, {**HONEST, "store.py": "import os\nimport harness.sim\n"}))
    assert str(finding).startswith("store.py:2: rule 1: core imports harness.sim")
