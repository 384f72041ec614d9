"""The guest manager of a host with process guests: what libvirt is for VMs.

One JSON object per line on a UNIX socket, one as answer:

* ``{"op": "list"}``: ``{"domains": [{"uuid", "name", "state", "persistent", "state_dir", "autostart", "run"}]}``;
  ``run`` is null while the guest is off, else an id that no other start of it has
* ``{"op": "watch"}``: the same, and then one ``{"domain": {...}, "event": ...}`` for each change
* ``{"op": "define", "uuid", "name", "scenario", "agent_config", "create_certs", "autostart"}``: the last three may be
  left out: nothing runs inside; the host's own tool ({"tool", "config"} names another); false
* ``{"op": "autostart", "uuid", "on"}``: whether the guest is kept running; it is neither started nor stopped by this
* ``{"op": "start" | "stop" | "undefine", "uuid"}``

A guest with ``autostart`` is started with the manager, and again whenever it is off: a host agent that is not there
yet, or a vTPM that ends, costs it a power cycle and not its life. After a ``stop`` it stays off until ``start``, or
until the manager is started again.

A definition that was kept and cannot be used is a domain in state ``broken`` with the reason as ``detail``: ``define``
replaces the definition and keeps the vTPM, ``undefine`` removes both. When the manager ends while swtpm_setup runs,
the half-made vTPM is removed at the next start; the host's journal may hold its EK by then, and the next manufacture
is refused (Conflict) until an operator releases it: no vTPM is certified twice by itself (DESIGN 3.6).

Invariants:
    1. What is defined survives a restart of the manager; what runs does not, and is started again if it is kept.
    2. A watcher sees every change after its list, in order; one that does not read is cut off.

Owner: the service `GuestManager`.

Spec: DESIGN 3.1 (runs here), 5.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from asyncio import StreamReader, StreamWriter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from harness import events
from harness.config import GuestManagerSettings
from harness.errors import ConfigError, Conflict, HarnessError, MalformedMessage, NotFound
from harness.messages import parse_json
from harness.sim import guest_definitions
from harness.sim.guest import GuestDefinition, MakeAgent, ProcessGuest
from harness.sim.guest_definitions import Broken
from harness.sim.guest_keeper import GuestKeeper
from harness.unix_server import LINE_LIMIT, UnixServer, refusal
from harness.values import AgentId, parse_agent_id

_WATCHER_LIMIT = 10_000
_READ_S = 10.0


class GuestManager:
    """The service.

    Args:
        settings: from its file.
        make_agent: makes a guest agent.
    """

    def __init__(self, settings: GuestManagerSettings, make_agent: MakeAgent) -> None:
        self._settings = settings
        self._make_agent = make_agent
        self._guests: dict[AgentId, ProcessGuest] = {}
        self._broken: dict[AgentId, Broken] = {}
        self._keeper = GuestKeeper()
        self._watchers: set[asyncio.Queue[str]] = set()
        self._defining = asyncio.Lock()

    async def run(self, sock: object = None) -> None:
        """Serves until it is cancelled.

        Args:
            sock: not used: the socket is that of the settings.

        Raises:
            SimulationError: the socket cannot be made.

        *Cancellation:* every guest is stopped in order.
        """
        await asyncio.to_thread(self._settings.state_dir.mkdir, parents=True, exist_ok=True, mode=0o700)
        for found in await asyncio.to_thread(guest_definitions.load_all, self._settings.state_dir, **self._tool):
            if isinstance(found, Broken):
                self._broken[found.agent_id] = found
                events.emit("definition_broken", level="error", agent_id=str(found.agent_id), detail=found.detail)
            else:
                self._add(found)
        server = UnixServer(self._settings.socket, self._serve)
        await server.start()
        events.emit("ready", guests=len(self._guests), broken=len(self._broken))
        for guest in self._guests.values():
            if guest.definition.autostart:
                self._keeper.keep(guest)
        try:
            await asyncio.Event().wait()
        finally:
            await server.stop()  # first: a start that is in work is given up, and holds its guest no longer
            await self._keeper.close()
            await asyncio.gather(*(guest.stop() for guest in self._guests.values()))

    @property
    def _tool(self) -> dict[str, Path]:
        return {"tool": self._settings.create_certs_tool, "tool_config": self._settings.create_certs_config}

    async def _serve(self, reader: StreamReader, writer: StreamWriter) -> None:
        while line := await reader.readline():
            try:
                request = _request(line)
                if request == {"op": "watch"}:
                    await self._watch(writer)
                    return
                answer: Mapping[str, object] = await self._carry_out(request)
            except HarnessError as error:
                answer = refusal(error)
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()

    async def _carry_out(self, request: Mapping[str, object]) -> Mapping[str, object]:
        match request:
            case {"op": "list", **rest} if not rest:
                return self._list()
            case {"op": "define", **members}:
                await self._define({str(name): value for name, value in members.items()})
            case {"op": "autostart", "uuid": str(uuid), "on": bool(on), **rest} if not rest:
                await self._set_autostart(self._guest(uuid), on)
            case {"op": "start", "uuid": str(uuid), **rest} if not rest:
                await self._start(self._guest(uuid))
            case {"op": "stop", "uuid": str(uuid), **rest} if not rest:
                guest = self._guest(uuid)
                await self._keeper.release(guest)
                await guest.stop()
            case {"op": "undefine", "uuid": str(uuid), **rest} if not rest:
                await self._undefine(parse_agent_id(uuid))
            case _:
                raise MalformedMessage('"op" is list, watch, define, autostart (on), start, stop or undefine (uuid)')
        return {}

    # --- domains ------------------------------------------------------------------------------------------

    async def _define(self, members: Mapping[str, object]) -> None:
        definition = guest_definitions.parse(members, **self._tool)
        agent_id = definition.agent_id
        async with self._defining:  # of two definitions at once the second finds the first
            if agent_id in self._guests:
                raise Conflict(f"domain {agent_id} is defined already")
            await asyncio.to_thread(guest_definitions.save, self._folder(agent_id), members)
            self._broken.pop(agent_id, None)
            self._add(definition)
        self._tell(self._guests[agent_id], "defined")

    async def _set_autostart(self, guest: ProcessGuest, on: bool) -> None:
        folder = self._folder(guest.definition.agent_id)
        async with self._defining:
            members = await asyncio.to_thread(guest_definitions.load, folder)
            await asyncio.to_thread(guest_definitions.save, folder, {**members, "autostart": on})
            guest.definition = replace(guest.definition, autostart=on)
        if on and guest.state == "running":
            self._keeper.keep(guest)
        self._tell(guest, "changed")

    async def _start(self, guest: ProcessGuest) -> None:
        try:
            await guest.start()
        finally:
            if guest.definition.autostart:
                self._keeper.keep(guest)

    def _add(self, definition: GuestDefinition) -> None:
        agent_id = definition.agent_id
        guest = ProcessGuest(
            definition,
            self._folder(agent_id),
            self._settings.host_agent,
            make_agent=self._make_agent,
            changed=lambda state: self._tell(self._guests[agent_id], _EVENTS[state]),
        )
        self._guests[agent_id] = guest

    async def _undefine(self, agent_id: AgentId) -> None:
        broken = self._broken.pop(agent_id, None)
        if broken is not None:
            await asyncio.to_thread(shutil.rmtree, self._folder(agent_id), ignore_errors=True)
            self._report(_shown_broken(broken, self._folder(agent_id)), "undefined")
            return
        guest = self._guest(str(agent_id))
        await self._keeper.release(guest)
        await guest.remove()
        if self._guests.get(agent_id) is guest:  # only one of two calls at once
            del self._guests[agent_id]
            self._tell(guest, "undefined")

    def _guest(self, uuid: str) -> ProcessGuest:
        agent_id = parse_agent_id(uuid)
        guest = self._guests.get(agent_id)
        if guest is not None:
            return guest
        broken = self._broken.get(agent_id)
        if broken is not None:
            raise ConfigError(f"{broken.detail}; define the domain again, or undefine it")
        raise NotFound(f"no domain {uuid}")

    def _folder(self, agent_id: AgentId) -> Path:
        return self._settings.state_dir / str(agent_id)

    # --- watchers -----------------------------------------------------------------------------------------

    def _list(self) -> Mapping[str, object]:
        broken = [_shown_broken(one, self._folder(agent_id)) for agent_id, one in self._broken.items()]
        return {"domains": [*(_shown(guest) for guest in self._guests.values()), *broken]}

    def _tell(self, guest: ProcessGuest, event: str) -> None:
        self._report(_shown(guest), event)

    def _report(self, shown: Mapping[str, object], event: str) -> None:
        events.emit("domain", agent_id=shown["uuid"], state=shown["state"], change=event)
        line = json.dumps({"domain": shown, "event": event})
        for watcher in self._watchers:
            watcher.put_nowait(line)

    async def _watch(self, writer: StreamWriter) -> None:
        changes: asyncio.Queue[str] = asyncio.Queue()
        line = json.dumps(self._list())
        self._watchers.add(changes)
        try:
            while changes.qsize() < _WATCHER_LIMIT:
                writer.write(line.encode() + b"\n")
                async with asyncio.timeout(_READ_S):
                    await writer.drain()
                line = await changes.get()
        except TimeoutError:
            return  # it does not read; it may connect anew and is told everything again
        finally:
            self._watchers.discard(changes)


_EVENTS = {"starting": "starting", "running": "started", "shutoff": "stopped"}


def _shown(guest: ProcessGuest) -> Mapping[str, object]:
    return {
        "uuid": str(guest.definition.agent_id),
        "name": guest.definition.name,
        "state": guest.state,
        "persistent": True,
        "state_dir": str(guest.state_dir),
        "autostart": guest.definition.autostart,
        "run": guest.run,
    }


def _shown_broken(broken: Broken, folder: Path) -> Mapping[str, object]:
    return {
        "uuid": str(broken.agent_id),
        "name": "",
        "state": "broken",
        "persistent": True,
        "state_dir": str(folder / "tpm"),
        "autostart": False,
        "run": None,
        "detail": broken.detail,
    }


def _request(line: bytes) -> Mapping[str, object]:
    request = parse_json(line, limit=LINE_LIMIT)
    if not isinstance(request, dict):
        raise MalformedMessage("a request is one JSON object per line")
    return request
