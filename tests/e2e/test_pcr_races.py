"""A PCR that is extended between quote and reading, and a TPM that is busy: through real services, with a real TPM.

The extends are commands of a second user of the TPM, which the TPM carries out (`tests.support.meddling`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness.attest import owner_qualified_name
from harness.errors import BatchFailed
from harness.tenant.appraisal import Accepted, HostTrust, Rejected, SentRequest, appraise_host
from harness.tenant.policy import Policy
from harness.values import HashAlg
from tests.support.figures import Figures, figures
from tests.support.meddling import Meddler, meddler
from tests.support.pendings import a_request, agent, allow
from tests.support.provider_lab import ProviderLab, Tenant, provider_lab
from tests.support.tpms import short_folder

pytestmark = pytest.mark.needs_swtpm

TIME_S = 120.0
MEDDLED = (0, 9)  # PCR 9 is the one that somebody else extends
VTPM_EK = b"e" * 32
BUSY = {"RETRY": 0x922, "YIELDED": 0x908, "TESTING": 0x90A}


@pytest.fixture
def folder() -> Iterator[Path]:
    with short_folder() as made:
        yield made


@dataclass(slots=True, kw_only=True)
class Host:
    """A host whose TPM somebody else uses too, with two tenants that share no pool.

    Alice may see PCR 0 to 9, Bob, who has a guest there, only PCR 0 to 7.
    """

    lab: ProviderLab
    tpm: Meddler
    alice: Tenant
    bob: Tenant

    async def bobs(self) -> Accepted | Rejected:
        """A round for Bob's guest."""
        async with asyncio.timeout(TIME_S):
            return await self.bob.round((0, 7), agent(1))

    @property
    def found(self) -> Figures:
        """What the host agent counts."""
        return figures(self.lab.agent_metrics)

    async def waiting(self, count: int) -> None:
        """Returns when so many requests have reached the host agent."""
        async with asyncio.timeout(TIME_S):
            while self.lab.quoting.waiting < count:  # noqa: ASYNC110 - they come through sockets: there is no event
                await asyncio.sleep(0.005)

    def quotes(self) -> dict[str, float]:
        """Of the TPM, as counted: quotes, races, and batches that were quoted or failed."""
        found = self.found
        return {
            "quotes": found.sum("harness_tpm_quotes_total"),
            "races": found.sum("harness_tpm_races_total"),
            "quoted": found.sum("harness_batches_total", outcome="quoted"),
            "failed": found.sum("harness_batches_total", outcome="TpmError"),
        }


@asynccontextmanager
async def host(folder: Path) -> AsyncIterator[Host]:
    """The host, its tenants and its second user."""
    allowlists = {"alice": allow(range(10)), "bob": allow(range(8))}
    users: list[Meddler] = []

    @asynccontextmanager
    async def user(back: Path) -> AsyncIterator[Meddler]:
        async with meddler(back) as made:
            users.append(made)
            yield made

    async with AsyncExitStack() as stack:
        lab = await stack.enter_async_context(
            provider_lab(folder, "alice", "bob", allowlists=allowlists, tpm_user=user)
        )
        lab.add_guest(agent(1), "bob", VTPM_EK)
        await lab.admission.refresh(0)
        tenants = [Tenant(lab, name) for name in ("alice", "bob")]
        for tenant in tenants:
            stack.push_async_callback(tenant.client.close)
        yield Host(lab=lab, tpm=users[0], alice=tenants[0], bob=tenants[1])


async def test_a_pcr_extended_between_quote_and_reading_costs_one_more_quote(folder: Path) -> None:
    """One retry, and an answer that the tenant accepts: its values are those that were signed."""
    async with host(folder) as made:
        made.tpm.spoil = 1
        request = a_request("alice", MEDDLED).request
        async with asyncio.timeout(TIME_S):
            results = await made.alice.ask(request)
        values = await made.lab.tpm.pcr_read(request.selection)
        ak = made.lab.keys.identity.ak
        trust = HostTrust(
            host_id=made.lab.host_id,
            ak=ak,
            ak_qualified_name=owner_qualified_name(ak),
            policy=Policy.of(HashAlg.SHA256, values[HashAlg.SHA256]),
            baseline=None,
        )
        sent = SentRequest(request=request, requester=made.alice.requester, vtpm_ek=None)
        verdict = appraise_host(results, sent, trust, guest_binding=None)
        assert isinstance(verdict, Accepted), verdict
        assert values[HashAlg.SHA256][9] != bytes(32)
        assert made.quotes() == {"quotes": 2, "races": 1, "quoted": 1, "failed": 0}
        assert (made.tpm.quotes, made.tpm.extends) == (2, 2)


async def test_a_pcr_extended_during_both_quotes_fails_that_batch_and_no_other(folder: Path) -> None:
    """All of the batch are told that it failed; a guest in another batch is attested, and so is the next batch."""
    async with host(folder) as made:
        assert isinstance(await made.alice.round(MEDDLED), Accepted)
        assert isinstance(await made.bobs(), Accepted)
        await made.tpm.hold(cut=False)
        first = asyncio.create_task(made.bob.round((0, 7)))
        await made.waiting(1)
        alices = [asyncio.create_task(made.alice.round(MEDDLED)) for _ in range(3)]
        guests = asyncio.create_task(made.bobs())
        await made.waiting(5)
        made.tpm.spoil = 2
        made.tpm.release()
        async with asyncio.timeout(TIME_S):
            outcomes = await asyncio.gather(*alices, return_exceptions=True)
            assert isinstance(await first, Accepted)
            assert isinstance(await guests, Accepted)
        for outcome in outcomes:
            assert isinstance(outcome, BatchFailed), outcome
            assert "extended during each of 2 quotes" in outcome.detail
        assert made.quotes() == {"quotes": 6, "races": 2, "quoted": 4, "failed": 1}
        for metrics in (made.lab.agent_metrics, made.lab.metrics):
            assert figures(metrics).value("harness_refusals_total", reason="BatchFailed") == 3
        assert isinstance(await made.alice.round((0, 7)), Accepted)
        assert isinstance(await made.bobs(), Accepted)
        assert made.quotes() == {"quotes": 8, "races": 2, "quoted": 6, "failed": 1}
        assert made.tpm.quotes == 8


async def test_a_race_in_one_batch_is_not_noticed_by_a_batch_without_that_pcr(folder: Path) -> None:
    """A batch that does not quote the PCR needs no second quote, however often it is extended."""
    async with host(folder) as made:
        assert isinstance(await made.bobs(), Accepted)
        before = made.tpm.quotes
        made.tpm.spoil = 1
        assert isinstance(await made.bobs(), Accepted)
        assert made.tpm.quotes == before + 1
        assert made.quotes()["races"] == 0


@pytest.mark.parametrize("code", BUSY.values(), ids=BUSY)
async def test_a_busy_tpm_is_asked_again(folder: Path, code: int) -> None:
    """RETRY, YIELDED and TESTING cost time, and no answer; the TSS repeats some itself, the rest are counted."""
    async with host(folder) as made:
        assert isinstance(await made.bobs(), Accepted)
        made.tpm.set_faults({"action": "fail", "command": "Quote", "response_code": code, "times": 12})
        assert isinstance(await made.bobs(), Accepted)
        assert made.quotes() == {"quotes": 2, "races": 0, "quoted": 2, "failed": 0}
        assert made.found.sum("harness_tpm_busy_total") >= 1


async def test_a_tpm_that_stays_busy_fails_the_batch_within_a_bound(folder: Path) -> None:
    """It is not asked for ever: the batch fails, others do not wait for it, and the TPM is used again afterwards."""
    async with host(folder) as made:
        assert isinstance(await made.bobs(), Accepted)
        made.tpm.set_faults({"action": "fail", "command": "Quote", "response_code": BUSY["RETRY"], "times": 1_000_000})
        async with asyncio.timeout(TIME_S):
            with pytest.raises(BatchFailed):
                await made.alice.round((0, 7))
        assert made.tpm.quotes < 1_000
        assert made.found.sum("harness_batches_total", outcome="DeviceFault") == 1
        made.tpm.set_faults()
        assert isinstance(await made.bobs(), Accepted)
