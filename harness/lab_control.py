"""Starts, asks and ends a lab that lives on: the other side of `lab_supervisor`.

Invariants:
    1. `start` returns when the supervisor is ready, or raises what it said; `down` when all its processes have ended.
    2. Whether a lab is up is asked of its supervisor, never read from a file.

Owner: the command line.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import config, lab_ready
from harness.errors import ConfigError, DeadlineExceeded, HarnessError, LocalRefusal, PeerUnreachable, SimulationError
from harness.lab_folder import close_folder, remove_sockets, supervisor_socket
from harness.lab_names import RECORD_FILE, SITE_FILE, TOPOLOGY_FILE
from harness.lab_record import LabRecord
from harness.peer import PeerClient
from harness.pki import Role, load_certificate, now
from harness.tls import expired
from harness.unix_client import ask

_START_S = 90.0
_DOWN_S = 90.0
_APPLY_S = 120.0
_ASK_S = 10.0
_SERVERS = frozenset(Role) - {Role.PROVIDER_OPERATOR, Role.TENANT_OPERATOR}
_RESTART_S = 60.0
_POWER_S = 150.0
_POLL_S = 0.05
_OURS = frozenset({"h", "log", "p", "pki", "run", "t", "vendor", "x", RECORD_FILE, SITE_FILE, TOPOLOGY_FILE})
"""What a lab's folder may hold for it to be removed by `wipe`; anything else is somebody's own."""


class LabControl:
    """One lab, from outside.

    Args:
        folder: of the lab.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()

    @property
    def log(self) -> Path:
        """The supervisor's own log."""
        return self.folder / "log" / "supervisor.log"

    async def status(self) -> Mapping[str, Any] | None:
        """The supervisor's answer; None when the lab is down.

        Raises:
            DeadlineExceeded: a supervisor that runs does not answer.
            PeerUnreachable: it cannot be asked from here: no right to, too many files, ...
        """
        try:
            return await self._ask({"op": "status"}, _ASK_S)
        except PeerUnreachable as error:
            if _nobody_there(error):
                return None
            raise

    async def start(self, topology: Path) -> None:
        """Starts a supervisor in the background; returns when it has started all services.

        Args:
            topology: absolute path of the lab's ``lab.yml``.

        Raises:
            ConfigError: its own words: what is wrong with the topology, the folder or a port.
            SimulationError: it ended without a word; its log is named.
        """
        process = self._spawn(topology)
        try:
            said = await asyncio.to_thread(_first_line, process)
        except BaseException:
            process.terminate()
            raise
        if "ready" not in said:
            raise ConfigError(str(said.get("detail") or f"the supervisor ended at once; see {self.log}"))

    def _spawn(self, topology: Path) -> subprocess.Popen[bytes]:
        self.log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-P", "-m", "harness.lab_supervisor", str(self.folder), str(topology)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # it outlives the terminal, and a Ctrl-C there is not for it
            )

    async def apply(self, topology: Path) -> bool:
        """Makes what a topology says now the lab's services; whether that changed anything.

        Raises:
            HarnessError: the supervisor refused, or does not answer.
        """
        return bool((await self._asked({"op": "apply", "topology": str(topology)}, _APPLY_S)).get("changed"))

    async def restart(self, service: str) -> int:
        """Ends a service in order and starts it again; returns its new process id when it answers.

        Raises:
            ConfigError: the lab is down, or has no such service.
            SimulationError: it did not come up in time; what ended it is in the text.
        """
        await self._asked({"op": "restart", "service": service}, _DOWN_S)
        return await self._until_up(service)

    async def power_cycle(self, host: str, *, scenario: str | None = None, orderly: bool = True) -> Mapping[str, Any]:
        """Switches a host off and on, with its guests and its agent; returns when its agent answers again.

        Args:
            host: its name.
            scenario: what it boots from now on, by name or whole path; None: what it booted last.
            orderly: everything is stopped in order; else power is cut.

        Returns:
            The status of its hardware TPM.

        Raises:
            ConfigError: the lab is down, has no such host, or its hardware TPM refused.
            SimulationError: the host did not come up again in time.
        """
        boots = {} if scenario is None else {"scenario": scenario}
        return await self._powered(host, {"op": "power_cycle", "host": host, "orderly": orderly, **boots})

    async def replace_tpm(self, host: str, *, replaced: int) -> Mapping[str, Any]:
        """Gives a host another hardware TPM, as in `power_cycle`. Its agent announces another host id from then on.

        Args:
            host: its name.
            replaced: how many were replaced before; when that is not so the TPM stays.
        """
        return await self._powered(host, {"op": "replace_tpm", "host": host, "replaced": replaced})

    async def _powered(self, host: str, request: Mapping[str, object]) -> Mapping[str, Any]:
        status = await self._asked(request, _POWER_S)
        await self._until_up(f"{host}-agent")
        await self._until_up(f"{host}-guests")
        return status

    async def _until_up(self, service: str) -> int:
        until = time.monotonic() + _RESTART_S
        why: object = "it does not answer"
        while time.monotonic() < until:
            status = await self.status()
            found = next((each for each in (status or {}).get("services", ()) if each["name"] == service), None)
            if found is not None and found["pid"] is not None and await self._unanswered(found) is None:
                return int(found["pid"])
            why = (found or {}).get("why") or why
            await asyncio.sleep(_POLL_S)
        raise SimulationError(f"{service} is not up again after {_RESTART_S:g} s: {why}")

    async def broken_services(self) -> dict[str, SimulationError]:
        """Waits until every service answers or is known not to run; the latter by name, and why.

        Raises:
            ConfigError: the lab is down, or an operator's certificate cannot be used.
        """

        async def services() -> Sequence[Mapping[str, Any]]:
            status = await self.status()
            if status is None:
                raise ConfigError(f"the lab in {self.folder} went down; see {self.log}")
            shown: Sequence[Mapping[str, Any]] = status["services"]
            return shown

        return await lab_ready.broken_services(services, self._unanswered)

    async def _unanswered(self, service: Mapping[str, Any]) -> str | None:
        """Why a service does not speak TLS at its address, or does not answer at its socket; None when it does.

        Raises:
            ConfigError: our own certificate cannot be used: it will not mend itself.
        """
        site = config.load(self.folder / SITE_FILE, config.SiteSettings)
        owner, _, part = str(service["name"]).rpartition("-")
        try:
            if service["url"] is None:
                host = site.hosts[owner]
                control, op = (host.hardware_control, "status") if part == "tpm" else (host.guest_manager, "list")
                await ask(control, {"op": op}, deadline_s=_ASK_S)
                return None
            tls = site.tenants[owner].operator if owner in site.tenants else site.provider.operator
            _check_own(tls)
            async with PeerClient(tls, str(service["url"]), deadline_s=_ASK_S, roles=_SERVERS) as client:
                await client.get("/version")
        except ConfigError:
            raise
        except HarnessError as error:
            return error.detail
        return None

    async def down(self) -> bool:
        """Ends every process of the lab, also one that is just being started; whether it was up.

        Raises:
            DeadlineExceeded: the supervisor did not start, or end, in time; it is named.
        """
        until = time.monotonic() + _START_S
        while (status := await self.status()) is None:
            if self._cleaned():
                return False
            if time.monotonic() > until:
                raise DeadlineExceeded(f"a supervisor of {self.folder} neither starts nor ends; see {self.log}")
            await asyncio.sleep(_POLL_S)
        watch = _watch(int(status["pid"]))
        try:
            with contextlib.suppress(PeerUnreachable):
                await self._ask({"op": "down"}, _DOWN_S)
            if watch is not None and not await asyncio.to_thread(_readable, watch, _DOWN_S):
                raise DeadlineExceeded(f"the supervisor (process {status['pid']}) has not ended within {_DOWN_S:g} s")
        finally:
            if watch is not None:
                os.close(watch)
        close_folder(self.folder)
        return True

    def _cleaned(self) -> bool:
        """Removes what a supervisor leaves that was killed; False while one is just starting or ending."""
        try:
            descriptor = os.open(self.folder / "run", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return True  # there never was one
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove_sockets(self.folder)
            close_folder(self.folder)
        except BlockingIOError:
            return False
        finally:
            os.close(descriptor)
        return True

    def wipe(self) -> None:
        """Removes a lab that is down, with all its keys and records.

        Raises:
            ConfigError: the folder holds something that is not a lab's, or cannot be removed.
        """
        if not self.folder.exists():
            return
        if strange := sorted({entry.name for entry in self.folder.iterdir()} - _OURS):
            raise ConfigError(f"{self.folder}: holds {strange[0]}, which is not a lab's; move it away first")
        try:
            for name in _OURS - {TOPOLOGY_FILE}:
                path = self.folder / name
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(f"{self.folder}: cannot be removed: {error.strerror}") from error

    def shown(self, status: Mapping[str, Any]) -> dict[str, object]:
        """What any client needs to talk to this lab: the object of ``harness lab status --json``.

        Args:
            status: the supervisor's answer.

        Raises:
            ConfigError: the lab's folder cannot be read.
        """
        site = config.load(self.folder / SITE_FILE, config.SiteSettings)
        host_ids = LabRecord(self.folder).host_ids()
        members = ("name", "pid", "url", "state_dir")
        return {
            "services": [{name: service[name] for name in members} for service in status["services"]],
            "tenants": [_tenant(name, tenant, host_ids) for name, tenant in site.tenants.items()],
            "hosts": [
                {"host_id": host_ids.get(name), "tpm_socket": str(host.tpm_socket), "chip": host.chip}
                for name, host in site.hosts.items()
            ],
        }

    async def _asked(self, request: Mapping[str, object], deadline_s: float) -> Mapping[str, Any]:
        try:
            return await self._ask(request, deadline_s)
        except LocalRefusal as error:
            raise ConfigError(error.detail) from error
        except PeerUnreachable as error:
            if not _nobody_there(error):
                raise
            raise ConfigError(f"the lab in {self.folder} is down; `harness lab up` starts it") from error

    async def _ask(self, request: Mapping[str, object], deadline_s: float) -> Mapping[str, Any]:
        return await ask(supervisor_socket(self.folder), request, deadline_s=deadline_s)


def _check_own(tls: config.TlsSettings) -> None:
    if (end := load_certificate(tls.certificate).not_valid_after_utc) < now():
        raise ConfigError(expired(f"our own certificate {tls.certificate}", end))


def _nobody_there(error: PeerUnreachable) -> bool:
    """Whether nobody listens; a connection that broke is that too: the supervisor has just ended."""
    cause = error.__cause__
    return cause is None or isinstance(cause, FileNotFoundError | ConnectionError | NotADirectoryError)


def _tenant(name: str, tenant: config.TenantSite, host_ids: Mapping[str, str]) -> dict[str, object]:
    client = tenant.client
    if client is None:
        raise ConfigError(f"tenant {name} has no client certificate in {SITE_FILE}; `harness lab up` writes it")
    return {
        "name": name,
        "client_cert": str(client.certificate),
        "client_key": str(client.key),
        "ca": str(next(iter(client.authorities.values()))),
        "provider_verifier": tenant.provider_verifier,
        "host_id": host_ids.get(tenant.host or ""),
        "guests": [str(agent_id) for agent_id in tenant.guests.values()],
    }


def _first_line(process: subprocess.Popen[bytes]) -> Mapping[str, Any]:
    """What a supervisor says about its start; empty when it ended without a word."""
    output = process.stdout
    if output is None or not _readable(output.fileno(), _START_S):
        process.terminate()
        raise SimulationError(f"the supervisor (process {process.pid}) was not ready within {_START_S:g} s")
    with output:
        line = output.readline()
    try:
        said = json.loads(line)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _watch(pid: int) -> int | None:
    """File descriptor that becomes readable when a process ends; None when it has."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


def _readable(descriptor: int, deadline_s: float) -> bool:
    return bool(select.select([descriptor], [], [], deadline_s)[0])
