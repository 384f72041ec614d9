"""The host's keys on a TPM in software that is busy, raced and paused where a test says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

from harness.provider.auths import KeyAuths
from harness.provider.keys import HostIdentity, HostKeys
from harness.tpm import Tpm
from harness.tpm_connection import Connection
from harness.values import HashAlg, PcrSelection
from tests.support.manual_clock import ManualClock
from tests.support.soft_tpm import SoftTpm


class Busy(Exception):
    """What ESAPI raises; has the response code."""

    def __init__(self, rc: int) -> None:
        super().__init__(f"0x{rc:x}")
        self.rc = rc


class PausingTpm:
    """A TPM client whose commands go through the real connection, and so through its retries.

    ``codes`` are answered one by one, in place of the next commands; ``before`` is called before each command;
    ``gates`` close a command's way.
    """

    def __init__(self, soft: SoftTpm) -> None:
        self.usable = True
        self.codes: list[int] = []
        self.waited_s: list[float] = []
        self.quotes = self.reads = 0
        self.before: Callable[[str], None] = lambda command: None
        self.gates = {"quote": asyncio.Event(), "read": asyncio.Event()}
        self.reached: list[str] = []
        self._soft = soft
        self._connection = Connection(lambda: self, Busy, wait=self.waited_s.append)
        for gate in self.gates.values():
            gate.set()

    async def quote(self, handle: int, auth: bytes, qualifying: bytes, selection: PcrSelection) -> tuple[bytes, bytes]:
        await self._come("quote")
        return cast(tuple[bytes, bytes], self._connection.do("esys_quote", qualifying, selection))

    async def pcr_read(self, selection: PcrSelection) -> dict[HashAlg, dict[int, bytes]]:
        await self._come("read")
        return cast(dict[HashAlg, dict[int, bytes]], self._connection.do("esys_read", selection))

    async def _come(self, command: str) -> None:
        self.reached.append(command)
        await self.gates[command].wait()
        self.before(command)

    def esys_quote(self, qualifying: bytes, selection: PcrSelection) -> tuple[bytes, bytes]:
        self._answer_code()
        self.quotes += 1
        self._soft.clock_ms += 1
        return self._soft.quote(qualifying, selection)

    def esys_read(self, selection: PcrSelection) -> dict[HashAlg, dict[int, bytes]]:
        self._answer_code()
        self.reads += 1
        return self._soft.values(selection)

    def _answer_code(self) -> None:
        if self.codes:
            raise Busy(self.codes.pop(0))

    def close(self) -> None:
        """The connection drops its context."""


def keys_on(tpm: PausingTpm, soft: SoftTpm, clock: ManualClock) -> HostKeys:
    """Keys as `HostKeys.provision` would find them."""
    identity = HostIdentity(
        ek=soft.ak, ak=soft.ak, ca=soft.ak, ek_certificates=(), host_id=soft.host_id, banks=frozenset(soft.pcrs)
    )
    auths = KeyAuths(ak=b"a" * 32, ca=b"c" * 32)
    return HostKeys(cast(Tpm, tpm), identity, auths, handles=(1, 2), clock=clock)
