"""The guest manager of a host with process guests: what libvirt is for VMs.

One JSON object per line on a UNIX socket, one as answer:

* ``{"op": "list"}``: ``{"domains": [{"uuid", "name", "state", "persistent", "state_dir"}]}``
* ``{"op": "watch"}``: the same, and then one ``{"domain": {...}, "event": ...}`` for each change
* ``{"op": "define", "uuid", "name", "scenario", "agent_config", "create_certs"}``: ``agent_config`` and
  ``create_certs`` ({"tool", "config"}) may be left out: nothing runs inside; the host's own tool
* ``{"op": "start" | "stop" | "undefine", "uuid"}``

Invariants:
    1. What is defined survives a restart of the manager; what runs does not.
    2. A watcher sees every change after its list, in order; one that does not read is cut off.

Owner: the service `GuestManager`.

Spec: DESIGN 3.1 (runs here), 5.
"""

from __future__ import annotations

import asyncio
import json
import re
from asyncio import StreamReader, StreamWriter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from harness import events
from harness.config import GuestManagerSettings
from harness.errors import (
    ConfigError,
    Conflict,
    HarnessError,
    MalformedMessage,
    NotFound,
    ProtocolError,
    SimulationError,
)
from harness.messages import parse_json
from harness.sim.guest import GuestDefinition, ProcessGuest, Spawn
from harness.unix_server import UnixServer
from harness.values import AgentId, parse_agent_id

_LINE_LIMIT = 64 * 1024
_WATCHER_LIMIT = 10_000
_READ_S = 10.0
_DEFINITION = "domain.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")  # part of file names and of --vmid
_MEMBERS = frozenset({"uuid", "name", "scenario", "agent_config", "create_certs"})


class GuestManager:
    """The service.

    Args:
        settings: from its file.
        spawn: starts a guest agent.
    """

    def __init__(self, settings: GuestManagerSettings, spawn: Spawn) -> None:
        self._settings = settings
        self._spawn = spawn
        self._guests: dict[AgentId, ProcessGuest] = {}
        self._watchers: set[asyncio.Queue[str]] = set()
        self._defining = asyncio.Lock()

    async def run(self, sock: object = None) -> None:
        """Serves until it is cancelled.

        Args:
            sock: not used: the socket is that of the settings.

        Raises:
            SimulationError: the socket cannot be made.
            ConfigError: a definition that was kept cannot be used; its file is named.

        *Cancellation:* every guest is stopped in order.
        """
        folder = self._settings.state_dir
        await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True, mode=0o700)
        for path in await asyncio.to_thread(lambda: sorted(folder.glob(f"*/{_DEFINITION}"))):
            try:
                self._add(self._definition(_load(path)))
            except ProtocolError as error:
                raise ConfigError(f"{path}: {error.detail}") from error
        server = UnixServer(self._settings.socket, self._serve)
        await server.start()
        events.emit("ready", guests=len(self._guests))
        try:
            await asyncio.Event().wait()
        finally:
            await server.stop()  # first: a start that is in work is given up, and holds its guest no longer
            await asyncio.gather(*(guest.stop() for guest in self._guests.values()))

    async def _serve(self, reader: StreamReader, writer: StreamWriter) -> None:
        while line := await reader.readline():
            try:
                request = _request(line)
                if request == {"op": "watch"}:
                    await self._watch(writer)
                    return
                answer: Mapping[str, object] = await self._carry_out(request)
            except HarnessError as error:
                answer = {"error": type(error).__name__, "detail": error.detail}
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()

    async def _carry_out(self, request: Mapping[str, object]) -> Mapping[str, object]:
        match request:
            case {"op": "list", **rest} if not rest:
                return self._list()
            case {"op": "define", **members}:
                await self._define({str(name): value for name, value in members.items()})
            case {"op": "start", "uuid": str(uuid), **rest} if not rest:
                await self._guest(uuid).start()
            case {"op": "stop", "uuid": str(uuid), **rest} if not rest:
                await self._guest(uuid).stop()
            case {"op": "undefine", "uuid": str(uuid), **rest} if not rest:
                await self._undefine(self._guest(uuid))
            case _:
                raise MalformedMessage('"op" is list, watch, define, start, stop or undefine (uuid)')
        return {}

    # --- domains ------------------------------------------------------------------------------------------

    async def _define(self, members: Mapping[str, object]) -> None:
        definition = self._definition(members)
        async with self._defining:  # of two definitions at once the second finds the first
            if definition.agent_id in self._guests:
                raise Conflict(f"domain {definition.agent_id} is defined already")
            folder = self._folder(definition.agent_id)
            await asyncio.to_thread(_save, folder, members)
            self._add(definition)
        self._tell(self._guests[definition.agent_id], "defined")

    def _definition(self, members: Mapping[str, object]) -> GuestDefinition:
        tool, config = self._settings.create_certs_tool, self._settings.create_certs_config
        match members.get("create_certs"):
            case {"tool": str(given_tool), "config": str(given_config), **rest} if not rest:
                tool, config = Path(given_tool), Path(given_config)
            case None:
                pass
            case _:
                raise MalformedMessage("create_certs must have tool and config")
        return replace(_parse(members), tool=tool, tool_config=config)

    def _add(self, definition: GuestDefinition) -> None:
        agent_id = definition.agent_id
        guest = ProcessGuest(
            definition,
            self._folder(agent_id),
            self._settings.host_agent,
            spawn=self._spawn,
            changed=lambda state: self._tell(self._guests[agent_id], _EVENTS[state]),
        )
        self._guests[agent_id] = guest

    async def _undefine(self, guest: ProcessGuest) -> None:
        await guest.remove()
        if self._guests.pop(guest.definition.agent_id, None) is guest:  # only one of two calls at once
            self._tell(guest, "undefined")

    def _guest(self, uuid: str) -> ProcessGuest:
        guest = self._guests.get(parse_agent_id(uuid))
        if guest is None:
            raise NotFound(f"no domain {uuid}")
        return guest

    def _folder(self, agent_id: AgentId) -> Path:
        return self._settings.state_dir / str(agent_id)

    # --- watchers -----------------------------------------------------------------------------------------

    def _list(self) -> Mapping[str, object]:
        return {"domains": [_shown(guest) for guest in self._guests.values()]}

    def _tell(self, guest: ProcessGuest, event: str) -> None:
        events.emit("domain", agent_id=str(guest.definition.agent_id), state=guest.state, change=event)
        line = json.dumps({"domain": _shown(guest), "event": event})
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
    }


def _request(line: bytes) -> Mapping[str, object]:
    request = parse_json(line, limit=_LINE_LIMIT)
    if not isinstance(request, dict):
        raise MalformedMessage("a request is one JSON object per line")
    return request


def _parse(members: Mapping[str, object]) -> GuestDefinition:
    if unknown := sorted(members.keys() - _MEMBERS):
        raise MalformedMessage(f"define has no member {unknown[0][:32]!r}")
    match members:
        case {"uuid": str(uuid), "name": str(name), "scenario": str(scenario)}:
            agent_config = members.get("agent_config")
            if agent_config is not None and not isinstance(agent_config, str):
                raise MalformedMessage("agent_config must be a path")
            if not _NAME.fullmatch(name):
                raise MalformedMessage("name must be at most 63 letters, digits, dots, dashes and underscores")
            return GuestDefinition(
                agent_id=parse_agent_id(uuid),
                name=name,
                scenario=scenario,
                agent_config=None if agent_config is None else Path(agent_config),
                tool=Path(),
                tool_config=Path(),
            )
    raise MalformedMessage("define needs uuid, name and scenario")


def _save(folder: Path, members: Mapping[str, object]) -> None:
    half = folder / f".{_DEFINITION}"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        half.write_text(json.dumps(members), encoding="utf-8")
        half.replace(folder / _DEFINITION)
    except OSError as error:
        raise SimulationError(f"{folder}: the definition cannot be kept: {error.strerror}") from error


def _load(path: Path) -> Mapping[str, object]:
    try:
        return _request(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
