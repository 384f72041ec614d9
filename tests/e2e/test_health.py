"""``GET /health`` on real services, when all is well and when a part is lost."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from harness import __version__
from harness.config import Listen, TlsSettings
from harness.errors import HarnessError, PeerUnreachable
from harness.health import DEADLINE_S, Health
from harness.peer import PeerClient
from harness.pki import Role, load_certificate
from harness.tls import identities_of
from harness.web import application, serve
from tests.support.provider_site import Site, bound, new_site, provider, url_of
from tests.support.tenant_site import new_tenant_site
from tests.support.web_lab import WAIT_S, Pki, wire

MEMBERS = {"status", "service", "version", "uptime_s", "certificate_expires", "checks"}


async def asked(tls: TlsSettings, port: int) -> tuple[int, dict[str, Any]]:
    """Status and envelope of ``GET /health``."""
    async with wire(tls, port) as bare:
        await bare.send(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        status, _, body = await bare.answer()
        return status, json.loads(body)


async def until(client: PeerClient, status: str) -> dict[str, Any]:
    """The first report with this status."""
    async with asyncio.timeout(WAIT_S):
        while True:
            try:
                report = await client.get("/health")
            except HarnessError:
                report = {}
            if isinstance(report, dict) and report.get("status") == status:
                return report
            await asyncio.sleep(0.1)


async def test_a_hanging_check_is_failing_within_its_deadline(tmp_path: Path) -> None:
    """503 with the reason, in the envelope, while other calls go on; anybody with a known certificate may ask."""
    pki = Pki(tmp_path / "pki")
    tls = pki.tls("provider", Role.PROVIDER_VERIFIER, "server", trusts=("provider", "alice"))
    health = Health()

    async def hang() -> None:
        await asyncio.Event().wait()

    health.check("database", hang)
    app = application("test", [], identities_of(tls), health=health)
    async with serve(app, tls, Listen()) as server:
        status, envelope = await asked(pki.tls("alice", Role.GUEST_AGENT), int(server.url.rsplit(":", 1)[1]))
        assert (status, envelope["code"]) == (503, 503)
        assert envelope["status"] == f"failing: database: no answer within {DEADLINE_S:g} s"
        assert envelope["results"].keys() == MEMBERS
        assert envelope["results"]["status"] == "failing"
        async with PeerClient(pki.tls("alice"), server.url) as client:
            with pytest.raises(PeerUnreachable, match="failing: database"):
                await client.get("/health")


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with new_site() as made:
        yield made


@pytest.mark.needs_swtpm
async def test_a_provider_is_well_and_a_lost_host_degrades_it(site: Site) -> None:
    """Host agent and provider verifier report; without the host agent the verifier says which host is lost, 200."""
    operator = site.pki.tls("provider", Role.PROVIDER_OPERATOR, "op", trusts=["provider"])
    with bound() as sockets:
        async with (
            provider(site, sockets) as (alice, agent),
            PeerClient(operator, url_of(sockets[0])) as to_agent,
            PeerClient(operator, url_of(sockets[1])) as to_verifier,
        ):
            await alice.round()
            report = await until(to_agent, "ok")
            assert report.keys() == MEMBERS
            assert (report["service"], report["version"]) == ("host-agent", __version__)
            assert report["checks"] == {"tpm": "ok", "last batch": "ok", "database": "ok"}
            certificate = load_certificate(site.agent_settings().tls.certificate)
            assert abs(report["certificate_expires"] - certificate.not_valid_after_utc.timestamp()) < 86400
            host = f"host {alice.identity['host_id']}"
            assert (await until(to_verifier, "ok"))["checks"] == {"records": "ok", host: "ok"}
            agent.cancel()
            await asyncio.gather(agent, return_exceptions=True)
            report = await until(to_verifier, "degraded")
            assert report["checks"][host].startswith("not connected: ")
            seen = await alice.client.get("/health")
            assert isinstance(seen, dict)
            assert seen["checks"] == {"records": "ok", "hosts": "1 of 1 cannot be reached"}


@pytest.mark.needs_swtpm
async def test_a_tenants_services_report() -> None:
    """Registrar, verifier and guest agent of a tenant; an agent that is not registered yet is degraded."""
    async with new_tenant_site() as tenant, tenant.running("registrar", "verifier", "guest"):
        for name, checks in (("registrar", {"database"}), ("verifier", {"database"})):
            async with tenant.client(name, Role.TENANT_OPERATOR) as client:
                assert (await until(client, "ok"))["checks"].keys() == checks
        async with tenant.client("guest", Role.TENANT_OPERATOR) as client:
            report = await until(client, "degraded")  # the operator has not stated it yet
            assert report["checks"]["vtpm"] == "ok"
            said = report["checks"][f"registration at {tenant.url('registrar')}"]
            assert said.startswith(("pending: ", "refused: "))
