"""The provider verifier over real TLS: who may ask what, and enrolment relayed to the TPM."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, cast

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from harness import protocol
from harness.attest import parse_attest, parse_public, parse_signature, verify_signature
from harness.credential import make_credential
from harness.errors import (
    AccessDenied,
    ChallengeFailed,
    HarnessError,
    NotYourGuest,
    PeerRefusedUs,
    PeerUnreachable,
    SelectionNotAllowed,
    ShareExhausted,
    ShuttingDown,
)
from harness.messages import VerifierQuery, verifier_query
from harness.peer import PeerClient
from harness.pki import Authority, Role, load_certificate
from harness.provider.keys import HostKeys
from harness.provider.proxy_routes import ENROLMENTS_PER_TENANT
from harness.tenant.appraisal import Accepted
from harness.tls import certificate_requester
from harness.values import HostId
from tests.support.batching import WAIT_S
from tests.support.figures import figures
from tests.support.pendings import a_request, agent, allow
from tests.support.provider_lab import CA_CERTIFICATE, ProviderLab, Tenant, provider_lab
from tests.support.tpms import short_folder
from tests.support.vtpm_host import until

pytestmark = pytest.mark.needs_swtpm


@pytest.fixture
async def lab() -> AsyncIterator[ProviderLab]:
    with short_folder() as folder:
        async with provider_lab(
            folder, "alice", "bob", allowlists={"alice": allow(range(16)), "bob": allow([0])}
        ) as made:
            made.add_guest(agent(1), "alice", b"1" * 32)
            await made.admission.refresh(0)
            yield made


@asynccontextmanager
async def client(
    lab: ProviderLab, authority: str, role: Role, *, days: float = 30
) -> AsyncIterator[tuple[PeerClient, bytes]]:
    """A client with a new certificate, and its requester."""
    tls = lab.pki.tls(authority, role, "x", trusts=["provider"], days=days)
    async with PeerClient(tls, lab.verifier_url, deadline_s=60) as made:
        yield made, certificate_requester(load_certificate(tls.certificate))


def host_query(host_id: HostId, pcrs: Sequence[int] = (0,)) -> list[tuple[str, str]]:
    return verifier_query(VerifierQuery(request=a_request(pcrs=pcrs).request, host_id=host_id))


# --- who may ask ------------------------------------------------------------------------------------------------------


async def test_a_tenant_verifier_is_answered(lab: ProviderLab) -> None:
    """A guest round and a host-only round, both accepted by the tenant's own appraisal."""
    alice = Tenant(lab, "alice")
    assert isinstance(await alice.round(agent_id=agent(1)), Accepted)
    assert isinstance(await alice.round(), Accepted)
    await alice.client.close()


@pytest.mark.parametrize("role", sorted(set(Role) - {Role.TENANT_VERIFIER}))
async def test_only_the_role_of_a_tenant_verifier_may_ask_for_quotes(lab: ProviderLab, role: Role) -> None:
    """A guest's certificate is not a verifier's, although the same authority signed it."""
    async with client(lab, "alice", role) as (caller, _):
        with pytest.raises(AccessDenied):
            await caller.get("/v1/verifier", host_query(lab.host_id))


@pytest.mark.parametrize("role", sorted(set(Role) - {Role.TENANT_REGISTRAR, Role.TENANT_VERIFIER}))
async def test_only_a_tenants_registrar_or_verifier_may_enrol(lab: ProviderLab, role: Role) -> None:
    """Every call of enrolment has the same guard."""
    async with client(lab, "alice", role) as (caller, _):
        for method, path in (
            ("GET", "/v1/hosts"),
            ("GET", f"/v1/hosts/{lab.host_id}/identity"),
            ("POST", f"/v1/hosts/{lab.host_id}/activate"),
            ("POST", f"/v1/hosts/{lab.host_id}/certify"),
        ):
            with pytest.raises(AccessDenied):
                await caller.call(method, path, body={})


async def test_the_providers_own_certificates_are_no_tenant(lab: ProviderLab) -> None:
    """A verifier's role under the provider's authority owns nothing."""
    async with client(lab, "provider", Role.TENANT_VERIFIER) as (caller, _):
        with pytest.raises(AccessDenied):
            await caller.get("/v1/verifier", host_query(lab.host_id))


@pytest.mark.parametrize("case", ["expired", "unknown-authority", "same-name-as-alice"])
async def test_certificates_that_do_not_hold_open_nothing(lab: ProviderLab, case: str) -> None:
    """Refused in the handshake: an authority is its key, not its name."""
    if case != "expired":
        authority = Authority.create("alice" if case == "same-name-as-alice" else "mallory")
        authority.write(lab.pki.folder / "mallory")
        lab.pki.authorities["mallory"] = authority  # type: ignore[index]
    days = -0.5 if case == "expired" else 30
    async with client(lab, "alice" if case == "expired" else "mallory", Role.TENANT_VERIFIER, days=days) as (caller, _):
        with pytest.raises(PeerUnreachable):
            await caller.get("/v1/verifier", host_query(lab.host_id))


async def test_a_removed_tenant_is_refused_and_a_new_one_is_served(lab: ProviderLab) -> None:
    """Rights follow the provider's records while the service runs."""
    records = lab.records
    async with client(lab, "bob", Role.TENANT_VERIFIER) as (bob, _):
        await bob.get("/v1/verifier", host_query(lab.host_id))
        lab.records = replace(records, tenants={"alice": lab.pki.pem("alice")})
        await lab.admission.refresh(0)
        with pytest.raises(AccessDenied):
            await bob.get("/v1/verifier", host_query(lab.host_id))
        lab.records = records
        await lab.admission.refresh(0)
        await bob.get("/v1/verifier", host_query(lab.host_id))


@pytest.mark.parametrize("how", ["removed", "another authority"])
async def test_what_a_removed_tenant_has_in_work_ends_at_once(lab: ProviderLab, how: str) -> None:
    """Its waiters are refused, the others' are answered; added again it is served again."""
    records = lab.records
    lab.residency.gate.clear()
    async with client(lab, "bob", Role.TENANT_VERIFIER) as (bob, _):
        alice = Tenant(lab, "alice")
        await bob.get("/v1/verifier", host_query(lab.host_id))
        kept = asyncio.create_task(alice.round(agent_id=agent(1)))
        await until(lambda: bool(lab.residency.asked))  # the TPM's turn is held by this batch
        waiting = [asyncio.create_task(bob.get("/v1/verifier", host_query(lab.host_id))) for _ in range(3)]
        await until(lambda: lab.quoting.waiting == 4)
        others = {} if how == "removed" else {"bob": Authority.create("bob").certificate}
        pems = {name: made.public_bytes(Encoding.PEM).decode() for name, made in others.items()}
        lab.records = replace(records, tenants={"alice": lab.pki.pem("alice"), **pems})
        await lab.admission.refresh(0)
        async with asyncio.timeout(WAIT_S):
            outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {AccessDenied}
        assert not kept.done()
        lab.residency.gate.set()
        assert isinstance(await kept, Accepted)
        with pytest.raises(AccessDenied):
            await bob.get("/v1/verifier", host_query(lab.host_id))
        lab.records = records
        await lab.admission.refresh(0)
        await bob.get("/v1/verifier", host_query(lab.host_id))
        await alice.client.close()


async def test_a_removed_hosts_waiters_are_released_and_its_link_is_closed(lab: ProviderLab) -> None:
    """As for one that is not there; added again, it is reached again."""
    records = lab.records
    lab.residency.gate.clear()
    async with client(lab, "alice", Role.TENANT_VERIFIER) as (alice, _):
        query = verifier_query(VerifierQuery(request=a_request(agent_id=agent(1)).request, host_id=None))
        waiting = asyncio.create_task(alice.get("/v1/verifier", query))
        await until(lambda: bool(lab.residency.asked))
        lab.records = replace(records, hosts={}, allowlists={}, guests={})
        await lab.admission.refresh(0)
        async with asyncio.timeout(WAIT_S):
            with pytest.raises(ShuttingDown, match="removed"):
                await waiting
        with pytest.raises(AccessDenied):
            await alice.get("/v1/verifier", host_query(lab.host_id))
        lab.residency.gate.set()
        lab.records = records
        await lab.admission.refresh(0)
        await alice.get("/v1/verifier", host_query(lab.host_id))


async def test_a_tenant_cannot_take_the_providers_name(lab: ProviderLab) -> None:
    """A record of that name is ignored, and its disappearance takes nothing away from the provider."""
    lab.records = replace(lab.records, tenants={**lab.records.tenants, "provider": lab.pki.pem("bob")})
    await lab.admission.refresh(0)
    lab.records = replace(lab.records, tenants={"alice": lab.pki.pem("alice")})
    await lab.admission.refresh(0)
    async with client(lab, "provider", Role.PROVIDER_OPERATOR) as (operator, _):
        assert cast(dict[str, object], await operator.get("/version"))["service"] == "provider-verifier"


# --- what may be asked ------------------------------------------------------------------------------------------------


async def test_refusals_are_typed_and_counted(lab: ProviderLab) -> None:
    """Foreign and unknown guests look alike; PCRs outside the allowlist and unknown hosts are refused."""
    bob, alice = Tenant(lab, "bob"), Tenant(lab, "alice")
    texts = set()
    for agent_id in (agent(1), agent(77)):
        with pytest.raises(NotYourGuest) as caught:
            await bob.ask(a_request(pcrs=[0], agent_id=agent_id).request)
        texts.add(caught.value.detail)
    assert len(texts) == 1
    with pytest.raises(SelectionNotAllowed):
        await bob.ask(a_request(pcrs=[0, 7]).request)
    with pytest.raises(AccessDenied):
        await alice.client.get("/v1/verifier", host_query(HostId(agent(5))))
    assert figures(lab.metrics).refusals() == {"NotYourGuest": 2, "SelectionNotAllowed": 1, "AccessDenied": 1}
    await alice.client.close()
    await bob.client.close()


BAD_QUERIES = [
    pytest.param({"nonce": None}, id="nonce-missing"),
    pytest.param({"nonce": "00" * 15}, id="nonce-short"),
    pytest.param({"nonce": "00" * 65}, id="nonce-long"),
    pytest.param({"nonce": "AB" * 32}, id="nonce-upper-case"),
    pytest.param({"mask": "0x0"}, id="mask-empty"),
    pytest.param({"mask": "0x10000"}, id="mask-pcr-16"),
    pytest.param({"mask": "0x800000"}, id="mask-pcr-23"),
    pytest.param({"mask": "0x1000000"}, id="mask-pcr-24"),
    pytest.param({"mask": "1"}, id="mask-decimal"),
    pytest.param({"hash_alg": "sha1"}, id="sha1"),
    pytest.param({"hash_alg": None}, id="hash-missing"),
    pytest.param({"host_id": None}, id="no-host-no-guest"),
    pytest.param({"agent_id": str(agent(1))}, id="guest-without-binding"),
    pytest.param({"binding": "00" * 32}, id="binding-without-guest"),
    pytest.param({"agent_id": str(agent(1)), "binding": "00" * 32}, id="guest-and-host"),
    pytest.param({"root": "00" * 32}, id="unknown-parameter"),
    pytest.param({"leaf_hash": "00" * 32}, id="leaf-hash"),
]


@pytest.mark.parametrize("change", BAD_QUERIES)
async def test_a_query_that_breaks_a_rule_is_400(lab: ProviderLab, change: dict[str, str | None]) -> None:
    """One change to an honest query; nothing reaches the host."""
    alice = Tenant(lab, "alice")
    honest = dict(host_query(lab.host_id))
    await alice.client.get("/v1/verifier", list(honest.items()))
    changed = {name: value for name, value in (honest | change).items() if value is not None}
    with pytest.raises(PeerRefusedUs) as caught:
        await alice.client.get("/v1/verifier", list(changed.items()))
    assert (caught.value.status, caught.value.error) == (400, "MalformedMessage")
    await alice.client.close()


async def test_a_repeated_parameter_is_400(lab: ProviderLab) -> None:
    """Two parsers could read two requests in it."""
    alice = Tenant(lab, "alice")
    with pytest.raises(PeerRefusedUs) as caught:
        await alice.client.get("/v1/verifier", [*host_query(lab.host_id), ("mask", "0x1")])
    assert caught.value.status == 400
    await alice.client.close()


async def test_a_host_that_is_down_is_a_transport_error(lab: ProviderLab) -> None:
    """The tenant is told to come again, at once."""
    down = HostId(agent(9))
    lab.records = replace(
        lab.records,
        hosts={**lab.records.hosts, down: "https://127.0.0.1:9"},
        allowlists={**lab.records.allowlists, ("alice", down): allow([0])},
    )
    await lab.admission.refresh(0)
    alice = Tenant(lab, "alice")
    with pytest.raises(PeerUnreachable):
        await alice.client.get("/v1/verifier", host_query(down))
    assert isinstance(await alice.round(), Accepted)
    await alice.client.close()


# --- enrolment --------------------------------------------------------------------------------------------------------


async def identity_of(caller: PeerClient, lab: ProviderLab) -> dict[str, Any]:
    return cast(dict[str, Any], await caller.get(f"/v1/hosts/{lab.host_id}/identity"))


async def test_a_host_is_enrolled_over_the_wire(lab: ProviderLab) -> None:
    """Identity, challenge and certification, as a tenant's registrar checks them."""
    async with client(lab, "alice", Role.TENANT_REGISTRAR) as (registrar, requester):
        assert await registrar.get("/v1/hosts") == {"hosts": [str(lab.host_id)]}
        identity = await identity_of(registrar, lab)
        ek, ak, ca = (parse_public(base64.b64decode(identity[name])) for name in ("ek", "ak", "ca"))
        assert identity["host_id"] == str(protocol.host_id_of(ek.name))
        assert base64.b64decode(identity["ca_certificate"]) == CA_CERTIFICATE
        assert "sha256" in identity["banks"]

        blob = make_credential(ek, ak.name, b"s" * 32).keylime_blob()
        body = {"credential": base64.b64encode(blob).decode()}
        answer = await registrar.post(f"/v1/hosts/{lab.host_id}/activate", body)
        expected = protocol.enrol_answer(b"s" * 32, requester=requester, host_id=lab.host_id, ak_name=ak.name)
        assert answer == {"answer": expected.hex()}

        certified = await registrar.post(f"/v1/hosts/{lab.host_id}/certify", {"nonce": "ab" * 32})
        raw, signature = (base64.b64decode(cast(dict[str, str], certified)[name]) for name in ("attest", "signature"))
        verify_signature(ak, parse_signature(signature), raw)
        assert parse_attest(raw).extra_data == protocol.certify_qualifying(bytes.fromhex("ab" * 32), ca.name)


async def test_a_wrong_credential_is_refused_without_an_oracle(lab: ProviderLab) -> None:
    """For another key: one text, and the next right one is answered."""
    async with client(lab, "alice", Role.TENANT_REGISTRAR) as (registrar, _):
        identity = await identity_of(registrar, lab)
        ek, ca, ak = (parse_public(base64.b64decode(identity[name])) for name in ("ek", "ca", "ak"))
        for name, fails in ((ca.name, True), (ak.name, False)):
            body = {"credential": base64.b64encode(make_credential(ek, name, b"s" * 32).keylime_blob()).decode()}
            call = registrar.post(f"/v1/hosts/{lab.host_id}/activate", body)
            if fails:
                with pytest.raises(ChallengeFailed):
                    await call
            else:
                await call


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("activate", {}),
        ("activate", {"credential": "!"}),
        ("activate", {"credential": ""}),
        ("activate", {"credential": 5}),
        ("activate", {"credential": "AAAA", "requester": "00" * 32}),
        ("activate", []),
        ("certify", {}),
        ("certify", {"nonce": "00"}),
        ("certify", {"nonce": "00" * 32, "extra_data": "00" * 32}),
        ("certify", {"nonce": None}),
    ],
)
async def test_malformed_orders_of_enrolment_are_400(lab: ProviderLab, path: str, body: object) -> None:
    """Nobody can say who the requester is, or what is certified."""
    async with client(lab, "alice", Role.TENANT_REGISTRAR) as (registrar, _):
        with pytest.raises(PeerRefusedUs) as caught:
            await registrar.post(f"/v1/hosts/{lab.host_id}/{path}", body)
        assert caught.value.status == 400


@pytest.mark.parametrize("path", ["identity", "activate", "certify"])
async def test_a_host_without_an_allowlist_shows_nothing(lab: ProviderLab, path: str) -> None:
    """An unknown host and one that the tenant may not ask are not told apart."""
    async with client(lab, "alice", Role.TENANT_REGISTRAR) as (registrar, _):
        with pytest.raises(AccessDenied):
            await registrar.call("GET" if path == "identity" else "POST", f"/v1/hosts/{agent(3)}/{path}", body={})
        with pytest.raises(PeerRefusedUs):
            await registrar.call("GET" if path == "identity" else "POST", f"/v1/hosts/no-uuid/{path}", body={})


async def test_one_tenant_cannot_keep_others_from_enrolling(lab: ProviderLab) -> None:
    """Its orders in work are bounded; another tenant's is served meanwhile."""
    slow = SlowCertify(lab.keys)
    async with (
        client(lab, "alice", Role.TENANT_REGISTRAR) as (alice, _),
        client(lab, "bob", Role.TENANT_REGISTRAR) as (bob, _),
    ):
        path, body = f"/v1/hosts/{lab.host_id}/certify", {"nonce": "00" * 32}
        flood = [asyncio.create_task(alice.post(path, body)) for _ in range(ENROLMENTS_PER_TENANT + 3)]
        async with asyncio.timeout(WAIT_S):
            await asyncio.wait(flood, return_when=asyncio.FIRST_COMPLETED)
            while sum(task.done() for task in flood) < 3:
                await asyncio.wait([task for task in flood if not task.done()], return_when=asyncio.FIRST_COMPLETED)
            assert {type(task.exception()) for task in flood if task.done()} == {ShareExhausted}
            other = asyncio.create_task(bob.post(path, body))
            slow.gate.set()
            await other
            outcomes: list[object] = list(await asyncio.gather(*flood, return_exceptions=True))
        assert sum(isinstance(outcome, HarnessError) for outcome in outcomes) == 3


class SlowCertify:
    """Holds TPM2_Certify back."""

    def __init__(self, keys: HostKeys) -> None:
        self._certify = keys.certify_ca
        self.gate = asyncio.Event()
        keys.certify_ca = self.certify_ca  # type: ignore[method-assign]

    async def certify_ca(self, nonce: bytes) -> tuple[bytes, bytes]:
        await self.gate.wait()
        return await self._certify(nonce)
