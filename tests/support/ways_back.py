"""A lab whose operators find their ways back: what a person at the terminal does, sees and leaves in the audit trails.

Each alarm has a real cause, made by `harness` commands, by the host's power switch, or on the disk of a host that its
owner controls; each way back is commands of `harness` only.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

from harness import cli, cli_exit
from harness.sim import control
from harness.tenant.states import ACTIVE
from tests.support.running_lab import COMMAND_S, RunningLab

WHY = "ticket 4711"
LIMIT_S = 240.0
_AGAIN_S = 4.0
_ACTIVE = {state.name for state in ACTIVE}
Test = TypeVar("Test", bound=Callable[..., None])


def raises(*kinds: str, perhaps: tuple[str, ...] = ()) -> Callable[[Test], Test]:
    """A test that raises alarms of these kinds, and has them acknowledged by `WaysBack.settled` before it ends.

    Args:
        kinds: of a test with a table: all that its rows raise.
        perhaps: others that come or not, by who is faster.
    """

    def declare(test: Test) -> Test:
        @functools.wraps(test)
        def checked(*args: object, lab: WaysBack, **kwargs: object) -> None:
            lab.seen_kinds = frozenset()
            test(*args, lab=lab, **kwargs)
            sure = lab.seen_kinds - set(perhaps)
            told = f"declared {sorted(kinds)}, raised {sorted(lab.seen_kinds)}"
            assert sure <= set(kinds), told
            assert sure == set(kinds) or (sure and hasattr(checked, "pytestmark")), told

        checked.alarm_kinds = frozenset(kinds)  # type: ignore[attr-defined]
        return checked  # type: ignore[return-value]

    return declare


class WaysBack(RunningLab):
    """A lab with ``tenant status --watch`` running beside it.

    Invariant: no line that it ever showed has a guest that is attested and stopped.
    """

    def __init__(self, folder: Path, topology: str) -> None:
        super().__init__(folder, topology)
        self.seen_kinds: frozenset[str] = frozenset()
        self.ids: dict[str, str] = {}
        self._shown: dict[str, dict[str, Any]] = {}
        self._wrong: list[dict[str, Any]] = []
        self._came = threading.Condition()
        self._watching: subprocess.Popen[str] | None = None

    # --- what is seen -------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Reads the watched status for the time of the context."""
        self.names()
        command = [sys.executable, "-P", "-m", "harness", "tenant", "status", "--watch", "--json", "--every", "0.3"]
        environment = {**os.environ, "HARNESS_LAB": str(self.folder / "lab.yml")}
        with subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as self._watching:
            reader = threading.Thread(target=self._read, args=(self._watching,))
            reader.start()
            try:
                self.attested(since=0.0)
                yield
            finally:
                self._watching.terminate()
                reader.join(LIMIT_S)
        assert self._wrong == [], "shown as attested while stopped"

    def names(self) -> None:
        """Learns the ids of the guests by their names."""
        for guest in json.loads(self.do("provider", "guest", "list", "--json").stdout):
            self.ids[guest["name"]] = guest["agent_id"]

    def _read(self, watching: subprocess.Popen[str]) -> None:
        assert watching.stdout is not None
        for line in watching.stdout:
            guests = json.loads(line)["guests"]
            with self._came:
                self._shown = {guest["agent_id"]: guest for guest in guests}
                self._wrong += [one for one in guests if one["attested"] and one["state"] not in _ACTIVE]
                self._came.notify_all()

    def see(self, what: str, holds: Callable[[dict[str, dict[str, Any]]], bool], limit_s: float = LIMIT_S) -> None:
        """Waits until the shown status, by name of the guest, is as expected."""
        until = time.monotonic() + limit_s
        with self._came:
            while True:
                named = {name: self._shown[id_] for name, id_ in self.ids.items() if id_ in self._shown}
                if holds(named):
                    return
                left = until - time.monotonic()
                if left <= 0 or (self._watching is not None and self._watching.poll() is not None):
                    break
                self._came.wait(min(left, 1.0))
        raise AssertionError(f"{what} was not seen; seen: {json.dumps(named, indent=1)}\n{self.tail()}")

    def attested(self, *names: str, since: float | None = None, limit_s: float = LIMIT_S) -> None:
        """Waits until these guests (default: all) are attested by evidence of after ``since`` (default: now)."""
        after = time.time() if since is None else since
        wanted = names or tuple(self.ids)

        def holds(shown: dict[str, dict[str, Any]]) -> bool:
            return all(
                name in shown and shown[name]["attested"] and (shown[name]["last_success"] or 0) > after
                for name in wanted
            )

        self.see(f"attested: {', '.join(wanted)}", holds, limit_s)

    def stopped(self, *names: str, state: str = "INVALID_QUOTE", check: int | None = None, error: str) -> None:
        """Waits until these guests have stopped for this reason; none of them is shown as attested then."""

        def holds(shown: dict[str, dict[str, Any]]) -> bool:
            wanted = {"state": state, "failed_check": check, "error": error, "attested": False}
            return all(name in shown and wanted.items() <= shown[name].items() for name in names)

        self.see(f"{state} by {error} of {', '.join(names)}", holds)

    # --- what is done -------------------------------------------------------------------------------------

    def run(self, *words: str, timeout: float = COMMAND_S) -> subprocess.CompletedProcess[str]:
        """``harness WORDS`` in the lab's folder; what does not fork runs here: a new interpreter takes a second."""
        if words[0] == "lab":
            return super().run(*words, timeout=timeout)
        out, err = io.StringIO(), io.StringIO()
        environment = {"HARNESS_LAB": str(self.folder / "lab.yml"), "NO_COLOR": "1"}
        with (
            mock.patch.dict(os.environ, environment),
            contextlib.chdir(self.folder),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            code = cli_exit.run(lambda: cli.app(list(words), prog_name="harness"))
        return subprocess.CompletedProcess(["harness", *words], code, out.getvalue(), err.getvalue())

    def do(self, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        """A command that ends with this exit code."""
        done = self.run(*words)
        assert done.returncode == code, f"{' '.join(words)}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def act(self, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        """A command that overrules something, with a reason."""
        return self.do(*words, "--reason", WHY, code=code)

    def resumed(self, guest: str, tenant: str) -> None:
        """Resumes a guest, and again when it has stopped again because its cause was not quite gone yet."""
        until, since = time.monotonic() + LIMIT_S, time.time()
        while time.monotonic() < until:
            self.act("tenant", "guest", "resume", guest, "--tenant", tenant)
            with contextlib.suppress(AssertionError):
                self.attested(guest, since=since, limit_s=_AGAIN_S)
                return
            self.see(f"{guest} attested or stopped", lambda shown: self._decided(shown[guest], since))
            if self.guests()[self.ids[guest]]["attested"]:
                return
        raise AssertionError(f"{guest} was not attested again by any resume\n{self.tail()}")

    @staticmethod
    def _decided(shown: dict[str, Any], since: float) -> bool:
        return shown["state"] not in _ACTIVE or (shown["attested"] and (shown["last_success"] or 0) > since)

    def advised(self, guest: str, tenant: str, words: str) -> None:
        """What ``guest show`` says to do about a guest that is not attested has these words in it."""
        shown = self.do("tenant", "guest", "show", guest, "--tenant", tenant, code=1).stdout
        assert words in " ".join(shown.split()), shown

    def verdicts(self, guest: str, tenant: str) -> list[dict[str, Any]]:
        """The newest verdicts on a guest, oldest first."""
        shown = json.loads(self.run("tenant", "guest", "show", guest, "--tenant", tenant, "--json").stdout)
        found: list[dict[str, Any]] = shown["attestation"]["last_verdicts"]
        return found

    def errors(self, guest: str, tenant: str) -> set[str]:
        """What the newest verdicts on a guest found."""
        return {verdict["error"] for verdict in self.verdicts(guest, tenant) if verdict["error"]}

    def of_host(self, request: dict[str, object], host: str = "host1") -> dict[str, object]:
        """Answer of a host's hardware TPM: its power switch and its chip."""
        return asyncio.run(control.ask(self.state / "h" / host / "c", request))

    def new_vtpm(self, guest: str, tenant: str) -> None:
        """A guest is removed at the provider with its vTPM, and defined and started under the same UUID."""
        self.act("provider", "guest", "remove", guest)
        self.do("provider", "guest", "define", guest, "--uuid", self.ids[guest], "--tenant", tenant)
        self.do("provider", "guest", "start", guest)

    # --- alarms and trails --------------------------------------------------------------------------------

    def tenants(self) -> list[str]:
        """Names of the tenants that the lab has now."""
        return [tenant["name"] for tenant in self.json("lab", "status")["tenants"]]

    def alarms(self, tenant: str) -> list[str]:
        """Kinds of the alarms of a tenant that nobody has acknowledged, oldest first."""
        return [
            alarm["kind"] for alarm in json.loads(self.run("tenant", "alarms", "--tenant", tenant, "--json").stdout)
        ]

    def settled(self, *kinds: str) -> None:
        """Exactly these kinds of alarms have come; each is acknowledged, all guests are attested, nothing is left."""
        found: set[str] = set()
        for tenant in self.tenants():
            listed = self.run("tenant", "alarms", "--tenant", tenant, "--json")
            alarms = json.loads(listed.stdout)
            assert listed.returncode == (1 if alarms else 0), listed.stderr
            if alarms:
                self.act("tenant", "alarms", "ack", *(alarm["id"] for alarm in alarms), "--tenant", tenant)
                assert json.loads(self.do("tenant", "alarms", "--tenant", tenant, "--json").stdout) == []
            found |= {alarm["kind"] for alarm in alarms}
        self.attested()
        assert found == set(kinds)
        self.seen_kinds = frozenset(found)

    def trail(self, tenant: str | None) -> list[dict[str, Any]]:
        """Audit trail of a tenant, or of the provider."""
        words = ["provider", "audit"] if tenant is None else ["tenant", "audit", "--tenant", tenant]
        entries: list[dict[str, Any]] = json.loads(self.do(*words, "--json").stdout)
        return entries

    def acts(self, tenant: str | None, since: float) -> set[str]:
        """Acts that were made with the reason since a moment, each by somebody."""
        entries = [entry for entry in self.trail(tenant) if entry["at"] >= since and entry["reason"] == WHY]
        owner = tenant or "provider"
        assert all(str(entry["who"]).startswith((f"{owner}/", "uid ")) for entry in entries), entries
        return {entry["action"] for entry in entries}


@contextlib.contextmanager
def ways_back(topology: str, files: Mapping[str, str] | None = None) -> Iterator[WaysBack]:
    """A lab that is up and watched, and ended with everything that belongs to it.

    Args:
        topology: text of lab.yml.
        files: what lies beside it.
    """
    with tempfile.TemporaryDirectory(prefix="hw") as name:
        for file, text in (files or {}).items():
            (Path(name) / file).write_text(text)
        lab = WaysBack(Path(name), topology)
        try:
            lab.up()
            with lab.watched():
                yield lab
        finally:
            lab.run("lab", "down")
