"""The operators' acts on the wire: which service is asked for what, with which reason, and what is answered."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any, cast

import pytest

from harness.attest import Public
from harness.config import TlsSettings
from harness.errors import ConfigError, MalformedMessage, NotFound
from harness.peer import PeerClient
from harness.provider.operator import ProviderOperator
from harness.tenant.operator import TenantOperator
from harness.tenant.order import GuestContact, Order, request_of
from harness.tenant.policy import Policy, parse_policy
from harness.values import HashAlg, PcrSelection, parse_agent_id, parse_host_id
from tests.support.cli_operators import AGENT_ID, HOST_ID, OTHER_HOST_ID, POLICIES, POLICY

AGENT, HOST, OTHER_HOST = parse_agent_id(AGENT_ID), parse_host_id(HOST_ID), parse_host_id(OTHER_HOST_ID)
WHY = "ticket 4711"
VIEW = {
    "provider_verifier": "https://provider",
    "need_provider_quote": True,
    "allow_reboots": True,
    "quote_interval_s": 5.0,
    "provider_quote_interval": 3,
    "guest_mask": "0xff",
    "host_mask": "0x3ff",
    "hash_alg": "sha384",
    "round_deadline_s": 30.0,
    "clock_unsafe_limit_s": 4000.0,
}

CONTACT = GuestContact(agent_id=AGENT, ak=cast(Public, None), ip="10.0.0.7", port=9002, mtls_cert="PEM")


class Service:
    """A service that writes down its calls and answers from a table; what is not in it is not found."""

    def __init__(self, answers: Mapping[str, object] | None = None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.answers = answers

    async def call(
        self, method: str, path: str, *, params: Sequence[tuple[str, str]] = (), body: object = None
    ) -> object:
        """As `PeerClient.call`."""
        self.calls.append((method, path, *([list(params)] if params else []), *([body] if body is not None else [])))
        if self.answers is None:
            return {}
        if path not in self.answers:
            raise NotFound(path)
        return self.answers[path]

    async def get(self, path: str, params: Sequence[tuple[str, str]] = ()) -> object:
        """As `PeerClient.get`."""
        return await self.call("GET", path, params=params)

    async def put(self, path: str, body: object) -> object:
        """As `PeerClient.put`."""
        return await self.call("PUT", path, body=body)

    async def post(self, path: str, body: object) -> object:
        """As `PeerClient.post`."""
        return await self.call("POST", path, body=body)


def tenant(registrar: Service, verifier: Service) -> TenantOperator:
    """A tenant's operator between these services."""
    return TenantOperator(cast(PeerClient, registrar), cast(PeerClient, verifier), cast(TlsSettings, None))


async def test_each_act_of_a_tenant_goes_to_its_service_with_the_reason() -> None:
    """Registrar and verifier get exactly the members that their calls take."""
    registrar, verifier = Service(), Service()
    operator = tenant(registrar, verifier)
    await operator.resume(AGENT, WHY)
    await operator.resume(AGENT, WHY, accept_reboot=True)
    await operator.set_policy(AGENT, WHY, host=parse_policy(POLICY))
    await operator.end_attestation(AGENT, WHY)
    await operator.acknowledge("v7", WHY)
    await operator.re_enrol_host(HOST, WHY)
    await operator.re_enrol_guest(AGENT, WHY)
    await operator.re_enrol_guest(AGENT, WHY, host_id=HOST)
    await operator.acknowledge("r12", WHY)
    agent = f"/v2.1/agents/{AGENT_ID}"
    assert verifier.calls == [
        ("PUT", f"{agent}/resume", {"reason": WHY}),
        ("PUT", f"{agent}/resume", {"reason": WHY, "accept_reboot": True}),
        ("PUT", f"{agent}/policy", {"reason": WHY, "host_policy": POLICY}),
        ("DELETE", agent, [("reason", WHY)]),
        ("PUT", "/v1/alarms/7/acknowledge", {"reason": WHY}),
    ]
    assert registrar.calls == [
        ("PUT", f"/v1/hosts/{HOST_ID}/re-enrol", {"reason": WHY}),
        ("PUT", f"/v1/guests/{AGENT_ID}/re-enrol", {"reason": WHY}),
        ("PUT", f"/v1/guests/{AGENT_ID}/re-enrol", {"reason": WHY, "host_id": HOST_ID}),
        ("PUT", "/v1/alarms/12/acknowledge", {"reason": WHY}),
    ]


async def test_a_guest_that_was_never_admitted_is_removed_at_the_registrar() -> None:
    """The verifier's 404 does not keep the keys from being forgotten; both get the reason."""
    registrar, verifier = Service(), Service({})
    await tenant(registrar, verifier).remove_guest(AGENT, WHY)
    assert registrar.calls == [("DELETE", f"/v1/guests/{AGENT_ID}", [("reason", WHY)])]
    assert verifier.calls[0][0] == "DELETE"


async def test_alarms_of_both_services_are_one_list_in_the_order_of_time() -> None:
    """Ids tell whose an alarm is; `everything` asks for the acknowledged ones too."""
    registrar = Service({"/v1/alarms": {"alarms": [{"id": 1, "at": 2.0}, {"id": 2, "at": 4.0}]}})
    verifier = Service({"/v1/alarms": {"alarms": [{"id": 1, "at": 3.0}]}})
    found = await tenant(registrar, verifier).alarms(everything=True)
    assert [alarm["id"] for alarm in found] == ["r1", "v1", "r2"]
    assert registrar.calls == verifier.calls == [("GET", "/v1/alarms", [("all", "true")])]


async def test_the_audit_trail_says_which_service_kept_an_entry() -> None:
    """Entries of both services are in the order of time."""
    registrar = Service({"/v1/audit": {"entries": [{"at": 2.0, "action": "host-remove"}]}})
    verifier = Service({"/v1/audit": {"entries": [{"at": 1.0, "action": "resume"}]}})
    found = await tenant(registrar, verifier).audit()
    assert [(entry["service"], entry["action"]) for entry in found] == [
        ("verifier", "resume"),
        ("registrar", "host-remove"),
    ]


@pytest.mark.parametrize("answer", [{}, {"alarms": None}, {"alarms": [1]}, []])
async def test_an_answer_of_another_form_is_malformed(answer: object) -> None:
    """What is no list of objects is not shown as "no alarms"."""
    service = Service({"/v1/alarms": answer})
    with pytest.raises(MalformedMessage):
        await tenant(service, service).alarms()


async def test_an_alarm_of_no_service_is_not_asked_for() -> None:
    """An id without its letter reaches nobody."""
    service = Service()
    with pytest.raises(ConfigError):
        await tenant(service, service).acknowledge("7", WHY)
    assert service.calls == []


# --- the former order -------------------------------------------------------------------------------------


def attested(view: Mapping[str, object]) -> Service:
    """A verifier that attests the guest."""
    path = f"/v2.1/agents/{AGENT_ID}"
    return Service({path: view, f"{path}/policy": POLICIES})


async def test_an_order_is_given_again_as_it_was() -> None:
    """Policies, intervals, provider and the rule on reboots come from the verifier; the payload from the operator."""
    order = await tenant(Service(), attested(VIEW)).former_order(AGENT, b"secret")
    assert (order.guest_policy.encode(), order.host_policy.encode()) == (POLICY, POLICY)
    assert (order.quote_interval_s, order.provider_quote_interval) == (5.0, 3)
    assert (order.provider_verifier, order.allow_reboots, order.payload) == ("https://provider", True, b"secret")
    assert (order.round_deadline_s, order.clock_unsafe_limit_s) == (30.0, 4000.0)
    assert (order.guest_quoted, order.host_quoted) == (
        PcrSelection.of(HashAlg.SHA256, 0xFF),
        PcrSelection.of(HashAlg.SHA384, 0x3FF),
    )


async def test_an_order_given_again_asks_for_the_same() -> None:
    """The verifier is sent the masks and limits that were in force, not those that follow from the policies."""
    order = await tenant(Service(), attested(VIEW)).former_order(AGENT)
    sent = request_of(CONTACT, order, None)
    assert {name: sent[name] for name in VIEW} == VIEW
    assert (sent["guest_policy"], sent["host_policy"]) == (POLICY, POLICY)
    assert "v" not in sent


def test_what_is_not_ordered_is_left_to_the_verifier() -> None:
    """Without masks the policies' own PCRs are quoted; limits that nobody ordered are not sent."""
    policy = parse_policy(POLICY)
    sent = request_of(CONTACT, Order(guest_policy=policy, host_policy=policy, provider_verifier=None), b"v" * 32)
    assert (sent["guest_mask"], sent["host_mask"], sent["hash_alg"]) == ("0x11", "0x11", "sha256")
    assert sent.keys().isdisjoint({"round_deadline_s", "clock_unsafe_limit_s"})
    assert sent["v"] == base64.b64encode(b"v" * 32).decode()
    bare = Order(guest_policy=policy, host_policy=Policy({}), provider_verifier=None)
    assert (request_of(CONTACT, bare, None)["host_mask"], request_of(CONTACT, bare, None)["hash_alg"]) == (
        "0x1",
        "sha256",
    )


async def test_a_guest_without_host_quotes_stays_one() -> None:
    """Where no provider quote was needed none is asked for."""
    order = await tenant(Service(), attested({**VIEW, "need_provider_quote": False})).former_order(AGENT)
    assert order.provider_verifier is None
    assert request_of(CONTACT, order, None)["need_provider_quote"] is False


@pytest.mark.parametrize("missing", sorted(VIEW.keys() - {"allow_reboots"}))
async def test_an_order_is_not_guessed(missing: str) -> None:
    """A verifier that does not say how a guest is attested leaves no order."""
    view = {name: value for name, value in VIEW.items() if name != missing}
    with pytest.raises(MalformedMessage):
        await tenant(Service(), attested(view)).former_order(AGENT)


async def test_reboots_are_allowed_only_where_that_is_said() -> None:
    """Without the member, or with anything but true, a reset is refused."""
    for stated in ({}, {"allow_reboots": None}, {"allow_reboots": 1}):
        view = {**{name: value for name, value in VIEW.items() if name != "allow_reboots"}, **stated}
        order = await tenant(Service(), attested(view)).former_order(AGENT)
        assert order.allow_reboots is False


# --- the provider -----------------------------------------------------------------------------------------


async def test_each_act_of_the_provider_carries_its_reason() -> None:
    """A reason is a member of a body, or a parameter where there is none; one that was not given is left out."""
    registrar = Service()
    operator = ProviderOperator(cast(PeerClient, registrar))
    await operator.add_tenant("carol", "PEM", WHY)
    await operator.add_tenant("carol", "PEM")
    await operator.allow("carol", HOST, PcrSelection.from_lists({HashAlg.SHA256: [0, 7]}), WHY)
    await operator.replace_host(HOST, OTHER_HOST, WHY)
    await operator.move_guest(AGENT, OTHER_HOST, WHY)
    await operator.remove_host(HOST, WHY)
    await operator.remove_guest(AGENT)
    assert registrar.calls == [
        ("POST", "/v1/tenants", {"name": "carol", "ca": "PEM", "reason": WHY}),
        ("POST", "/v1/tenants", {"name": "carol", "ca": "PEM"}),
        ("PUT", f"/v1/tenants/carol/allowlists/{HOST_ID}", [("reason", WHY)], {"sha256": [0, 7]}),
        ("PUT", f"/v1/hosts/{HOST_ID}/replace", {"host_id": OTHER_HOST_ID, "reason": WHY}),
        ("PUT", f"/v1/guests/{AGENT_ID}/host", {"host_id": OTHER_HOST_ID, "reason": WHY}),
        ("DELETE", f"/v1/hosts/{HOST_ID}", [("reason", WHY)]),
        ("DELETE", f"/v1/guests/{AGENT_ID}"),
    ]
