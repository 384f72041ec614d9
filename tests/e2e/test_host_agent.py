"""Requests over real sockets into a real TPM: N requests, one quote, N proofs that verify."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

from harness.config import BatchSettings
from harness.errors import (
    GuestNotHere,
    MalformedMessage,
    PeerRefusedUs,
    PeerUnreachable,
    SelectionNotAllowed,
)
from harness.messages import parse_provider_evidence
from harness.peer import PeerClient
from harness.pki import Role
from harness.provider.stream import QuoteOrder, encode_order
from harness.provider.stream_link import HostLink
from harness.tenant.appraisal import Accepted, Rejected
from harness.values import HashAlg
from tests.support.batching import WAIT_S
from tests.support.figures import figures
from tests.support.pendings import a_request, agent, allow
from tests.support.provider_lab import ProviderLab, Tenant, provider_lab
from tests.support.tpms import short_folder

pytestmark = pytest.mark.needs_swtpm

T = TypeVar("T")


@pytest.fixture
def folder() -> Iterator[Path]:
    with short_folder() as made:
        yield made


class SlowTpm:
    """Holds the TPM's quotes back from outside, and counts them."""

    def __init__(self, lab: ProviderLab) -> None:
        self._quote = lab.keys.quote_batch
        self.quotes = 0
        self.gate = asyncio.Event()
        self.arrived = asyncio.Event()
        lab.keys.quote_batch = self.quote_batch  # type: ignore[method-assign]

    async def quote_batch(self, batch: Any) -> Any:
        self.quotes += 1
        self.arrived.set()
        await self.gate.wait()
        return await self._quote(batch)


@asynccontextmanager
async def tenants_of(lab: ProviderLab, *names: str) -> AsyncIterator[list[Tenant]]:
    tenants = [Tenant(lab, name) for name in names]
    try:
        yield tenants
    finally:
        for tenant in tenants:
            await tenant.client.close()


async def all_of(*calls: Coroutine[Any, Any, T]) -> list[T]:
    async with asyncio.timeout(60):
        return list(await asyncio.gather(*calls))


def accepted(verdicts: list[Accepted | Rejected]) -> None:
    assert [verdict for verdict in verdicts if isinstance(verdict, Rejected)] == []


async def waiting(lab: ProviderLab, count: int) -> None:
    """Returns when so many requests have reached the host agent's pools."""
    async with asyncio.timeout(WAIT_S):
        while lab.quoting.waiting < count:  # noqa: ASYNC110 - they come through real sockets: there is no event
            await asyncio.sleep(0.005)


# --- batching ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ak", ["rsa2048", "ecc256"])
@pytest.mark.parametrize("tree", ["rfc9162", "merklelib"])
async def test_requests_of_three_tenants_share_one_quote(folder: Path, ak: str, tree: str) -> None:
    """Those that arrive while one quote is in flight get exactly one more, and each tenant accepts its own answer."""
    batch = BatchSettings.model_validate({"tree": tree})
    async with (
        provider_lab(folder, "alice", "bob", "carol", ak=ak, batch=batch) as lab,
        tenants_of(lab, "alice", "bob", "carol") as tenants,
    ):
        slow = SlowTpm(lab)
        first = asyncio.create_task(tenants[0].round())
        async with asyncio.timeout(WAIT_S):
            await slow.arrived.wait()
        calls = [asyncio.create_task(tenant.round([0, pcr])) for tenant in tenants for pcr in range(1, 5)]
        await waiting(lab, 13)
        slow.gate.set()
        accepted(list(await asyncio.gather(first, *calls)))
        assert slow.quotes == 2


async def test_a_tenant_is_shown_no_pcr_outside_its_allowlist(folder: Path) -> None:
    """A narrow tenant gets a pool of its own; what it may not see never reaches it."""
    allowlists = {"narrow": allow([0, 1]), "wide": allow(range(16))}
    async with (
        provider_lab(folder, "narrow", "wide", allowlists=allowlists) as lab,
        tenants_of(lab, "narrow", "wide") as (narrow, wide),
    ):
        slow = SlowTpm(lab)
        first = asyncio.create_task(wide.round([0]))
        async with asyncio.timeout(WAIT_S):
            await slow.arrived.wait()
        calls = [
            asyncio.create_task(narrow.ask(a_request(pcrs=[0]).request)),
            asyncio.create_task(wide.ask(a_request(pcrs=[0, 7]).request)),
        ]
        await waiting(lab, 3)
        slow.gate.set()
        await first
        shown = [parse_provider_evidence(await call).pcrs[HashAlg.SHA256].keys() for call in calls]
        assert [set(pcrs) for pcrs in shown] == [{0}, {0, 7}]
        assert slow.quotes == 3
        with pytest.raises(SelectionNotAllowed):
            await narrow.ask(a_request(pcrs=[0, 7]).request)


async def test_two_guests_of_one_tenant_in_one_batch_are_both_accepted(folder: Path) -> None:
    """Each leaf names its own guest's vTPM; a guest that is not here is told so and spoils nothing."""
    async with provider_lab(folder, "alice") as lab, tenants_of(lab, "alice") as (alice,):
        lab.add_guest(agent(1), "alice", b"1" * 32)
        lab.add_guest(agent(2), "alice", b"2" * 32)
        lab.add_guest(agent(3), "alice", None)
        await lab.admission.refresh(0)
        slow = SlowTpm(lab)
        first = asyncio.create_task(alice.round())
        async with asyncio.timeout(WAIT_S):
            await slow.arrived.wait()
        absent = asyncio.create_task(alice.ask(a_request(agent_id=agent(3)).request))
        calls = [asyncio.create_task(alice.round(agent_id=agent(number))) for number in (1, 2)]
        await waiting(lab, 4)
        slow.gate.set()
        accepted(list(await asyncio.gather(first, *calls)))
        assert slow.quotes == 2
        with pytest.raises(GuestNotHere):
            await absent


async def test_a_vtpm_that_the_tenant_did_not_pin_is_refused_by_the_tenant(folder: Path) -> None:
    """A decoy under the guest's UUID: the host's leaf names its EK, the tenant's leaf the pinned one (check 5)."""
    async with provider_lab(folder, "alice") as lab, tenants_of(lab, "alice") as (alice,):
        lab.add_guest(agent(1), "alice", b"1" * 32)
        await lab.admission.refresh(0)
        request = a_request(agent_id=agent(1)).request
        lab.residency.states[agent(1)] = b"decoy".ljust(32)
        results = await alice.ask(request)
        lab.residency.states[agent(1)] = b"1" * 32
        verdict = alice.appraise(request, results)
        assert isinstance(verdict, Rejected)
        assert (verdict.check, verdict.error) == (5, "QualifyingDataMismatch")


async def test_another_tenants_answer_is_worthless(folder: Path) -> None:
    """The same nonce and PCRs from another certificate: the requester is in the leaf (check 5)."""
    async with provider_lab(folder, "alice", "bob") as lab, tenants_of(lab, "alice", "bob") as (alice, bob):
        request = a_request().request
        results = await alice.ask(request)
        assert isinstance(alice.appraise(request, results), Accepted)
        verdict = bob.appraise(request, results)
        assert isinstance(verdict, Rejected)
        assert verdict.check == 5


async def test_a_thousand_rounds_without_a_false_refusal(folder: Path) -> None:
    """At raw swtpm speed, with answers that overtake each other: honest evidence always passes, the clock included."""
    async with provider_lab(folder, "alice", "bob") as lab, tenants_of(lab, "alice", "bob") as tenants:
        todo = itertools.cycle(tenants)

        async def worker(rounds: int) -> list[Accepted | Rejected]:
            return [await next(todo).round([0, number % 16]) for number in range(rounds)]

        verdicts = await all_of(*(worker(50) for _ in range(20)))
        accepted([verdict for part in verdicts for verdict in part])


async def test_a_bank_that_is_not_allocated_is_the_tenants_error(folder: Path) -> None:
    """400, not a fault of the TPM."""
    everything = allow(range(16)).union(allow(range(16), HashAlg.SHA512))
    async with (
        provider_lab(folder, "alice", allowlists={"alice": everything}) as lab,
        tenants_of(lab, "alice") as (alice,),
    ):
        lab.keys.identity = replace(lab.keys.identity, banks=frozenset({HashAlg.SHA256}))
        await alice.ask(a_request().request)
        with pytest.raises(PeerRefusedUs, match="not allocated") as caught:
            await alice.ask(a_request(bank=HashAlg.SHA512).request)
        assert caught.value.status == 400


# --- the stream itself ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("member", ["root", "leaf_hash", "extra_data"])
async def test_nobody_can_hand_the_host_agent_something_to_sign(folder: Path, member: str) -> None:
    """A frame with a leaf hash, a root or extra data is refused; the same frame without it is served."""
    async with provider_lab(folder, "alice") as lab:
        tls = lab.pki.tls("provider", Role.PROVIDER_VERIFIER, "hostile", trusts=["provider"])
        async with PeerClient(tls, lab.agent_url) as client, client.channel("/v1/stream") as channel:
            honest = json.loads(encode_order(1, QuoteOrder(pending=a_request())))
            answers = []
            for frame in ({**honest, member: "00" * 32}, {**honest, "id": 2}):
                await channel.send(json.dumps(frame))
                async with asyncio.timeout(WAIT_S):
                    answers.append(json.loads(await channel.receive() or "{}"))
        assert answers[0]["error"] == {
            "status": 400,
            "error": "MalformedMessage",
            "detail": f"quote: member '{member}' is unknown",
            "retry_after_s": None,
        }
        assert [proof["id"] for proof in answers[1]["proofs"]] == [2]


async def test_a_frame_without_form_closes_the_connection(folder: Path) -> None:
    """The host agent goes on serving others."""
    async with provider_lab(folder, "alice") as lab, tenants_of(lab, "alice") as (alice,):
        tls = lab.pki.tls("provider", Role.PROVIDER_VERIFIER, "hostile", trusts=["provider"])
        async with PeerClient(tls, lab.agent_url) as client, client.channel("/v1/stream") as channel:
            await channel.send("no frame")
            async with asyncio.timeout(WAIT_S):
                assert await channel.receive() is None
        accepted([await alice.round()])


@pytest.mark.parametrize("role", [Role.HOST_AGENT, Role.PROVIDER_REGISTRAR, Role.PROVIDER_OPERATOR])
async def test_only_a_provider_verifier_opens_a_stream(folder: Path, role: Role) -> None:
    """Other certificates of the same authority are refused."""
    async with provider_lab(folder, "alice") as lab:
        tls = lab.pki.tls("provider", role, "other", trusts=["provider"])
        async with PeerClient(tls, lab.agent_url) as client:
            with pytest.raises(PeerUnreachable, match="403"):
                async with client.channel("/v1/stream"):
                    pass


async def test_a_tenants_certificate_opens_no_stream(folder: Path) -> None:
    """Its authority is not known to the host agent: the handshake fails."""
    async with provider_lab(folder, "alice") as lab:
        tls = lab.pki.tls("alice", Role.PROVIDER_VERIFIER, "fake", trusts=["provider"])
        async with PeerClient(tls, lab.agent_url) as client:
            with pytest.raises(PeerUnreachable):
                async with client.channel("/v1/stream"):
                    pass


async def test_a_host_agent_that_stops_releases_everybody(folder: Path) -> None:
    """Waiters at the provider verifier end at once, with an error that says "later"."""
    async with provider_lab(folder, "alice") as lab:
        tls = lab.pki.tls("provider", Role.PROVIDER_VERIFIER, "second", trusts=["provider"])
        async with PeerClient(tls, lab.agent_url) as client:
            link = HostLink(lambda: client.channel("/v1/stream"))
            runner = asyncio.create_task(link.run())
            slow = SlowTpm(lab)
            calls = [asyncio.create_task(link.quote(a_request(tenant))) for tenant in "abc"]
            async with asyncio.timeout(WAIT_S):
                await slow.arrived.wait()
                await lab.quoting.stop()
                outcomes = await asyncio.gather(*calls, return_exceptions=True)
                assert [getattr(type(outcome), "retryable", False) for outcome in outcomes] == [True] * 3
                slow.gate.set()
            runner.cancel()
            await asyncio.gather(runner, return_exceptions=True)


async def test_malformed_requests_never_reach_the_host(folder: Path) -> None:
    """The provider verifier refuses them itself."""
    async with provider_lab(folder, "alice") as lab, tenants_of(lab, "alice") as (alice,):
        slow = SlowTpm(lab)
        with pytest.raises(PeerRefusedUs, match="unknown parameter"):
            await alice.client.get("/v1/verifier", [("nonce", "00" * 32), ("root", "00" * 32)])
        assert slow.quotes == 0
        assert figures(lab.metrics).refusals() == {MalformedMessage.__name__: 1}
