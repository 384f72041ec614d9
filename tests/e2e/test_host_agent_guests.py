"""The host agent with its own guests' side: not ready without a guest manager, a CA certificate that stays."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from typing import cast

import pytest
from cryptography import x509

from harness.attest import parse_public
from harness.errors import (
    NotReady,
)
from harness.provider.host_agent import HostAgent
from harness.provider.stream import IdentityOrder
from tests.support.pendings import a_request, agent
from tests.support.provider_site import Site, linked, new_site

pytestmark = pytest.mark.needs_swtpm


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with new_site() as made:
        yield made


async def test_without_a_guest_manager_the_host_is_attested_and_guests_are_not_ready(site: Site) -> None:
    """Not knowing who runs here is 503, not 404; host-only requests do not suffer."""
    settings = site.agent_settings(database=f"sqlite+aiosqlite:///{site.folder / 'agent.db'}")
    async with linked(site, HostAgent(settings)) as link:
        assert b'"host_id":' in (await link.quote(a_request())).text
        with pytest.raises(NotReady):
            await link.quote(a_request(agent_id=agent(1)))


async def test_the_ca_certificate_survives_a_restart(site: Site) -> None:
    """It is self-signed by the CA key, and what tenants were given stays what it was."""
    settings = site.agent_settings(database=f"sqlite+aiosqlite:///{site.folder / 'agent.db'}")
    seen = []
    for _ in range(2):
        async with linked(site, HostAgent(settings)) as link:
            identity = cast(dict[str, str], await link.ask(IdentityOrder()))
            seen.append(base64.b64decode(identity["ca_certificate"]))
            certificate = x509.load_der_x509_certificate(seen[-1])
            certificate.verify_directly_issued_by(certificate)
            assert certificate.public_key() == parse_public(base64.b64decode(identity["ca"])).key()
    assert seen[0] == seen[1]


async def test_a_ca_certificate_that_does_not_fit_the_key_is_made_anew(site: Site) -> None:
    """Whatever somebody left in its place."""
    settings = site.agent_settings(database=f"sqlite+aiosqlite:///{site.folder / 'agent.db'}")
    settings.state_dir.mkdir()
    (settings.state_dir / "vtpm-ca.der").write_bytes(b"no certificate")
    async with linked(site, HostAgent(settings)) as link:
        identity = cast(dict[str, str], await link.ask(IdentityOrder()))
        certificate = x509.load_der_x509_certificate(base64.b64decode(identity["ca_certificate"]))
        certificate.verify_directly_issued_by(certificate)
