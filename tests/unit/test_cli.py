"""The command line itself: help with examples, usage errors, and `doctor` and `appraise` through it."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import typer
from typer.testing import CliRunner

from harness import cli, console, doctor

type_of_command = typer.main.get_command(cli.app)
runner = CliRunner()


def commands(found: object = type_of_command, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every command of the program, groups excluded, as its words."""
    children = getattr(found, "commands", None)
    if children is None:
        yield path
        return
    for name, child in children.items():
        yield from commands(child, (*path, name))


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_every_command_has_help_with_examples_of_itself(words: tuple[str, ...]) -> None:
    """`--help` of each command ends with examples, and each example is a call of that command."""
    result = runner.invoke(cli.app, [*words, "--help"], env={"COLUMNS": "200", "TERM": "dumb"}, prog_name="harness")
    assert result.exit_code == 0
    _, _, text = result.output.partition("Examples:")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    assert lines
    assert all(line.startswith("harness " + " ".join(words)) for line in lines)


@pytest.mark.parametrize(
    "arguments",
    [["nonsense"], ["demo", "--guests", "many"], ["appraise"], ["serve"], ["doctor", "--nonsense"]],
    ids=" ".join,
)
def test_a_usage_error_is_exit_code_2(arguments: list[str]) -> None:
    """An unknown command or option, or a missing or wrong argument, is unusable input."""
    assert runner.invoke(cli.app, arguments).exit_code == 2


def test_the_version_is_printed() -> None:
    """`--version` prints name and version and nothing else."""
    result = runner.invoke(cli.app, ["--version"])
    assert (result.exit_code, result.output.split()[0]) == (0, "harness")


def test_shell_completion_can_be_installed() -> None:
    """The program offers completion for the person's shell."""
    assert "--install-completion" in runner.invoke(cli.app, ["--help"], env={"COLUMNS": "200"}).output


@pytest.mark.parametrize("as_json", [True, False])
def test_doctor_exits_1_and_shows_the_remedy_when_something_is_missing(
    monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    """What is missing is a negative finding; text and JSON carry the same remedy."""
    check = doctor.Check(name="swtpm", why="simulates TPMs", found=None, packages={})
    told = doctor.Diagnosis(checks=(check,), remedy="install swtpm")
    monkeypatch.setattr(doctor, "examine", lambda machine: told)
    result = runner.invoke(cli.app, ["doctor", *(["--json"] if as_json else [])])
    assert result.exit_code == 1
    if as_json:
        assert json.loads(result.output) == told.as_json()
    else:
        assert "missing" in result.output
        assert "install swtpm" in result.output


def test_a_table_in_a_pipe_has_no_control_sequences(capsys: pytest.CaptureFixture[str]) -> None:
    """What a program reads is plain text, one row a line, and markup in a cell stays text."""
    console.print_table(("a", "b"), [("ok", "[bold]x[/bold] " + "y" * 90)], empty="none")
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert out.splitlines()[1].split() == ["ok", "[bold]x[/bold]", "y" * 90]


def test_an_empty_table_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing to show is said in words."""
    console.print_table(("a",), [], empty="no hosts yet")
    assert capsys.readouterr().out == "no hosts yet\n"
