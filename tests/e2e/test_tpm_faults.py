"""TPM commands that fail, hang or are cut, before and after their effect, under a host agent over real sockets.

Size: one host agent, and a fault plan for each way in which its TPM may let it down.
"""

from __future__ import annotations

import asyncio
import functools
import socket
from collections.abc import AsyncIterator
from typing import cast

import pytest

from harness.errors import BatchFailed, DeviceUnavailable, HarnessError, TpmError
from harness.provider.host_agent import HostAgent
from harness.provider.stream import IdentityOrder
from harness.provider.stream_link import HostLink
from harness.tpm import Tpm
from tests.support.pendings import a_request
from tests.support.provider_site import TIME_S, Site, linked, new_site

pytestmark = pytest.mark.needs_swtpm
EFFECTS = ("before", "after")
PATIENCE_S = 3.0


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with new_site() as made:
        yield made


async def identity(link: HostLink) -> dict[str, str]:
    """The host's public keys."""
    return cast(dict[str, str], await link.ask(IdentityOrder()))


async def quoted(link: HostLink) -> bool:
    """One quote."""
    return b'"attest":' in (await link.quote(a_request())).text


@pytest.mark.parametrize("effect", EFFECTS)
@pytest.mark.parametrize("action", ["fail", "cut"])
async def test_a_quote_that_fails_or_is_cut_reaches_its_waiters_and_the_agent_goes_on(
    site: Site, action: str, effect: str
) -> None:
    """All waiters of that batch get one named error; the next quote is made by the same agent with the same keys."""
    async with linked(site, site.host_agent()) as link:
        before = await identity(link)
        assert await quoted(link)
        site.device.set_faults([{"action": action, "effect": effect, "command": "Quote"}])
        waiting = [asyncio.create_task(quoted(link)) for _ in range(3)]
        async with asyncio.timeout(TIME_S):
            outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        failed = [outcome for outcome in outcomes if isinstance(outcome, BatchFailed)]
        assert failed
        assert all(outcome is True or isinstance(outcome, BatchFailed) for outcome in outcomes)
        assert await quoted(link)
        assert await identity(link) == before


@pytest.mark.parametrize("command", ["PCR_Read", "ReadPublic"])
async def test_a_command_around_the_quote_that_is_cut_harms_one_batch_at_most(site: Site, command: str) -> None:
    """The client connects anew, and finds its keys again."""
    async with linked(site, site.host_agent()) as link:
        site.device.set_faults(
            [{"action": "cut", "command": command, "times": 2}, {"action": "cut", "command": "Quote"}]
        )
        async with asyncio.timeout(TIME_S):
            failures = 0
            while not await _made(link):
                failures += 1
        assert 1 <= failures <= 4
        assert await quoted(link)


async def _made(link: HostLink) -> bool:
    try:
        return await quoted(link)
    except BatchFailed:
        return False


@pytest.mark.parametrize("effect", EFFECTS)
async def test_a_tpm_that_hangs_ends_the_agent_and_the_next_one_has_the_same_keys(
    site: Site, effect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client is given up; every waiter has its error; a supervisor's new process quotes again."""
    monkeypatch.setattr(Tpm, "open", functools.partial(Tpm.open, timeout_s=PATIENCE_S))
    agent = Watched(site.host_agent())
    async with linked(site, cast(HostAgent, agent)) as link:
        before = await identity(link)
        site.device.set_faults([{"action": "hang", "effect": effect, "command": "Quote"}])
        waiting = [asyncio.create_task(quoted(link)) for _ in range(3)]
        async with asyncio.timeout(TIME_S):
            outcomes = await asyncio.gather(*waiting, return_exceptions=True)
            await agent.ended.wait()
        assert all(isinstance(outcome, HarnessError) for outcome in outcomes), outcomes
        assert isinstance(agent.error, DeviceUnavailable)
    site.device.set_faults([])
    await site.device.power_cycle()  # the client's thread is in this process, so the hang does not end with it
    async with linked(site, site.host_agent()) as link:
        assert await identity(link) == before
        assert await quoted(link)


class Watched:
    """A host agent that notes how it ended."""

    def __init__(self, agent: HostAgent) -> None:
        self._agent = agent
        self.ended = asyncio.Event()
        self.error: HarnessError | None = None

    async def run(self, sock: socket.socket | None = None) -> None:
        try:
            await self._agent.run(sock)
        except HarnessError as error:
            self.error = error
            raise
        finally:
            self.ended.set()


@pytest.mark.parametrize("effect", EFFECTS)
@pytest.mark.parametrize(
    ("command", "at"),
    [("CreatePrimary", 1), ("CreatePrimary", 2), ("EvictControl", 1), ("EvictControl", 2), ("Certify", 1)],
)
async def test_keys_that_are_being_made_survive_a_cut(site: Site, command: str, effect: str, at: int) -> None:
    """The first start ends with an error of the TPM or makes its keys; all later ones have one and the same set."""
    site.device.set_faults([{"action": "cut", "effect": effect, "command": command, "at": at}])
    try:
        async with linked(site, site.host_agent()) as link:
            assert await identity(link)
    except TpmError:
        pass
    seen = []
    for _ in range(2):
        site.device.set_faults([])
        async with linked(site, site.host_agent()) as link:
            seen.append(await identity(link))
            assert await quoted(link)
    assert seen[0] == seen[1]


async def test_a_power_cut_in_the_middle_of_a_batch(site: Site) -> None:
    """The command in flight is lost, its waiters are told, and the agent quotes again after the boot."""
    async with linked(site, site.host_agent()) as link:
        before = await identity(link)
        site.device.set_faults([{"action": "hang", "command": "Quote"}])
        waiting = asyncio.create_task(quoted(link))
        commands = site.device.status()["commands"]
        async with asyncio.timeout(TIME_S):
            while True:
                if site.device.status()["commands"] != commands:
                    break
                await asyncio.sleep(0.01)
        await site.device.power_cycle(orderly=False)
        async with asyncio.timeout(TIME_S):
            with pytest.raises(BatchFailed):
                await waiting
            while not await _made(link):
                pass
        assert await identity(link) == before
