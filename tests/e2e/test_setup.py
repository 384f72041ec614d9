"""Set-up: interpreters are found by running them, packages are installed only when missing, and nothing is asked."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
FOR_TESTS = {
    "openssl": ("openssl", "openssl"),
    "systemd-analyze": ("systemd", "systemd"),
    "chattr": ("e2fsprogs", "e2fsprogs"),
    "mount": ("mount", "util-linux"),
    "umount": ("mount", "util-linux"),
    "unshare": ("util-linux", "util-linux"),
    "setpriv": ("util-linux", "util-linux"),
}
"""Programs that only tests need: Debian's package, and Fedora's."""
NEEDED = ("bash", "sh", "env", "cat", "cut", "sort", "tr", "head", "grep", "sha256sum", "dirname", "id", "true")


def load_tool(name: str) -> ModuleType:
    """A file of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pythons = load_tool("pythons")


def script(path: Path, body: str) -> Path:
    """An executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def test_a_dead_shim_is_no_interpreter(tmp_path: Path) -> None:
    """A command of the right name that fails, prints something else or does not exist is not offered."""
    failing = script(tmp_path / "python3.12", "echo 'python3.12: command not found' >&2; exit 127")
    talking = script(tmp_path / "python3.13", "echo 3.13")
    assert pythons.probe(str(failing)) is None
    assert pythons.probe(str(talking)) is None
    assert pythons.probe(str(tmp_path / "nothing")) is None


def test_the_running_interpreter_is_found_with_its_version() -> None:
    """An interpreter that runs tells its version and whether C headers are there."""
    found = pythons.probe(sys.executable)
    assert found is not None
    assert found.version == sys.version_info[:2]


def test_interpreters_behind_a_dead_shim_are_found(tmp_path: Path) -> None:
    """A version manager's folder is searched when the command in PATH is a shim that does not run."""
    script(tmp_path / "shims" / "python3", "exit 127")
    behind = tmp_path / ".pyenv" / "versions" / "3.11.99" / "bin" / "python3"
    script(behind, f'exec "{sys.executable}" "$@"')
    found = pythons.found({"PATH": str(tmp_path / "shims"), "HOME": str(tmp_path)})
    assert [one.version for one in found] == [sys.version_info[:2]]


def one(path: str, minor: int, *, has_headers: bool = True) -> tuple[str, tuple[int, int], bool]:
    """A made-up interpreter."""
    made: tuple[str, tuple[int, int], bool] = pythons.Interpreter(path, (3, minor), has_headers)
    return made


@pytest.mark.parametrize(
    ("found", "best"),
    [
        ([], None),
        ([one("old", 10)], None),
        ([one("default", 12), one("other", 11)], "default"),
        ([one("bare", 11, has_headers=False), one("full", 12)], "full"),
        ([one("new", 14), one("tested", 11)], "tested"),
        ([one("new", 14)], "new"),
        ([one("bare", 13, has_headers=False)], "bare"),
    ],
)
def test_the_best_interpreter_is_tested_and_can_compile(found: list[object], best: str | None) -> None:
    """Tested versions come first, then those with headers, then the machine's default; old ones never."""
    chosen = pythons.best(found)
    assert (chosen and chosen.path) == best


def test_the_closing_lines_say_which_versions_were_found() -> None:
    """Each supported version is named, with its path or as not found."""
    lines = pythons.table({(3, 12): one("/x/python3.12", 12)})
    assert lines[1] == "Python 3.12: /x/python3.12"
    assert [line for line in lines if "not found" in line] == [lines[0], lines[2]]


class Machine:
    """A folder that is the whole PATH, with stubs that write down how they were called."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.log = folder / "calls"
        self.log.touch()
        for name in NEEDED:
            found = shutil.which(name)
            assert found is not None, name
            (self.bin / name).symlink_to(found)
        for name in ("swtpm", "swtpm_setup", "tpm2_pcrread", "gcc", "make", *FOR_TESTS):
            script(self.bin / name, "exit 0")
        (self.bin / "python3").symlink_to(sys.executable)
        script(self.bin / "pkg-config", "exit 0")
        script(self.bin / "id", "echo 0")

    def installer(self, name: str, *, installs: str) -> None:
        """A package manager that records its call and, when told to install, makes one program appear."""
        target = self.bin / installs
        script(
            self.bin / name,
            f'echo "{name} $*" >>"{self.log}"\n'
            f'case "$*" in *install*) printf "#!/bin/sh\\nexit 0\\n" >"{target}"; /bin/chmod 755 "{target}" ;; esac',
        )

    def remove(self, name: str) -> None:
        """Take a program away."""
        (self.bin / name).unlink()

    @property
    def calls(self) -> list[str]:
        """What was installed, in order."""
        return self.log.read_text(encoding="utf-8").splitlines()

    def setup(self, *options: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """Run the package part of the set-up in this machine, without standard input or a terminal."""
        env: Mapping[str, str] = {"PATH": str(self.bin), "HOME": str(self.bin.parent), **environ}
        return subprocess.run(
            [shutil.which("bash") or "bash", str(ROOT / "tools" / "setup.sh"), "--packages", *options],
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
            start_new_session=True,
        )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A machine on which nothing is missing."""
    return Machine(tmp_path)


def test_nothing_is_installed_where_nothing_is_missing(machine: Machine) -> None:
    """On a complete machine no package manager is called and nothing is said."""
    machine.installer("apt-get", installs="swtpm")
    ran = machine.setup()
    assert (ran.returncode, ran.stderr, machine.calls) == (0, "", [])


@pytest.mark.parametrize(
    ("program", "package"), [("swtpm", "swtpm"), ("swtpm_setup", "swtpm-tools"), ("tpm2_pcrread", "tpm2-tools")]
)
def test_only_the_missing_package_is_installed(machine: Machine, program: str, package: str) -> None:
    """On Debian the lists are updated first, then exactly the missing package is installed without a question."""
    machine.remove(program)
    machine.installer("apt-get", installs=program)
    ran = machine.setup()
    assert ran.returncode == 0, ran.stderr
    assert machine.calls == ["apt-get -qq update", f"apt-get -qq install -y --no-install-recommends {package}"]
    assert f"installing with apt-get: {package}" in ran.stderr


def test_fedora_is_asked_through_dnf(machine: Machine) -> None:
    """Where dnf is the package manager it installs, without a question."""
    machine.remove("swtpm_setup")
    machine.installer("dnf", installs="swtpm_setup")
    assert machine.setup().returncode == 0
    assert machine.calls == ["dnf -q -y install swtpm-tools"]


@pytest.mark.parametrize("present", ["pg_ctlcluster", "initdb"])
def test_a_database_server_is_for_the_tests_only(machine: Machine, present: str) -> None:
    """Without tests none is installed; for tests it is, unless its programs are there (Debian's, or in PATH)."""
    machine.installer("apt-get", installs=present)
    assert (machine.setup().returncode, machine.calls) == (0, [])
    ran = machine.setup("--tests")
    assert ran.returncode == 0, ran.stderr
    assert machine.calls == ["apt-get -qq update", "apt-get -qq install -y --no-install-recommends postgresql"]
    assert "the tests run private PostgreSQL servers" in ran.stderr
    again = machine.setup("--tests")
    assert (again.returncode, again.stderr, len(machine.calls)) == (0, "", 2)


def test_fedora_is_asked_for_its_own_server_package(machine: Machine) -> None:
    """Where dnf is the package manager the server has another name."""
    machine.installer("dnf", installs="initdb")
    assert machine.setup("--tests").returncode == 0
    assert machine.calls == ["dnf -q -y install postgresql-server"]


@pytest.mark.parametrize("program", FOR_TESTS)
@pytest.mark.parametrize("manager", ["apt-get", "dnf"])
def test_programs_of_the_tests_are_installed_for_them_only(machine: Machine, program: str, manager: str) -> None:
    """Without `--tests` nobody misses them; with it the package that brings one is installed, once."""
    script(machine.bin / "initdb", "exit 0")
    machine.remove(program)
    machine.installer(manager, installs=program)
    assert (machine.setup().returncode, machine.calls) == (0, [])
    assert machine.setup("--tests").returncode == 0
    package = FOR_TESTS[program][manager == "dnf"]
    assert machine.calls[-1].endswith(f" {package}")
    calls = len(machine.calls)
    again = machine.setup("--tests")
    assert (again.returncode, again.stderr, len(machine.calls)) == (0, "", calls)


def test_an_unknown_option_is_refused(machine: Machine) -> None:
    """Nothing is installed for a word that means nothing."""
    ran = machine.setup("--test")
    assert (ran.returncode, machine.calls) == (2, [])
    assert "unknown option --test" in ran.stderr


def test_a_user_with_sudo_is_served_through_it(machine: Machine) -> None:
    """A user whose sudo needs no password gets the packages installed through sudo."""
    machine.remove("swtpm")
    machine.installer("apt-get", installs="swtpm")
    script(machine.bin / "id", "echo 1000")
    script(machine.bin / "sudo", f'echo "sudo $1" >>"{machine.log}"; shift; exec "$@"')
    assert machine.setup().returncode == 0
    assert machine.calls[1:] == [
        "sudo -n",
        "apt-get -qq update",
        "apt-get -qq install -y --no-install-recommends swtpm",
    ]


def test_without_rights_the_command_to_run_is_said(machine: Machine) -> None:
    """Neither root nor sudo: exit code 2 and the command that someone with rights has to run."""
    machine.remove("swtpm")
    machine.installer("apt-get", installs="swtpm")
    script(machine.bin / "id", "echo 1000")
    ran = machine.setup()
    assert (ran.returncode, machine.calls) == (2, [])
    assert "run as root: " in ran.stderr
    assert "apt-get -qq install -y --no-install-recommends swtpm" in ran.stderr


def test_without_a_package_manager_the_packages_are_named(machine: Machine) -> None:
    """Neither apt-get nor dnf: exit code 2 and the names of what is missing."""
    machine.remove("swtpm")
    ran = machine.setup()
    assert ran.returncode == 2
    assert "swtpm" in ran.stderr


def test_an_installation_that_changed_nothing_is_an_error(machine: Machine) -> None:
    """A package manager that claims success but leaves the program missing is not believed."""
    machine.remove("swtpm")
    machine.installer("apt-get", installs="something-else")
    ran = machine.setup()
    assert ran.returncode == 2
    assert "still missing after the installation: swtpm" in ran.stderr


def test_help_of_make_lists_the_commands() -> None:
    """`make` without a target explains itself."""
    ran = subprocess.run(["make", "-C", str(ROOT)], capture_output=True, text=True, timeout=240, check=True)
    assert {"make demo", "make test", "make clean"} <= {" ".join(line.split()[:2]) for line in ran.stdout.splitlines()}


def test_help_starts_without_the_heavy_parts() -> None:
    """The command line loads neither services nor their libraries before a command asks for them."""
    heavy = ["aiohttp", "sqlalchemy", "cryptography", "pydantic", "tpm2_pytss", "structlog", "asyncio", "yaml"]
    code = f"import harness.cli, sys; print(sorted(set({heavy}) & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=True)
    assert ran.stdout.strip() == "[]"
