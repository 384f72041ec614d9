"""A guest manager and its guest agents as processes of their own, beside a host's guests' side in the test's process.

Everything may be killed. The host agent's parts are those of `vtpm_host`, and follow the real manager.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

from harness.config import GuestAgentSettings, GuestManagerSettings, Listen, dump
from harness.errors import HarnessError
from harness.lab_processes import ServiceProcess
from harness.pki import Role
from harness.provider import localca, scratch
from harness.provider.guests import GuestCache, SocketGuestSource
from harness.provider.journal import Journal
from harness.provider.local_socket import LocalSocket
from harness.provider.residency import GuestResidency
from harness.provider.tables import HOST_SCHEMA, HostBase
from harness.provider.vtpm_ca import VtpmCa
from harness.store import open_store
from harness.unix_client import ask
from harness.values import AgentId
from tests.support.guest_lab import vtpm_pids
from tests.support.provider_lab import Pki
from tests.support.vtpm_host import SoftCa

TIME_S = 240.0
_POLL_S = 0.05


class FaultLab:
    """The running parts. `start_manager` starts the manager, again after it was killed."""

    def __init__(self, folder: Path, cache: GuestCache, journal: Journal, local: LocalSocket, host: GuestResidency):
        self.folder = folder
        self.cache = cache
        self.journal = journal
        self.local = local
        self.residency = host
        self.socket = folder / "manager"
        self.manager = ServiceProcess("guest manager", "guest-manager", folder / "manager.yml", folder / "manager.log")
        self._pki = Pki.make(folder / "pki", "alice")
        tool = Path(localca.__file__)
        tool.chmod(tool.stat().st_mode | 0o111)
        config = folder / "localca.conf"
        config.write_text(f"socket = {folder / 'local'}\n")
        settings = GuestManagerSettings(
            state_dir=folder / "guests",
            socket=self.socket,
            host_agent=folder / "local",
            create_certs_tool=tool,
            create_certs_config=config,
            logs=folder,
        )
        dump(settings, folder / "manager.yml")

    async def start_manager(self) -> None:
        """Starts it and waits until it answers and the host's cache follows it."""
        self.manager.start()

        async def answers() -> bool:
            self.manager.check()
            await self.shown()
            self.cache.domains()
            return True

        await eventually(answers)

    def kill_manager(self) -> None:
        kill(cast(int, self.manager.pid))

    async def shown(self) -> list[dict[str, Any]]:
        return cast(list[dict[str, Any]], (await ask(self.socket, {"op": "list"}, deadline_s=TIME_S))["domains"])

    async def of(self, agent_id: AgentId) -> dict[str, Any]:
        """What the list says of a guest."""
        return next(entry for entry in await self.shown() if entry["uuid"] == str(agent_id))

    async def ask(self, op: str, agent_id: AgentId, **members: object) -> None:
        await ask(self.socket, {"op": op, "uuid": str(agent_id), **members}, deadline_s=TIME_S)

    async def define(self, agent_id: AgentId, name: str, *, port: int | None = None, autostart: bool = True) -> None:
        """A guest, with an agent when a port is given."""
        members: dict[str, object] = {"name": name, "scenario": "guest-good", "autostart": autostart}
        if port is not None:
            members["agent_config"] = str(self._agent(agent_id, name, port))
        await self.ask("define", agent_id, **members)

    def _agent(self, agent_id: AgentId, name: str, port: int) -> Path:
        settings = GuestAgentSettings(
            listen=Listen(port=port),
            tls=self._pki.tls("alice", Role.GUEST_AGENT, str(agent_id), trusts=["provider", "alice"]),
            tenant="alice",
            agent_id=agent_id,
            tcti=f"swtpm:path={self.state_dir(agent_id).parent / 's'}",
            state_dir=self.folder / f"agent-{name}",
            registrars=["https://127.0.0.1:1"],
            payload_dir=self.folder / f"agent-{name}",
        )
        dump(settings, self.folder / f"agent-{name}.yml")
        return self.folder / f"agent-{name}.yml"

    async def runs(self, agent_id: AgentId, *, other_than: object = None) -> str:
        """Waits until a guest runs, in another run than this one; the id of its run."""

        async def running() -> bool:
            shown = await self.of(agent_id)
            return bool(shown["state"] == "running" and shown["run"] != other_than)

        await eventually(running)
        return str((await self.of(agent_id))["run"])

    async def is_here(self, agent_id: AgentId) -> bool:
        """Whether the host would give the guest a leaf now."""
        return isinstance((await self.residency.check({agent_id}))[agent_id], bytes)

    def state_dir(self, agent_id: AgentId) -> Path:
        return self.folder / "guests" / str(agent_id) / "tpm"

    def vtpm_pid(self, agent_id: AgentId) -> int:
        [pid] = vtpm_pids(self.state_dir(agent_id))
        return pid

    def log(self, name: str) -> list[dict[str, object]]:
        """Events in a log; lines of other kinds as ``{"text": ...}``."""
        lines = (self.folder / f"{name}.log").read_text().splitlines()
        return [json.loads(line) if line.startswith("{") else {"text": line} for line in lines]


@asynccontextmanager
async def fault_lab(folder: Path) -> AsyncIterator[FaultLab]:
    """The parts; the manager is not started yet, and is stopped at the end."""
    url = f"sqlite+aiosqlite:///{folder / 'agent.db'}"
    store = await open_store(url, HostBase.metadata, component="host-agent", version=HOST_SCHEMA)
    soft = SoftCa()
    cache, journal = GuestCache(SocketGuestSource(folder / "manager"), rng=random.Random(1)), Journal(store)
    residency = GuestResidency(cache, journal, scratch.read_ek)
    ca = VtpmCa(soft.public, soft.sign, journal, cache, host="host-1")
    local = LocalSocket(folder / "local", {os.getuid()}, ca, residency, journal)
    lab = FaultLab(folder, cache, journal, local, residency)
    following = asyncio.create_task(cache.follow())
    try:
        await local.start()
        yield lab
    finally:
        await lab.manager.stop()
        await local.stop()
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await store.close()


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


async def listens(port: int) -> bool:
    """Whether somebody accepts connections there."""
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


async def eventually(condition: Callable[[], Awaitable[bool]]) -> None:
    """Waits until a question is answered with yes; a part that is not there yet is no answer."""
    async with asyncio.timeout(TIME_S):
        while True:
            try:
                if await condition():
                    return
            except (HarnessError, OSError):
                pass
            await asyncio.sleep(_POLL_S)
