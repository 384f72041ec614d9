"""A host's guests' side in one process: journal, cache, vTPM CA with a soft key, and the real local socket."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from harness.attest import Public
from harness.errors import HarnessError, PeerUnreachable
from harness.provider import localca, scratch
from harness.provider.guests import Domain, GuestCache
from harness.provider.journal import Journal
from harness.provider.local_socket import LocalSocket
from harness.provider.residency import GuestResidency
from harness.provider.tables import HOST_SCHEMA, HostBase
from harness.provider.vtpm_ca import Sign, VtpmCa
from harness.sim.swtpm import CreateCerts
from harness.store import open_store
from harness.swtpm import SwtpmProcess
from harness.tpm import Tpm
from harness.tpm_templates import KeyTemplate
from harness.unix_client import ask
from harness.values import AgentId
from tests.support.batching import WAIT_S
from tests.support.soft_tpm import public_of

Report = Mapping[AgentId, Domain] | tuple[AgentId, Domain | None]
NV_RSA_EK, NV_PLATFORM = 0x01C00002, 0x01C08000


class ScriptedGuests:
    """A guest manager that says what the test says. ``break_off`` ends the connection; the next one starts anew."""

    def __init__(self) -> None:
        self._reports: asyncio.Queue[Report | None] = asyncio.Queue()
        self.connections = 0

    def say(self, report: Report) -> None:
        self._reports.put_nowait(report)

    def break_off(self) -> None:
        self._reports.put_nowait(None)

    async def watch(self) -> AsyncIterator[Report]:
        self.connections += 1
        while (report := await self._reports.get()) is not None:
            yield report
        raise PeerUnreachable("it went away")


def domain(agent_id: AgentId, state: str = "shutoff", *, persistent: bool = True, run: str | None = None) -> Domain:
    return Domain(agent_id=agent_id, state=state, persistent=persistent, run=run)


class SoftCa:
    """A CA key without a TPM. ``fault`` is raised instead of signing; ``signed`` counts."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.public = public_of(self.key, KeyTemplate.CA_P256)
        self.fault: HarnessError | None = None
        self.signed = 0

    async def sign(self, builder: x509.CertificateBuilder) -> bytes:
        if self.fault is not None:
            raise self.fault
        self.signed += 1
        return builder.sign(self.key, hashes.SHA256()).public_bytes(Encoding.DER)


@dataclass(slots=True, kw_only=True)
class VtpmHost:
    """The running parts, and the tool's configuration that leads to them."""

    folder: Path
    guests: ScriptedGuests
    cache: GuestCache
    journal: Journal
    residency: GuestResidency
    ca: Public

    @property
    def socket(self) -> Path:
        return self.folder / "local"

    async def report(self, *domains: Domain) -> None:
        """The guest manager says that these are all domains; waits until the cache has it."""
        async with asyncio.timeout(WAIT_S):
            self.guests.say({entry.agent_id: entry for entry in domains})
            await self.cache.changed()

    def certs(self, agent_id: AgentId, name: str = "vm-1") -> CreateCerts:
        """What swtpm_setup is told about the tool."""
        config = self.folder / "localca.conf"
        config.write_text(f"# where the host agent listens\nsocket = {self.socket}\n")
        tool = Path(localca.__file__)
        tool.chmod(tool.stat().st_mode | 0o111)
        return CreateCerts(tool=tool, config=config, options=config, vmid=f"{name}:{agent_id}")

    async def ask(self, **request: Any) -> dict[str, object]:
        return await ask(self.socket, request, deadline_s=30)


@asynccontextmanager
async def vtpm_host(
    folder: Path, ca: Public, sign: Sign, *, peer_uids: Collection[int] | None = None
) -> AsyncIterator[VtpmHost]:
    """The parts, with a CA key that is in a TPM or not."""
    url = f"sqlite+aiosqlite:///{folder / 'agent.db'}"
    store = await open_store(url, HostBase.metadata, component="host-agent", version=HOST_SCHEMA)
    guests = ScriptedGuests()
    cache, journal = GuestCache(guests, settle_s=0.5), Journal(store)
    residency = GuestResidency(cache, journal, scratch.read_ek)
    vtpm_ca = VtpmCa(ca, sign, journal, cache, host="host-1")
    uids = {os.getuid()} if peer_uids is None else peer_uids
    host = VtpmHost(folder=folder, guests=guests, cache=cache, journal=journal, residency=residency, ca=ca)
    socket = LocalSocket(host.socket, uids, vtpm_ca, residency, journal)
    follower = asyncio.create_task(cache.follow())
    try:
        await socket.start()
        yield host
    finally:
        await socket.stop()
        follower.cancel()
        await asyncio.gather(follower, return_exceptions=True)
        await store.close()


async def nv_of(state_dir: Path, folder: Path, *indices: int) -> list[bytes | None]:
    """What a manufactured vTPM holds in NV."""
    swtpm = SwtpmProcess(state_dir, folder / "look", folder / "look.log")
    await swtpm.start()
    try:
        async with await Tpm.open(swtpm.tcti) as tpm:
            await tpm.startup()
            found = [await tpm.nv_read(index) for index in indices]
            await tpm.shutdown()
            return found
    finally:
        await swtpm.stop()


async def until(condition: Callable[[], bool]) -> None:
    """Waits for something that nobody announces."""
    async with asyncio.timeout(WAIT_S):
        while True:
            if condition():
                return
            await asyncio.sleep(0.002)


async def exchange(socket: Path, *lines: bytes) -> list[object]:
    """Answers to raw lines on a local socket; fewer than lines when the server closes the connection."""
    async with asyncio.timeout(WAIT_S):
        reader, writer = await asyncio.open_unix_connection(socket)
        try:
            answers: list[object] = []
            for line in lines:
                writer.write(line + b"\n")
                answer = await reader.readline()
                if not answer:
                    break
                answers.append(json.loads(answer))
            return answers
        finally:
            writer.close()
