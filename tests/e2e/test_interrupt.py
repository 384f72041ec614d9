"""Ctrl-C, from the first moment of a command on: quiet, and code 130."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

PAUSE = """
import sys
WANTED = sys.argv[1]
class Pause:
    def find_spec(self, name, path=None, target=None):
        if name == WANTED:
            print("importing", flush=True)
            sys.stdin.read()
sys.meta_path.insert(0, Pause())
from harness.__main__ import main
sys.argv[1:] = ["tenant", "guest", "list", "--lab", "."]
main()
"""
"""A command that stops at the import of one module until it is interrupted."""


@pytest.mark.parametrize("module", ["harness.cli", "typer", "harness.cli_tenant", "harness.config"])
def test_an_interrupt_while_modules_are_loaded_is_quiet(module: str) -> None:
    """No traceback, whichever import was under way."""
    with (
        tempfile.TemporaryDirectory(prefix="h") as folder,
        subprocess.Popen(
            [sys.executable, "-c", PAUSE, module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
        ) as process,
    ):
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"importing\n"
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=240)
        finally:
            process.kill()
    assert (process.returncode, said) == (130, b"")


def test_the_console_script_begins_with_the_quiet_module() -> None:
    """What is installed as ``harness`` is the entry point that catches interrupts."""
    project = Path(__file__).parents[2] / "pyproject.toml"
    assert '\nharness = "harness.__main__:main"\n' in project.read_text()
