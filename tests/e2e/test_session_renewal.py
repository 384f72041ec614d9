"""Sessions while the certificates of verifier and guest agent are renewed, and while one has expired."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from harness.pki import Issued, Role, load_certificate, load_issued, now, renew
from harness.tenant.operator import TenantOperator
from harness.tls import certificate_requester
from tests.support.tenant_site import TENANT, WAIT_S, TenantSite, new_tenant_site
from tests.support.tenant_wire import AGENT

pytestmark = pytest.mark.needs_swtpm
VERIFIER, GUEST = f"{Role.TENANT_VERIFIER.value}-verifier", f"{Role.GUEST_AGENT.value}-{AGENT}"
SHORT_S = 10.0
"""Between the making of a certificate and the end of the call that hands it over."""
REASON = "it would have expired"


def file_of(site: TenantSite, owner: str) -> Path:
    return site.folder / "pki" / TENANT / f"{owner}.pem"


def renewed(site: TenantSite, owner: str, *, seconds: float = 86400.0) -> Issued:
    """A renewal of a party's certificate, as its tenant's authority makes it."""
    path = file_of(site, owner)
    return renew(site.pki.authorities[TENANT], load_issued(path, path.with_suffix(".key")), days=seconds / 86400)


def text_of(issued: Issued) -> str:
    return issued.certificate.public_bytes(Encoding.PEM).decode()


async def put(site: TenantSite, service: str, issued: Issued) -> None:
    async with site.client(service, Role.TENANT_OPERATOR, "renewer") as client:
        await client.put("/v1/certificate", {"certificate": text_of(issued), "reason": REASON})


@asynccontextmanager
async def attested() -> AsyncIterator[tuple[TenantSite, TenantOperator]]:
    """A tenant whose guest is attested again and again."""
    async with new_tenant_site() as site, site.running("registrar", "verifier", "guest"), site.operator() as operator:
        await operator.add_host(site.provider_url)
        await operator.state_guest(AGENT, site.provider.host.host_id)
        contact = await operator.registered(AGENT, deadline_s=WAIT_S)
        await operator.admit(contact, await site.order())
        await more_rounds(operator)
        yield site, operator


async def more_rounds(operator: TenantOperator, count: int = 3) -> None:
    """Waits for this many more accepted attestations; no other state than a good one is left at the end."""
    begun: int | None = None
    async with asyncio.timeout(WAIT_S):
        while True:
            view: Any = await operator.attestation(AGENT)
            begun = view["attestation_count"] if begun is None else begun
            if view["attested"] and view["attestation_count"] >= begun + count:
                return
            await asyncio.sleep(0.05)


async def test_a_session_goes_on_across_renewals() -> None:
    """The verifier's certificate and the pinned one of the guest agent are replaced in the middle of a session.

    Rounds go on with the same requester and without a new registration, and nothing is an alarm.
    """
    async with attested() as (site, operator):
        requester = certificate_requester(load_certificate(file_of(site, VERIFIER)))
        await put(site, "verifier", renewed(site, VERIFIER))
        await more_rounds(operator)
        assert certificate_requester(load_certificate(file_of(site, VERIFIER))) == requester
        await put(site, "guest", renewed(site, GUEST))
        await more_rounds(operator)
        async with site.client("registrar", Role.TENANT_OPERATOR) as registrar:
            record: Any = await registrar.get(f"/v2.1/agents/{AGENT}")
        assert record["regcount"] == 1
        assert await operator.alarms() == []


async def test_an_expired_verifier_attests_again_when_it_is_renewed(capfd: pytest.CaptureFixture[str]) -> None:
    """While its certificate has expired no round is made; the renewed file brings it back without a restart."""
    async with attested() as (site, operator):
        short = renewed(site, VERIFIER, seconds=SHORT_S)
        await put(site, "verifier", short)
        while now() <= short.certificate.not_valid_after_utc:  # noqa: ASYNC110 - a time, not an event
            await asyncio.sleep(0.05)
        capfd.readouterr()
        async with asyncio.timeout(WAIT_S):  # whatever round was under way then has ended when the session says so
            while '"new": "GET_QUOTE_RETRY"' not in capfd.readouterr().err:  # noqa: ASYNC110 - a line of its log
                await asyncio.sleep(0.05)
        rounds = site.provider.rounds
        await asyncio.sleep(1.0)  # several intervals: a round that is made all the same is seen below
        assert site.provider.rounds == rounds
        file_of(site, VERIFIER).write_text(text_of(renewed(site, VERIFIER)))
        async with asyncio.timeout(WAIT_S):
            while site.provider.rounds <= rounds + 2:  # noqa: ASYNC110 - the provider counts, and does not tell
                await asyncio.sleep(0.05)
        await more_rounds(operator)
