"""``GET /metrics`` over mutual TLS: who may read it, and what a server counts of its calls."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from harness import __version__
from harness.errors import AccessDenied, HarnessError
from harness.peer import PeerClient
from harness.pki import Role
from tests.support.figures import Figures, parse, scrape
from tests.support.web_lab import WAIT_S, Pki, Service, refusal, service, wire


def operator(pki: Pki, running: Service) -> PeerClient:
    """Client of the service's own operator."""
    return PeerClient(pki.tls("provider", Role.PROVIDER_OPERATOR, "op"), running.url, deadline_s=WAIT_S)


async def until(client: PeerClient, name: str, **labels: str) -> Figures:
    """The first scrape in which this series is exposed."""
    async with asyncio.timeout(WAIT_S):
        while True:
            found = await scrape(client)
            if found.value(name, **labels) is not None:
                return found
            await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    ("authority", "role"),
    [
        ("alice", Role.PROVIDER_OPERATOR),
        ("alice", Role.TENANT_OPERATOR),
        ("provider", Role.TENANT_OPERATOR),
        ("provider", Role.PROVIDER_VERIFIER),
    ],
)
async def test_only_an_operator_of_its_own_authority_reads_the_figures(
    tmp_path: Path, authority: str, role: Role
) -> None:
    """A tenant that issues itself an operator's certificate learns nothing, nor does another service."""
    pki = Pki(tmp_path)
    async with service(pki) as running:
        assert isinstance(await refusal(running, pki.tls(authority, role), "/metrics"), AccessDenied)
        async with PeerClient(pki.tls(authority, role), running.url, deadline_s=WAIT_S) as client:
            with pytest.raises(AccessDenied):
                await client.text("/metrics")
        async with operator(pki, running) as client:
            found = await scrape(client)
    reason = {"call": "GET /metrics", "outcome": "refused", "reason": "AccessDenied"}
    assert found.value("harness_requests_total", **reason) == 2


async def test_it_is_the_text_format(tmp_path: Path) -> None:
    """Content type and body are what Prometheus reads, not to be stored; with program and end of the certificate."""
    pki = Pki(tmp_path)
    async with service(pki) as running, wire(pki.tls("provider", Role.PROVIDER_OPERATOR, "op"), running.port) as bare:
        await bare.send(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        status, headers, body = await bare.answer()
        expires = running.server.own.expires.timestamp()
    assert (status, headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert headers["cache-control"] == "no-store"
    assert b"# TYPE harness_requests_total counter\n" in body
    found = parse(body.decode())
    assert found.value("harness_certificate_expiry_timestamp_seconds") == expires
    assert found.value("harness_build_info", service="test", version=__version__) == 1


@pytest.mark.parametrize(
    ("method", "path", "labels"),
    [
        ("GET", "/v1/whoami", ("GET /v1/whoami", "answered", "none")),
        ("GET", "/v1/full", ("GET /v1/full", "refused", "PoolFull")),
        ("GET", "/v1/fault", ("GET /v1/fault", "failed", "InternalFault")),
        ("GET", "/v1/slow", ("GET /v1/slow", "failed", "DeadlineExceeded")),
        ("GET", "/v1/operator", ("GET /v1/operator", "refused", "AccessDenied")),
        ("POST", "/v1/echo", ("POST /v1/echo", "answered", "none")),
        ("GET", "/v1/no/such", ("other", "refused", "NotFound")),
        ("DELETE", "/v1/whoami", ("other", "refused", "MalformedMessage")),
    ],
)
async def test_every_call_is_counted_under_its_route(
    tmp_path: Path, method: str, path: str, labels: tuple[str, str, str]
) -> None:
    """A call is counted once, by its route and by how it ended, also one that no route takes."""
    pki = Pki(tmp_path)
    async with service(pki) as running, PeerClient(pki.tls("alice"), running.url, deadline_s=WAIT_S) as client:
        try:
            await client.call(method, path, body={} if method == "POST" else None)
        except HarnessError:
            assert labels[1] != "answered"
        async with operator(pki, running) as reading:
            found = await scrape(reading)
    named = dict(zip(("call", "outcome", "reason"), labels, strict=True))
    assert found.value("harness_requests_total", **named) == 1
    assert found.value("harness_request_seconds_count", call=labels[0]) == 1
    assert found.sum("harness_requests_total") == 1
    assert found.sum("harness_refusals_total") == (0 if labels[1] == "answered" else 1)


async def test_a_body_that_is_too_large_is_a_refusal_with_its_name(tmp_path: Path) -> None:
    """What aiohttp refuses is counted under the name that the client is told."""
    pki = Pki(tmp_path)
    async with service(pki) as running, PeerClient(pki.tls("alice"), running.url, deadline_s=WAIT_S) as client:
        with pytest.raises(HarnessError):
            await client.post("/v1/echo", {"x": "y" * 70_000})
        async with operator(pki, running) as reading:
            found = await scrape(reading)
    assert found.value("harness_refusals_total", reason="MessageTooLarge") == 1


async def test_a_client_that_leaves_abandons_its_call(tmp_path: Path) -> None:
    """A call whose client has gone is neither answered nor refused."""
    pki = Pki(tmp_path)
    async with service(pki) as running:
        async with wire(pki.tls("alice"), running.port) as bare:
            await bare.send(b"GET /v1/wait HTTP/1.1\r\nHost: x\r\n\r\n")
            async with asyncio.timeout(WAIT_S):
                await running.entered.wait()
        async with operator(pki, running) as reading:
            labels = {"call": "GET /v1/wait", "outcome": "abandoned", "reason": "none"}
            found = await until(reading, "harness_requests_total", **labels)
    assert found.sum("harness_refusals_total") == 0
