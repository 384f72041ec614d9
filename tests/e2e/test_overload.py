"""One tenant floods with 10,000 requests beside 50 of another: over real sockets, into a real TPM."""

from __future__ import annotations

import asyncio
import json
import resource
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from harness.config import BatchSettings, TlsSettings
from harness.door import Bounds
from harness.messages import VerifierQuery, compact, verifier_query
from harness.pki import Role, load_certificate
from harness.protocol import QuoteRequest
from harness.tenant.appraisal import Accepted
from harness.tls import certificate_requester
from tests.support.batching import WAIT_S
from tests.support.pendings import a_request
from tests.support.provider_lab import ProviderLab, Tenant, provider_lab
from tests.support.tpms import short_folder
from tests.support.vtpm_host import until
from tests.support.web_lab import Wire, wire

pytestmark = pytest.mark.needs_swtpm

REQUESTS = 10_000
CONNECTIONS = 240
SHARE_OF_CONNECTIONS = 220
SHARE_OF_POOL = 150
CALM, CALM_AT_A_TIME = 50, 5
TPM_S = 0.05
MEMORY_MIB = 300
"""Much more than it takes, and much less than 10,000 requests that are all kept."""


@pytest.fixture
def folder() -> Iterator[Path]:
    with short_folder() as made:
        yield made


def slow_down(lab: ProviderLab) -> None:
    """Gives the TPM the time of a chip: else nobody would wait."""
    quote = lab.keys.quote_batch

    async def quote_batch(batch: Any) -> Any:
        await asyncio.sleep(TPM_S)
        return await quote(batch)

    lab.keys.quote_batch = quote_batch  # type: ignore[method-assign]


def port_of(lab: ProviderLab) -> int:
    return int(lab.verifier_url.rpartition(":")[2])


def bytes_of(lab: ProviderLab, request: QuoteRequest) -> bytes:
    """A host-only request, as it is sent."""
    target = urlencode(verifier_query(VerifierQuery(request=request, host_id=lab.host_id)))
    return f"GET /v1/verifier?{target} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


@dataclass(slots=True)
class Flood:
    """A tenant that asks again as soon as it was answered or refused, whatever Retry-After says."""

    tenant: Tenant
    tls: TlsSettings
    left: int = REQUESTS
    refusals: Counter[str] = field(default_factory=Counter)
    untyped: list[str] = field(default_factory=list)
    answers: list[tuple[QuoteRequest, bytes]] = field(default_factory=list)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(CONNECTIONS):
                tasks.create_task(self._ask_on_one())

    async def _ask_on_one(self) -> None:
        async with wire(self.tls, port_of(self.tenant.lab)) as bare:
            usable = True
            while usable and self.left > 0:
                self.left -= 1
                usable = await self._ask(bare)

    async def _ask(self, bare: Wire) -> bool:
        """One request. Whether the connection may be used for another."""
        request = a_request(self.tenant.name).request
        await bare.send(bytes_of(self.tenant.lab, request))
        status, headers, body = await bare.answer()
        if status == 200:
            self.answers.append((request, body))
        elif status == 503 and int(headers["retry-after"]) >= 1:
            self.refusals[json.loads(body)["results"]["error"]] += 1
        else:
            self.untyped.append(f"{status}: {body[:200]!r}")
        return headers.get("connection") != "close"


async def calm_rounds(lab: ProviderLab) -> list[object]:
    """Verdicts, or what was raised, of a tenant that behaves."""
    tenant = Tenant(lab, "calm")
    verdicts: list[object] = []

    async def some() -> None:
        for _ in range(CALM // CALM_AT_A_TIME):
            try:
                verdicts.append(await tenant.round())
            except Exception as error:  # the border of a load: what went wrong is what the test looks at
                verdicts.append(error)

    await asyncio.gather(*(some() for _ in range(CALM_AT_A_TIME)))
    await tenant.client.close()
    return verdicts


def peak_mib() -> float:
    """The most memory that this process, with services and clients in it, has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


async def test_a_flood_of_one_tenant_costs_another_nothing(folder: Path) -> None:
    """Each of the 50 is accepted; each of the 10,000 is answered with evidence that holds, or 503 and Retry-After."""
    batch, bounds = BatchSettings(tenant_share=SHARE_OF_POOL), Bounds(per_authority=SHARE_OF_CONNECTIONS)
    async with provider_lab(folder, "flood", "calm", batch=batch, bounds=bounds) as lab:
        slow_down(lab)
        before = peak_mib()
        flooding, tls = Tenant(lab, "flood"), lab.pki.tls("flood", Role.TENANT_VERIFIER, "floods", trusts=["provider"])
        flooding.requester = certificate_requester(load_certificate(tls.certificate))
        flood = Flood(flooding, tls)
        async with asyncio.timeout(4 * WAIT_S):
            running = asyncio.create_task(flood.run())
            await until(lambda: lab.quoting.waiting >= SHARE_OF_POOL)
            verdicts = await calm_rounds(lab)
            assert not running.done(), "the flood was over before the others were done"
            await running
        grown = peak_mib() - before
        print(f"memory: {grown:.0f} MiB more; {len(flood.answers)} answers, refusals {dict(flood.refusals)}")

        assert [verdict for verdict in verdicts if not isinstance(verdict, Accepted)] == []
        assert len(verdicts) == CALM
        assert flood.untyped == []
        assert len(flood.answers) + flood.refusals.total() == REQUESTS
        assert flood.refusals.keys() == {"ShareExhausted", "TooManyConnections"}
        assert flood.refusals["TooManyConnections"] == CONNECTIONS - SHARE_OF_CONNECTIONS
        assert flood.answers
        for request, body in flood.answers:
            assert isinstance(flooding.appraise(request, json.loads(body)["results"]), Accepted)
            assert body == compact(json.loads(body)).encode(), "what is handed on is what would have been written"
        assert lab.quoting.waiting == 0
        assert grown < MEMORY_MIB
        await flooding.client.close()


async def test_clients_that_leave_leave_nothing_behind(folder: Path) -> None:
    """200 waiting clients close their connections: their requests leave the host agent, and nobody quotes for them."""
    async with provider_lab(folder, "flood", "calm") as lab:
        sealed: list[int] = []
        quote, gate = lab.keys.quote_batch, asyncio.Event()

        async def held(batch: Any) -> Any:
            sealed.append(len(batch.members))
            await gate.wait()
            return await quote(batch)

        lab.keys.quote_batch = held  # type: ignore[method-assign]
        calm = Tenant(lab, "calm")
        first = asyncio.create_task(calm.round())
        await until(lambda: sealed == [1])
        tls = lab.pki.tls("flood", Role.TENANT_VERIFIER, "leaves", trusts=["provider"])
        everybody_waits = asyncio.Event()

        async def ask_and_leave() -> None:
            async with wire(tls, port_of(lab)) as bare:
                await bare.send(bytes_of(lab, a_request("flood").request))
                await everybody_waits.wait()

        async with asyncio.timeout(WAIT_S), asyncio.TaskGroup() as tasks:
            for _ in range(200):
                tasks.create_task(ask_and_leave())
            await until(lambda: lab.quoting.waiting == 201)
            everybody_waits.set()
        await until(lambda: lab.quoting.waiting == 1)
        gate.set()
        assert isinstance(await first, Accepted)
        assert isinstance(await calm.round(), Accepted)
        assert sealed == [1, 1]
        await calm.client.close()
