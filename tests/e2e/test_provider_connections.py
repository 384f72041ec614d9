"""The provider verifier's bound on open connections is a setting."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from harness.config import ProviderVerifierSettings
from harness.errors import HarnessError, PeerUnreachable
from harness.peer import PeerClient
from harness.pki import Role
from harness.provider.admission import Snapshot
from harness.provider.proxy import ProviderVerifier, Records
from tests.support.provider_lab import Pki
from tests.support.provider_site import TIME_S, bound, running, url_of


@asynccontextmanager
async def no_records(_: str) -> AsyncIterator[Records]:
    async def load() -> Snapshot:
        return Snapshot()

    yield Records(load=load)


async def answered(client: PeerClient) -> None:
    async with asyncio.timeout(TIME_S):
        while True:
            try:
                await client.get("/version")
            except HarnessError:
                await asyncio.sleep(0.05)
            else:
                return


async def test_one_connection_more_than_the_setting_is_cut_off(tmp_path: Path) -> None:
    """With a bound of one the second client gets none while the first one's is open, and one afterwards."""
    pki = Pki.make(tmp_path)
    tls = pki.tls("provider", Role.PROVIDER_VERIFIER, "v", trusts=["provider"])
    settings = ProviderVerifierSettings(tls=tls, database="sqlite+aiosqlite://", connections=1)
    operator = pki.tls("provider", Role.PROVIDER_OPERATOR, "o", trusts=["provider"])
    with bound() as (sock, _):
        async with running(ProviderVerifier(settings, no_records), sock), PeerClient(operator, url_of(sock)) as second:
            async with PeerClient(operator, url_of(sock)) as first:
                await answered(first)
                with pytest.raises(PeerUnreachable):
                    await second.get("/version")
            await answered(second)
