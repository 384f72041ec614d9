"""Runs the commands that the documentation shows in `console` blocks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import docs

TIME_LIMIT_S = 60


@pytest.mark.parametrize("block", docs.blocks("console"), ids=str)
@pytest.mark.needs_swtpm
def test_the_commands_of_a_block_do_what_the_page_says(block: docs.Block, tmp_path: Path) -> None:
    """Each command runs; all end with 0, the last one with the exit code that the block names."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    *before, last = block.commands
    for command, expected in [*((command, 0) for command in before), (last, block.exit_code)]:
        ran = subprocess.run(
            ["bash", "-c", command],
            cwd=tmp_path,
            env={**os.environ, "PATH": path},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIME_LIMIT_S,
            check=False,
        )
        assert ran.returncode == expected, f"{block}: {command}\n{ran.stdout}\n{ran.stderr}"


def test_the_documentation_shows_commands_that_can_be_run() -> None:
    """There is something to run: a renamed fence cannot empty this test unnoticed."""
    assert "harness doctor" in [command for block in docs.blocks("console") for command in block.commands]
