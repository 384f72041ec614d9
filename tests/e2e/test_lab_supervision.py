"""Supervision on real processes: what dies comes back, what is taken is said, and nothing is left."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from harness import config, lab_processes
from harness.errors import ConfigError, NotFound, SimulationError
from harness.lab_processes import ServiceProcess
from harness.lab_record import LabRecord
from harness.lab_site import ServiceFile
from harness.lab_supervision import Supervision
from harness.pki import Authority, Role

_DEADLINE_S = 120.0


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short folder with an authority in it."""
    with tempfile.TemporaryDirectory(prefix="h") as name:
        Authority.create("provider CA").write(Path(name))
        yield Path(name)


def registrar(folder: Path, name: str = "registrar", *, port: int | None = None) -> ServiceFile:
    """A provider registrar: a real service that needs nothing but a database."""
    certificate, key = Authority.load(folder).issue(Role.PROVIDER_REGISTRAR, name).write(folder, name)
    settings = config.ProviderRegistrarSettings(
        listen=config.Listen(port=port or LabRecord(folder).port(name)),
        tls=config.TlsSettings(certificate=certificate, key=key, authorities={"provider": folder / "ca.pem"}),
        database=f"sqlite+aiosqlite:///{folder / name}.db",
    )
    path = folder / f"{name}.yml"
    config.dump(settings, path)
    return ServiceFile(
        name=name,
        service="provider-registrar",
        config=path,
        text=path.read_text(),
        state_dir=folder,
        url=f"https://127.0.0.1:{settings.listen.port}",
    )


@pytest.fixture
async def supervision(folder: Path) -> AsyncIterator[Supervision]:
    """One that is stopped at the end."""
    made = Supervision(lambda name: folder / f"{name}.log")
    yield made
    await made.stop()


async def until(holds: Callable[[], bool], what: str) -> None:
    """Waits for a change of state that nobody announces."""
    async with asyncio.timeout(_DEADLINE_S):
        while not holds():  # noqa: ASYNC110 - nobody announces it
            await asyncio.sleep(0.02)
    assert holds(), what


def pid_of(supervision: Supervision, name: str = "registrar") -> int | None:
    """Process id as the supervision says it."""
    found = {service["name"]: service["pid"] for service in supervision.status()}[name]
    assert found is None or isinstance(found, int)
    return found


def environment_of(pid: int) -> list[str]:
    """What a process was started with."""
    return Path(f"/proc/{pid}/environ").read_text().split("\0")


def alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_a_killed_service_comes_back_at_its_address(folder: Path, supervision: Supervision) -> None:
    """After kill -9 another process serves the same port, and a client that came meanwhile was not refused."""
    service = registrar(folder)
    assert await supervision.apply([service])
    await until(lambda: pid_of(supervision) is not None, "started")
    first = pid_of(supervision)
    assert first is not None
    os.kill(first, signal.SIGKILL)
    _, port = str(service.url).rsplit(":", 1)
    socket.create_connection(("127.0.0.1", int(port)), timeout=5).close()
    await until(lambda: pid_of(supervision) not in (None, first), "restarted")
    assert supervision.status()[0]["restarts"] == 1


async def test_a_service_that_cannot_start_is_tried_again_and_says_why(folder: Path, supervision: Supervision) -> None:
    """Unusable settings end it each time; the status quotes its log; the others are not disturbed."""
    good, bad = registrar(folder), registrar(folder, "broken")
    bad.config.write_text("listen: {}\n")
    await supervision.apply([good, bad])
    await until(lambda: int(str(supervision.status()[1]["restarts"])) >= 2, "tried again")
    await until(lambda: "database: is missing" in str(supervision.status()[1]["why"]), "said why")
    assert (pid_of(supervision) is not None, supervision.status()[0]["restarts"]) == (True, 0)


async def test_nothing_starts_while_a_port_is_taken(folder: Path, supervision: Supervision) -> None:
    """The port and its service are named, and no other service was started."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = registrar(folder, "taken", port=other.getsockname()[1])
        with pytest.raises(ConfigError, match=r"port \d+ of taken is taken by another program; `ss -tlnp"):
            await supervision.apply([registrar(folder), taken])
        assert supervision.status() == []


async def test_applying_the_same_services_changes_nothing(folder: Path, supervision: Supervision) -> None:
    """Other settings restart a service, a service that is gone is ended, and everything else goes on."""
    one, two = registrar(folder, "one"), registrar(folder, "two")
    await supervision.apply([one, two])
    await until(lambda: None not in (pid_of(supervision, "one"), pid_of(supervision, "two")), "started")
    before = pid_of(supervision, "one"), pid_of(supervision, "two")
    assert not await supervision.apply([one, two])
    assert (pid_of(supervision, "one"), pid_of(supervision, "two")) == before
    assert await supervision.apply([one])
    assert [service["name"] for service in supervision.status()] == ["one"]
    assert pid_of(supervision, "one") == before[0]
    assert not alive(before[1] or 0)


async def test_a_restart_on_request_ends_a_service_in_order(folder: Path, supervision: Supervision) -> None:
    """It comes back as another process; a service that the lab does not have is refused by name."""
    await supervision.apply([registrar(folder)])
    await until(lambda: pid_of(supervision) is not None, "started")
    before = pid_of(supervision)
    await supervision.restart("registrar")
    await until(lambda: pid_of(supervision) not in (None, before), "restarted")
    with pytest.raises(NotFound, match="this lab has registrar"):
        await supervision.restart("nosuch")


async def test_stopping_leaves_no_process_and_no_port(folder: Path) -> None:
    """Also when it is stopped while services are still being started."""
    service = registrar(folder)
    for wait_s in (0.0, 0.05, 0.2, 1.0):
        supervision = Supervision(lambda name: folder / f"{name}.log")
        await supervision.apply([service])
        await asyncio.sleep(wait_s)  # other moments of a start
        pid = pid_of(supervision)
        await supervision.stop()
        assert pid is None or not alive(pid)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", int(str(service.url).rsplit(":", 1)[1])))


async def test_a_lab_that_restarts_nothing_is_told_of_an_end(folder: Path) -> None:
    """The demo's mode: a service that ends by itself is an error that quotes its log."""
    bad = registrar(folder)
    bad.config.write_text("listen: {}\n")
    supervision = Supervision(lambda name: folder / f"{name}.log", restart=False)
    try:
        await supervision.apply([bad])
        with pytest.raises(SimulationError, match=r"registrar ended with code \d+: .*database: is missing"):
            async with asyncio.timeout(_DEADLINE_S):
                await supervision.failed()
    finally:
        await supervision.stop()


async def test_services_outlive_the_parent_that_forks_them(folder: Path, supervision: Supervision) -> None:
    """The forking parent is killed: what runs goes on under the same PID, and what dies afterwards still comes back."""
    from multiprocessing import forkserver

    await supervision.apply([registrar(folder)])
    await until(lambda: pid_of(supervision) is not None, "started")
    first = pid_of(supervision)
    parent = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    os.kill(parent, signal.SIGKILL)
    await until(lambda: not alive(parent), "killed")
    assert pid_of(supervision) == first
    assert first is not None
    os.kill(first, signal.SIGKILL)
    await until(lambda: pid_of(supervision) not in (None, first), "restarted")


async def test_a_refused_change_leaves_the_lab_as_it_is(folder: Path, supervision: Supervision) -> None:
    """A port that is taken ends nothing: what ran goes on under the same PID, and is still known."""
    one = registrar(folder, "one")
    await supervision.apply([one])
    await until(lambda: pid_of(supervision, "one") is not None, "started")
    before = pid_of(supervision, "one")
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = registrar(folder, "taken", port=other.getsockname()[1])
        with pytest.raises(ConfigError, match="is taken by another program"):
            await supervision.apply([taken])
    assert [service["name"] for service in supervision.status()] == ["one"]
    assert pid_of(supervision, "one") == before


async def test_other_settings_keep_the_port(folder: Path, supervision: Supervision) -> None:
    """A service with other settings at the same address is another process at a socket that was never closed."""
    one = registrar(folder, "one")
    await supervision.apply([one])
    await until(lambda: pid_of(supervision, "one") is not None, "started")
    before = pid_of(supervision, "one")
    assert await supervision.apply([dataclasses.replace(one, text=one.text + "\n")])
    _, port = str(one.url).rsplit(":", 1)
    socket.create_connection(("127.0.0.1", int(port)), timeout=5).close()
    await until(lambda: pid_of(supervision, "one") not in (None, before), "restarted")


async def test_a_parent_that_hangs_is_given_up(
    folder: Path, supervision: Supervision, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is stopped in the middle of its work: the start is given up in time, and the next one has a new parent."""
    from multiprocessing import forkserver

    from harness import lab_supervision

    await supervision.apply([registrar(folder)])
    await until(lambda: pid_of(supervision) is not None, "started")
    first, parent = pid_of(supervision), forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    assert first is not None
    monkeypatch.setattr(lab_supervision, "_FORK_S", 8.0)
    os.kill(parent, signal.SIGSTOP)
    os.kill(first, signal.SIGKILL)
    await until(lambda: pid_of(supervision) not in (None, first), "restarted")
    assert forkserver._forkserver._forkserver_pid != parent  # type: ignore[attr-defined]


async def test_a_stop_ends_only_the_process_that_ran(folder: Path) -> None:
    """One that was started again before the stop had noticed the end of its own is left alone."""
    service = registrar(folder)
    process = ServiceProcess(service.name, service.service, service.config, folder / "registrar.log")
    process.start()
    first = process.pid
    assert first is not None
    try:
        stopping = asyncio.create_task(process.stop())
        await asyncio.sleep(0)  # it has sent its signal, and waits
        give_up = time.monotonic() + _DEADLINE_S
        while alive(first):  # without the event loop, which must not notice
            assert time.monotonic() < give_up
            time.sleep(0.01)  # noqa: ASYNC251
        process.start()
        await stopping
        assert process.running
        assert process.pid not in (None, first)
    finally:
        await process.kill()


async def test_a_process_can_be_looked_at_while_it_is_started_again(folder: Path) -> None:
    """Its status and its start are in different threads."""
    service = registrar(folder)
    process = ServiceProcess(service.name, service.service, service.config, folder / "registrar.log")

    def starts() -> None:
        for _ in range(20):
            process.start()
            os.kill(process.pid or 0, signal.SIGKILL)

    starting = asyncio.create_task(asyncio.to_thread(starts))
    while not starting.done():
        for _ in range(1000):
            assert process.running in {True, False}
        await asyncio.sleep(0)
    await starting
    await process.kill()


async def test_only_what_is_forked_has_a_safe_path(
    folder: Path, supervision: Supervision, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Services import nothing from the folder where a person stands; the program that starts them stays as it is."""
    from multiprocessing import forkserver

    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    forkserver._forkserver._stop()  # type: ignore[attr-defined]
    await asyncio.gather(*(asyncio.to_thread(lab_processes.warm_up) for _ in range(20)))
    assert "PYTHONSAFEPATH" not in os.environ
    await supervision.apply([registrar(folder)])
    await until(lambda: pid_of(supervision) is not None, "started")
    parent = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    assert "PYTHONSAFEPATH=1" in environment_of(parent)
    assert "PYTHONSAFEPATH" not in os.environ
