"""Reads the imports of a package with ``ast`` and says which arrows they break.

The rules, for a package like ``harness`` (the number is in each finding):

1. Core modules import no sub-package and no composition root.
2. A sub-package imports core and itself, never another sub-package and never a composition root.
3. An outside package with a home is imported in its home only, function-level imports included.
4. Inside core, arrows follow the order of ``CORE_ORDER``.
5. Modules do not import each other in a cycle.
6. A file above ``LINE_LIMIT`` lines gives the reason in a ``Size:`` line of its docstring.
7. A program that others start (``STANDARD_LIBRARY_ONLY``) imports the standard library only.

Imports inside functions, under ``TYPE_CHECKING`` and through ``import_module("literal")`` count like any other, except
that an import for types alone closes no cycle: it never runs.
"""

from __future__ import annotations

import ast
import fnmatch
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

LINE_LIMIT = 400
ROOTS = (
    *("__main__.py", "bench.py", "bench_*.py", "cli.py", "cli_*.py", "demo.py", "demo_*.py"),
    *("lab.py", "lab_*.py", "preload.py", "serve.py", "serve_*.py"),
)
"""Composition roots: the only files that may import every package."""

CORE_ORDER: tuple[tuple[str, ...], ...] = (
    ("__init__.py", "errors.py"),
    ("values.py",),
    ("merkle.py", "reader.py", "public_area.py", "attest.py", "protocol.py"),
    ("messages.py", "messages_*.py", "wire_*.py", "keylime_wire.py", "credential.py", "certificates.py"),
)
"""Layers of core from the bottom; a file named nowhere is above them all."""

HOMES: Mapping[str, tuple[str, ...]] = {
    "tpm2_pytss": ("tpm.py", "tpm_*.py"),
    "merklelib": ("provider/merklelib_tree.py",),
    "pymerkle": ("bench_tree.py",),
    "sqlalchemy": ("store.py", "store_*.py", "*/tables.py", "*_store.py", "*journal*.py", "migrations/*"),
    "prometheus_client": ("metrics.py", "metrics_*.py"),
    "alembic": ("store_schema.py", "migrations/*"),
    "aiohttp": (
        "web.py",
        "web_*.py",
        "peer.py",
        "peer_*.py",
        "*_routes.py",
        "provider/host_agent.py",
        "provider/proxy.py",
        "provider/registrar.py",
        "provider/stream*.py",
        "tenant/registrar.py",
        "tenant/verifier.py",
        "tenant/guest_agent.py",
        "attacks/*.py",
        "bench_bare.py",
        "bench_peers.py",
    ),
}
"""Outside package: the files that may import it."""

STANDARD_LIBRARY_ONLY = ("provider/localca.py",)
"""Programs that another program starts several times: swtpm_setup and our create_certs_tool."""


@dataclass(frozen=True, slots=True)
class Import:
    """One imported module, as a file and line says it."""

    path: str
    line: int
    target: str
    for_types: bool = False


@dataclass(frozen=True, slots=True, order=True)
class Finding:
    """One broken rule."""

    rule: int
    path: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: rule {self.rule}: {self.text}"


def check(package: Path) -> list[Finding]:
    """Everything in ``package`` (a folder, whose name is the package's) that breaks a rule, in order."""
    files = sorted(package.rglob("*.py"))
    modules = {_module_of(package, file): file.relative_to(package).as_posix() for file in files}
    findings: list[Finding] = []
    edges: dict[str, set[str]] = {}
    for file in files:
        path = file.relative_to(package).as_posix()
        source = file.read_text(encoding="utf-8")
        tree = ast.parse(source, path)
        imports = list(_imports(tree, path, package.name, modules))
        findings += _size(tree, path, source)
        for found in dict.fromkeys(imports):
            findings += _judge(found, package.name, modules)
        run = {found.target for found in imports if not found.for_types}
        edges[path] = {modules[target] for target in run if target in modules} - {path}
    findings += [Finding(5, cycle[0], 1, "import cycle " + " -> ".join([*cycle, cycle[0]])) for cycle in _cycles(edges)]
    return sorted(findings)


def _module_of(package: Path, file: Path) -> str:
    parts = [package.name, *file.relative_to(package).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(tree: ast.Module, path: str, name: str, modules: Mapping[str, str]) -> Iterator[Import]:
    for_types = {id(inner) for node in ast.walk(tree) if _is_for_types(node) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(path, node.lineno, alias.name, id(node) in for_types)
        elif isinstance(node, ast.ImportFrom):
            base = _base(node, path, name)
            for alias in node.names:
                member = f"{base}.{alias.name}"
                yield Import(path, node.lineno, member if member in modules else base, id(node) in for_types)
        elif isinstance(node, ast.Call) and _is_import_call(node.func):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield Import(path, node.lineno, argument.value)


def _is_for_types(node: ast.AST) -> bool:
    """Whether this is ``if TYPE_CHECKING:``; a branch for the other case would count as for types too."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _is_import_call(function: ast.expr) -> bool:
    called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return called in {"import_module", "__import__"}


def _base(node: ast.ImportFrom, path: str, name: str) -> str:
    if node.level == 0:
        return node.module or ""
    folder = [name, *Path(path).parent.parts]
    parts = folder[: len(folder) - node.level + 1]
    return ".".join([*parts, node.module] if node.module else parts)


def _judge(found: Import, name: str, modules: Mapping[str, str]) -> Iterator[Finding]:
    top = found.target.split(".")[0]
    if top != name:
        home = HOMES.get(top)
        if home is not None and not _matches(found.path, home):
            yield Finding(3, found.path, found.line, f"imports {top}, whose home is {', '.join(home)}")
        if _matches(found.path, STANDARD_LIBRARY_ONLY) and top not in sys.stdlib_module_names:
            yield Finding(7, found.path, found.line, f"imports {top}, which is not in the standard library")
        return
    if _matches(found.path, STANDARD_LIBRARY_ONLY):
        yield Finding(7, found.path, found.line, f"imports {found.target}, which is not in the standard library")
    target = modules.get(found.target, found.target.removeprefix(f"{name}.").replace(".", "/") + ".py")
    source_kind, target_kind = _kind(found.path), _kind(target)
    if source_kind == "root" or source_kind == target_kind != "core":
        return
    if target_kind != "core":
        rule = 1 if source_kind == "core" else 2
        yield Finding(rule, found.path, found.line, f"{source_kind} imports {found.target} ({target_kind})")
    elif source_kind == "core" and _rank(target) > _rank(found.path):
        yield Finding(4, found.path, found.line, f"imports {found.target}, which is above it in core")


def _kind(path: str) -> str:
    """``core``, ``root`` (composition root) or the name of the sub-package."""
    folder, _, rest = path.partition("/")
    if rest:
        return folder
    return "root" if _matches(path, ROOTS) else "core"


def _rank(path: str) -> int:
    for rank, patterns in enumerate(CORE_ORDER):
        if _matches(path, patterns):
            return rank
    return len(CORE_ORDER)


def _matches(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def too_long(folder: Path) -> list[Finding]:
    """Files below a folder that are too long and give no reason for it, whatever they import."""
    return [
        finding
        for file in sorted(folder.rglob("*.py"))
        for source in [file.read_text(encoding="utf-8")]
        for finding in _size(ast.parse(source), file.relative_to(folder).as_posix(), source)
    ]


def _size(tree: ast.Module, path: str, source: str) -> Iterator[Finding]:
    lines = len(source.splitlines())
    reason = any(line.strip().startswith("Size:") for line in (ast.get_docstring(tree) or "").splitlines())
    if lines > LINE_LIMIT and not reason:
        yield Finding(6, path, 1, f"has {lines} lines and no Size: line in its docstring")


def _cycles(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """Each group of files that import each other, once, as one path through it."""
    done: set[str] = set()
    cycles: list[list[str]] = []

    def visit(path: str, trail: list[str]) -> None:
        if path in trail:
            cycles.append(trail[trail.index(path) :])
            return
        if path in done:
            return
        for target in sorted(edges.get(path, ())):
            visit(target, [*trail, path])
        done.add(path)

    for start in sorted(edges):
        visit(start, [])
    return cycles
