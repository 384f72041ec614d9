"""The tenant registrar as a process: killed, stopped and with a database that fails; what is enrolled stays enrolled.

A guest's agent registers by itself, as often as it takes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from harness.errors import NotReady, PeerUnreachable, ShuttingDown
from harness.tenant.enrolment import SECRET_SIZE
from tests.support.database_faults import Fault, Site, full, locked
from tests.support.lab_faults import mounted
from tests.support.registrar_process import RegistrarSite, registrar_site
from tests.support.requirements import DISK
from tests.support.service_process import STOP_S, serving
from tests.support.tenant_wire import AGENT
from tests.support.tpms import short_folder

WAIT_S = 120.0
RESTORE = "harness db restore"


@pytest.fixture
async def site(request: pytest.FixtureRequest) -> AsyncIterator[RegistrarSite]:
    on_disk = request.node.get_closest_marker("needs_chattr") is not None
    with short_folder(DISK if on_disk else None) as folder:
        async with registrar_site(folder) as made:
            yield made


class Held:
    """Holds the host's answer to its challenge back."""

    def __init__(self, site: RegistrarSite) -> None:
        self.asked, self.gate = asyncio.Event(), asyncio.Event()
        self._activate = site.provider.host.activate
        site.provider.host.activate = self.activate  # type: ignore[method-assign]

    async def activate(self, host_id: object, credential: bytes) -> bytes:
        assert len(credential) > SECRET_SIZE
        self.asked.set()
        await self.gate.wait()
        return await self._activate(host_id, credential)  # type: ignore[arg-type]


async def in_time(task: asyncio.Task[None]) -> None:
    async with asyncio.timeout(WAIT_S):
        await task


async def enrolled(site: RegistrarSite) -> None:
    """A host, and a guest that has registered."""
    await site.add_host()
    await site.state_guest()
    await in_time(site.registration())
    assert await site.guest_state() == "active"


# --- ends in the middle of something ------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["kill", "stop"])
async def test_a_guest_registers_anew_when_its_challenge_is_lost(site: RegistrarSite, end: str) -> None:
    """The registrar ends between challenge and activation: challenges are in its memory, the agent begins again."""
    async with serving(site.process):
        await site.add_host()
        await site.state_guest()
        site.guest.gate.clear()
        registering = site.registration()
        async with asyncio.timeout(WAIT_S):
            await site.guest.asked.wait()
        await (site.process.kill() if end == "kill" else site.process.stop())
        await site.process.start()
        assert await site.guest_state() == "stated"
        site.guest.gate.set()
        await in_time(registering)
        assert await site.guest_state() == "active"


@pytest.mark.parametrize("end", ["kill", "stop"])
async def test_a_host_is_not_half_pinned_when_the_registrar_ends_during_its_enrolment(
    site: RegistrarSite, end: str
) -> None:
    """The operator's call ends with an error at once; nothing is pinned or audited, and the enrolment is repeated."""
    async with serving(site.process):
        held = Held(site)
        adding = asyncio.create_task(site.add_host())
        async with asyncio.timeout(WAIT_S):
            await held.asked.wait()
        await (site.process.kill() if end == "kill" else site.process.stop())
        async with asyncio.timeout(STOP_S):
            with pytest.raises(PeerUnreachable if end == "kill" else ShuttingDown):
                await adding
        held.gate.set()
        await site.process.start()
        assert await site.hosts() == []
        assert (await site.get("/v1/audit"))["entries"] == []
        await site.add_host()
        [host] = await site.hosts()
        assert host[0] == str(site.provider.host.host_id)


@pytest.mark.parametrize("end", ["kill", "stop"])
async def test_what_is_enrolled_is_enrolled_after_a_restart(site: RegistrarSite, end: str) -> None:
    """Host, guest and audit trail; the guest's next registration is the same guest's."""
    async with serving(site.process):
        await enrolled(site)
        before = (await site.hosts(), await site.get("/v1/audit"), await site.get("/v1/guests"))
        for _ in range(3):
            await (site.process.kill() if end == "kill" else site.process.stop())
            await site.process.start()
            assert (await site.hosts(), await site.get("/v1/audit"), await site.get("/v1/guests")) == before
        await in_time(site.registration())
        assert await site.guest_state() == "active"


# --- faults of the database -----------------------------------------------------------------------------------


@contextlib.contextmanager
def read_only(site: Site) -> Iterator[None]:
    """The file and its log cannot be changed, not even by root and by who has them open."""
    files = [site.database, site.database.with_name(f"{site.database.name}-wal")]
    subprocess.run(["chattr", "+i", *files], check=True)
    try:
        yield
    finally:
        subprocess.run(["chattr", "-i", *files], check=True)


FAULTS = [locked, full, pytest.param(read_only, marks=pytest.mark.needs_chattr)]


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_database_that_fails_is_503_until_it_is_back(site: RegistrarSite, fault: Fault) -> None:
    """With Retry-After; the process lives, nothing enrolled is lost, nothing half stored, and the next call works."""
    async with serving(site.process):
        await enrolled(site)
        hosts = await site.hosts()
        host_id = site.provider.host.host_id
        with fault(site):
            for _ in range(2):
                with pytest.raises(NotReady, match=r"registrar\.db"):
                    await site.operator.put(f"/v1/guests/{AGENT}/re-enrol", {"reason": "x"})
        assert await site.hosts() == hosts
        assert await site.guest_state() == "active"
        await site.operator.put(f"/v1/hosts/{host_id}/re-enrol", {"reason": "after the fault"})
        await in_time(site.registration())
        entries = (await site.get("/v1/audit"))["entries"]
        assert [entry["action"] for entry in entries] == ["host-add", "guest-state", "host-re-enrol"]


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_guest_that_registers_during_a_fault_is_taken_afterwards(site: RegistrarSite, fault: Fault) -> None:
    """Its agent is told to come again, and does; no alarm is raised."""
    async with serving(site.process):
        await site.add_host()
        await site.state_guest()
        with fault(site):
            registering = site.registration()
            with pytest.raises(NotReady):
                await site.operator.delete(f"/v1/guests/{AGENT}")
            assert not registering.done()
        await in_time(registering)
        assert (await site.get("/v1/alarms"))["alarms"] == []


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    path = tmp_path / "disk"
    path.mkdir()
    with mounted(path, "-t", "tmpfs", "-o", "size=1m", "tmpfs"):
        yield path


@pytest.mark.needs_mount
async def test_a_full_disk_is_503_until_there_is_room(disk: Path) -> None:
    """Somebody fills it; what was enrolled is read all the same, and the service goes on when there is room."""
    with short_folder() as folder:
        async with registrar_site(folder, database=disk / "registrar.db") as site, serving(site.process):
            await enrolled(site)
            hosts, filler = await site.hosts(), disk / "filler"
            fill(filler)
            with pytest.raises(NotReady, match="full; free some space"):
                await fill_up(site)
            assert await site.hosts() == hosts
            filler.unlink()
            await site.operator.put(f"/v1/hosts/{site.provider.host.host_id}/re-enrol", {"reason": "x"})
            await in_time(site.registration())
            assert await site.guest_state() == "active"


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


async def fill_up(site: RegistrarSite) -> None:
    """Acts until the room that the database's log has left is used up."""
    for _ in range(200):
        await site.operator.put(f"/v1/guests/{AGENT}/re-enrol", {"reason": "x" * 500})


# --- a database that cannot be used -----------------------------------------------------------------------------


def overwritten(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[:100] = os.urandom(100)
    path.write_bytes(data)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [overwritten, cut])
async def test_a_damaged_database_is_refused_with_the_next_step(
    site: RegistrarSite, damage: Callable[[Path], None]
) -> None:
    """One sentence that names the file and the command; with the file put back, all is there."""
    async with serving(site.process):
        await enrolled(site)
        before = await site.hosts()
        await site.process.stop()
        kept = site.folder / "kept.db"
        shutil.copy(site.database, kept)
        damage(site.database)
        code, said = await site.process.refused()
        assert code == 2
        assert str(site.database) in said
        assert RESTORE in said
        assert "Traceback" not in site.process.log
        shutil.copy(kept, site.database)
        await site.process.start()
        assert await site.hosts() == before


async def test_a_registrar_that_is_away_is_tried_again(site: RegistrarSite) -> None:
    """A guest's agent that starts before its registrar waits for it."""
    registering = site.registration()
    async with serving(site.process):
        with contextlib.suppress(PeerUnreachable):
            await site.add_host()
        await site.state_guest()
        await in_time(registering)
        assert await site.guest_state() == "active"
