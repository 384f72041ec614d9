"""Fixtures of the tests of commands: a lab that is described and never started, and an operator that reaches nobody."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.cli_operators import Operator, in_place_of_operators, make_lab


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    """A lab with one host, a guest and two tenants."""
    return make_lab(tmp_path)


@pytest.fixture
def operator(monkeypatch: pytest.MonkeyPatch) -> Operator:
    """The operator that every command gets instead of connections."""
    fake = Operator()
    in_place_of_operators(monkeypatch, fake)
    return fake
