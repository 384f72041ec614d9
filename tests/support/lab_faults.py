"""What tests of faults in a whole lab share: an eye that never closes, what was enrolled, small disks, databases.

The eye asks the tenants' verifiers several times a second, as an operator may, and keeps each answer: "attested" on
evidence that is older than three intervals is found also where a test looks for something else.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from harness.config import SiteSettings, TenantSite, load
from harness.errors import HarnessError
from harness.peer import PeerClient
from tests.support.running_lab import RunningLab

_LOOK_S = 0.2
_ASK_S = 10.0
_JUMP_S, _SETTLE_S = 1.0, 3.0
"""A clock that goes apart from the monotonic one by more was set; every process knows it after that time."""
_PLACES = ("p", "t", "h", "log")


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """One answer: what a verifier said of a guest, and when it was asked (unix time)."""

    asked: float
    agent_id: str
    attested: bool
    last_success: float | None
    window_s: float
    error: str | None
    state: str

    @property
    def stale(self) -> bool:
        """Shown as attested on evidence that was too old already when we asked."""
        return self.attested and (self.last_success is None or self.asked - self.last_success >= self.window_s)


class Eye:
    """Looks at all guests of a lab while the context lasts; at its end no look may have shown a stale success.

    Args:
        lab: it is up.
        now: the lab's clock, unix time.
    """

    def __init__(self, lab: RunningLab, *, now: Callable[[], float] = time.time) -> None:
        self.looks: list[Look] = []
        self._site = load(lab.state / "site.yml", SiteSettings)
        self._now = now
        self._offset_s, self._set_at = now() - time.monotonic(), float("-inf")
        self._end = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._watch()), name="eye")

    def __enter__(self) -> Eye:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()
        if kind is None:
            assert self.looks, "no verifier was heard"
            assert [look for look in self.looks if look.stale] == []

    def saw(self, agent_id: str, holds: Callable[[Look], bool], since: float = 0.0) -> bool:
        """Whether a look at this guest, since then, had something."""
        return any(holds(look) for look in self.looks if look.agent_id == agent_id and look.asked >= since)

    def _is_settled(self) -> bool:
        """Whether the lab's clock was not set just now: an answer may still be by the one before."""
        at = time.monotonic()
        if abs(self._now() - at - self._offset_s) > _JUMP_S:
            self._offset_s, self._set_at = self._now() - at, at
        return at - self._set_at > _SETTLE_S

    def sees(self, agent_id: str) -> bool:
        """Whether a look at this guest is of the last second; for a wait after which there are new ones."""
        return self.saw(agent_id, lambda look: True, self._now() - 1)

    async def _watch(self) -> None:
        await asyncio.gather(*(self._tenant(tenant) for tenant in self._site.tenants.values()))

    async def _tenant(self, tenant: TenantSite) -> None:
        async with PeerClient(tenant.operator, tenant.verifier, deadline_s=_ASK_S) as client:
            while not self._end.is_set():
                for agent_id in tenant.guests.values():
                    asked = self._now()
                    try:
                        look = _look(asked, await client.get(f"/v2.3/agents/{agent_id}"))
                    except HarnessError:
                        continue  # it is away: nothing is shown
                    if self._is_settled():
                        self.looks.append(look)
                await asyncio.sleep(_LOOK_S)


def _look(asked: float, view: Any) -> Look:
    return Look(
        asked=asked,
        agent_id=view["agent_id"],
        attested=view["attested"],
        last_success=view["last_successful_attestation"],
        window_s=3 * view["quote_interval_s"],
        error=view["error"],
        state=view["state"],
    )


def enrolled(lab: RunningLab) -> dict[str, Any]:
    """Everything that the tenants have pinned: hosts with their keys and the time of enrolment, guests with theirs."""
    found: dict[str, Any] = {}
    for tenant in load(lab.state / "site.yml", SiteSettings).tenants:
        for host in lab.json("tenant", "host", "list", "--tenant", tenant):
            found[f"{tenant} {host['host_id']}"] = (host["ek"], host["ak"], host["ca"], host["enrolled_at"])
        for guest in lab.json("tenant", "guest", "list", "--tenant", tenant):
            found[guest["agent_id"]] = (guest["state"], guest["attestation"]["ak_name"], guest["host_id"])
    return found


def alarms(lab: RunningLab) -> list[tuple[str, str]]:
    """Alarms that wait for an operator: their kind and what they are about."""
    found = []
    for tenant in load(lab.state / "site.yml", SiteSettings).tenants:
        done = lab.run("tenant", "alarms", "list", "--tenant", tenant, "--json")
        assert done.returncode in {0, 1}, done.stderr  # 1: there are some
        found += json.loads(done.stdout)
    return [(alarm["kind"], alarm["detail"]) for alarm in found]


def databases(lab: RunningLab) -> list[Path]:
    """Files of all databases of a lab."""
    return sorted(path for place in _PLACES for path in (lab.state / place).rglob("*.db"))


def damaged(lab: RunningLab) -> list[str]:
    """What SQLite finds wrong in the databases."""
    found = []
    for path in databases(lab):
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10)) as connection:
            [(said,)] = connection.execute("PRAGMA integrity_check(1)").fetchall()
        if said != "ok":
            found.append(f"{path}: {said}")
    return found


def tracebacks(lab: RunningLab) -> list[str]:
    """Logs in which somebody raised what nobody caught."""
    return sorted(path.name for path in (lab.state / "log").iterdir() if b"Traceback" in path.read_bytes())


def why(lab: RunningLab, service: str, since: float) -> str:
    """What a service could not start for, in its own words, since then (unix time); empty when it could."""
    events = [json.loads(line) for line in lab.run("lab", "logs", service, "--json", "-n", "5").stdout.splitlines()]
    failed = [event for event in events if event["event"] == "service_failed"]
    new = [event for event in failed if datetime.datetime.fromisoformat(event["timestamp"]).timestamp() > since]
    return str(new[-1]["detail"]) if new else ""


@contextlib.contextmanager
def mounted(folder: Path, *arguments: str) -> Iterator[Path]:
    """Something mounted on a folder, and taken away at the end whatever is open there."""
    subprocess.run(["mount", *arguments, str(folder)], check=True, capture_output=True, timeout=120)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True, capture_output=True, timeout=120)


@contextlib.contextmanager
def full(folder: Path) -> Iterator[None]:
    """A disk without a byte left, while the context lasts."""
    filler = folder / "filler"
    try:
        for size in (1 << 20, 4096, 1):
            with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
                while True:
                    file.write(b"\0" * size)
        yield
    finally:
        filler.unlink()
