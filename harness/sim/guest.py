"""One process guest: a vTPM made by the real swtpm_setup, its measured boot, and the agent that runs inside it.

Invariants:
    1. The vTPM is manufactured once, at the first start; its certificates come from the tool that was defined for it.
    2. Before the guest runs, the host agent has read its EK from a copy of the state; then its boot is measured.
    3. A stopped guest leaves no process.
    4. A removed guest does not start again, whoever waited for its turn.
    5. Every start is another run, with an id of its own; a guest whose vTPM ends is off, and its run is over.

Owner: the guest manager; `start` and `stop` of one guest exclude each other.

Spec: DESIGN 3.6 (vTPM manufacture), 5 (process guests).
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from harness.errors import GuestDidNotStart, HarnessError, NotFound
from harness.sim.boot import Scenario, replay
from harness.sim.guest_agents import AgentProcess, KeptAgent
from harness.sim.swtpm import CreateCerts, manufacture
from harness.swtpm import SwtpmProcess
from harness.tpm import Tpm
from harness.unix_client import ask
from harness.values import AgentId

_HOOK_S = 40.0
_TPM_S = 20.0


MakeAgent = Callable[[str, Path], AgentProcess]
"""Makes the guest agent of a guest with this name and settings file; it is not started yet."""
Changed = Callable[[str], None]
"""Told the new state of the domain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestDefinition:
    """What a guest is.

    Args:
        agent_id: its UUID.
        name: for people and ``--vmid``.
        scenario: what it boots.
        agent_config: settings of its guest agent; None: nothing runs inside.
        tool: create_certs_tool for its vTPM.
        tool_config: its configuration file.
        autostart: whether it is kept running.
    """

    agent_id: AgentId
    name: str
    scenario: str
    agent_config: Path | None
    tool: Path
    tool_config: Path
    autostart: bool = False


class ProcessGuest:
    """One guest.

    Args:
        definition: what it is.
        folder: where it lives.
        host_agent: the host agent's local socket.
        make_agent: makes its agent.
        changed: told about its states: starting, running, shutoff.
    """

    def __init__(
        self, definition: GuestDefinition, folder: Path, host_agent: Path, *, make_agent: MakeAgent, changed: Changed
    ) -> None:
        self.definition = definition
        self.state = "shutoff"
        self.run: str | None = None
        self.state_dir = folder / "tpm"
        self._folder = folder
        self._host_agent = host_agent
        self._changed = changed
        self._swtpm = SwtpmProcess(self.state_dir, folder / "s", folder / "swtpm.log")
        config = definition.agent_config
        self._agent = None if config is None else KeptAgent(definition.name, make_agent(definition.name, config))
        self._is_off = asyncio.Event()
        self._is_off.set()
        self._watching: asyncio.Task[None] | None = None
        self._removed = False
        self._lock = asyncio.Lock()

    async def start(self) -> None:
        """Starts the guest; does nothing when it runs.

        Raises:
            GuestDidNotStart: manufacture, host agent, vTPM, boot or agent failed; the guest is off.
            ConfigError: its scenario cannot be used.
            NotFound: it was removed.

        *Cancellation:* the guest is off.
        """
        async with self._lock:
            if self._removed:
                raise NotFound(f"no domain {self.definition.agent_id}")
            if self.state == "running":
                return
            scenario = Scenario.load(self.definition.scenario)
            self.run = secrets.token_hex(16)
            self._enter("starting")
            try:
                await self._power_on(scenario)
                self._enter("running")
                if self._agent is not None:
                    self._agent.start()
            except (HarnessError, OSError) as error:  # OSError: from the system, when a program is started
                await self._power_off()
                reason = error.detail if isinstance(error, HarnessError) else str(error)
                raise GuestDidNotStart(f"guest {self.definition.name}: {reason}") from error
            except BaseException:
                await self._power_off()
                raise
            self._watching = asyncio.create_task(self._watch())

    async def off(self) -> None:
        """Waits until the guest is off; no deadline, for a task that keeps it running.

        *Cancellation:* the guest goes on.
        """
        await self._is_off.wait()

    async def stop(self) -> None:
        """Stops the guest in order; does nothing when it is off.

        *Cancellation:* its processes are ended.
        """
        async with self._lock:
            await self._stop()

    async def remove(self) -> None:
        """Stops the guest in order and removes what it has left on disk; does nothing when it is removed.

        *Cancellation:* its processes are ended; call `remove` again.
        """
        async with self._lock:
            if self._removed:
                return  # the folder may be that of a new definition
            await self._stop()
            self._removed = True
            await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)

    async def _stop(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
            self._watching = None
        await self._power_off()

    async def _power_on(self, scenario: Scenario) -> None:
        wanted = self.definition
        if not await asyncio.to_thread(self.state_dir.exists):
            vmid = f"{wanted.name}:{wanted.agent_id}"
            certs = CreateCerts(tool=wanted.tool, config=wanted.tool_config, options=wanted.tool_config, vmid=vmid)
            await manufacture(self.state_dir, create_certs=certs)
        await self._swtpm.until_free()  # what is read now is what will run
        start = {"op": "starting", "agent_id": str(wanted.agent_id), "state_dir": str(self.state_dir), "run": self.run}
        await ask(self._host_agent, start, deadline_s=_HOOK_S)
        await self._swtpm.start()
        async with await Tpm.open(self._swtpm.tcti, timeout_s=_TPM_S) as tpm:
            await tpm.startup()
            await replay(scenario, tpm)

    async def _power_off(self) -> None:
        if self._agent is not None:
            await self._agent.stop()
        if self._swtpm.running:
            with contextlib.suppress(HarnessError):  # a vTPM that takes no command any more is switched off too
                async with await Tpm.open(self._swtpm.tcti, timeout_s=_TPM_S) as tpm:
                    await tpm.shutdown()
        await self._swtpm.stop()
        if self.state != "shutoff":
            self.run = None
            self._enter("shutoff")

    async def _watch(self) -> None:
        await self._swtpm.wait()
        async with self._lock:
            self._watching = None
            await self._power_off()

    def _enter(self, state: str) -> None:
        self.state = state
        if state == "shutoff":
            self._is_off.set()
        else:
            self._is_off.clear()
        self._changed(state)
