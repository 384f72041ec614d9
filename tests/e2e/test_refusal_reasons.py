"""Every reason for which a call is refused or fails has its counter, and each is driven through real handlers.

`CALLS` has those that the calls of provider verifier and host agent are answered with, each with what brings it about
on the real services and a real TPM; `ELSEWHERE` those of other services. A new error class with a status on the wire
must be put into one of the two.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from aiohttp import web

from harness import errors
from harness.config import BatchSettings, Listen
from harness.credential import make_credential
from harness.door import Bounds
from harness.errors import DeadlineExceeded, HarnessError, NotFound, PeerRefusedUs, StoreError
from harness.metrics import Metrics
from harness.peer import PeerClient
from harness.pki import Role
from harness.provider.admission import Snapshot
from harness.tls import identities_of
from harness.web import Route, application, serve
from harness.wire_errors import reasons, status_of
from tests.support.certificates import put_in_place, reissue, until_expired
from tests.support.figures import figures, scrape
from tests.support.meddling import Meddler, meddler
from tests.support.pendings import agent
from tests.support.provider_lab import ProviderLab, Tenant, provider_lab
from tests.support.tpms import short_folder
from tests.support.web_lab import ANYBODY, WAIT_S, Pki, service, wire

BATCH_S = 1.5
"""Longer than the shortest time in which an answer can be of use."""
NOWHERE = "https://127.0.0.1:9"


@dataclass(slots=True, kw_only=True)
class Provider:
    """Provider verifier and host agent, with a tenant's two services."""

    lab: ProviderLab
    tpm: Meddler
    alice: Tenant
    registrar: PeerClient

    async def refused(self, call: Awaitable[object]) -> str:
        """Name of the error that a call ends with."""
        async with asyncio.timeout(WAIT_S):
            try:
                answered = await call
            except PeerRefusedUs as error:
                return error.error or ""
            except HarnessError as error:
                return type(error).__name__
        raise AssertionError(f"answered: {answered!r}")

    async def ask(self, wait_s: int | None = None) -> object:
        """One host-only request."""
        query = [("nonce", "ab" * 32), ("mask", "0x1"), ("hash_alg", "sha256"), ("host_id", str(self.lab.host_id))]
        headers = None if wait_s is None else {"Prefer": f"wait={wait_s}"}
        return await self.alice.client.get("/v1/verifier", query, headers=headers)

    @asynccontextmanager
    async def busy(self, requests: int = 2) -> AsyncIterator[None]:
        """A request is with the TPM, which is held, and any others wait for it."""
        await self.tpm.hold(cut=False)
        waiting: list[asyncio.Task[object]] = []
        for count in range(1, requests + 1):
            waiting.append(asyncio.create_task(self.ask()))
            async with asyncio.timeout(WAIT_S):
                while self.lab.quoting.waiting < count:  # noqa: ASYNC110 - they come through sockets
                    await asyncio.sleep(0.005)
        try:
            yield
        finally:
            self.tpm.release()
            async with asyncio.timeout(WAIT_S):
                await asyncio.gather(*waiting, return_exceptions=True)

    def path(self, call: str) -> str:
        """A call of enrolment."""
        return f"/v1/hosts/{self.lab.host_id}/{call}"


@asynccontextmanager
async def provider(**bounds: int) -> AsyncIterator[Provider]:
    """The running services."""
    users: list[Meddler] = []

    @asynccontextmanager
    async def user(back: Path) -> AsyncIterator[Meddler]:
        async with meddler(back) as made:
            users.append(made)
            yield made

    batch = BatchSettings.model_validate(bounds)
    with short_folder() as folder:
        async with provider_lab(folder, "alice", batch=batch, tpm_user=user) as lab:
            alice = Tenant(lab, "alice")
            tls = lab.pki.tls("alice", Role.TENANT_REGISTRAR, "r", trusts=["provider"])
            async with alice.client, PeerClient(tls, lab.verifier_url, deadline_s=WAIT_S) as registrar:
                yield Provider(lab=lab, tpm=users[0], alice=alice, registrar=registrar)


# --- what the calls of provider verifier and host agent are answered with ---------------------------------------------


async def malformed(made: Provider) -> str:
    return await made.refused(made.alice.client.get("/v1/verifier"))


async def too_large(made: Provider) -> str:
    return await made.refused(made.registrar.post(made.path("activate"), {"credential": "A" * 70_000}))


async def access_denied(made: Provider) -> str:
    return await made.refused(made.registrar.get("/v1/verifier"))


async def not_found(made: Provider) -> str:
    """A call that does not exist has no error of ours in its answer; it is counted under the one that fits."""
    await made.refused(made.alice.client.get("/v1/no/such"))
    return NotFound.__name__


async def not_your_guest(made: Provider) -> str:
    return await made.refused(made.alice.round((0,), agent(7)))


async def selection_not_allowed(made: Provider) -> str:
    return await made.refused(made.alice.round((17,)))


async def guest_not_here(made: Provider) -> str:
    made.lab.add_guest(agent(1), "alice", None)
    await made.lab.admission.refresh(0)
    return await made.refused(made.alice.round((0,), agent(1)))


async def not_ready(made: Provider) -> str:
    made.lab.add_guest(agent(1), "alice", b"e" * 32)
    await made.lab.admission.refresh(0)
    made.lab.residency.fault = StoreError("the journal cannot be read")
    return await made.refused(made.alice.round((0,), agent(1)))


async def full(made: Provider) -> str:
    async with made.busy():
        return await made.refused(made.ask())


async def would_be_late(made: Provider) -> str:
    async with made.busy(1):
        await asyncio.sleep(BATCH_S)  # no synchronisation: the time that the TPM takes for this batch
    return await made.refused(made.ask(1))


async def deadline_exceeded(made: Provider) -> str:
    """A client hears "later", in whatever words."""
    async with made.busy():
        await made.refused(made.ask(1))
    return DeadlineExceeded.__name__


async def batch_failed(made: Provider) -> str:
    made.tpm.set_faults({"action": "fail", "command": "Quote"})
    return await made.refused(made.ask())


async def shutting_down(made: Provider) -> str:
    async with made.busy():
        refused = asyncio.create_task(made.refused(made.ask()))
        async with asyncio.timeout(WAIT_S):
            while made.lab.quoting.waiting < 3:  # noqa: ASYNC110 - it comes through sockets
                await asyncio.sleep(0.005)
        await made.lab.quoting.stop()
        return await refused


async def peer_unreachable(made: Provider) -> str:
    records = made.lab.records
    made.lab.records = Snapshot(
        tenants=records.tenants, hosts={made.lab.host_id: NOWHERE}, allowlists=records.allowlists
    )
    await made.lab.admission.refresh(0)
    return await made.refused(made.ask())


async def store_error(made: Provider) -> str:
    """The provider's database cannot be read. A client hears "later", in whatever words."""
    made.lab.fault = StoreError("the disk is full")
    await asyncio.sleep(0.2)  # no synchronisation: the records are read once in a tenth of a second at most
    await made.refused(made.registrar.get("/v1/hosts"))
    return StoreError.__name__


async def challenge_failed(made: Provider) -> str:
    identity = made.lab.keys.identity
    credential = make_credential(identity.ek, b"\x00\x0b" + bytes(32), b"s" * 32)  # for another AK
    blob = base64.b64encode(credential.keylime_blob()).decode()
    return await made.refused(made.registrar.post(made.path("activate"), {"credential": blob}))


async def _certified(made: Provider, action: str) -> None:
    made.tpm.set_faults({"action": action, "command": "Certify", "times": 100})
    await made.refused(made.registrar.post(made.path("certify"), {"nonce": "ab" * 32}))


async def device_fault(made: Provider) -> str:
    """A TPM that refuses: what kind of fault it was, only the host agent knows."""
    await _certified(made, "fail")
    return errors.DeviceFault.__name__


async def device_unavailable(made: Provider) -> str:
    """A TPM that does not answer; likewise."""
    await _certified(made, "cut")
    return errors.DeviceUnavailable.__name__


Drive = Callable[[Provider], Awaitable[str]]
BOTH, VERIFIER, AGENT = frozenset({"verifier", "agent"}), frozenset({"verifier"}), frozenset({"agent"})
EITHER = frozenset({"verifier", "perhaps agent"})
"""Both have the deadline: the host agent says so too if it is the first to look."""
CALLS: dict[str, tuple[Drive, frozenset[str], dict[str, int]]] = {
    "MalformedMessage": (malformed, VERIFIER, {}),
    "MessageTooLarge": (too_large, VERIFIER, {}),
    "AccessDenied": (access_denied, VERIFIER, {}),
    "NotFound": (not_found, VERIFIER, {}),
    "NotYourGuest": (not_your_guest, VERIFIER, {}),
    "SelectionNotAllowed": (selection_not_allowed, VERIFIER, {}),
    "PeerUnreachable": (peer_unreachable, VERIFIER, {}),
    "StoreError": (store_error, VERIFIER, {}),
    "GuestNotHere": (guest_not_here, BOTH, {}),
    "NotReady": (not_ready, BOTH, {}),
    "PoolFull": (full, BOTH, {"pool_size": 1}),
    "ShareExhausted": (full, BOTH, {"tenant_share": 2}),
    "WouldBeLate": (would_be_late, BOTH, {}),
    "DeadlineExceeded": (deadline_exceeded, EITHER, {}),
    "BatchFailed": (batch_failed, BOTH, {}),
    "ShuttingDown": (shutting_down, BOTH, {}),
    "ChallengeFailed": (challenge_failed, BOTH, {}),
    "DeviceFault": (device_fault, AGENT, {}),
    "DeviceUnavailable": (device_unavailable, AGENT, {}),
}
"""By reason: what brings it about, which service says so, and the bounds that it takes."""

CONNECTIONS = frozenset({"CertificateExpired", "TooManyConnections"})
"""What a connection is refused with, at every service: tests of their own below."""

ELSEWHERE = {
    "UnsupportedVersion": "no call of v1",
    "PeerRefusedUs": "the tenant registrar, of a provider",
    "LocalRefusal": "whoever asks a service on the same machine",
    "Conflict": "registrars",
    "CapabilityMissing": "the guest agent",
    "UnacceptableKey": "registrars",
    "CertificateRefused": "registrars",
    "KeyChanged": "registrars",
    "CloneSuspected": "registrars",
}
"""By reason: who answers with it."""


def test_every_reason_is_driven() -> None:
    """A reason that is new must be driven by one of these tests; one that is gone must not be listed."""
    assert set(CALLS) | CONNECTIONS | set(ELSEWHERE) == set(reasons())
    assert not set(CALLS) & set(ELSEWHERE)


@pytest.mark.needs_swtpm
@pytest.mark.parametrize("reason", CALLS)
async def test_a_reason_is_counted_where_a_call_is_refused_for_it(reason: str) -> None:
    """Once for one call, by the service that says no, and by the one that passes it on; nothing else is counted."""
    drive, where, bounds = CALLS[reason]
    async with provider(**bounds) as made:
        assert await drive(made) == reason
        services = {"verifier": figures(made.lab.metrics), "agent": figures(made.lab.agent_metrics)}
    count = 3 if reason == "ShuttingDown" else 1  # those that waited are released with it too
    for service_name, found in services.items():
        refused = found.value("harness_refusals_total", reason=reason)
        assert refused == (count if service_name in where else 0) or f"perhaps {service_name}" in where
        assert found.sum("harness_requests_total", reason=reason) == refused


def _made(name: str) -> HarnessError:
    """An error of this class, with whatever its constructor takes."""
    kind = getattr(errors, name)
    for extra in ({}, {"batch_id": "b"}, {"response_code": 0x101}, {"status": 400}, {"error": "X"}):
        for detail in (("a sentence",), ()):
            with contextlib.suppress(TypeError):
                made: HarnessError = kind(*detail, **extra)
                return made
    raise AssertionError(f"no way to make a {name} is known here")


@pytest.mark.parametrize("reason", reasons())
async def test_every_reason_is_counted_by_any_service(tmp_path: Path, reason: str) -> None:
    """Whatever a handler refuses a call with: once, under its name, with the status that belongs to it."""
    error = _made(reason)

    async def refuse(_: web.Request) -> object:
        raise error

    pki = Pki(tmp_path)
    tls, metrics = pki.tls("provider", Role.PROVIDER_VERIFIER, "server"), Metrics("test")
    app = application("test", [Route("GET", "/v1/x", refuse, roles=ANYBODY)], identities_of(tls), metrics=metrics)
    async with serve(app, tls, Listen()) as server:
        port = int(server.url.rsplit(":", 1)[1])
        async with wire(pki.tls("provider"), port) as bare:
            await bare.send(b"GET /v1/x HTTP/1.1\r\nHost: x\r\n\r\n")
            status, _, _ = await bare.answer()
    found = figures(metrics)
    assert status == status_of(error)
    assert found.value("harness_refusals_total", reason=reason) == 1
    assert found.sum("harness_refusals_total") == 1
    assert found.sum("harness_requests_total", call="GET /v1/x", reason=reason) == 1


# --- what connections are refused with --------------------------------------------------------------------------------


async def test_one_connection_too_many_is_counted(tmp_path: Path) -> None:
    """An authority that has as many as it may: the next one is told so, and counted although it asked for nothing."""
    pki = Pki(tmp_path)
    operator = pki.tls("provider", Role.PROVIDER_OPERATOR, "op")
    async with service(pki, bounds=Bounds(per_authority=1)) as running, wire(pki.tls("alice"), running.port) as first:
        await first.send(b"GET /v1/whoami HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await first.answer())[0] == 200
        async with wire(pki.tls("alice"), running.port) as second:
            await second.send(b"GET /v1/whoami HTTP/1.1\r\nHost: x\r\n\r\n")
            status, _, body = await second.answer()
        assert (status, b"TooManyConnections" in body) == (503, True)
        async with PeerClient(operator, running.url, deadline_s=WAIT_S) as client:
            found = await scrape(client)
    assert (found.value("harness_refusals_total", reason="TooManyConnections") or 0) >= 1


async def test_a_certificate_that_expires_on_an_open_connection_is_counted(tmp_path: Path) -> None:
    """Its next call is refused, and counted under its route."""
    pki = Pki(tmp_path)
    tls = pki.tls("alice")
    put_in_place(reissue(pki, tls, seconds=3), tls)
    operator = pki.tls("provider", Role.PROVIDER_OPERATOR, "op")
    async with service(pki) as running, wire(tls, running.port) as bare:
        async with asyncio.timeout(WAIT_S):
            await until_expired(tls)
        await bare.send(b"GET /v1/whoami HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await bare.answer())[0] == 401
        async with PeerClient(operator, running.url, deadline_s=WAIT_S) as client:
            found = await scrape(client)
    labels = {"call": "GET /v1/whoami", "outcome": "refused", "reason": "CertificateExpired"}
    assert found.value("harness_requests_total", **labels) == 1
    assert found.value("harness_refusals_total", reason="CertificateExpired") == 1
