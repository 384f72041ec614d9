"""The machine's clock may be set at any time: nothing that waits looks at it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "harness"


def reckons(tree: ast.AST) -> list[int]:
    """Lines that add to, subtract from or compare ``time.time()``: what a deadline or an age is made of."""
    found = []
    for node in ast.walk(tree):
        sides = [node.left, node.right] if isinstance(node, ast.BinOp) else []
        sides += [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
        found += [side.lineno for side in sides if _is_wall_clock(side)]
    return found


def _is_wall_clock(node: ast.expr) -> bool:
    match node:
        case ast.Call(func=ast.Attribute(value=ast.Name(id="time"), attr="time")):
            return True
    return False


def test_nobody_reckons_with_the_machines_clock() -> None:
    """It is stored and shown; deadlines, pauses and ages are monotonic. A benchmark reads logs; nothing waits on it."""
    found = [
        f"{path.relative_to(PACKAGE)}:{line}"
        for path in PACKAGE.rglob("*.py")
        if not path.name.startswith("bench")
        for line in reckons(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert found == []


@pytest.mark.parametrize(
    ("code", "lines"),
    [
        ("until = time.time() + 5", [1]),
        ("while time.time() < until: pass", [1]),
        ("age = time.time() - began", [1]),
        ("until = time.monotonic() + 5", []),
        ("store(time.time())", []),
    ],
)
def test_the_search_finds_it(code: str, lines: list[int]) -> None:
    """A deadline that is made of the machine's clock is seen; a time that is only stored is none."""
    assert reckons(ast.parse(code)) == lines
