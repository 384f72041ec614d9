"""Runs commands of the documentation in a shell, and checks what they print and how they end."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from tests.support.docs import Block, Step

BIN = Path(sys.executable).parent


def run_blocks(blocks: Iterable[Block], folder: Path, *, at_most_s: float) -> None:
    """Runs blocks one after the other in one shell that begins in a folder.

    Raises:
        AssertionError: a command ended otherwise than its page says, or did not print what the page promises.
    """
    with tempfile.TemporaryDirectory(prefix="hd") as aside:
        steps, script = _script(blocks, Path(aside))
        ran = subprocess.run(
            ["bash", "-c", script],
            cwd=folder,
            env={**os.environ, "PATH": os.pathsep.join([str(BIN), os.environ["PATH"]]), "COLUMNS": "140"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=at_most_s,
            check=False,
        )
        for number, step in enumerate(steps):
            code, said = Path(aside, f"{number}.code"), Path(aside, f"{number}.out")
            assert code.exists(), f"{step.where}: {step.command}\nwas not reached:\n{ran.stdout}\n{ran.stderr}"
            broken = step.broken(int(code.read_text()), said.read_text())
            assert broken is None, broken


def _script(blocks: Iterable[Block], aside: Path) -> tuple[list[Step], str]:
    steps: list[Step] = []
    lines: list[str] = []
    for block in blocks:
        if block.target is not None:
            copy = aside / f"{len(lines)}.text"
            copy.write_text(block.body)
            lines.append(f"cp {copy} {block.target} || exit")
            continue
        for step in block.steps:
            out, code = aside / f"{len(steps)}.out", aside / f"{len(steps)}.code"
            lines.append(
                f"{{ {step.command}\n}} >{out} 2>&1; rc=$?; echo $rc >{code}; [ $rc = {step.exit_code} ] || exit"
            )
            steps.append(step)
    return steps, "\n".join(lines)
