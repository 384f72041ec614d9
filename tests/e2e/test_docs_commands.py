"""Runs the commands that the documentation shows in `console` blocks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import docs

TIME_LIMIT_S = 100
LAB_IN_DOCS = "/tmp/lab"
BLOCKS = docs.blocks("console")
LAB_PAGES = sorted({block.file for block in BLOCKS if block.needs_lab})
BIN = Path(sys.executable).parent
PATH = os.pathsep.join([str(BIN), os.environ["PATH"]])


@pytest.fixture(scope="module")
def lab() -> Iterator[Path]:
    """A running lab, as `harness demo --keep` leaves it."""
    with tempfile.TemporaryDirectory(prefix="hd") as folder:
        arguments = ["demo", "--keep", "--json", "--lab", folder, "--chip", "swtpm", "--guests", "1"]
        with subprocess.Popen(
            [BIN / "harness", *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as demo:
            assert demo.stdout is not None
            watchdog = threading.Timer(TIME_LIMIT_S, demo.kill)
            watchdog.start()
            said = []
            for line in demo.stdout:
                said.append(line.decode())
                if "lab is running" in said[-1]:
                    break
            watchdog.cancel()
            assert demo.poll() is None, f"the lab did not start: {''.join(said)}"
            try:
                yield Path(folder)
            finally:
                demo.send_signal(signal.SIGINT)
                demo.communicate(timeout=TIME_LIMIT_S)


def run(script: str, folder: Path) -> None:
    """Run a script that stops at the first command that ends otherwise than the page says."""
    ran = subprocess.run(
        ["bash", "-ec", script],
        cwd=folder,
        env={**os.environ, "PATH": PATH},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT_S,
        check=False,
    )
    assert ran.returncode == 0, f"{script}\n{ran.stdout}\n{ran.stderr}"


@pytest.mark.needs_swtpm
@pytest.mark.parametrize("block", [block for block in BLOCKS if not block.needs_lab], ids=str)
def test_the_commands_of_a_block_do_what_the_page_says(block: docs.Block, tmp_path: Path) -> None:
    """Each command runs; all end with 0, the last one with the exit code that the block names."""
    run(block.script, tmp_path)


@pytest.mark.needs_swtpm
@pytest.mark.parametrize("page", LAB_PAGES)
def test_the_commands_of_a_page_work_in_a_running_lab(page: str, lab: Path, tmp_path: Path) -> None:
    """The blocks of a page that need a lab do, one after the other, what the page says."""
    script = "\n".join(block.script for block in BLOCKS if block.needs_lab and block.file == page)
    run(script.replace(LAB_IN_DOCS, str(lab)), tmp_path)


def test_the_documentation_shows_commands_that_can_be_run() -> None:
    """There is something to run: a renamed fence cannot empty these tests unnoticed."""
    assert "harness doctor" in [command for block in BLOCKS for command in block.commands]
    assert "docs/tutorial.md" in LAB_PAGES
