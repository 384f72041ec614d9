"""Reads the documentation: fenced blocks with commands, links, and names of functions.

The convention (CONTRIBUTING.md): a block marked ``console`` holds commands that are run as they stand, on lines that
start with ``$``; the other lines are what the command prints, in its order, among other lines; ``…`` in them stands
for anything. ``exit=N`` after the word is the exit code of the last command. ``tour`` says that the blocks of the page
are run one after the other in one shell, which begins in the project's folder; a block of any language with
``file=NAME`` is written to that file first. A block marked ``sh`` holds commands that are not run but checked: targets,
commands and options must exist. A block with ``settings=CLASS`` is a file that this class of `harness.config` loads.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<body>.*?)^```\s*$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\((?!https?:)(?P<target>[^)\s]*)\)")
_HEADING = re.compile(r"^#+ (?P<text>.+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Step:
    """A command that is run, where it stands, and what the page promises of it."""

    where: str
    command: str
    output: tuple[str, ...] = ()
    exit_code: int = 0

    def broken(self, code: int, said: str) -> str | None:
        """Which promise was not kept; None when all were."""
        if code != self.exit_code:
            return f"{self.where}: {self.command}\nended with {code} and not {self.exit_code}:\n{said}"
        lines = iter(said.splitlines())
        for promised in self.output:
            if not any(_fits(promised, line) for line in lines):
                return f"{self.where}: {self.command}\ndid not print: {promised}\nbut:\n{said}"
        return None


def _fits(promised: str, line: str) -> bool:
    words = (".*?".join(map(re.escape, word.split("…"))) for word in promised.split())
    return re.fullmatch(r"\s*" + r"\s+".join(words) + r"\s*", line) is not None


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block."""

    file: str
    line: int
    language: str
    options: tuple[str, ...]
    body: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"

    @property
    def exit_code(self) -> int:
        """Exit code that the last command of the block has."""
        return int(next((option[5:] for option in self.options if option.startswith("exit=")), "0"))

    @property
    def tour(self) -> bool:
        """Whether the block belongs to the tour of its page."""
        return "tour" in self.options

    @property
    def target(self) -> str | None:
        """File that gets the block's text in a tour."""
        return next((option[5:] for option in self.options if option.startswith("file=")), None)

    @property
    def settings(self) -> str | None:
        """Class that loads the block, for a block of settings."""
        return next((option[9:] for option in self.options if option.startswith("settings=")), None)

    @property
    def commands(self) -> tuple[str, ...]:
        """Command lines; continuation lines are joined, comments are dropped."""
        if self.language == "console":
            return tuple(step.command for step in self.steps)
        lines = self.body.replace("\\\n", " ").splitlines()
        return tuple(line.split(" #")[0].strip() for line in lines if line.strip() and not line.startswith("#"))

    @property
    def steps(self) -> tuple[Step, ...]:
        """The commands of a console block, each with what the page says of it."""
        steps: list[Step] = []
        for line in self.body.replace("\\\n", " ").splitlines():
            if line.startswith("$ "):
                steps.append(Step(str(self), line[2:].strip()))
            elif line.strip() and steps:
                steps[-1] = replace(steps[-1], output=(*steps[-1].output, line.strip()))
        if steps:
            steps[-1] = replace(steps[-1], exit_code=self.exit_code)
        return tuple(steps)


def pages() -> list[Path]:
    """Every page of the documentation."""
    return sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def blocks(language: str) -> list[Block]:
    """Blocks of one language in all pages, in order."""
    return [block for page in pages() for block in blocks_of(page) if block.language == language]


def blocks_of(page: Path) -> Iterator[Block]:
    """Fenced blocks of one page."""
    text = page.read_text(encoding="utf-8")
    name = page.relative_to(ROOT).as_posix() if page.is_relative_to(ROOT) else page.name
    for fence in _FENCE.finditer(text):
        language, *options = fence["info"].split() or [""]
        yield Block(name, text.count("\n", 0, fence.start()) + 1, language, tuple(options), fence["body"])


def broken_links(page: Path) -> list[str]:
    """Links to files or headings that do not exist, seen from the page's folder."""
    broken = []
    for link in _LINK.finditer(_FENCE.sub("", page.read_text(encoding="utf-8"))):
        path, _, anchor = link["target"].partition("#")
        target = (page.parent / path) if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link["target"])
    return broken


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as hosting sites make them."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    kept = (re.sub(r"[^\w\- ]", "", heading["text"].lower()) for heading in _HEADING.finditer(text))
    return {heading.replace(" ", "-") for heading in kept}


def code_names(page: Path) -> list[str]:
    """Names like ``tenant.session.Session.run`` in back quotes: module path and what it defines."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    return [name.removesuffix("()") for name in re.findall(r"`([a-z_]+(?:\.[A-Za-z_]+)+(?:\(\))?)`", text)]


def is_defined(name: str, package: Path) -> bool:
    """Whether ``module.Class.function`` (without the package's own name) is defined in the source."""
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        file = package.joinpath(*parts[:length]).with_suffix(".py")
        if file.is_file():
            return _defines(ast.parse(file.read_text(encoding="utf-8")).body, parts[length:])
    return False


def _defines(body: list[ast.stmt], names: list[str]) -> bool:
    if not names:
        return True
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and node.name == names[0]:
            return _defines(node.body, names[1:])
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == names[0] for target in targets):
            return len(names) == 1
    return False
