"""Definitions of guests: what ``define`` says, and the files in which it is kept.

Invariants:
    1. A definition appears whole (`private_file`); what a crash left of one that was not is removed at the next start.
    2. One that cannot be used is named and skipped: it keeps no other guest from running.

Spec: `guest_manager` (the members).
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from harness.errors import ConfigError, MalformedMessage, ProtocolError, SimulationError
from harness.messages import parse_json
from harness.private_file import write_private
from harness.sim.guest import GuestDefinition
from harness.values import AgentId, parse_agent_id

FILE = "domain.json"
_LIMIT = 64 * 1024
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")  # part of file names and of --vmid
_MEMBERS = frozenset({"uuid", "name", "scenario", "agent_config", "create_certs", "autostart"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken:
    """A definition that was kept and cannot be used: whose it is, and why, with its file."""

    agent_id: AgentId
    detail: str


def parse(members: Mapping[str, object], *, tool: Path, tool_config: Path) -> GuestDefinition:
    """Definition from the members of a ``define``.

    Args:
        members: without ``op``.
        tool: create_certs_tool, where the definition names none.
        tool_config: its configuration.

    Raises:
        MalformedMessage: not a definition.
    """
    if unknown := sorted(members.keys() - _MEMBERS):
        raise MalformedMessage(f"define has no member {unknown[0][:32]!r}")
    match members:
        case {"uuid": str(uuid), "name": str(name), "scenario": str(scenario)}:
            agent_config, autostart = members.get("agent_config"), members.get("autostart", False)
            if agent_config is not None and not isinstance(agent_config, str):
                raise MalformedMessage("agent_config must be a path")
            if not isinstance(autostart, bool):
                raise MalformedMessage("autostart must be true or false")
            if not _NAME.fullmatch(name):
                raise MalformedMessage("name must be at most 63 letters, digits, dots, dashes and underscores")
            own_tool, own_config = _create_certs(members.get("create_certs"))
            return GuestDefinition(
                agent_id=parse_agent_id(uuid),
                name=name,
                scenario=scenario,
                agent_config=None if agent_config is None else Path(agent_config),
                tool=own_tool or tool,
                tool_config=own_config or tool_config,
                autostart=autostart,
            )
    raise MalformedMessage("define needs uuid, name and scenario")


def _create_certs(given: object) -> tuple[Path | None, Path | None]:
    match given:
        case None:
            return None, None
        case {"tool": str(tool), "config": str(config), **rest} if not rest:
            return Path(tool), Path(config)
    raise MalformedMessage("create_certs must have tool and config")


def save(folder: Path, members: Mapping[str, object]) -> None:
    """Keeps a definition in a guest's folder, in place of the one that may be there.

    Raises:
        SimulationError: it cannot be written; what was there is there.
    """
    try:
        write_private(folder / FILE, json.dumps(members).encode())
    except OSError as error:
        raise SimulationError(f"{folder}: the definition cannot be kept: {error.strerror}") from error


def load(folder: Path) -> Mapping[str, object]:
    """Members that `save` kept.

    Raises:
        ConfigError: the file cannot be read, or is not such a file.
    """
    path = folder / FILE
    try:
        members = parse_json(path.read_bytes(), limit=_LIMIT)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except ProtocolError as error:
        raise ConfigError(f"{path}: {error.detail}") from error
    if not isinstance(members, dict):
        raise ConfigError(f"{path}: must hold a JSON object")
    return members


def load_all(state_dir: Path, *, tool: Path, tool_config: Path) -> list[GuestDefinition | Broken]:
    """Every definition below the manager's folder, by UUID; what a crash left half-made is removed."""
    found: list[GuestDefinition | Broken] = []
    for folder in sorted(path for path in state_dir.iterdir() if path.is_dir()):
        with contextlib.suppress(OSError):
            for half in folder.glob(f".{FILE}*"):
                half.unlink()
            folder.rmdir()  # only when a crash left it empty
        if not folder.is_dir():
            continue
        with contextlib.suppress(MalformedMessage):  # not a guest's folder
            agent_id = parse_agent_id(folder.name)
            found.append(_one(folder, agent_id, tool, tool_config))
    return found


def _one(folder: Path, agent_id: AgentId, tool: Path, tool_config: Path) -> GuestDefinition | Broken:
    try:
        definition = parse(load(folder), tool=tool, tool_config=tool_config)
    except ConfigError as error:
        return Broken(agent_id=agent_id, detail=error.detail)
    except ProtocolError as error:
        return Broken(agent_id=agent_id, detail=f"{folder / FILE}: {error.detail}")
    if definition.agent_id != agent_id:
        return Broken(agent_id=agent_id, detail=f"{folder / FILE}: is of another guest, {definition.agent_id}")
    return definition
