"""Runs the commands that the documentation shows in `console` blocks."""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.support import docs
from tests.support.tours import BIN, run_blocks

TIME_LIMIT_S = 400
TOUR_LIMIT_S = 1200
FOLDER_IN_DOCS = "~/lab"
BLOCKS = docs.blocks("console")
TOURS = sorted({block.file for block in BLOCKS if block.tour})


@pytest.mark.needs_swtpm
@pytest.mark.parametrize("block", [block for block in BLOCKS if not block.tour], ids=str)
def test_the_commands_of_a_block_do_what_the_page_says(block: docs.Block, tmp_path: Path) -> None:
    """Each command prints what the page shows; all end with 0, the last one with the exit code that the block names."""
    run_blocks([block], tmp_path, at_most_s=TIME_LIMIT_S)


@pytest.mark.needs_swtpm
@pytest.mark.timeout(TOUR_LIMIT_S + 60)
@pytest.mark.parametrize("page", TOURS)
def test_the_commands_of_a_tour_do_what_the_page_says(page: str) -> None:
    """The blocks of a page, followed word for word from a clone with no lab, do what the page says."""
    with tempfile.TemporaryDirectory(prefix="hd") as folder:
        try:
            run_blocks(_tour(page, folder), docs.ROOT, at_most_s=TOUR_LIMIT_S)
        finally:
            for topology in Path(folder).glob("**/lab.yml"):
                with contextlib.suppress(subprocess.SubprocessError):  # of a tour that did not come to its end
                    subprocess.run([BIN / "harness", "lab", "down", "--lab", topology], check=False, timeout=120)


def _tour(page: str, folder: str) -> list[docs.Block]:
    blocks = [block for block in docs.blocks_of(docs.ROOT / page) if block.tour]
    return [dataclasses.replace(block, body=block.body.replace(FOLDER_IN_DOCS, folder)) for block in blocks]


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("$ echo one two; echo three\none …\nthree\n", None),
        ("$ cat note\nwritten\n$ word=kept\n$ echo $word\nkept\n", None),
        ("$ echo one; echo two\ntwo\none\n", "did not print: one"),
        ("$ echo one two three\none … four\n", "did not print: one … four"),
        ("$ false\n$ true\n", "ended with 1 and not 0"),
        ("$ exit 0\n$ true\n", "was not reached"),
    ],
)
def test_a_page_that_promises_something_else_is_found(text: str, broken: str | None, tmp_path: Path) -> None:
    """A line that is not printed, another exit code, or a command that is never reached fails the page."""
    page = tmp_path / "page.md"
    page.write_text(f"```text tour file=note\nwritten\n```\n\n```console tour\n{text}```\n", encoding="utf-8")
    if broken is None:
        run_blocks(docs.blocks_of(page), tmp_path, at_most_s=TIME_LIMIT_S)
    else:
        with pytest.raises(AssertionError, match=broken):
            run_blocks(docs.blocks_of(page), tmp_path, at_most_s=TIME_LIMIT_S)


def test_the_documentation_shows_commands_that_can_be_run() -> None:
    """There is something to run: a renamed fence cannot empty these tests unnoticed."""
    assert "harness doctor" in [command for block in BLOCKS for command in block.commands]
    assert "docs/tutorial.md" in TOURS
