"""The supervisor of a lab that lives on: a process in the background that owns all others.

``python -m harness.lab_supervisor FOLDER LAB.YML`` prints one JSON line when it is ready, or why it is not, and goes on
until it is told to stop. On ``L/run/s`` it takes one JSON object per line and answers with one:

* ``{"op": "status"}``: ``{"pid", "topology", "services": [...]}`` (`Supervision.status`)
* ``{"op": "apply", "topology": PATH}``: ``{"changed": bool}``; what the file says now becomes the lab's services
* ``{"op": "restart", "service": NAME}``: ``{}``
* ``{"op": "power_cycle", "host": NAME, "scenario": NAME or PATH, "orderly": true}`` (the last two may be left out) and
  ``{"op": "replace_tpm", "host": NAME, "replaced": N}``: the status of the host's hardware TPM (`sim.control`); guests
  and agent of the host are ended first, and start again
* ``{"op": "down"}``: ``{}`` when every process has ended; then the supervisor ends too

Invariants:
    1. One supervisor works on a folder: the kernel's lock on ``L/run`` ends with its process, however that ends.
    2. When the supervisor ends, so does every process of the lab (`lab_processes`, invariant 1).
    3. A lab whose folder is removed ends: no command would reach it.

Owner: itself.

Spec: DESIGN 6; docs/architecture.md (local sockets).
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import sys
from asyncio import StreamReader, StreamWriter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from harness import events
from harness.errors import ConfigError, Conflict, HarnessError, MalformedMessage
from harness.lab_folder import SUPERVISOR_SOCKET, close_folder, remove_sockets
from harness.lab_plan import LabPlan, plan_of
from harness.lab_record import LabRecord
from harness.lab_site import LabSite
from harness.lab_supervision import Supervision
from harness.lab_topology import load_topology
from harness.messages import parse_json
from harness.unix_server import LINE_LIMIT, UnixServer, refusal

_LOCK_S = 15.0
_POLL_S = 0.1
_LOOK_S = 2.0
_OPERATIONS = "status, apply (topology), restart (service), power_cycle (host), replace_tpm (host, replaced), down"


class Supervisor:
    """The process.

    Args:
        folder: of the lab.
        topology: its ``lab.yml``.
        say: called once, with the line for whoever started us.
    """

    def __init__(self, folder: Path, topology: Path, say: Callable[[Mapping[str, object]], None]) -> None:
        self._folder = folder
        self._topology = topology
        self._say = say
        self._ended = asyncio.Event()

    async def run(self) -> None:
        """Runs the lab until it is told to stop; says on standard output when it is ready.

        Raises:
            ConfigError: the topology or the folder cannot be used, or a port is taken.
            Conflict: another supervisor works on this folder.

        *Cancellation:* every process of the lab is ended.
        """
        plan = _planned(self._topology, self._folder)
        (self._folder / "run").mkdir(exist_ok=True, mode=0o700)
        with _locked(self._folder / "run") as lock:
            await lock
            files = LabSite.open(self._folder, plan)
            events.configure("supervisor", files.log("supervisor"), streams=True)
            self._supervision = Supervision(files.log)
            server = UnixServer(files.folder / SUPERVISOR_SOCKET, self._serve)
            watching: asyncio.Task[None] | None = None
            try:
                await self._supervision.apply(files.services())
                files.site()
                await server.start()
                self._say({"ready": os.getpid()})
                watching = asyncio.create_task(self._watch_folder())
                await self._ended.wait()
            finally:
                if watching is not None:
                    watching.cancel()
                await self._supervision.stop()
                await server.stop()
                remove_sockets(self._folder)  # a hardware TPM that was ended while it started leaves its swtpm's
                close_folder(self._folder)
                events.emit("stopped")

    async def _watch_folder(self) -> None:
        """Ends the lab when its folder is removed: no command would reach it any more."""
        run = self._folder / "run"
        inode = run.stat().st_ino
        while True:
            await asyncio.sleep(_LOOK_S)
            try:
                gone = run.stat().st_ino != inode
            except OSError:
                gone = True
            if gone:
                events.emit("folder_removed", level="error", detail=f"{self._folder} is gone: the lab in it ends")
                self._ended.set()

    async def _serve(self, reader: StreamReader, writer: StreamWriter) -> None:
        while line := await reader.readline():
            try:
                answer = await self._carry_out(parse_json(line, limit=LINE_LIMIT))
            except (HarnessError, OSError) as error:
                answer = _told(error)
            except Exception as error:  # the border of a request: whoever asked learns that it failed, the log why
                events.emit("internal_fault", level="error", exc_info=True)
                answer = {"error": type(error).__name__, "detail": "internal fault; see the supervisor's log"}
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()

    async def _carry_out(self, request: object) -> Mapping[str, object]:
        match request:
            case {"op": "status", **rest} if not rest:
                return {"pid": os.getpid(), "topology": str(self._topology), "services": self._supervision.status()}
            case {"op": "apply", "topology": str(path), **rest} if not rest:
                return {"changed": await self._apply(Path(path))}
            case {"op": "restart", "service": str(name), **rest} if not rest:
                await self._supervision.restart(name)
                return {}
            case {"op": "power_cycle", "host": str(host), **rest} if rest.keys() <= {"scenario", "orderly"}:
                match {"scenario": None, "orderly": True, **rest}:
                    case {"scenario": str() | None as scenario, "orderly": bool(orderly)}:
                        order = {"op": "power_cycle", "scenario": scenario, "orderly": orderly}
                        return await self._supervision.power_cycle(host, order, orderly=orderly)
            case {"op": "replace_tpm", "host": str(host), "replaced": int(replaced), **rest} if not rest:
                return await self._supervision.power_cycle(host, {"op": "replace", "replaced": replaced}, orderly=True)
            case {"op": "down", **rest} if not rest:
                await self._supervision.stop()
                self._ended.set()
                return {}
        raise MalformedMessage(f'"op" is one of: {_OPERATIONS}')

    async def _apply(self, topology: Path) -> bool:
        plan = await asyncio.to_thread(_planned, topology, self._folder)
        files = await asyncio.to_thread(LabSite.open, self._folder, plan)
        changed = await self._supervision.apply(await asyncio.to_thread(files.services))
        files.site()
        self._topology = topology
        return changed


def _planned(topology: Path, folder: Path) -> LabPlan:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return plan_of(load_topology(topology), LabRecord(folder))


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[asyncio.Task[None]]:
    """Lock on a folder, while the context lasts; what it gives is to be awaited until the lock is held."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield asyncio.ensure_future(_lock(descriptor, folder))
    finally:
        os.close(descriptor)


async def _lock(descriptor: int, folder: Path) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LOCK_S):  # one that was just killed, or is just ending, lets go in a moment
            while True:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return
                await asyncio.sleep(_POLL_S)
    raise Conflict(f"another supervisor runs the lab in {folder.parent}; `harness lab down` ends it")


def main() -> int:
    """Entry point of the process."""
    folder, topology = Path(sys.argv[1]), Path(sys.argv[2])
    answer = os.fdopen(os.dup(1), "w")  # standard output itself becomes the log

    def say(line: Mapping[str, object]) -> None:
        with contextlib.suppress(OSError):  # whoever asked has gone
            print(json.dumps(line), file=answer, flush=True)
        answer.close()

    try:
        asyncio.run(_until_told(Supervisor(folder, topology, say)))
    except (HarnessError, OSError) as error:  # also a full disk, a folder that cannot be written
        if answer.closed:
            raise
        say(_told(error))
        return 2
    return 0


def _told(error: HarnessError | OSError) -> Mapping[str, object]:
    if isinstance(error, HarnessError):
        return refusal(error)
    where = f"{error.filename}: " if error.filename else ""
    return refusal(ConfigError(f"{where}{error.strerror or error}"))


async def _until_told(supervisor: Supervisor) -> None:
    loop = asyncio.get_running_loop()
    task = loop.create_task(supervisor.run())
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await task


if __name__ == "__main__":
    sys.exit(main())
