"""A provider verifier that lies about the host, in the tenants' path instead of the honest one.

It has what a provider has: a certificate of the provider's authority, the stream to the host agent, the registrar's
records, and the host's power switch. What it cannot do is to make the host's TPM sign what the host agent does not say.

| mode | what it does | refused by |
|---|---|---|
| ``wrong-ak`` | signs the right batch with another TPM | check 6 |
| ``replay`` | plays one recorded answer back to everybody | check 5 |
| ``strip`` | has a host-only leaf quoted for a guest's round | check 5 |
| ``reboot`` | resets the host between guest quote and host quote | check 10 |

Enrolment is relayed honestly: it could not be forged, and without it there would be nothing to attack.

Spec: docs/threat-model.md; DESIGN 3.5.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

from aiohttp import web

from harness import events
from harness.config import HostileProviderSettings, Listen
from harness.errors import NotReady, PeerUnreachable
from harness.merkle import MerkleTree, leaf_hash
from harness.messages import (
    VerifierQuery,
    encode_proof,
    encode_shared,
    error_from_response,
    parse_json,
    parse_verifier_query,
    verifier_query,
)
from harness.peer import PeerClient
from harness.pki import Role, load_certificate
from harness.prefer import LONGEST_WAIT_S
from harness.protocol import QuoteRequest, leaf_data, qualifying_data
from harness.swtpm import SwtpmProcess
from harness.tls import Peer, certificate_requester, identities_of
from harness.tpm import Tpm
from harness.tpm_templates import KeyTemplate
from harness.unix_client import ask
from harness.values import HashAlg, HostId, Nonce, parse_host_id
from harness.web import Route, application, peer_of, read_object, serve

_FRAME_LIMIT = 1 << 20
_POWER_S = 60.0
_AK_HANDLE = 0x8100_4B11
_AK_AUTH = b"the attacker's own"
_EVERYTHING = {alg.text: "0xffff" for alg in HashAlg}
_FILLING = 16


class HostStream:
    """Orders to a host agent, one connection each.

    Args:
        client: to the host agent.
    """

    def __init__(self, client: PeerClient) -> None:
        self._client = client

    async def order(self, op: str, **members: object) -> Mapping[str, Any]:
        """Result of one order, or for a quote the answer with its proof.

        Raises:
            PeerUnreachable: the connection broke.
            HarnessError: what the host agent refused it with.

        *Cancellation:* the connection is closed.
        """
        async with self._client.channel("/v1/stream") as channel:
            await channel.send(json.dumps({"id": 1, "op": op, **members}))
            match parse_json((await channel.receive() or "null").encode(), limit=_FRAME_LIMIT):
                case {"batch": dict(shared), "proofs": [{"proof": proof}]}:
                    return {**shared, "proof": proof}
                case {"result": dict(result)}:
                    return result
                case {"error": {"status": int(status), "error": str(name), "detail": str(detail)}}:
                    raise error_from_response(status, {"status": detail, "results": {"error": name}}, None)
        raise PeerUnreachable("the host agent gave no answer")

    async def quote(self, request: QuoteRequest, tenant: str, requester: bytes) -> Mapping[str, Any]:
        """Answer to a request for a quote; raises, and is cancelled, like `order`."""
        fields = dict(verifier_query(VerifierQuery(request=request, host_id=None)))
        fields |= {"tenant": tenant, "requester": requester.hex()}
        return await self.order("quote", allowlist=_EVERYTHING, wait_s=LONGEST_WAIT_S, **fields)


class Lies:
    """The answers.

    Args:
        settings: of the hostile provider.
        stream: to the honest host agent.
        records: to the provider registrar.
    """

    def __init__(self, settings: HostileProviderSettings, stream: HostStream, records: PeerClient) -> None:
        self._settings = settings
        self._stream = stream
        self._records = records
        self._requester = certificate_requester(load_certificate(settings.tls.certificate))
        self._once = asyncio.Lock()
        self._recorded: Mapping[str, Any] | None = None
        self._rebooted = False
        self._tpm: Tpm | None = None
        self._swtpm = SwtpmProcess(settings.state_dir / "tpm", settings.state_dir / "s", settings.state_dir / "log")

    async def answer(self, request: QuoteRequest, peer: Peer) -> Mapping[str, Any]:
        """What a tenant is told."""
        events.emit("attack", mode=self._settings.mode, tenant=peer.authority)
        match self._settings.mode:
            case "replay":
                return await self._replay(request)
            case "strip":
                stripped = replace(request, agent_id=None, binding=None)
                return await self._stream.quote(stripped, peer.authority, peer.requester)
            case "reboot":
                return await self._after_reboot(request, peer)
            case "wrong-ak":
                return await self._wrong_ak(request, peer)

    async def _replay(self, request: QuoteRequest) -> Mapping[str, Any]:
        async with self._once:
            if self._recorded is None:
                own = QuoteRequest(nonce=Nonce(bytes(32)), bank=request.bank, mask=request.mask)
                self._recorded = await self._stream.quote(own, "attacker", self._requester)
            return self._recorded

    async def _after_reboot(self, request: QuoteRequest, peer: Peer) -> Mapping[str, Any]:
        async with self._once:
            if not self._rebooted:
                await ask(self._settings.hardware_control, {"op": "power_cycle", "orderly": True}, deadline_s=_POWER_S)
                self._rebooted = True
        return await self._stream.quote(request, peer.authority, peer.requester)

    async def _wrong_ak(self, request: QuoteRequest, peer: Peer) -> Mapping[str, Any]:
        leaf = leaf_hash(leaf_data(request, requester=peer.requester, vtpm_ek=await self._vtpm_ek(request)))
        tree = MerkleTree([leaf] + [leaf_hash(bytes(32))] * (_FILLING - 1))
        async with self._once:
            tpm = self._tpm = self._tpm or await self._own_tpm()
            qualifying = qualifying_data(tree.size, tree.root)
            attest, signature = await tpm.quote(_AK_HANDLE, _AK_AUTH, qualifying, request.selection)
            pcrs = await tpm.pcr_read(request.selection)
        shared = encode_shared(
            host_id=await self.host_id(),
            attest=attest,
            signature=signature,
            pcrs=pcrs,
            batch_id="forged",
            sealed_at="2026-01-01T00:00:00Z",
        )
        return {**shared, "proof": encode_proof(tree.proof(0))}

    async def _vtpm_ek(self, request: QuoteRequest) -> bytes | None:
        if request.agent_id is None:
            return None
        listed = await self._records.get("/v1/guests")
        for guest in listed["guests"] if isinstance(listed, dict) else []:
            if guest["agent_id"] == str(request.agent_id) and guest["vtpm_ek"]:
                return bytes.fromhex(guest["vtpm_ek"])
        # Not an absent guest: the verifier would give that up after three tries.
        raise NotReady("the attacker does not know this guest's EK yet")

    async def _own_tpm(self) -> Tpm:
        await self._swtpm.start()
        tpm = await Tpm.open(self._swtpm.tcti)
        await tpm.startup()
        await tpm.persist(await tpm.create_primary(KeyTemplate.AK_P256, _AK_AUTH), _AK_HANDLE)
        return tpm

    async def host_id(self) -> HostId:
        """The honest host's id."""
        return parse_host_id(str((await self._stream.order("identity"))["host_id"]))

    async def stop(self) -> None:
        """Ends the attacker's own TPM. *Cancellation:* it is killed."""
        if self._tpm is not None:
            await self._tpm.close()
        await self._swtpm.stop()


class HostileProvider:
    """The service.

    Args:
        settings: from its file.
    """

    def __init__(self, settings: HostileProviderSettings) -> None:
        self._settings = settings

    async def run(self, sock: socket.socket | None = None) -> None:
        """Serves until it is cancelled.

        Args:
            sock: bound and listening.

        Raises:
            ConfigError: no socket was handed over.

        *Cancellation:* calls in work are ended.
        """
        settings = self._settings
        async with AsyncExitStack() as stack:
            host = await stack.enter_async_context(
                PeerClient(settings.tls, settings.host_agent, roles={Role.HOST_AGENT})
            )
            records = await stack.enter_async_context(
                PeerClient(settings.operator, settings.registrar, roles={Role.PROVIDER_REGISTRAR})
            )
            lies = Lies(settings, HostStream(host), records)
            stack.push_async_callback(lies.stop)
            app = application("provider-verifier", _routes(HostStream(host), lies), identities_of(settings.tls))
            server = await stack.enter_async_context(serve(app, settings.tls, sock or Listen()))
            events.emit("ready", url=server.url, mode=settings.mode)
            await asyncio.Event().wait()


def _routes(stream: HostStream, lies: Lies) -> list[Route]:
    registrar = frozenset({Role.TENANT_REGISTRAR})

    async def verifier(request: web.Request) -> object:
        return await lies.answer(parse_verifier_query(list(request.query.items())).request, peer_of(request))

    async def hosts(_request: web.Request) -> object:
        return {"hosts": [str(await lies.host_id())]}

    async def identity(_request: web.Request) -> object:
        return await stream.order("identity")

    async def activate(request: web.Request) -> object:
        body = await read_object(request, members={"credential"})
        return await stream.order("activate", requester=peer_of(request).requester.hex(), **body)

    async def certify(request: web.Request) -> object:
        return await stream.order("certify", **await read_object(request, members={"nonce"}))

    return [
        Route("GET", "/v1/verifier", verifier, roles={Role.TENANT_VERIFIER}),
        Route("GET", "/v1/hosts", hosts, roles=registrar),
        Route("GET", "/v1/hosts/{host_id}/identity", identity, roles=registrar),
        Route("POST", "/v1/hosts/{host_id}/activate", activate, roles=registrar),
        Route("POST", "/v1/hosts/{host_id}/certify", certify, roles=registrar),
    ]
