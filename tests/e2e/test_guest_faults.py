"""Guests that are killed: vTPM, agent and manager as real processes, each ended without a word.

Size: one manager, and every way in which something of it may die.
"""

from __future__ import annotations

import asyncio
import shutil
import socket
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest

from harness.errors import LocalRefusal
from harness.sim.boot import Scenario, reference_values
from harness.swtpm import STATE_FILE
from harness.tpm import Tpm
from harness.values import AgentId, HashAlg, PcrSelection
from tests.support.fault_lab import FaultLab, eventually, fault_lab, kill, listens
from tests.support.guest_lab import vtpm_pids
from tests.support.pendings import agent
from tests.support.processes import left_by, processes_of
from tests.support.service_process import free_port
from tests.support.tpms import short_folder

pytestmark = pytest.mark.needs_swtpm
GUEST, OTHER, THIRD = agent(0xABC), agent(0xABD), agent(0xABE)


@pytest.fixture
async def lab() -> AsyncIterator[FaultLab]:
    with short_folder() as folder:
        async with fault_lab(folder) as made:
            await made.start_manager()
            yield made
        assert left_by(folder) == {}


async def pcrs_of(lab: FaultLab, agent_id: AgentId) -> dict[int, bytes]:
    """PCR 0 to 7 of a running guest."""
    async with await Tpm.open(f"swtpm:path={lab.state_dir(agent_id).parent / 's'}") as tpm:
        return (await tpm.pcr_read(PcrSelection.of(HashAlg.SHA256, 0xFF)))[HashAlg.SHA256]


async def test_a_killed_vtpm_is_a_power_cycle(lab: FaultLab) -> None:
    """The guest starts again by itself: same EK, another run, its whole boot, an agent that answers at its address."""
    port = free_port()
    await lab.define(GUEST, "vm", port=port)
    await lab.ask("start", GUEST)
    await eventually(lambda: listens(port))
    before = (await lab.of(GUEST))["run"]
    certified = await lab.journal.rsa_eks()
    kill(lab.vtpm_pid(GUEST))
    await lab.runs(GUEST, other_than=before)
    await eventually(lambda: listens(port))
    expected = reference_values(Scenario.load("guest-good"), HashAlg.SHA256)
    assert await pcrs_of(lab, GUEST) == {pcr: expected.get(pcr, bytes(32)) for pcr in range(8)}
    assert await lab.journal.rsa_eks() == certified
    await eventually(lambda: lab.is_here(GUEST))


async def test_a_killed_agent_comes_back_and_its_guest_goes_on(lab: FaultLab) -> None:
    """At the same address at once, in the same run, over the same vTPM."""
    port = free_port()
    await lab.define(GUEST, "vm", port=port)
    await lab.ask("start", GUEST)
    await eventually(lambda: listens(port))
    run, vtpm = (await lab.of(GUEST))["run"], lab.vtpm_pid(GUEST)
    for starts in (2, 3):
        kill(_agent_pid(lab, "vm"))
        await eventually(partial(_ready, lab, "vm", starts))
        assert await listens(port)
    assert ((await lab.of(GUEST))["run"], lab.vtpm_pid(GUEST)) == (run, vtpm)
    assert await lab.is_here(GUEST)


def _agent_pid(lab: FaultLab, name: str) -> int:
    """The process of an agent: forked, so nothing in its command line tells; it holds its log."""
    return min(pid for pid in _holders(lab.folder / f"agent-{name}.log") if pid != lab.manager.pid)


def _holders(file: Path) -> list[int]:
    found = []
    for descriptor in Path("/proc").glob("[0-9]*/fd/1"):
        try:
            if str(descriptor.readlink()) == str(file):
                found.append(int(descriptor.parts[2]))
        except OSError:
            continue
    return found


async def _ready(lab: FaultLab, name: str, times: int) -> bool:
    return sum(entry.get("event") == "ready" for entry in lab.log(f"agent-{name}")) >= times


async def test_a_killed_manager_takes_its_guests_along_and_brings_them_back(lab: FaultLab) -> None:
    """No vTPM and no agent outlives it; the next manager starts what is kept, and only that, with the same keys."""
    ports = {GUEST: free_port(), OTHER: free_port()}
    for agent_id, port in ports.items():
        await lab.define(agent_id, f"vm-{port}", port=port)
        await lab.ask("start", agent_id)
        await eventually(partial(listens, port))
    await lab.define(THIRD, "by-hand", autostart=False)
    await lab.ask("start", THIRD)
    certified = await lab.journal.rsa_eks()
    runs = {agent_id: (await lab.of(agent_id))["run"] for agent_id in ports}
    lab.kill_manager()
    await lab.start_manager()  # at once: its vTPMs may still be ending
    for agent_id, port in ports.items():
        await lab.runs(agent_id, other_than=runs[agent_id])
        await eventually(partial(listens, port))
        await eventually(partial(lab.is_here, agent_id))
    assert (await lab.of(THIRD))["state"] == "shutoff"
    assert vtpm_pids(lab.state_dir(THIRD)) == []
    assert await lab.journal.rsa_eks() == certified


async def test_a_manager_that_is_killed_leaves_no_process(lab: FaultLab) -> None:
    """vTPMs by the kernel's signal, agents by their lifeline."""
    port = free_port()
    await lab.define(GUEST, "vm", port=port)
    await lab.ask("start", GUEST)
    await eventually(lambda: listens(port))
    assert processes_of(lab.folder)
    lab.kill_manager()
    assert await asyncio.to_thread(left_by, lab.folder) == {}

    async def silent() -> bool:
        return not await listens(port)

    await eventually(silent)


async def test_a_guest_that_was_stopped_stays_off_until_the_manager_starts_again(lab: FaultLab) -> None:
    """Stop is an operator's word; a start, or a new manager, ends it."""
    await lab.define(GUEST, "vm")
    await lab.define(OTHER, "other")
    await lab.ask("start", GUEST)
    await lab.ask("stop", GUEST)
    await lab.ask("start", OTHER)
    kill(lab.vtpm_pid(OTHER))  # its return tells that time has passed
    await lab.runs(OTHER, other_than=(await lab.of(OTHER))["run"])
    assert (await lab.of(GUEST))["state"] == "shutoff"
    lab.kill_manager()
    await lab.start_manager()
    await lab.runs(GUEST)


async def test_autostart_can_be_changed(lab: FaultLab) -> None:
    """It is shown and kept; it neither starts nor stops a guest by itself."""
    await lab.define(GUEST, "vm", autostart=False)
    assert (await lab.of(GUEST))["autostart"] is False
    await lab.ask("autostart", GUEST, on=True)
    assert ((await lab.of(GUEST))["autostart"], (await lab.of(GUEST))["state"]) == (True, "shutoff")
    await lab.manager.stop()
    await lab.start_manager()
    run = await lab.runs(GUEST)
    await lab.ask("autostart", GUEST, on=False)
    assert (await lab.of(GUEST))["run"] == run
    await lab.manager.stop()
    await lab.start_manager()
    shown = await lab.of(GUEST)
    assert (shown["autostart"], shown["state"]) == (False, "shutoff")


async def test_guests_wait_for_a_host_agent_that_is_not_there_yet(lab: FaultLab) -> None:
    """Nothing starts unseen; when it is back they start by themselves."""
    await lab.define(GUEST, "vm")
    await lab.ask("start", GUEST)
    lab.kill_manager()
    await lab.local.stop()
    await lab.start_manager()

    async def refused() -> bool:
        return any(entry.get("event") == "guest_not_started" for entry in lab.log("manager"))

    await eventually(refused)
    assert vtpm_pids(lab.state_dir(GUEST)) == []
    await lab.local.start()
    await lab.runs(GUEST)
    await eventually(lambda: lab.is_here(GUEST))


async def test_a_truncated_vtpm_is_named_and_harms_no_other_guest(lab: FaultLab) -> None:
    """Half a state file: the guest stays off with swtpm's own word; with the whole one it starts."""
    await lab.define(GUEST, "vm")
    await lab.define(OTHER, "other")
    for agent_id in (GUEST, OTHER):
        await lab.ask("start", agent_id)
    await lab.ask("stop", GUEST)
    state = lab.state_dir(GUEST) / STATE_FILE
    whole = state.read_bytes()
    state.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LocalRefusal, match=r"guest vm: .*permall: no swtpm starts.*Invalid magic") as caught:
        await lab.ask("start", GUEST)
    assert caught.value.error == "GuestDidNotStart"
    assert (await lab.of(GUEST))["state"] != "running"
    assert vtpm_pids(lab.state_dir(GUEST)) == []
    assert await lab.is_here(OTHER)
    kill(lab.vtpm_pid(OTHER))
    await lab.runs(OTHER, other_than=(await lab.of(OTHER))["run"])
    state.write_bytes(whole)
    await lab.runs(GUEST)  # by itself: it is kept
    await eventually(lambda: lab.is_here(GUEST))


async def test_a_cloned_guest_does_not_start(lab: FaultLab) -> None:
    """A second domain with a copy of another's vTPM: refused by name; the genuine one stays attestable."""
    await lab.define(GUEST, "vm")
    await lab.ask("start", GUEST)
    await lab.define(OTHER, "clone")
    shutil.copytree(lab.state_dir(GUEST), lab.state_dir(OTHER))
    with pytest.raises(LocalRefusal, match=f"holds the EK that is certified for guest {GUEST}"):
        await lab.ask("start", OTHER)
    assert vtpm_pids(lab.state_dir(OTHER)) == []
    assert not await lab.is_here(OTHER)
    assert await lab.is_here(GUEST)


async def test_a_port_that_is_taken_is_one_clear_sentence_and_tried_again(lab: FaultLab) -> None:
    """The guest runs, its agent's log says what is in the way, and it listens when the port is free."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = int(taken.getsockname()[1])
        await lab.define(GUEST, "vm", port=port)
        await lab.ask("start", GUEST)
        said = f"listen.port: 127.0.0.1 port {port}: Address already in use"

        async def told() -> bool:
            return said in (lab.folder / "agent-vm.log").read_text()

        await eventually(told)
        assert (await lab.of(GUEST))["state"] == "running"
    await eventually(lambda: _ready(lab, "vm", 1))
    assert await listens(port)
    log = (lab.folder / "agent-vm.log").read_text()
    assert "Traceback" not in log, log


async def test_a_manufacture_that_dies_with_its_manager_is_cleared_away(lab: FaultLab) -> None:
    """Nothing of swtpm_setup, its swtpm and its tool goes on; the next manager makes the vTPM from the beginning."""
    slow = lab.folder / "slow"
    slow.write_text(f"#!/bin/sh\ntouch {lab.folder}/asked\nexec sleep 60\n")
    slow.chmod(0o700)
    create = {"tool": str(slow), "config": "/nothing"}
    await lab.ask("define", GUEST, name="vm", scenario="guest-good", create_certs=create)
    start = asyncio.create_task(lab.ask("start", GUEST))

    async def asked() -> bool:
        return (lab.folder / "asked").exists()

    await eventually(asked)
    half = lab.state_dir(GUEST).with_name(".tpm-new")
    assert half.is_dir()
    lab.kill_manager()
    await asyncio.gather(start, return_exceptions=True)
    assert await asyncio.to_thread(left_by, lab.folder) == {}
    await lab.start_manager()
    await lab.ask("undefine", GUEST)
    await lab.define(GUEST, "vm")
    await lab.ask("start", GUEST)
    assert not half.exists()
    await eventually(lambda: lab.is_here(GUEST))
