"""The documentation: its links lead somewhere, its names and commands exist, and these checks can fail."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest
import typer

from harness import cli
from harness.lab_plan import TAMPER_CASES
from tests.support import docs

PACKAGE = docs.ROOT / "harness"
MAKE_TARGETS = set(re.findall(r"^([a-z]+):", (docs.ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize("page", docs.pages(), ids=lambda page: page.name)
def test_every_link_leads_to_a_file_or_heading(page: Path) -> None:
    """No page links to a file or heading that is not there."""
    assert docs.broken_links(page) == []


@pytest.mark.parametrize("block", docs.blocks("sh") + docs.blocks("console"), ids=str)
def test_every_command_shown_exists(block: docs.Block) -> None:
    """Each `make` target and each `harness` command and option in the documentation exists."""
    assert block.commands
    for line in block.commands:
        assert problem_with(line) is None, line


def problem_with(line: str) -> str | None:
    """What is wrong with a command line shown to people; None when nothing is."""
    inner = re.fullmatch(r"\w+=\$\((.*)\)", line)
    program, *words = shlex.split(inner[1] if inner else line, comments=True)
    if program == "make":
        unknown = [word for word in words if "=" not in word and word not in MAKE_TARGETS]
        return f"no target {unknown[0]}" if unknown else None
    if program == "harness":
        return problem_with_harness(words)
    return None


def problem_with_harness(words: list[str]) -> str | None:
    """What is wrong with a call of `harness`."""
    command: object = typer.main.get_command(cli.app)
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]  # type: ignore[attr-defined]
    known = {name for param in command.params for name in param.opts} | {"--help"}  # type: ignore[attr-defined]
    alone = getattr(command, "invoke_without_command", True)
    if not alone and not all(word.startswith("--") for word in words):
        return f"no command {words[0]}"
    unknown = [word for word in words if word.startswith("--") and word not in known]
    return f"no option {unknown[0]}" if unknown else None


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("make nonsense", "no target nonsense"),
        ("harness nonsense", "no command nonsense"),
        ("harness demo --nonsense", "no option --nonsense"),
        ("x=$(harness nonsense)", "no command nonsense"),
        ('make test ARGS="-e py311"', None),
        ("harness demo --tamper host-kernel", None),
    ],
)
def test_the_check_of_commands_can_fail(line: str, problem: str | None) -> None:
    """A target, command or option that does not exist is a problem; an honest line is not."""
    assert problem_with(line) == problem


def test_blocks_and_links_are_read_as_written(tmp_path: Path) -> None:
    """Commands, their exit code, and links with anchors are read from a page; text in fences is no link."""
    page = tmp_path / "page.md"
    page.write_text(
        "# One Heading: 3.5\n\n[a](#one-heading-35) [b](#two) [c](page.md) [d](none.md) [e](https://example.org)\n\n"
        "```console exit=1\n$ harness a \\\n  --b\noutput\n$ harness c\n```\n\n"
        "```sh\nmake x  # why\n# alone\n[f](none)\n```\n",
        encoding="utf-8",
    )
    console, shell = docs.blocks_of(page)
    assert (console.commands, console.exit_code) == (("harness a    --b", "harness c"), 1)
    assert (shell.commands, shell.exit_code, shell.line) == (("make x", "[f](none)"), 0, 12)
    assert docs.broken_links(page) == ["#two", "none.md"]


@pytest.mark.parametrize("page", ["README.md", "docs/threat-model.md"])
def test_the_tamper_tables_list_the_cases_of_the_lab(page: str) -> None:
    """Each way to cheat that the lab can play is in the table, in its order, and no other."""
    rows = re.findall(r"^\|.*`([a-z]+-[a-z]+|decoy|replay|strip|reboot)` \|", text_of(page), re.MULTILINE)
    assert rows == list(TAMPER_CASES)


def text_of(page: str) -> str:
    """Text of a page."""
    return (docs.ROOT / page).read_text(encoding="utf-8")


def test_the_page_about_the_command_line_is_the_generated_one() -> None:
    """`docs/cli.md` is what `python tools/cli_docs.py` prints now."""
    tool = runpy.run_path(str(docs.ROOT / "tools" / "cli_docs.py"))
    assert text_of("docs/cli.md") == tool["page"]()


@pytest.mark.parametrize("name", docs.code_names(docs.ROOT / "docs" / "request-flow.md"))
def test_every_function_in_the_request_flow_exists(name: str) -> None:
    """The page about one exchange names functions, classes and modules that are in the source."""
    assert docs.is_defined(name, PACKAGE)


@pytest.mark.parametrize(
    ("name", "defined"),
    [
        ("cli_exit.guarded", True),
        ("doctor.ThisMachine.answer", True),
        ("errors.WrongHost", True),
        ("cli_exit.nonsense", False),
        ("doctor.ThisMachine.nonsense", False),
        ("nonsense.guarded", False),
    ],
)
def test_the_check_of_names_can_fail(name: str, defined: bool) -> None:
    """A name counts as defined only when the source defines it."""
    assert docs.is_defined(name, PACKAGE) is defined
