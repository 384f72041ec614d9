"""A guest manager on its real socket, with a host agent and guest agents that the test plays."""

from __future__ import annotations

import asyncio
import json
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

from harness.config import GuestManagerSettings
from harness.sim.guest_manager import GuestManager
from harness.unix_client import ask
from harness.unix_server import UnixServer
from harness.values import AgentId
from tests.support.vtpm_host import until

TIME_S = 240.0
TOOL = """#!/bin/sh
while [ $# -gt 0 ]; do
  case $1 in --type) type=$2 ;; --dir) dir=$2 ;; --vmid) vmid=$2 ;; esac
  shift
done
echo "$type $vmid" >> {log}
echo certificate > "$dir/$type.cert"
"""


class HostAgentHook:
    """The host agent's local socket: remembers who starts, and answers with ``answer``. Checks that no vTPM runs yet.

    ``hold`` makes it wait with the answer until it is set.
    """

    def __init__(self) -> None:
        self.answer: dict[str, object] = {"resident": True}
        self.started: list[tuple[str, str]] = []
        self.hold = asyncio.Event()
        self.hold.set()

    async def serve(self, reader: StreamReader, writer: StreamWriter) -> None:
        while line := await reader.readline():
            request = json.loads(line)
            assert request.pop("op") == "starting"
            assert vtpm_pids(Path(request["state_dir"])) == []
            self.started.append((request["agent_id"], request["state_dir"]))
            await self.hold.wait()
            writer.write(json.dumps(self.answer).encode() + b"\n")
            await writer.drain()


class Agents:
    """Makes guest agents that do nothing. ``fault`` is raised when one is started."""

    def __init__(self) -> None:
        self.running: list[tuple[str, Path]] = []
        self.starts = 0
        self.fault: Exception | None = None
        self._made: list[_Agent] = []

    def make(self, name: str, config: Path) -> _Agent:
        self._made.append(_Agent(self, (name, config)))
        return self._made[-1]

    def crash(self) -> None:
        """All end by themselves."""
        for made in self._made:
            made.end()


class _Agent:
    def __init__(self, agents: Agents, entry: tuple[str, Path]) -> None:
        self._agents, self._entry = agents, entry
        self._ended = asyncio.Event()
        self._ended.set()

    def start(self) -> None:
        if self._agents.fault is not None:
            raise self._agents.fault
        self._agents.starts += 1
        self._agents.running.append(self._entry)
        self._ended = asyncio.Event()

    def end(self) -> None:
        if not self._ended.is_set():
            self._ended.set()
            self._agents.running.remove(self._entry)

    async def wait(self) -> int | None:
        await self._ended.wait()
        return 1

    async def stop(self) -> None:
        self.end()


class Watcher:
    """A client of ``watch``."""

    def __init__(self, reader: StreamReader) -> None:
        self._reader = reader

    async def report(self) -> dict[str, Any]:
        async with asyncio.timeout(TIME_S):
            return cast(dict[str, Any], json.loads(await self._reader.readline()))

    async def change(self) -> tuple[str, str, str]:
        """UUID, event and state of the next change."""
        report = await self.report()
        return report["domain"]["uuid"], report["event"], report["domain"]["state"]

    async def until(self, event: str) -> list[str]:
        """Events up to and with this one."""
        seen: list[str] = []
        while not seen or seen[-1] != event:
            seen.append((await self.change())[1])
        return seen


class GuestLab:
    """One folder with everything in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hook = HostAgentHook()
        self.agents = Agents()
        self.tool_log = folder / "tool.log"
        self.tool = folder / "tool"
        self.tool.write_text(TOOL.format(log=self.tool_log))
        self.tool.chmod(0o700)

    @property
    def socket(self) -> Path:
        return self.folder / "manager"

    @property
    def settings(self) -> GuestManagerSettings:
        return GuestManagerSettings(
            state_dir=self.folder / "guests",
            socket=self.socket,
            host_agent=self.folder / "local",
            create_certs_tool=self.tool,
            create_certs_config=self.folder / "localca.conf",
            logs=self.folder,
        )

    @asynccontextmanager
    async def manager(self) -> AsyncIterator[asyncio.Task[None]]:
        """A running guest manager; afterwards cancelled, and it must end in time."""
        task = asyncio.create_task(GuestManager(self.settings, self.agents.make).run())
        try:
            await until(lambda: self.socket.exists() or task.done())
            if task.done():
                task.result()
            yield task
        finally:
            task.cancel()
            async with asyncio.timeout(TIME_S):
                await asyncio.gather(task, return_exceptions=True)

    @asynccontextmanager
    async def watcher(self) -> AsyncIterator[Watcher]:
        reader, writer = await asyncio.open_unix_connection(self.socket)
        try:
            writer.write(b'{"op": "watch"}\n')
            yield Watcher(reader)
        finally:
            writer.close()

    async def ask(self, **request: object) -> dict[str, object]:
        return await ask(self.socket, request, deadline_s=TIME_S)

    async def define(self, agent_id: AgentId, name: str = "vm", **members: object) -> None:
        order = {"op": "define", "uuid": str(agent_id), "name": name, "scenario": "guest-good"} | members
        assert await self.ask(**order) == {}

    async def start(self, agent_id: AgentId) -> None:
        assert await self.ask(op="start", uuid=str(agent_id)) == {}

    async def stop(self, agent_id: AgentId) -> None:
        assert await self.ask(op="stop", uuid=str(agent_id)) == {}

    async def domains(self) -> dict[str, str]:
        """State of each domain."""
        shown = cast(list[dict[str, str]], (await self.ask(op="list"))["domains"])
        return {entry["uuid"]: entry["state"] for entry in shown}

    async def shown(self) -> list[dict[str, Any]]:
        """All that the list says."""
        return cast(list[dict[str, Any]], (await self.ask(op="list"))["domains"])

    def state_dir(self, agent_id: AgentId) -> Path:
        return self.folder / "guests" / str(agent_id) / "tpm"


@asynccontextmanager
async def guest_lab(folder: Path) -> AsyncIterator[GuestLab]:
    """The lab with its host agent's hook; no guest manager yet."""
    lab = GuestLab(folder)
    server = UnixServer(folder / "local", lab.hook.serve)
    await server.start()
    try:
        yield lab
    finally:
        await server.stop()


def vtpm_pids(state_dir: Path) -> list[int]:
    """Processes of swtpm that use this state."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"dir={state_dir}".encode() in command:
            found.append(int(folder.name))
    return found
