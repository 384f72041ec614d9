"""A second user of a host's TPM: extends a PCR between the host agent's quote and its reading of the values."""

from __future__ import annotations

import hashlib
from asyncio import StreamReader
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from harness.sim.commands import parse_header
from harness.sim.faults import FaultInjector, parse_plan
from harness.sim.profiles import load_profile
from harness.sim.tpm_proxy import TpmProxy

_QUOTE, _PCR_READ = 0x158, 0x17E
_RC_SUCCESS = 0


class Meddler(TpmProxy):
    """The command proxy before a TPM that somebody else uses too.

    ``spoil`` is the number of quotes that come to nothing: PCR 9 is extended before each of them and before its values
    are read, by a command of its own that the TPM carries out.
    """

    spoil = 0
    quotes = 0
    extends = 0

    async def _execute(self, command: bytes, client: StreamReader) -> bytes | None:
        code = parse_header(command).code
        if code == _QUOTE:
            self.quotes += 1
        if self.spoil and code in (_QUOTE, _PCR_READ):
            await self._extend()
            self.spoil -= code == _PCR_READ
        return await super()._execute(command, client)

    async def _extend(self) -> None:
        self.extends += 1
        digest = hashlib.sha256(b"%d" % self.extends).digest()
        password = bytes.fromhex("00000009 40000009 0000 00 0000")
        body = (9).to_bytes(4, "big") + password + bytes.fromhex("00000001 000b") + digest
        command = bytes.fromhex("8002") + (10 + len(body)).to_bytes(4, "big") + bytes.fromhex("00000182") + body
        assert parse_header(await self._ask(command)).code == _RC_SUCCESS

    def set_faults(self, *plan: dict[str, object]) -> None:
        """What goes wrong from now on (`harness.sim.faults`)."""
        self.faults = FaultInjector(parse_plan(list(plan)))


@asynccontextmanager
async def meddler(back: Path) -> AsyncIterator[Meddler]:
    """Between a TPM's socket and its users, until the context is left."""
    proxy = Meddler(Path(f"{back}.front"), back, load_profile("swtpm"), seed=1)
    await proxy.start()
    try:
        yield proxy
    finally:
        await proxy.stop()
