"""The guest manager over its real socket: process guests with vTPMs of the real swtpm_setup.

Size: one service, with its host around it.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from harness.errors import LocalRefusal, SimulationError
from harness.provider import scratch
from harness.provider.guests import GuestCache, SocketGuestSource
from harness.sim.boot import Scenario, reference_values
from harness.tpm import Tpm
from harness.values import HashAlg, PcrSelection
from tests.support.guest_lab import TIME_S, GuestLab, guest_lab, vtpm_pids
from tests.support.pendings import agent
from tests.support.tpms import short_folder
from tests.support.vtpm_host import exchange, until

pytestmark = pytest.mark.needs_swtpm
GUEST, OTHER = agent(0xABC), agent(0xABD)


@pytest.fixture
async def lab() -> AsyncIterator[GuestLab]:
    with short_folder() as folder:
        async with guest_lab(folder) as made:
            yield made


async def refused(lab: GuestLab, error: str, **request: object) -> str:
    """Sentence of a refusal with this error."""
    with pytest.raises(LocalRefusal) as caught:
        await lab.ask(**request)
    assert caught.value.error == error, caught.value
    return caught.value.detail


async def pcrs_of(lab: GuestLab) -> dict[int, bytes]:
    """PCR 0 to 7 of the running guest."""
    async with await Tpm.open(f"swtpm:path={lab.state_dir(GUEST).parent / 's'}") as tpm:
        return (await tpm.pcr_read(PcrSelection.of(HashAlg.SHA256, 0xFF)))[HashAlg.SHA256]


async def test_a_guests_life_from_definition_to_removal(lab: GuestLab) -> None:
    """Each step is an event with the state after it; the list says the same."""
    async with lab.manager(), lab.watcher() as watcher:
        assert await watcher.report() == {"domains": []}
        await lab.define(GUEST, agent_config="/agent.yml")
        assert await watcher.change() == (str(GUEST), "defined", "shutoff")
        assert await lab.domains() == {str(GUEST): "shutoff"}
        await lab.start(GUEST)
        assert await watcher.change() == (str(GUEST), "starting", "starting")
        assert await watcher.change() == (str(GUEST), "started", "running")
        assert await lab.domains() == {str(GUEST): "running"}
        assert lab.agents.running == [("vm", Path("/agent.yml"))]
        assert len(vtpm_pids(lab.state_dir(GUEST))) == 1
        await lab.stop(GUEST)
        assert await watcher.change() == (str(GUEST), "stopped", "shutoff")
        assert lab.agents.running == []
        assert vtpm_pids(lab.state_dir(GUEST)) == []
        assert await lab.ask(op="undefine", uuid=str(GUEST)) == {}
        assert await watcher.change() == (str(GUEST), "undefined", "shutoff")
        assert await lab.domains() == {}
        assert not lab.state_dir(GUEST).parent.exists()


async def test_a_list_shows_what_a_host_agent_needs(lab: GuestLab) -> None:
    """UUID, name, state, that it is persistent, and where the vTPM's state is."""
    async with lab.manager():
        await lab.define(GUEST, "web-1")
        assert await lab.ask(op="list") == {
            "domains": [
                {
                    "uuid": str(GUEST),
                    "name": "web-1",
                    "state": "shutoff",
                    "persistent": True,
                    "state_dir": str(lab.state_dir(GUEST)),
                    "autostart": False,
                    "run": None,
                }
            ]
        }


async def test_a_vtpm_is_manufactured_once(lab: GuestLab) -> None:
    """Three certificates at the first start, none at later ones; the host agent is told of every start."""
    async with lab.manager():
        await lab.define(GUEST)
        for _ in range(2):
            await lab.start(GUEST)
            await lab.stop(GUEST)
            vmid = f"vm:{GUEST}"
            assert lab.tool_log.read_text().splitlines() == [f"ek {vmid}", f"platform {vmid}", f"ek {vmid}"]
    assert lab.hook.started == [(str(GUEST), str(lab.state_dir(GUEST)))] * 2


async def test_the_boot_is_measured_before_the_guest_runs(lab: GuestLab) -> None:
    """The PCRs are those of its scenario, at the second start too."""
    expected = reference_values(Scenario.load("guest-good"), HashAlg.SHA256)
    async with lab.manager():
        await lab.define(GUEST)
        for _ in range(2):
            await lab.start(GUEST)
            assert await pcrs_of(lab) == {pcr: expected.get(pcr, bytes(32)) for pcr in range(8)}
            await lab.stop(GUEST)


async def test_starting_and_stopping_twice_changes_nothing(lab: GuestLab) -> None:
    """No second event, no second agent."""
    async with lab.manager(), lab.watcher() as watcher:
        await watcher.report()
        await lab.define(GUEST, agent_config="/a")
        await lab.stop(GUEST)
        await lab.start(GUEST)
        await lab.start(GUEST)
        assert len(lab.agents.running) == 1
        await lab.stop(GUEST)
        await lab.stop(GUEST)
        await lab.ask(op="undefine", uuid=str(GUEST))
        assert await watcher.until("undefined") == ["defined", "starting", "started", "stopped", "undefined"]


async def test_several_guests_at_once(lab: GuestLab) -> None:
    """Defined, started and stopped together; each has its own vTPM."""
    ids = [agent(number) for number in range(3)]
    async with lab.manager():
        for number, agent_id in enumerate(ids):
            await lab.define(agent_id, f"vm-{number}")
        await asyncio.gather(*map(lab.start, ids))
        assert await lab.domains() == {str(agent_id): "running" for agent_id in ids}
        await asyncio.gather(*map(lab.stop, ids))
        eks = [await scratch.read_ek(lab.state_dir(agent_id)) for agent_id in ids]
    assert len(set(eks)) == 3


async def test_what_is_defined_survives_a_restart_and_what_runs_does_not(lab: GuestLab) -> None:
    """The vTPM stays the same, so its guest need not be enrolled again."""
    async with lab.manager():
        await lab.define(GUEST, "one", agent_config="/a")
        await lab.define(OTHER, "two")
        await lab.start(GUEST)
    assert vtpm_pids(lab.state_dir(GUEST)) == []
    assert lab.agents.running == []
    ek = await scratch.read_ek(lab.state_dir(GUEST))
    async with lab.manager():
        assert await lab.domains() == {str(GUEST): "shutoff", str(OTHER): "shutoff"}
        await lab.start(GUEST)
        assert lab.agents.running == [("one", Path("/a"))]
        assert len(lab.tool_log.read_text().splitlines()) == 3
        await lab.stop(GUEST)
        assert await scratch.read_ek(lab.state_dir(GUEST)) == ek


async def test_a_killed_vtpm_is_a_guest_that_is_off(lab: GuestLab) -> None:
    """Its agent is stopped, watchers are told, and it can be started again."""
    async with lab.manager(), lab.watcher() as watcher:
        await watcher.report()
        await lab.define(GUEST, agent_config="/a")
        await lab.start(GUEST)
        await watcher.until("started")
        [pid] = vtpm_pids(lab.state_dir(GUEST))
        os.kill(pid, signal.SIGKILL)
        assert await watcher.change() == (str(GUEST), "stopped", "shutoff")
        assert lab.agents.running == []
        assert await lab.domains() == {str(GUEST): "shutoff"}
        await lab.start(GUEST)
        assert await lab.domains() == {str(GUEST): "running"}


async def test_a_host_agents_cache_follows_a_guest(lab: GuestLab) -> None:
    """Both ends of the socket as they are in a lab; after a stop of the manager nothing is known."""
    cache = GuestCache(SocketGuestSource(lab.socket))
    task = asyncio.create_task(cache.follow())

    def state() -> str:
        found = cache.domain(GUEST)
        return "none" if found is None else found.state

    try:
        async with lab.manager():
            await lab.define(GUEST)
            async with asyncio.timeout(TIME_S):
                await cache.changed()
            await until(lambda: state() == "shutoff")
            await lab.start(GUEST)
            await until(lambda: state() == "running")
            await lab.stop(GUEST)
            await until(lambda: state() == "shutoff")
            await lab.ask(op="undefine", uuid=str(GUEST))
            await until(lambda: state() == "none")
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


# --- what can go wrong at a start -----------------------------------------------------------------------------


async def fails_to_start(lab: GuestLab, error: str = "GuestDidNotStart") -> str:
    """Starts the guest and returns the one sentence; the guest is off, nothing of it runs, and events say so."""
    async with lab.watcher() as watcher:
        await watcher.report()
        sentence = await refused(lab, error, op="start", uuid=str(GUEST))
        assert await lab.domains() == {str(GUEST): "shutoff"}
        assert vtpm_pids(lab.state_dir(GUEST)) == []
        assert lab.agents.running == []
        if error == "GuestDidNotStart":
            assert (await watcher.until("stopped"))[0] == "starting"
    return sentence


async def test_a_host_agent_that_refuses_keeps_the_guest_off(lab: GuestLab) -> None:
    """Its words are in the answer; when it agrees the guest starts."""
    lab.hook.answer = {"error": "MalformedMessage", "detail": "no vTPM state"}
    async with lab.manager():
        await lab.define(GUEST)
        assert await fails_to_start(lab) == "guest vm: no vTPM state"
        lab.hook.answer = {"resident": True}
        await lab.start(GUEST)


async def test_a_decoy_may_run(lab: GuestLab) -> None:
    """Not resident is not a refusal: the host agent gives it no leaf."""
    lab.hook.answer = {"resident": False}
    async with lab.manager():
        await lab.define(GUEST)
        await lab.start(GUEST)


async def test_without_a_host_agent_no_guest_starts(lab: GuestLab) -> None:
    """Nobody would have looked at its vTPM."""
    (lab.folder / "local").unlink()
    async with lab.manager():
        await lab.define(GUEST)
        assert str(lab.folder / "local") in await fails_to_start(lab)


async def test_a_tool_that_fails_keeps_the_guest_off_and_leaves_no_half_vtpm(lab: GuestLab) -> None:
    """The tool's words are in the answer; with a tool that works the next start makes the vTPM."""
    works = lab.tool.read_text()
    log = '#!/bin/sh\nwhile [ $# -gt 0 ]; do case $1 in --logfile) echo "no luck" >> $2 ;; esac; shift; done\nexit 1\n'
    lab.tool.write_text(log)
    async with lab.manager():
        await lab.define(GUEST)
        assert "no luck" in await fails_to_start(lab)
        assert not lab.state_dir(GUEST).exists()
        assert lab.hook.started == []
        lab.tool.write_text(works)
        await lab.start(GUEST)


async def test_a_tool_that_does_not_exist_keeps_the_guest_off(lab: GuestLab) -> None:
    """swtpm_setup says so."""
    lab.tool.unlink()
    async with lab.manager():
        await lab.define(GUEST)
        assert "swtpm_setup failed" in await fails_to_start(lab)


async def test_an_own_tool_of_a_domain_is_used(lab: GuestLab) -> None:
    """A vTPM whose certificates come from elsewhere, for the lab's attack; the host's tool is not run."""
    own = lab.folder / "own"
    own.write_text(lab.tool.read_text().replace("tool.log", "own.log"))
    own.chmod(0o700)
    async with lab.manager():
        await lab.define(GUEST, create_certs={"tool": str(own), "config": "/nothing"})
    async with lab.manager():  # it is part of what is kept
        await lab.start(GUEST)
    assert not lab.tool_log.exists()
    assert len((lab.folder / "own.log").read_text().splitlines()) == 3


@pytest.mark.parametrize("content", [None, "", "events: 5", "- x", "based_on: nothing\nreplace: []", "\x00"])
async def test_a_broken_scenario_keeps_the_guest_off(lab: GuestLab, content: str | None) -> None:
    """A file that is missing or wrong: named, and nothing was manufactured for it."""
    scenario = lab.folder / "own.yml"
    if content is not None:
        scenario.write_text(content)
    async with lab.manager():
        await lab.define(GUEST, scenario=str(scenario))
        assert str(scenario) in await fails_to_start(lab, "ConfigError")
    assert not lab.tool_log.exists()


async def test_an_unknown_scenario_keeps_the_guest_off(lab: GuestLab) -> None:
    """By name."""
    async with lab.manager():
        await lab.define(GUEST, scenario="no-such")
        assert "no-such" in await fails_to_start(lab, "ConfigError")


@pytest.mark.parametrize("fault", [SimulationError("no fork"), OSError("no fork")])
async def test_an_agent_that_cannot_be_started_keeps_the_guest_off(lab: GuestLab, fault: Exception) -> None:
    """A guest without its agent would look as if it ran; the vTPM is switched off again."""
    lab.agents.fault = fault
    async with lab.manager():
        await lab.define(GUEST, agent_config="/a")
        assert await fails_to_start(lab) == "guest vm: no fork"
        lab.agents.fault = None
        await lab.start(GUEST)
        assert len(lab.agents.running) == 1


async def test_a_manager_that_stops_while_a_guest_starts_leaves_nothing(lab: GuestLab) -> None:
    """The start is given up, the host agent's answer is not waited for."""
    lab.hook.hold.clear()
    async with lab.manager():
        await lab.define(GUEST, agent_config="/a")
        starting = asyncio.create_task(lab.ask(op="start", uuid=str(GUEST)))
        await until(lambda: bool(lab.hook.started))
    async with asyncio.timeout(TIME_S):
        await asyncio.wait([starting])
    assert starting.exception() is not None
    assert vtpm_pids(lab.state_dir(GUEST)) == []
    assert lab.agents.running == []


# --- concurrent calls and bad requests ------------------------------------------------------------------------


async def test_of_two_definitions_at_once_one_wins(lab: GuestLab) -> None:
    """And it is the one that is kept."""
    orders = [
        {"op": "define", "uuid": str(GUEST), "name": f"vm-{number}", "scenario": "guest-good"} for number in range(4)
    ]
    async with lab.manager():
        answers = await asyncio.gather(*(lab.ask(**order) for order in orders), return_exceptions=True)
        failed = [answer for answer in answers if isinstance(answer, LocalRefusal)]
        assert [answer.error for answer in failed] == ["Conflict"] * 3
        winner = f"vm-{answers.index({})}"
        kept = json.loads((lab.state_dir(GUEST).parent / "domain.json").read_text())
        assert kept["name"] == winner


async def test_a_guest_that_is_removed_while_others_wait_to_start_it_stays_away(lab: GuestLab) -> None:
    """Start waits for its turn, finds the domain gone, and makes no vTPM in a folder that was removed."""
    lab.hook.hold.clear()
    async with lab.manager():
        await lab.define(GUEST)
        first = asyncio.create_task(lab.ask(op="start", uuid=str(GUEST)))
        await until(lambda: bool(lab.hook.started))
        removals = [asyncio.create_task(lab.ask(op="undefine", uuid=str(GUEST))) for _ in range(2)]
        await lab.domains()  # both removals wait for the start now: requests are taken in order of arrival
        late = asyncio.create_task(lab.ask(op="start", uuid=str(GUEST)))
        await lab.domains()
        lab.hook.hold.set()
        answers = await asyncio.gather(first, *removals, late, return_exceptions=True)
        assert answers[:3] == [{}, {}, {}]
        assert isinstance(answers[3], LocalRefusal)
        assert answers[3].error == "NotFound"
        assert await lab.domains() == {}
    assert vtpm_pids(lab.state_dir(GUEST)) == []
    assert not lab.state_dir(GUEST).parent.exists()


async def test_a_domain_is_defined_once(lab: GuestLab) -> None:
    """Until it is removed."""
    order = {"op": "define", "uuid": str(GUEST), "name": "vm", "scenario": "guest-good"}
    async with lab.manager():
        await lab.define(GUEST)
        assert str(GUEST) in await refused(lab, "Conflict", **order)
        await lab.ask(op="undefine", uuid=str(GUEST))
        await lab.define(GUEST)


@pytest.mark.parametrize("op", ["start", "stop", "undefine"])
async def test_a_domain_that_is_not_defined_is_not_found(lab: GuestLab, op: str) -> None:
    """The UUID is in the answer."""
    async with lab.manager():
        await lab.define(OTHER)
        assert str(GUEST) in await refused(lab, "NotFound", op=op, uuid=str(GUEST))
        assert await lab.domains() == {str(OTHER): "shutoff"}


HONEST = {"op": "define", "uuid": str(GUEST), "name": "vm", "scenario": "guest-good"}
WRONG_MEMBERS: dict[str, list[object]] = {
    "uuid": [None, 5, "", "X", str(GUEST).upper(), "../../etc"],
    "name": [None, 5, "", "a/b", "..", ".x", "-x", "a b", "a:b", "a\n", "x" * 64, "é"],
    "scenario": [None, 5],
    "agent_config": [5, []],
    "create_certs": [5, [], {}, {"tool": "/t"}, {"config": "/c"}, {"tool": 5, "config": "/c"}],
    "state_dir": ["/elsewhere"],
    "persistent": [False],
    "autostart": [None, 1, "true"],
}
BAD: list[object] = [
    *(HONEST | {name: value} for name, values in WRONG_MEMBERS.items() for value in values),
    HONEST | {"create_certs": {"tool": "/t", "config": "/c", "more": 1}},
    {},
    {"op": None},
    {"op": "reboot"},
    {"op": "list", "uuid": str(GUEST)},
    {"op": "watch", "uuid": str(GUEST)},
    {"op": "start"},
    {"op": "start", "uuid": 5},
    {"op": "start", "uuid": "X"},
    {"op": "start", "uuid": str(GUEST), "force": True},
    {"op": "autostart", "uuid": str(GUEST)},
    {"op": "autostart", "uuid": str(GUEST), "on": 1},
    {"op": "autostart", "uuid": str(GUEST), "on": True, "now": True},
    [],
    5,
    None,
]


@pytest.mark.parametrize("request_", BAD, ids=ascii)
async def test_a_bad_request_is_refused_and_the_connection_goes_on(lab: GuestLab, request_: object) -> None:
    """One named error, nothing defined, nothing on disk."""
    async with lab.manager():
        first, second = await exchange(lab.socket, json.dumps(request_).encode(), b'{"op": "list"}')
    assert isinstance(first, dict)
    assert first["error"] == "MalformedMessage"
    assert first["detail"]
    assert second == {"domains": []}
    assert list((lab.folder / "guests").iterdir()) == []


@pytest.mark.parametrize("line", [b"", b"no JSON", b"\xff", b'{"op": "list", "op": "list"}', b"[" * 20_000])
async def test_a_line_that_is_no_request_is_refused(lab: GuestLab, line: bytes) -> None:
    """The client gets an answer, and the service goes on."""
    async with lab.manager():
        first, second = await exchange(lab.socket, line, b'{"op": "list"}')
    assert isinstance(first, dict)
    assert first["error"] == "MalformedMessage"
    assert second == {"domains": []}


async def test_a_line_above_the_limit_ends_its_own_connection_only(lab: GuestLab) -> None:
    """64 KiB are enough for any request."""
    async with lab.manager():
        assert await exchange(lab.socket, b" " * 70_000) == []
        assert await lab.domains() == {}


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"no JSON", json.dumps({"uuid": str(GUEST)}).encode(), json.dumps(HONEST).encode()]
)
async def test_a_kept_definition_that_is_broken_is_shown_and_keeps_no_other_from_its_work(
    lab: GuestLab, content: bytes
) -> None:
    """It is listed with its file, cannot be started, and is defined again with the vTPM that it had."""
    file = lab.folder / "guests" / str(GUEST) / "domain.json"
    (file.parent / "tpm").mkdir(parents=True)
    file.write_bytes(content)
    async with lab.manager():
        await lab.define(OTHER)
        shown = {entry["uuid"]: entry for entry in await lab.shown()}
        assert (shown[str(GUEST)]["state"], shown[str(GUEST)]["persistent"]) == ("broken", True)
        assert str(file) in shown[str(GUEST)]["detail"]
        for op in ("start", "stop"):
            assert str(file) in await refused(lab, "ConfigError", op=op, uuid=str(GUEST))
        await lab.define(GUEST)
        assert await lab.domains() == {str(GUEST): "shutoff", str(OTHER): "shutoff"}
    assert (file.parent / "tpm").is_dir()


async def test_a_broken_definition_is_removed_with_its_folder(lab: GuestLab) -> None:
    """And watchers are told."""
    file = lab.folder / "guests" / str(GUEST) / "domain.json"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"{")
    async with lab.manager(), lab.watcher() as watcher:
        await watcher.report()
        assert await lab.ask(op="undefine", uuid=str(GUEST)) == {}
        assert await watcher.change() == (str(GUEST), "undefined", "broken")
        assert await lab.domains() == {}
    assert not file.parent.exists()


async def test_what_a_crash_left_half_written_is_removed(lab: GuestLab) -> None:
    """A definition that nobody was told of, and a new version of one that was not put in place."""
    folder = lab.folder / "guests"
    async with lab.manager():
        await lab.define(OTHER)
    (folder / str(GUEST)).mkdir()
    for agent_id in (GUEST, OTHER):
        (folder / str(agent_id) / ".domain.json.x7f3").write_bytes(b'{"uuid": "')
    async with lab.manager():
        assert await lab.domains() == {str(OTHER): "shutoff"}
    assert [path.name for path in folder.rglob("*")] == [str(OTHER), "domain.json"]


async def test_a_socket_that_cannot_be_made_is_named(lab: GuestLab) -> None:
    """A folder is in the way."""
    lab.socket.mkdir()
    with pytest.raises(SimulationError, match=str(lab.socket)):
        await _run(lab)


async def _run(lab: GuestLab) -> None:
    from harness.sim.guest_manager import GuestManager

    async with asyncio.timeout(TIME_S):
        await GuestManager(lab.settings, lab.agents.make).run()
