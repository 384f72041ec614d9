"""What a lab must remember between two starts: ports of services, UUIDs of guests, ids of hosts, what was set last.

Addresses are in certificates of trust (a host's pinned URL, a guest's contact): a service comes back where it was.

Invariants:
    1. A name keeps its port and its UUID until the lab is made anew.
    2. Two processes that add names at once do not overwrite each other's.

Owner: whoever works on the lab's folder: the supervisor, or a command.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness.errors import ConfigError
from harness.lab_names import RECORD_FILE
from harness.private_file import write_private

_PORTS = range(20_000, 32_000)
"""Below the range from which the kernel takes ports for outgoing connections."""
_TRIES = 200
_MORE = frozenset({"applied"})


class LabRecord:
    """The record of one lab.

    Args:
        folder: of the lab; it exists.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / RECORD_FILE

    def port(self, name: str) -> int:
        """Port of a service or guest agent; a free one is chosen the first time.

        Raises:
            ConfigError: the record cannot be used, or no port is free.
        """
        with self._locked() as record:
            ports = record["ports"]
            if name not in ports:
                ports[name] = _free_port(set(ports.values()))
            return int(ports[name])

    def agent_id(self, guest: str) -> uuid.UUID:
        """UUID of a guest; a new one the first time. Raises ConfigError as `port`."""
        with self._locked() as record:
            return uuid.UUID(record["guests"].setdefault(guest, str(uuid.uuid4())))

    def guests(self) -> dict[str, uuid.UUID]:
        """UUIDs of all guests that were ever named. Raises ConfigError as `port`."""
        with self._locked() as record:
            return {name: uuid.UUID(text) for name, text in record["guests"].items()}

    def forget_guest(self, guest: str) -> None:
        """Forgets a guest that was removed: a new one of this name is another one. Raises ConfigError as `port`."""
        with self._locked() as record:
            record["guests"].pop(guest, None)
            record["ports"].pop(f"agent-{guest}", None)

    def note_guest(self, guest: str, agent_id: uuid.UUID) -> None:
        """Notes the UUID of a guest that was stated. Raises ConfigError as `port`."""
        with self._locked() as record:
            record["guests"][guest] = str(agent_id)

    def applied(self) -> dict[str, Any]:
        """What `note_applied` was given last; empty before. Raises ConfigError as `port`."""
        with self._locked() as record:
            return dict(record["applied"])

    def note_applied(self, settings: Mapping[str, Any]) -> None:
        """Notes the settings that the lab has now, as plain data. Raises ConfigError as `port`."""
        with self._locked() as record:
            record["applied"] = dict(settings)

    def host_ids(self) -> dict[str, str]:
        """Ids of the hosts by name, as far as they have announced themselves. Raises ConfigError as `port`."""
        with self._locked() as record:
            return dict(record["hosts"])

    def note_hosts(self, host_ids: Mapping[str, str]) -> None:
        """Notes the ids under which the hosts have announced themselves. Raises ConfigError as `port`."""
        with self._locked() as record:
            record["hosts"] = dict(host_ids)

    @contextmanager
    def _locked(self) -> Iterator[dict[str, dict[str, Any]]]:
        descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # held for a moment, and by living processes only
            record = self._read()
            before = json.dumps(record)
            yield record
            if json.dumps(record) != before:
                write_private(self._path, json.dumps(record, indent=1).encode())
        finally:
            os.close(descriptor)

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            record = json.loads(self._path.read_bytes())
        except FileNotFoundError:
            return {"ports": {}, "guests": {}, "hosts": {}, "applied": {}}
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{self._path}: is not the record of a lab; `harness lab up --fresh` starts anew"
            ) from error
        match record:
            case {"ports": dict(ports), "guests": dict(guests), "hosts": dict(hosts), **rest} if rest.keys() <= _MORE:
                whole = all(isinstance(port, int) for port in ports.values())
                applied = rest.get("applied", {})
                if whole and all(map(_is_uuid, (*guests.values(), *hosts.values()))) and isinstance(applied, dict):
                    return {"ports": ports, "guests": guests, "hosts": hosts, "applied": applied}
        raise ConfigError(f"{self._path}: is not the record of a lab; `harness lab up --fresh` starts anew")


def _is_uuid(text: object) -> bool:
    try:
        return str(uuid.UUID(str(text))) == text
    except ValueError:
        return False


def _free_port(taken: set[int]) -> int:
    for _ in range(_TRIES):
        port = secrets.choice(_PORTS)
        if port in taken:
            continue
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise ConfigError(f"no port from {_PORTS.start} to {_PORTS.stop - 1} is free on 127.0.0.1")
