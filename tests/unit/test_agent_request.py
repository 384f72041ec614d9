"""The POST that adds an agent: what is accepted, what is refused and by which member's name."""

from __future__ import annotations

import base64
import uuid
from typing import Any

import pytest

from harness.attest import owner_qualified_name
from harness.errors import MalformedMessage
from harness.tenant.agent_request import Snapshot, make_plan, parse_add_agent
from harness.tenant.client import parse_baseline
from harness.tenant.plan import Plan
from harness.values import AgentId, ClockBaseline, HashAlg, HostId, PcrSelection
from tests.support.enrolment_parties import SoftVtpm
from tests.support.tenant_wire import SoftTpm

AGENT = AgentId(uuid.UUID(int=7 << 64))
V = bytes(range(32))
BODY: dict[str, Any] = {
    "cloudagent_ip": "127.0.0.1",
    "cloudagent_port": 9002,
    "provider_verifier": "https://provider:8443",
    "guest_mask": "0x91",
    "host_mask": "0x11",
    "guest_policy": {"sha256": {"0": ["00" * 32], "4": ["11" * 32]}},
    "host_policy": {"sha256": {"4": ["22" * 32, "33" * 32]}},
}


@pytest.fixture(scope="module")
def snapshot() -> Snapshot:
    vtpm, host = SoftVtpm(), SoftTpm()
    return Snapshot(
        host_id=HostId(uuid.uuid4()),
        guest_ek=vtpm.ek.marshal(),
        guest_ak=vtpm.ak.marshal(),
        mtls_cert="pem",
        host_ak=host.ak.marshal(),
        host_ak_qualified_name=owner_qualified_name(host.ak),
        host_baseline=ClockBaseline(clock=1, reset_count=1, restart_count=1, firmware_version=1),
        host_enrolled_at=0.0,
    )


def plan_of(body: dict[str, Any], snapshot: Snapshot) -> Plan:
    request = parse_add_agent(body)
    return make_plan(AGENT, request.agent, snapshot, v=request.v, requester=bytes(32))


def test_an_honest_request_makes_a_plan(snapshot: Snapshot) -> None:
    """Defaults: a provider quote in each round, no reboots, 60 s a round, 120 s of an unsafe clock."""
    plan = plan_of(BODY | {"v": base64.b64encode(V).decode()}, snapshot)
    assert plan.v == V
    assert plan.host is not None
    assert plan.host.host_id == snapshot.host_id
    assert plan.guest_selection == PcrSelection.of(HashAlg.SHA256, 0x91)
    assert (plan.bank, plan.host_mask) == (HashAlg.SHA256, 0x11)
    assert not plan.allow_reboots
    timing = plan.timing
    assert (timing.provider_quote_interval, timing.round_deadline_s, timing.clock_unsafe_limit_s) == (1, 60.0, 120.0)


def test_without_a_provider_quote_there_is_no_host(snapshot: Snapshot) -> None:
    """need_provider_quote = false needs neither address nor host policy."""
    body = {name: value for name, value in BODY.items() if name not in ("provider_verifier", "host_policy")}
    assert plan_of(body | {"need_provider_quote": False}, snapshot).host is None


def test_v_is_not_in_the_stored_request() -> None:
    """What is stored of the request does not hold the half of the key, nor does a repr."""
    text = base64.b64encode(V).decode()
    request = parse_add_agent(BODY | {"v": text})
    assert text not in request.agent.model_dump_json()
    assert repr(V) not in repr(request)


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("cloudagent_ip", {"cloudagent_ip": "a b"}),
    ("cloudagent_ip", {"cloudagent_ip": 5}),
    ("cloudagent_ip", {"cloudagent_ip": "host/path"}),
    ("cloudagent_port", {"cloudagent_port": 0}),
    ("cloudagent_port", {"cloudagent_port": "9002"}),
    ("cloudagent_port", {"cloudagent_port": True}),
    ("v must", {"v": "AAAA"}),
    ("v must", {"v": 7}),
    ("v must", {"v": "not base64"}),
    ("provider_verifier", {"provider_verifier": None}),
    ("provider_verifier", {"provider_verifier": "http://provider"}),
    ("unexpected", {"unexpected": 1}),
    ("allow_reboots", {"allow_reboots": "yes"}),
    ("need_provider_quote", {"need_provider_quote": 1}),
    ("provider_quote_interval", {"provider_quote_interval": 0}),
    ("provider_quote_interval", {"provider_quote_interval": 1.5}),
    ("quote_interval_s", {"quote_interval_s": 0}),
    ("quote_interval_s", {"quote_interval_s": float("inf")}),
    ("round_deadline_s", {"round_deadline_s": -1}),
    ("clock_unsafe_limit_s", {"clock_unsafe_limit_s": -1}),
    ("mask", {"guest_mask": "0x0"}),
    ("mask", {"guest_mask": "0x10001"}),
    ("mask", {"host_mask": "17"}),
    ("hash algorithm", {"hash_alg": "sha1"}),
    ("guest_policy names no PCR", {"guest_policy": {}}),
    ("host_policy names no PCR", {"host_policy": {}}),
    ("guest_policy names a PCR", {"guest_mask": "0x1"}),
    ("host_policy names a PCR", {"host_mask": "0x1"}),
    ("host_policy names a PCR", {"hash_alg": "sha384"}),
    ("sha1", {"guest_policy": {"sha1": {"0": ["00" * 20]}}}),
    ("index", {"guest_policy": {"sha256": {"24": ["00" * 32]}}}),
    ("hex", {"guest_policy": {"sha256": {"0": ["xx"]}}}),
]


@pytest.mark.parametrize(("named", "change"), REFUSED)
def test_one_wrong_member_is_refused_and_named(snapshot: Snapshot, named: str, change: dict[str, Any]) -> None:
    """Every member has its bounds; a policy that is empty or wider than its mask never becomes a plan."""
    with pytest.raises(MalformedMessage, match=named):
        plan_of(BODY | change, snapshot)


@pytest.mark.parametrize("missing", ["cloudagent_ip", "cloudagent_port", "guest_mask", "guest_policy"])
def test_a_missing_member_is_named(missing: str) -> None:
    """Nothing that decides what is believed has a default."""
    with pytest.raises(MalformedMessage, match=missing):
        parse_add_agent({name: value for name, value in BODY.items() if name != missing})


@pytest.mark.parametrize("body", [None, [], "text", 5])
def test_a_body_that_is_no_object_is_refused(body: object) -> None:
    """JSON of another shape."""
    with pytest.raises(MalformedMessage, match="object"):
        parse_add_agent(body)


@pytest.mark.parametrize(
    ("address", "url"), [("::1", "https://[::1]:9002"), ("vm-1.tenant.example", "https://vm-1.tenant.example:9002")]
)
def test_the_agents_address_becomes_a_url(address: str, url: str) -> None:
    """IPv6 addresses are bracketed."""
    assert parse_add_agent(BODY | {"cloudagent_ip": address}).agent.guest_url == url


@pytest.mark.parametrize("value", [None, {}, {"clock": 1}, dict.fromkeys(("clock", "reset_count"), True)])
def test_a_baseline_needs_four_integers(value: object) -> None:
    """The registrar's answer is parsed like any other."""
    with pytest.raises(MalformedMessage):
        parse_baseline(value)
