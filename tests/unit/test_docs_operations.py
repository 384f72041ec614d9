"""docs/operations.md: each alarm that the code can raise and each event that warns is there, and nothing else is."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from harness import cli_advice, errors, wire_errors
from harness.tenant import enrolment_alarms
from harness.tenant.states import STOPPED
from tests.support import docs

PAGE = docs.ROOT / "docs" / "operations.md"
PACKAGE = docs.ROOT / "harness"
SESSION = PACKAGE / "tenant" / "session.py"
_NAME = re.compile(r"`(\w+)`")


def alarms_of_the_code() -> set[str]:
    """Kinds of alarms: refusals of an enrolment, findings, what a question to a peer may end with, and states.

    A peer may answer with each error that it can make us raise; an internal fault may have any name.
    """
    appraisal = {kind.__name__ for kind in subclasses(errors.AppraisalError)}
    transport = {kind.__name__ for kind in (*subclasses(errors.TransportError), *subclasses(errors.ProtocolError))}
    enrolment = {kind.__name__ for kind in enrolment_alarms._ALARMS}
    rounds = set(re.findall(r"self\._restarted\(Event\.(\w+)", SESSION.read_text(encoding="utf-8")))
    stopped = {state.name for state in STOPPED}
    return appraisal | transport | enrolment | rounds | stopped | set(wire_errors._FROM_PEER) | {"StoreError"}


def subclasses(kind: type[Exception]) -> Iterator[type[Exception]]:
    """All classes below this one."""
    for below in kind.__subclasses__():
        yield below
        yield from subclasses(below)


def events_of_the_code() -> set[str]:
    """Events that are emitted as a warning or an error; of those whose level is computed, all."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "emit":
                level = next((word.value for word in call.keywords if word.arg == "level"), None)
                quiet = level is None or (isinstance(level, ast.Constant) and level.value in {"info", "debug"})
                if not quiet and isinstance(call.args[0], ast.Constant):
                    found.add(str(call.args[0].value))
    return found


COMPUTED = {
    "certificate_expires": "certificate_watch.py",
    "certificate_expired": "certificate_watch.py",
    "not_accepted": "door.py",
    "too_many_connections": "door.py",
    "handshake_failed": "door.py",
    "log_lines_lost": "log_file.py",
}
"""Events whose name is not written where they are emitted, and the module that names them."""


def sections(page: str) -> dict[str, str]:
    """Text of each section about alarms, by each of the names in its heading."""
    found = {}
    part = page.partition("\n## Alarms\n")[2].partition("\n## ")[0]
    for heading, text in re.findall(r"^### (.+)\n((?:(?!^### ).*\n?)*)", part, re.MULTILINE):
        found.update(dict.fromkeys(_NAME.findall(heading), text))
    return found


def table(page: str) -> set[str]:
    """Events in the table."""
    part = page.partition("\n## Events in the logs\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.+?) \|", part, re.MULTILINE)
    return {name for row in rows for name in _NAME.findall(row)}


def text() -> str:
    """The page."""
    return PAGE.read_text(encoding="utf-8")


def test_each_alarm_has_its_section_and_no_other_has() -> None:
    """Who looks up an alarm, a guest's error or a stopped state finds it, and nothing that is gone."""
    assert set(sections(text())) == alarms_of_the_code()


def test_the_command_line_advises_on_nothing_that_the_page_leaves_out() -> None:
    """What `tenant alarms` says in one sentence is said there at length, except about errors of commands only."""
    commands_only = {"SimulatorMissing", "Overloaded", "AppraisalError"}
    assert set(cli_advice._STEPS) - commands_only <= set(sections(text()))


@pytest.mark.parametrize("name", sorted(sections(text())))
def test_each_alarm_is_explained_and_has_a_way_out(name: str) -> None:
    """Each section says what the alarm means, what to look at, what to type, and what that costs."""
    section = sections(text())[name]
    for part in ("Means", "Look", "Type", "Costs"):
        assert f"- **{part}**" in section, f"{name}: {part} is missing"


def test_each_event_that_warns_is_in_the_table_and_no_other_is() -> None:
    """An operator who finds a warning in a log finds it on the page."""
    assert table(text()) == events_of_the_code() | set(COMPUTED)


@pytest.mark.parametrize(("event", "module"), COMPUTED.items())
def test_events_with_a_computed_name_exist(event: str, module: str) -> None:
    """The list of names that the source computes is not older than the source."""
    [path] = PACKAGE.rglob(module)
    assert f'"{event}"' in path.read_text(encoding="utf-8")


def test_these_checks_can_fail() -> None:
    """Sections and rows are read as they are written: a missing one is missed."""
    page = "# P\n\n## Alarms\n\n### Two: `A`, `B`\n\n- **Means**: x\n\n### `C`\n\ny\n"
    page += "\n## Events in the logs\n\n| `e`, `f` | g |\n"
    assert {name: "Means" in body for name, body in sections(page).items()} == {"A": True, "B": True, "C": False}
    assert table(page) == {"e", "f"}
