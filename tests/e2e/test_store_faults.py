"""What can happen to a database's file under a running service: each time one sentence, and what to do."""

from __future__ import annotations

import asyncio
import filecmp
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import func, select

from harness.errors import StoreError
from harness.store import Store
from harness.tenant.tables import AlarmRow
from tests.support.databases import sqlite_url
from tests.support.schemas import TENANT

ROOT = Path(__file__).parents[2]
WAIT_S = 240


async def write(store: Store, detail: str = "x") -> None:
    async with store.begin() as session:
        session.add(AlarmRow(at=1.0, kind="k", detail=detail))


async def count(store: Store) -> int | None:
    async with store.begin() as session:
        return await session.scalar(select(func.count()).select_from(AlarmRow))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "t.db"


@pytest.fixture
async def store(path: Path) -> AsyncIterator[Store]:
    made = await TENANT.open(sqlite_url(path))
    await write(made)
    yield made
    await made.close()


GONE = (
    r"t\.db: the file was deleted or replaced while it was in use; stop the service, put the file or a backup back "
    r"\(`harness db restore`\), and start it again"
)


async def test_a_file_that_was_deleted_is_missed_at_once(store: Store, path: Path) -> None:
    """SQLite would go on in a file without a name, or make an empty one: neither happens."""
    os.unlink(path)
    for _ in range(2):
        with pytest.raises(StoreError, match=GONE):
            await write(store)
    assert path.name not in os.listdir(path.parent)


async def test_a_file_that_was_replaced_is_not_written(store: Store, path: Path) -> None:
    """Another file under the name is not the one that was opened; when that is back, the service goes on."""
    aside = path.with_name("aside")
    os.rename(path, aside)
    shutil.copy(aside, path)
    with pytest.raises(StoreError, match=GONE):
        await write(store)
    assert filecmp.cmp(aside, path, shallow=False)
    os.replace(aside, path)
    await write(store)
    assert await count(store) == 2


async def test_a_log_without_its_file_is_no_fresh_database(path: Path) -> None:
    """SQLite would play what a killed service left in its log into the new file."""
    path.with_name("t.db-wal").write_bytes(b"x")
    with pytest.raises(StoreError, match=r"t\.db: the file is missing, its log t\.db-wal is not; put the file"):
        await TENANT.open(sqlite_url(path))
    assert os.listdir(path.parent) == ["t.db-wal"]


async def test_a_service_that_was_killed_leaves_no_lease(path: Path) -> None:
    """The kernel ends a lease with its process; the file of the lock may stay, and is in nobody's way."""
    code = f"""
import asyncio, os, signal
from tests.support.schemas import TENANT
from tests.e2e.test_store_faults import write
async def main():
    await write(await TENANT.open({sqlite_url(path)!r}))
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""
    ran = await asyncio.to_thread(child, code)
    assert ran.returncode == -9, ran.stderr
    store = await TENANT.open(sqlite_url(path))
    assert await count(store) == 1
    await store.close()
    assert sorted(os.listdir(path.parent)) == ["t.db"]


def child(code: str, *prefix: str) -> subprocess.CompletedProcess[str]:
    """Runs Python with this project's code."""
    command = [*prefix, sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=WAIT_S, check=False, env=environment
    )


LIMITED = """
import asyncio, os, resource
from harness.errors import StoreError
from tests.support.schemas import TENANT
from tests.e2e.test_store_faults import count, write

async def main():
    store = await TENANT.open({url!r})
    await write(store)
    resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize({path!r} + "-wal"), resource.RLIM_INFINITY))
    for _ in range(2):
        try:
            await write(store, "y" * 100_000)
        except StoreError as error:
            print(error.detail)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    await write(store, "z" * 100_000)
    print(await count(store))
    await store.close()

asyncio.run(main())
"""


def test_a_file_that_cannot_grow_is_a_store_error(path: Path) -> None:
    """Above a limit nothing is half written; when the limit is gone the same store goes on by itself."""
    ran = child(LIMITED.format(url=sqlite_url(path), path=str(path)))
    first, second, rows = ran.stdout.splitlines()
    assert first == second
    assert "t.db: disk I/O error; look at the disk: it is full, over a limit, or failing" in first
    assert rows == "2"


MOUNTED = """
import asyncio, subprocess
from harness.errors import StoreError
from tests.support.databases import sqlite_url
from tests.support.schemas import TENANT
from tests.e2e.test_store_faults import count, write
from pathlib import Path

def mount(*options):
    subprocess.run(["mount", *options, {folder!r}], check=True)

async def main():
    path = Path({folder!r}, "t.db")
    store = await TENANT.open(sqlite_url(path))
    await write(store)
    filler = path.with_name("filler")
    try:
        filler.write_bytes(bytes(8 << 20))
    except OSError:
        pass
    for _ in range(2):
        try:
            await write(store, "y" * 100_000)
        except StoreError as error:
            print(error.detail)
    filler.unlink()
    await write(store, "z" * 100_000)
    print(await count(store))
    await store.close()
    mount("-o", "remount,ro")
    try:
        await TENANT.open(sqlite_url(path))
    except StoreError as error:
        print(error.detail)

mount("-t", "tmpfs", "-o", "size=2m,mode=0700", "tmpfs")
asyncio.run(main())
"""


@pytest.mark.needs_mount
def test_a_full_disk_and_a_read_only_one_are_store_errors(path: Path) -> None:
    """Each time the sentence says what to do; the same store goes on when there is space again."""
    ran = child(MOUNTED.format(folder=str(path.parent)), "unshare", "--mount")
    assert ran.returncode == 0, ran.stderr
    first, second, rows, read_only = ran.stdout.splitlines()
    assert first == second
    assert first.endswith("t.db: database or disk is full; free some space; the service goes on by itself")
    assert rows == "2"
    assert "t.db: [Errno 30] Read-only file system" in read_only
    assert read_only.endswith("; make the file, its folder and its file system writable for this user")


def test_a_file_that_may_not_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    """A service that could only read does not start, and says why."""
    code = f"""
import asyncio, os
from harness.errors import StoreError
from tests.support.schemas import TENANT
async def main():
    await (await TENANT.open({sqlite_url(tmp_path / "t.db")!r})).close()
    os.chmod({str(tmp_path / "t.db")!r}, 0o400)
    try:
        await TENANT.open({sqlite_url(tmp_path / "t.db")!r})
    except StoreError as error:
        print(error.detail)
asyncio.run(main())
"""
    weak = ("setpriv", "--bounding-set=-dac_override,-dac_read_search") if os.geteuid() == 0 else ()
    ran = child(code, *weak)
    assert "t.db: attempt to write a readonly database; make the file, its folder" in ran.stdout, ran.stderr


async def test_a_corrupt_file_says_that_a_backup_is_needed(store: Store, path: Path) -> None:
    """Bytes overwritten in the file: the next transactions that read them are refused, until a backup is back."""
    for _ in range(40):
        await write(store, "y" * 4000)
    await store.close()
    again = await TENANT.open(sqlite_url(path))
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(4096)
        file.write(os.urandom(size - 4096))
    for _ in range(2):
        with pytest.raises(StoreError, match=r"t\.db: .*malformed.*; restore a backup with `harness db restore`"):
            await count(again)
    await again.close()
