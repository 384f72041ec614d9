"""What a lab remembers, and the short name of its folder."""

from __future__ import annotations

import contextlib
import socket
import tempfile
import threading
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from harness.errors import ConfigError
from harness.lab_folder import close_folder, open_folder, remove_sockets, short_name
from harness.lab_plan import plan
from harness.lab_record import LabRecord
from harness.lab_site import LabSite
from harness.swtpm import SOCKET_PATH_LIMIT

HOST = "00000000-0000-0000-0000-000000000001"


def test_a_name_keeps_its_port_and_its_uuid(tmp_path: Path) -> None:
    """Asked again, by another object, the record says the same; two names never share a port."""
    first = LabRecord(tmp_path)
    port, guest = first.port("alice-registrar"), first.agent_id("vm1")
    again = LabRecord(tmp_path)
    assert (again.port("alice-registrar"), again.agent_id("vm1"), again.guests()) == (port, guest, {"vm1": guest})
    assert len({again.port(f"s{number}") for number in range(50)} | {port}) == 51
    assert (tmp_path / "lab.json").stat().st_mode & 0o077 == 0


def test_a_removed_guest_of_the_same_name_is_another_one(tmp_path: Path) -> None:
    """Forgotten means forgotten."""
    record = LabRecord(tmp_path)
    before = record.agent_id("vm1")
    record.forget_guest("vm1")
    assert record.agent_id("vm1") != before


def test_hosts_are_noted(tmp_path: Path) -> None:
    """Ids of hosts are there after the next start."""
    LabRecord(tmp_path).note_hosts({"host1": HOST})
    assert LabRecord(tmp_path).host_ids() == {"host1": HOST}


def test_names_that_are_added_at_once_are_all_kept(tmp_path: Path) -> None:
    """Eight writers with a record object each lose nothing."""
    chosen: dict[str, uuid.UUID] = {}

    def add(number: int) -> None:
        for place in range(10):
            chosen[f"vm{number}-{place}"] = LabRecord(tmp_path).agent_id(f"vm{number}-{place}")

    threads = [threading.Thread(target=add, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert LabRecord(tmp_path).guests() == chosen
    assert len(chosen) == 80


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b'{"ports": {}}',
        b'{"ports": {"a": "x"}, "guests": {}, "hosts": {}}',
        b'{"ports": {}, "guests": {"a": "no uuid"}, "hosts": {}}',
        b'{"ports": {}, "guests": {}, "hosts": {"a": 7}}',
        b'{"ports": {}, "guests": {}, "hosts": {}, "more": 1}',
        b'{"ports": {}, "guests": {}, "hosts": {}, "applied": 1}',
        b"\xff",
    ],
)
def test_a_record_that_cannot_be_used_is_refused_with_the_way_out(tmp_path: Path, content: bytes) -> None:
    """Nothing is guessed: a new port under an old name would break what others have pinned."""
    (tmp_path / "lab.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"lab\.json.*--fresh"):
        LabRecord(tmp_path).port("alice-registrar")
    assert (tmp_path / "lab.json").read_bytes() == content


def test_a_short_folder_is_used_as_it_is() -> None:
    """No link is made where none is needed."""
    with tempfile.TemporaryDirectory(prefix="h") as name:
        folder = Path(name) / "lab"
        assert open_folder(folder, longest_host=5) == folder
        assert not short_name(folder).is_symlink()


def test_a_deep_folder_is_reached_by_a_short_name(tmp_path: Path) -> None:
    """The link leads there, opening again finds it, and closing removes the link and nothing else."""
    folder = tmp_path / ("d" * 60)
    short = open_folder(folder, longest_host=5)
    assert (short, short.readlink(), open_folder(folder, longest_host=5)) == (short_name(folder), folder, short)
    assert len(str(short)) < 40
    close_folder(folder)
    assert not short.is_symlink()
    assert folder.is_dir()


@pytest.mark.parametrize(("spare", "linked"), [(0, False), (-1, True)])
def test_a_lab_is_opened_under_a_name_that_is_short_enough(
    spare: int, linked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder in which the longest socket just fits is used as it is; one byte more, and it is not."""
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")  # short enough for the longest name of a host
    made = plan(tenants=1, guests=1)
    hosts = (replace(made.hosts[0], name="h" * 32), replace(made.hosts[0], name="h"))
    longest = len(f"/h/{hosts[0].name}/guests/{uuid.UUID(int=0)}/s.ctrl")
    with tempfile.TemporaryDirectory(prefix="h") as name:
        folder = Path(name) / ("d" * (SOCKET_PATH_LIMIT - longest - spare - len(name) - 1))
        try:
            files = LabSite.open(folder, replace(made, hosts=hosts))
            assert files.folder == (short_name(folder) if linked else folder)
            assert (folder / "pki" / "alice" / "ca.pem").is_file()
        finally:
            close_folder(folder)


def test_a_name_that_is_somebody_elses_is_refused(tmp_path: Path) -> None:
    """A link to elsewhere, or a file in its place, is not followed and not removed."""
    folder = tmp_path / ("d" * 60)
    short_name(folder).symlink_to(tmp_path)
    try:
        with pytest.raises(ConfigError, match="is not this lab's"):
            open_folder(folder, longest_host=5)
        close_folder(folder)
        assert short_name(folder).readlink() == tmp_path
    finally:
        short_name(folder).unlink()


def test_what_has_no_short_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where even the folder for temporary files is deep, the error says what to do."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("t" * 80)))
    with pytest.raises(ConfigError, match="choose a shorter folder"):
        open_folder(tmp_path / ("d" * 60), longest_host=5)


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    """A file in the way is named."""
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"file/lab: cannot be made"):
        open_folder(tmp_path / "file" / "lab", longest_host=5)


def test_sockets_that_killed_processes_left_are_removed() -> None:
    """The supervisor's, a hardware TPM's and a vTPM's; files stay, and a folder that is not there is no error."""
    with tempfile.TemporaryDirectory(prefix="h") as name, contextlib.ExitStack() as stack:
        folder = Path(name) / "l"
        remove_sockets(folder)
        places = [folder / place for place in ("run/s", "h/h1/back", "h/h1/guests/g/s")]
        for place in places:
            place.parent.mkdir(parents=True, exist_ok=True)
            (place.parent / "kept.yml").touch()
            stack.enter_context(socket.socket(socket.AF_UNIX)).bind(str(place))
        remove_sockets(folder)
        assert [path.name for path in folder.rglob("*") if not path.is_dir()] == ["kept.yml"] * 3
