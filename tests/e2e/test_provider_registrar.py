"""The provider registrar as a service over mTLS: operators, host agents, and guests that register as with Keylime.

The guests' vTPMs are soft ones with keys of the real templates: a credential opens only with EK and AK together.

Size: every call of one service, on one site.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from harness.config import ProviderRegistrarSettings
from harness.credential import keylime_auth_tag
from harness.errors import (
    AccessDenied,
    ChallengeFailed,
    CloneSuspected,
    Conflict,
    HarnessError,
    KeyChanged,
    NotFound,
    NotYourGuest,
    PeerRefusedUs,
    PeerUnreachable,
    UnacceptableKey,
)
from harness.peer import PeerClient
from harness.pki import Authority, Role
from harness.provider.operator import ProviderOperator
from harness.provider.registrar import ProviderRegistrar
from harness.registration import registration_view
from harness.values import AgentId, HostId, PcrSelection
from tests.support.enrolment_parties import SoftVtpm
from tests.support.pendings import agent, allow
from tests.support.provider_lab import Pki

TIME_S = 120.0
HOST, OTHER_HOST = HostId(agent(0xA01)), HostId(agent(0xA02))
GUEST, OTHER, STRANGERS = agent(0xABC), agent(0xABD), agent(0xABE)
HOST_SHOWN = {"host_id": str(HOST), "name": "host-1", "url": "https://host-1:1", "replacement": None}
CA_KEY = ec.generate_private_key(ec.SECP256R1())


class Site:
    """A running registrar; alice and bob are onboarded, one host is announced, alice has two guests and bob one."""

    def __init__(self, pki: Pki, url: str) -> None:
        self.pki = pki
        self.url = url
        self._clients: dict[tuple[str, Role, str], PeerClient] = {}

    def client(self, authority: str, role: Role, name: str = "x") -> PeerClient:
        key = (authority, role, name)
        if key not in self._clients:
            self._clients[key] = PeerClient(self.pki.tls(authority, role, name, trusts=["provider"]), self.url)
        return self._clients[key]

    @property
    def operator(self) -> ProviderOperator:
        return ProviderOperator(self.client("provider", Role.PROVIDER_OPERATOR))

    def host_agent(self, name: str = "host-1") -> PeerClient:
        return self.client("provider", Role.HOST_AGENT, name)

    def guest_agent(self, tenant: str = "alice", name: str = "guest") -> PeerClient:
        return self.client(tenant, Role.GUEST_AGENT, name)

    async def close(self) -> None:
        for client in self._clients.values():
            await client.close()

    async def onboarded(self, tenant: str) -> None:
        """Waits until the server takes this tenant's certificates."""
        async with asyncio.timeout(TIME_S):
            while True:
                try:
                    await self.client(tenant, Role.GUEST_AGENT, "ping").get("/version")
                except HarnessError:
                    await asyncio.sleep(0.02)
                else:
                    return

    async def fill(self) -> None:
        for tenant in ("alice", "bob"):
            await self.operator.add_tenant(tenant, self.pki.pem(tenant))
        await self.host_agent().put(f"/v1/hosts/{HOST}", {"name": "host-1", "url": "https://host-1:1"})
        await self.operator.define_guest(GUEST, "alice", HOST, "web")
        await self.operator.define_guest(OTHER, "alice", HOST, "db")
        await self.operator.define_guest(STRANGERS, "bob", HOST, "web")
        for tenant in ("alice", "bob"):
            await self.onboarded(tenant)

    async def guest(self, agent_id: AgentId = GUEST) -> dict[str, Any]:
        [shown] = [guest for guest in await self.operator.guests() if guest["agent_id"] == str(agent_id)]
        return dict(shown)


@asynccontextmanager
async def registrar(folder: Path, pki: Pki) -> AsyncIterator[Site]:
    """The service on the database in the folder."""
    tls = pki.tls("provider", Role.PROVIDER_REGISTRAR, "r", trusts=["provider"])
    settings = ProviderRegistrarSettings(tls=tls, database=f"sqlite+aiosqlite:///{folder / 'provider.db'}")
    with socket.create_server(("127.0.0.1", 0)) as sock:
        task = asyncio.create_task(ProviderRegistrar(settings).run(sock))
        site = Site(pki, f"https://127.0.0.1:{sock.getsockname()[1]}")
        try:
            yield site
        finally:
            await site.close()
            failed = task.done()
            task.cancel()
            async with asyncio.timeout(TIME_S):
                await asyncio.gather(task, return_exceptions=True)
            assert not failed, "the service ended by itself"


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki.make(tmp_path / "pki", "alice", "bob")


@pytest.fixture
async def site(tmp_path: Path, pki: Pki) -> AsyncIterator[Site]:
    async with registrar(tmp_path, pki) as running:
        await running.fill()
        yield running


# --- the operator ---------------------------------------------------------------------------------------------


async def test_the_operators_records_are_shown_as_they_were_made(site: Site) -> None:
    """Tenants with their allowlists, hosts, guests."""
    await site.operator.allow("alice", HOST, allow([0, 7]))
    assert await site.operator.tenants() == [
        {"name": "alice", "allowlists": {str(HOST): {"sha256": [0, 7]}}},
        {"name": "bob", "allowlists": {}},
    ]
    assert await site.operator.hosts() == [HOST_SHOWN]
    assert await site.guest() == {
        "agent_id": str(GUEST),
        "name": "web",
        "tenant": "alice",
        "host_id": str(HOST),
        "registered": False,
        "ip": None,
        "port": None,
        "state": None,
        "vtpm_ek": None,
    }


async def test_records_survive_a_restart(tmp_path: Path, pki: Pki) -> None:
    """And so do the tenants' authorities: a guest is let in at once."""
    async with registrar(tmp_path, pki) as running:
        await running.fill()
        await register(running)
    async with registrar(tmp_path, pki) as running:
        await running.onboarded("alice")
        assert (await running.guest())["registered"]


async def test_repeating_what_is_recorded_changes_nothing(site: Site) -> None:
    """Tenant with the same CA, guest with the same owner and host, the same allowlist."""
    await site.operator.add_tenant("alice", site.pki.pem("alice"))
    await site.operator.define_guest(GUEST, "alice", HOST, "web")
    for _ in range(2):
        await site.operator.allow("alice", HOST, allow([1]))
    assert len(await site.operator.guests()) == 3


async def test_a_tenant_is_not_taken_over_by_another_authority(site: Site) -> None:
    """It must be removed first; so must its guests."""
    with pytest.raises(Conflict, match="another CA"):
        await site.operator.add_tenant("alice", site.pki.pem("bob"))
    with pytest.raises(Conflict, match="that of tenant bob"):
        await site.operator.add_tenant("carol", site.pki.pem("bob"))
    with pytest.raises(Conflict, match="has guests"):
        await site.operator.remove_tenant("alice")
    for agent_id in (GUEST, OTHER):
        await site.operator.remove_guest(agent_id)
    await site.operator.allow("alice", HOST, allow([0]))
    await site.operator.remove_tenant("alice")
    assert [tenant["name"] for tenant in await site.operator.tenants()] == ["bob"]


async def test_a_removed_tenants_certificates_are_refused(site: Site) -> None:
    """On new connections and on those that are open."""
    await site.guest_agent().get("/version")
    for agent_id in (GUEST, OTHER):
        await site.operator.remove_guest(agent_id)
    await site.operator.remove_tenant("alice")
    for client in (site.guest_agent(), site.guest_agent(name="new")):
        async with asyncio.timeout(TIME_S):
            while True:
                try:
                    await client.get("/version")
                    await asyncio.sleep(0.02)
                except (AccessDenied, PeerUnreachable):
                    break


async def test_a_new_tenant_gets_none_of_an_old_ones_rights(site: Site) -> None:
    """Allowlists go with the tenant, whoever has its name later."""
    await site.operator.allow("bob", HOST, allow([0]))
    await site.operator.remove_guest(STRANGERS)
    await site.operator.remove_tenant("bob")
    await site.operator.add_tenant("bob", site.pki.pem("bob"))
    assert (await site.operator.tenants())[1] == {"name": "bob", "allowlists": {}}


async def test_an_empty_allowlist_takes_it_all_away(site: Site) -> None:
    """There is no row left that could be read another way."""
    await site.operator.allow("alice", HOST, allow([0]))
    await site.operator.allow("alice", HOST, PcrSelection())
    assert (await site.operator.tenants())[0]["allowlists"] == {}


async def test_what_does_not_exist_is_not_found(site: Site) -> None:
    """Tenant, host and guest."""
    with pytest.raises(NotFound, match="carol"):
        await site.operator.remove_tenant("carol")
    with pytest.raises(NotFound, match="carol"):
        await site.operator.allow("carol", HOST, allow([0]))
    with pytest.raises(NotFound, match="carol"):
        await site.operator.define_guest(agent(9), "carol", HOST, "x")
    with pytest.raises(NotFound, match=str(OTHER_HOST)):
        await site.operator.define_guest(agent(9), "alice", OTHER_HOST, "x")
    with pytest.raises(NotFound, match=str(agent(9))):
        await site.operator.remove_guest(agent(9))


async def test_a_guests_owner_and_host_are_stated_once(site: Site) -> None:
    """Another owner or host is refused until it is removed."""
    await site.host_agent("host-2").put(f"/v1/hosts/{OTHER_HOST}", {"name": "host-2", "url": "https://h"})
    for tenant, host in (("bob", HOST), ("alice", OTHER_HOST)):
        with pytest.raises(Conflict, match=str(GUEST)):
            await site.operator.define_guest(GUEST, tenant, host, "web")
    await site.operator.remove_guest(GUEST)
    await site.operator.define_guest(GUEST, "bob", OTHER_HOST, "web")


PEM = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
BAD_CALLS: list[tuple[str, str, object]] = [
    ("POST", "/v1/tenants", []),
    ("POST", "/v1/tenants", {}),
    ("POST", "/v1/tenants", {"name": "carol"}),
    ("POST", "/v1/tenants", {"name": "carol", "ca": 5}),
    ("POST", "/v1/tenants", {"name": "carol", "ca": "no PEM"}),
    ("POST", "/v1/tenants", {"name": "carol", "ca": "\ud800"}),
    ("POST", "/v1/tenants", {"name": "carol", "ca": PEM}),
    ("POST", "/v1/tenants", {"name": "Carol", "ca": PEM}),
    ("POST", "/v1/tenants", {"name": "", "ca": PEM}),
    ("POST", "/v1/tenants", {"name": "c" * 64, "ca": PEM}),
    ("POST", "/v1/tenants", {"name": "carol", "ca": PEM, "role": "operator"}),
    ("PUT", f"/v1/tenants/alice/allowlists/{HOST}", []),
    ("PUT", f"/v1/tenants/alice/allowlists/{HOST}", {"sha1": [0]}),
    ("PUT", f"/v1/tenants/alice/allowlists/{HOST}", {"sha256": [24]}),
    ("PUT", f"/v1/tenants/alice/allowlists/{HOST}", {"sha256": [True]}),
    ("PUT", f"/v1/tenants/alice/allowlists/{HOST}", {"sha256": 5}),
    ("PUT", "/v1/tenants/alice/allowlists/host-1", {"sha256": [0]}),
    ("POST", "/v1/guests", {"agent_id": "X", "tenant": "alice", "host_id": str(HOST), "name": "x"}),
    ("POST", "/v1/guests", {"agent_id": str(GUEST).upper(), "tenant": "alice", "host_id": str(HOST), "name": "x"}),
    ("POST", "/v1/guests", {"agent_id": str(GUEST), "tenant": 5, "host_id": str(HOST), "name": "x"}),
    ("POST", "/v1/guests", {"agent_id": str(GUEST), "tenant": "alice", "host_id": None, "name": "x"}),
    ("POST", "/v1/guests", {"agent_id": str(GUEST), "tenant": "alice", "host_id": str(HOST), "name": "a b"}),
    ("POST", "/v1/guests", {"agent_id": str(GUEST), "tenant": "alice", "host_id": str(HOST)}),
    ("DELETE", "/v1/guests/X", None),
    ("DELETE", f"/v1/guests/{GUEST}?why=x", None),
    ("DELETE", f"/v1/guests/{GUEST}?reason=", None),
    ("DELETE", f"/v1/guests/{GUEST}?reason=a&reason=b", None),
    ("PUT", f"/v1/tenants/alice/allowlists/{HOST}?reason=%0A", {"sha256": [0]}),
    (
        "POST",
        "/v1/guests",
        {"agent_id": str(agent(9)), "tenant": "alice", "host_id": str(HOST), "name": "x", "reason": 5},
    ),
    ("DELETE", f"/v1/hosts/{HOST}", None),
    ("PUT", f"/v1/hosts/{HOST}/replace", {"host_id": str(OTHER_HOST)}),
    ("PUT", f"/v1/hosts/{HOST}/replace", {"reason": "x"}),
    ("PUT", f"/v1/hosts/{HOST}/replace", {"host_id": "host-2", "reason": "x"}),
    ("PUT", f"/v1/guests/{GUEST}/host", {"host_id": str(OTHER_HOST)}),
    ("PUT", f"/v1/guests/{GUEST}/host", {"reason": "x"}),
]


@pytest.mark.parametrize(("method", "path", "body"), BAD_CALLS)
async def test_a_malformed_call_of_an_operator_is_refused(site: Site, method: str, path: str, body: object) -> None:
    """400, and nothing has changed."""
    before = (await site.operator.tenants(), await site.operator.guests())
    with pytest.raises(PeerRefusedUs) as refused:
        await site.client("provider", Role.PROVIDER_OPERATOR).call(method, path, body=body)
    assert (refused.value.status, refused.value.error) == (400, "MalformedMessage")
    assert (await site.operator.tenants(), await site.operator.guests()) == before


async def test_no_tenant_takes_the_providers_own_name(site: Site) -> None:
    """Its certificates would pass for the provider's."""
    with pytest.raises(Conflict, match="own authority"):
        await site.operator.add_tenant("provider", site.pki.pem("bob"))


# --- who may call ---------------------------------------------------------------------------------------------

OPERATORS = [
    ("GET", "/v1/tenants"),
    ("POST", "/v1/tenants"),
    ("DELETE", "/v1/tenants/alice"),
    ("PUT", f"/v1/tenants/alice/allowlists/{HOST}"),
    ("GET", "/v1/guests"),
    ("POST", "/v1/guests"),
    ("DELETE", f"/v1/guests/{GUEST}"),
    ("PUT", f"/v1/guests/{GUEST}/host"),
    ("GET", "/v1/hosts"),
    ("PUT", f"/v1/hosts/{HOST}/replace"),
    ("DELETE", f"/v1/hosts/{HOST}?reason=x"),
    ("GET", "/v1/audit"),
]
HOST_AGENTS = [("PUT", f"/v1/hosts/{HOST}"), ("PUT", f"/v1/hosts/{HOST}/guests")]
GUEST_AGENTS = [(method, f"/v2.1/agents/{GUEST}") for method in ("POST", "PUT")]


async def forbidden(client: PeerClient, calls: list[tuple[str, str]]) -> None:
    for method, path in calls:
        with pytest.raises(AccessDenied):
            await client.call(method, path, body=None if method in {"GET", "DELETE"} else {})


@pytest.mark.parametrize("role", [role for role in Role if role is not Role.PROVIDER_OPERATOR])
async def test_only_an_operator_makes_an_operators_calls(site: Site, role: Role) -> None:
    """403 for every other role of the provider's own people."""
    await forbidden(site.client("provider", role), OPERATORS)


@pytest.mark.parametrize("role", [Role.PROVIDER_OPERATOR, Role.PROVIDER_VERIFIER, Role.GUEST_AGENT])
async def test_only_a_host_agent_makes_a_host_agents_calls(site: Site, role: Role) -> None:
    """An operator is not a host."""
    await forbidden(site.client("provider", role, "host-1"), HOST_AGENTS)


@pytest.mark.parametrize("role", list(Role))
async def test_a_tenants_authority_makes_nobody_an_operator_or_a_host(site: Site, role: Role) -> None:
    """A tenant issues certificates with any role in them."""
    await forbidden(site.client("alice", role, "host-1"), OPERATORS + HOST_AGENTS)


@pytest.mark.parametrize("role", [Role.TENANT_VERIFIER, Role.TENANT_REGISTRAR, Role.TENANT_OPERATOR])
async def test_only_a_guest_agent_registers(site: Site, role: Role) -> None:
    """Not its tenant's other services."""
    await forbidden(site.client("alice", role), GUEST_AGENTS)


async def test_a_foreign_authority_is_cut_off(site: Site) -> None:
    """Nobody has onboarded it, whatever role its certificates state."""
    authority = Authority.create("mallory")
    authority.write(site.pki.folder / "mallory")
    pki = Pki(folder=site.pki.folder, authorities={**site.pki.authorities, "mallory": authority})
    for role in (Role.PROVIDER_OPERATOR, Role.HOST_AGENT, Role.GUEST_AGENT):
        async with PeerClient(pki.tls("mallory", role, "m", trusts=["provider"]), site.url) as client:
            with pytest.raises((PeerUnreachable, AccessDenied)):
                await client.get("/v1/tenants")


async def test_an_expired_operator_is_cut_off(site: Site) -> None:
    """The TLS layer refuses it."""
    tls = site.pki.tls("provider", Role.PROVIDER_OPERATOR, "old", trusts=["provider"], days=-0.5)
    async with PeerClient(tls, site.url) as client:
        with pytest.raises(PeerUnreachable):
            await client.get("/v1/tenants")


# --- host agents ----------------------------------------------------------------------------------------------


async def test_a_host_agent_announces_its_own_name_only(site: Site) -> None:
    """The one in its certificate."""
    with pytest.raises(AccessDenied, match="certificate"):
        await site.host_agent("host-2").put(f"/v1/hosts/{OTHER_HOST}", {"name": "host-1", "url": "https://evil"})
    assert len(await site.operator.hosts()) == 1


async def test_a_host_agent_does_not_take_another_host_over(site: Site) -> None:
    """Host ids are no secret: knowing one redirects no tenant's requests."""
    with pytest.raises(Conflict):
        await site.host_agent("host-2").put(f"/v1/hosts/{HOST}", {"name": "host-2", "url": "https://evil"})
    assert await site.operator.hosts() == [HOST_SHOWN]


async def test_a_name_belongs_to_one_host(site: Site) -> None:
    """A second TPM under the first one's name is refused."""
    with pytest.raises(Conflict, match=str(HOST)):
        await site.host_agent().put(f"/v1/hosts/{OTHER_HOST}", {"name": "host-1", "url": "https://h"})


async def test_a_host_agent_that_moved_announces_its_new_address(site: Site) -> None:
    """The same host, the same name."""
    await site.host_agent().put(f"/v1/hosts/{HOST}", {"name": "host-1", "url": "https://moved:2"})
    assert (await site.operator.hosts())[0]["url"] == "https://moved:2"


async def test_a_report_shows_what_runs_and_nothing_else(site: Site) -> None:
    """Guests of this host only, unknown ones are ignored; a later report replaces it."""
    reports = [
        {"agent_id": str(GUEST), "state": "running", "vtpm_ek": "ab" * 32},
        {"agent_id": str(agent(77)), "state": "running", "vtpm_ek": ""},
    ]
    await site.host_agent().put(f"/v1/hosts/{HOST}/guests", {"guests": reports})
    assert ((await site.guest())["state"], (await site.guest())["vtpm_ek"]) == ("running", "ab" * 32)
    assert (await site.guest(OTHER))["state"] is None
    assert len(await site.operator.guests()) == 3
    await site.host_agent().put(f"/v1/hosts/{HOST}/guests", {"guests": []})
    assert (await site.guest())["state"] is None


async def test_a_host_agent_reports_for_its_own_host_only(site: Site) -> None:
    """Another host's agent, with or without a host of its own; and nobody for a host that was never announced."""
    report = {"guests": [{"agent_id": str(GUEST), "state": "running", "vtpm_ek": ""}]}
    with pytest.raises(AccessDenied):
        await site.host_agent("host-2").put(f"/v1/hosts/{HOST}/guests", report)
    await site.host_agent("host-2").put(f"/v1/hosts/{OTHER_HOST}", {"name": "host-2", "url": "https://h"})
    with pytest.raises(AccessDenied):
        await site.host_agent("host-2").put(f"/v1/hosts/{HOST}/guests", report)
    with pytest.raises(AccessDenied):
        await site.host_agent().put(f"/v1/hosts/{agent(5)}/guests", report)
    assert (await site.guest())["state"] is None


REPORT = {"agent_id": str(GUEST), "state": "running", "vtpm_ek": ""}
BAD_ANNOUNCEMENTS: list[tuple[str, object]] = [
    (f"/v1/hosts/{HOST}", []),
    (f"/v1/hosts/{HOST}", {"name": "host-1"}),
    (f"/v1/hosts/{HOST}", {"name": "host-1", "url": 5}),
    (f"/v1/hosts/{HOST}", {"name": "host-1", "url": "http://h"}),
    (f"/v1/hosts/{HOST}", {"name": "host-1", "url": "https://h", "more": 1}),
    ("/v1/hosts/host-1", {"name": "host-1", "url": "https://h"}),
    (f"/v1/hosts/{HOST}/guests", {"guests": {}}),
    (f"/v1/hosts/{HOST}/guests", {"guests": [5]}),
    (f"/v1/hosts/{HOST}/guests", {"guests": [REPORT, REPORT | {"state": "RUNNING"}]}),
    (f"/v1/hosts/{HOST}/guests", {"guests": [REPORT | {"state": "x" * 17}]}),
    (f"/v1/hosts/{HOST}/guests", {"guests": [REPORT | {"vtpm_ek": "0" * 65}]}),
    (f"/v1/hosts/{HOST}/guests", {"guests": [REPORT | {"agent_id": None}]}),
    (f"/v1/hosts/{HOST}/guests", {}),
]


@pytest.mark.parametrize(("path", "body"), BAD_ANNOUNCEMENTS)
async def test_a_malformed_announcement_is_refused(site: Site, path: str, body: object) -> None:
    """400, and the records stay as they are."""
    with pytest.raises(PeerRefusedUs) as refused:
        await site.host_agent().put(path, body)
    assert (refused.value.status, refused.value.error) == (400, "MalformedMessage")
    assert (await site.operator.hosts())[0]["url"] == "https://host-1:1"
    assert (await site.guest())["state"] is None


# --- guests ---------------------------------------------------------------------------------------------------


def keys_of(vtpm: SoftVtpm, **changes: object) -> dict[str, object]:
    """Body of the POST."""

    def b64(data: bytes) -> str:
        return base64.b64encode(data).decode()

    honest: dict[str, object] = {
        "ek_tpm": b64(vtpm.ek.marshal()),
        "aik_tpm": b64(vtpm.ak.marshal()),
        "ekcert": b64(vtpm.certified(GUEST, CA_KEY)),
        "ip": "192.0.2.1",
        "port": 9002,
    }
    return honest | changes


async def challenge(
    site: Site, vtpm: SoftVtpm, agent_id: AgentId = GUEST, tenant: str = "alice", **changes: object
) -> str:
    """POST; the right answer to the challenge, from the vTPM."""
    path = f"/v2.1/agents/{agent_id}"
    results = cast(dict[str, str], await site.guest_agent(tenant).post(path, keys_of(vtpm, **changes)))
    return keylime_auth_tag(vtpm.activate(base64.b64decode(results["blob"])), str(agent_id))


async def answer(site: Site, tag: str, agent_id: AgentId = GUEST, tenant: str = "alice", suffix: str = "") -> None:
    """PUT."""
    await site.guest_agent(tenant).put(f"/v2.1/agents/{agent_id}{suffix}", {"auth_tag": tag})


async def register(
    site: Site,
    vtpm: SoftVtpm | None = None,
    agent_id: AgentId = GUEST,
    tenant: str = "alice",
    **changes: object,
) -> SoftVtpm:
    """A whole registration."""
    vtpm = vtpm or SoftVtpm()
    await answer(site, await challenge(site, vtpm, agent_id, tenant, **changes), agent_id, tenant)
    return vtpm


async def test_an_honest_guest_registers(site: Site) -> None:
    """Not before the answer; then its contact is known. Other guests are as before."""
    vtpm = SoftVtpm()
    tag = await challenge(site, vtpm)
    assert not (await site.guest())["registered"]
    await answer(site, tag)
    shown = await site.guest()
    assert (shown["registered"], shown["ip"], shown["port"]) == (True, "192.0.2.1", 9002)
    assert not (await site.guest(OTHER))["registered"]


async def test_a_guest_agent_is_told_what_is_recorded_of_it(site: Site) -> None:
    """Digests of its keys and certificate, and its contact; of another tenant's guest no more than of one unknown."""
    path = f"/v2.1/agents/{GUEST}/registration"
    assert await site.guest_agent().get(path) == {"registered": False}
    vtpm = await register(site)
    told = await site.guest_agent().get(path)
    assert told == registration_view(
        ek=vtpm.ek.marshal(),
        ak=vtpm.ak.marshal(),
        mtls_cert=cast(str | None, keys_of(vtpm).get("mtls_cert")),
        ip="192.0.2.1",
        port=9002,
    )
    assert await site.guest_agent("bob").get(path) == {"registered": False}
    assert await site.guest_agent().get(f"/v2.1/agents/{agent(77)}/registration") == {"registered": False}


@pytest.mark.parametrize("version", ["v2.1", "v2.3", "v2.6"])
@pytest.mark.parametrize("suffix", ["", "/activate"])
async def test_versions_and_both_forms_of_the_put_are_served(site: Site, version: str, suffix: str) -> None:
    """Stock agents of several years."""
    vtpm = SoftVtpm()
    path = f"/{version}/agents/{GUEST}"
    results = cast(dict[str, str], await site.guest_agent().post(path, keys_of(vtpm)))
    tag = keylime_auth_tag(vtpm.activate(base64.b64decode(results["blob"])), str(GUEST))
    await site.guest_agent().put(path + suffix, {"auth_tag": tag})
    assert (await site.guest())["registered"]


async def test_a_version_that_is_not_spoken_is_not_found(site: Site) -> None:
    """It is not guessed to be like another one."""
    with pytest.raises(HarnessError):
        await site.guest_agent().post(f"/v1.0/agents/{GUEST}", keys_of(SoftVtpm()))


async def test_unknown_guests_and_those_of_others_get_the_same_answer(site: Site) -> None:
    """No oracle: neither who exists nor whose it is, for the POST and for the PUT."""
    sentences = set()
    for agent_id in (STRANGERS, agent(99)):
        with pytest.raises(NotYourGuest) as refused:
            await challenge(site, SoftVtpm(), agent_id)
        sentences.add(refused.value.detail)
        with pytest.raises(NotYourGuest) as refused:
            await answer(site, "0" * 96, agent_id)
        sentences.add(refused.value.detail)
    assert len(sentences) == 1


async def test_another_tenant_does_not_burn_a_challenge(site: Site) -> None:
    """Its wrong answer is refused before the challenge is touched."""
    tag = await challenge(site, SoftVtpm())
    for _ in range(2):
        with pytest.raises(NotYourGuest):
            await answer(site, "0" * 96, GUEST, "bob")
    with pytest.raises(NotYourGuest):
        await answer(site, tag, GUEST, "bob")
    await answer(site, tag)
    assert (await site.guest())["registered"]


@pytest.mark.parametrize("wrong", ["", "0" * 96, "x"])
async def test_a_wrong_answer_registers_nobody_and_burns_the_challenge(site: Site, wrong: str) -> None:
    """400 with one text for all failures; a new POST starts over."""
    vtpm = SoftVtpm()
    tag = await challenge(site, vtpm)
    with pytest.raises(ChallengeFailed):
        await answer(site, wrong)
    with pytest.raises(ChallengeFailed):
        await answer(site, tag)
    assert not (await site.guest())["registered"]
    await register(site, vtpm)


async def test_an_answer_counts_once(site: Site) -> None:
    """Repeating it is refused, and the guest stays registered."""
    tag = await challenge(site, SoftVtpm())
    await answer(site, tag)
    with pytest.raises(ChallengeFailed):
        await answer(site, tag)
    assert (await site.guest())["registered"]


async def test_a_repeated_post_and_a_wrong_tag_leave_a_registered_guest_alone(site: Site) -> None:
    """Its record is neither deactivated nor changed before the right answer; then its contact is renewed."""
    vtpm = await register(site)
    before = await site.guest()
    tag = await challenge(site, vtpm, ip="198.51.100.1")
    assert await site.guest() == before
    with pytest.raises(ChallengeFailed):
        await answer(site, "0" * 96)
    assert await site.guest() == before
    with pytest.raises(ChallengeFailed):
        await answer(site, tag)
    await register(site, vtpm, ip="198.51.100.1")
    assert await site.guest() == before | {"ip": "198.51.100.1"}


@pytest.mark.parametrize("changed", ["ek", "ak", "both"])
async def test_other_keys_are_an_alarm_until_the_guest_is_removed(site: Site, changed: str) -> None:
    """EK, AK or both; the record stays. A removed and newly defined guest may register with new ones."""
    vtpm, other = await register(site), SoftVtpm()
    if changed == "ek":
        other.ak_key, other.ak = vtpm.ak_key, vtpm.ak
    if changed == "ak":
        other.ek_key, other.ek = vtpm.ek_key, vtpm.ek
    before = await site.guest()
    with pytest.raises(KeyChanged, match=str(GUEST)):
        await challenge(site, other)
    assert await site.guest() == before
    await site.operator.remove_guest(GUEST)
    await site.operator.define_guest(GUEST, "alice", HOST, "web")
    await register(site, other)


@pytest.mark.parametrize("shared", ["ek", "ak", "both"])
@pytest.mark.parametrize(("agent_id", "tenant"), [(OTHER, "alice"), (STRANGERS, "bob")])
async def test_a_key_of_another_guest_is_a_clone(site: Site, shared: str, agent_id: AgentId, tenant: str) -> None:
    """Of the same tenant or of another; the first one stays registered, the clone is not."""
    vtpm, clone = await register(site), SoftVtpm()
    if shared in {"ek", "both"}:
        clone.ek_key, clone.ek = vtpm.ek_key, vtpm.ek
    if shared in {"ak", "both"}:
        clone.ak_key, clone.ak = vtpm.ak_key, vtpm.ak
    with pytest.raises(CloneSuspected):
        await challenge(site, clone, agent_id, tenant)
    assert (await site.guest())["registered"]
    assert not (await site.guest(agent_id))["registered"]


async def test_of_two_clones_that_register_at_once_one_wins(site: Site) -> None:
    """Both have open challenges; the second answer finds the first guest's record."""
    vtpm = SoftVtpm()
    tags = [(await challenge(site, vtpm, agent_id), agent_id) for agent_id in (GUEST, OTHER)]
    await answer(site, *tags[0])
    with pytest.raises(CloneSuspected):
        await answer(site, *tags[1])
    assert [(await site.guest(agent_id))["registered"] for _, agent_id in tags] == [True, False]


async def test_a_guest_that_was_removed_while_it_registered_is_not_back(site: Site) -> None:
    """Its challenge is forgotten, even when it is defined again."""
    tag = await challenge(site, SoftVtpm())
    await site.operator.remove_guest(GUEST)
    with pytest.raises(NotYourGuest):
        await answer(site, tag)
    await site.operator.define_guest(GUEST, "alice", HOST, "web")
    with pytest.raises(ChallengeFailed):
        await answer(site, tag)


async def test_keys_that_are_not_acceptable_get_no_challenge(site: Site) -> None:
    """An EK as AK, an AK as EK: 403 with the reason."""
    vtpm = SoftVtpm()
    keys = keys_of(vtpm)
    for wrong in ({"aik_tpm": keys["ek_tpm"]}, {"ek_tpm": keys["aik_tpm"]}):
        with pytest.raises(UnacceptableKey):
            await site.guest_agent().post(f"/v2.1/agents/{GUEST}", keys | wrong)
    assert not (await site.guest())["registered"]


@pytest.mark.parametrize(
    ("method", "body"),
    [
        ("POST", []),
        ("POST", {}),
        ("POST", {"ek_tpm": "AAAA", "aik_tpm": "AAAA", "ekcert": ""}),
        ("PUT", {}),
        ("PUT", {"auth_tag": 5}),
        ("PUT", {"auth_tag": "ä"}),
        ("PUT", {"auth_tag": "0" * 300}),
    ],
)
async def test_a_malformed_registration_is_refused(site: Site, method: str, body: object) -> None:
    """400; a challenge that is open stays open."""
    tag = await challenge(site, SoftVtpm())
    with pytest.raises(PeerRefusedUs) as refused:
        await site.guest_agent().call(method, f"/v2.1/agents/{GUEST}", body=body)
    assert (refused.value.status, refused.value.error) == (400, "MalformedMessage")
    await answer(site, tag)


@pytest.mark.parametrize("agent_id", ["X", str(GUEST).upper(), GUEST.hex])
async def test_an_agent_id_in_another_form_is_malformed(site: Site, agent_id: str) -> None:
    """One guest has one name."""
    with pytest.raises(PeerRefusedUs) as refused:
        await site.guest_agent().post(f"/v2.1/agents/{agent_id}", keys_of(SoftVtpm()))
    assert refused.value.status == 400


async def test_many_guests_register_at_once(site: Site) -> None:
    """Each with its own keys; none is mixed up."""
    ids = [agent(number) for number in range(8)]
    for number, agent_id in enumerate(ids):
        await site.operator.define_guest(agent_id, "alice", HOST, f"vm-{number}")
    vtpms = [SoftVtpm() for _ in ids]
    guests = enumerate(zip(vtpms, ids, strict=True), start=9000)
    await asyncio.gather(*(register(site, vtpm, agent_id, port=port) for port, (vtpm, agent_id) in guests))
    assert [(await site.guest(agent_id))["port"] for agent_id in ids] == [9000 + number for number in range(8)]
    assert len({hashlib.sha256(vtpm.ek.name).digest() for vtpm in vtpms}) == 8
