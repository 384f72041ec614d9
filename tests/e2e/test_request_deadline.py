"""How long an answer is of use, from a tenant's request over the provider verifier to the host agent's pool."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlencode

import pytest

from harness.messages import VerifierQuery, verifier_query
from harness.pki import Role
from harness.tenant.appraisal import Accepted
from tests.support.pendings import a_request, agent
from tests.support.provider_lab import ProviderLab, Tenant, provider_lab
from tests.support.tpms import short_folder
from tests.support.vtpm_host import until
from tests.support.web_lab import Wire, wire

pytestmark = pytest.mark.needs_swtpm


@pytest.fixture
async def lab() -> AsyncIterator[ProviderLab]:
    with short_folder() as folder:
        async with provider_lab(folder, "alice") as made:
            made.add_guest(agent(1), "alice", b"1" * 32)
            await made.admission.refresh(0)
            yield made


@asynccontextmanager
async def asking(lab: ProviderLab, prefer: bytes) -> AsyncIterator[Wire]:
    """A host-only request of alice's verifier with this preference, as bytes."""
    tls = lab.pki.tls("alice", Role.TENANT_VERIFIER, "bare", trusts=["provider"])
    async with wire(tls, int(lab.verifier_url.rpartition(":")[2])) as bare:
        target = urlencode(verifier_query(VerifierQuery(request=a_request().request, host_id=lab.host_id))).encode()
        await bare.send(b"GET /v1/verifier?%b HTTP/1.1\r\nHost: x\r\nPrefer: %b\r\n\r\n" % (target, prefer))
        yield bare


@pytest.mark.parametrize(("prefer", "status"), [(b"wait=20", 200), (b"handling=lenient", 200), (b"wait=soon", 400)])
async def test_a_malformed_deadline_is_400(lab: ProviderLab, prefer: bytes, status: int) -> None:
    """Other preferences than ``wait`` are ignored."""
    async with asking(lab, prefer) as bare:
        found, _, body = await bare.answer()
        assert (found, status == 200) == (status, b"attest" in body)


async def test_a_request_is_answered_while_that_is_of_use(lab: ProviderLab) -> None:
    """One that states a deadline is refused when that has come, and leaves the host agent's pool."""
    quote, asked, gate = lab.keys.quote_batch, asyncio.Event(), asyncio.Event()

    async def held(batch: Any) -> Any:
        asked.set()
        await gate.wait()
        return await quote(batch)

    lab.keys.quote_batch = held  # type: ignore[method-assign]
    alice = Tenant(lab, "alice")
    kept = asyncio.create_task(alice.round(agent_id=agent(1)))
    await until(asked.is_set)  # the TPM's turn is held by this batch
    async with asking(lab, b"wait=1") as bare:
        status, _, _ = await bare.answer()
        assert status in {503, 504}
    await until(lambda: lab.quoting.waiting == 1)
    gate.set()
    assert isinstance(await kept, Accepted)
    await alice.client.close()
