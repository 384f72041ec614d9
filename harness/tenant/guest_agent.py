"""The guest agent: Keylime's agent API over the vTPM, inside the guest.

Invariants:
    1. Only certificates of the tenant's own authority are listened to: quotes and V for its verifier, U and the
       identity quote for its operator.
    2. Every quote vouches, through PCR 16, for the transport key that U and V are encrypted to.
    3. The payload is written only when U and V make the key that the operator sealed it with.

Owner: the service `GuestAgent`.

Spec: Keylime agent API v2.1 to v2.6; DESIGN 3.5 (guest evidence), 3.6.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
import socket
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiohttp import web
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from harness import events
from harness.config import GuestAgentSettings
from harness.errors import DeviceUnavailable, MalformedMessage, NotReady, TpmError
from harness.health import OK, Health
from harness.keylime_wire import encode_quote
from harness.peer import PeerClient
from harness.pki import Role
from harness.private_file import write_private
from harness.tenant.client import only_authority
from harness.tenant.guest_registration import Contact, Registration
from harness.tenant.payload import ShareBox, unwrap_share
from harness.tenant.vtpm import GuestTpm
from harness.tls import identities_of
from harness.values import AgentId, parse_mask
from harness.web import Route, application, read_object, serve

if TYPE_CHECKING:
    from harness.tpm import Tpm

VERSIONS = ("2.1", "2.2", "2.3", "2.4", "2.5", "2.6")
_NONCE = re.compile(r"[A-Za-z0-9]{1,31}")
_CHALLENGE = re.compile(r"[A-Za-z0-9]{1,128}")
_TPM_S = 30.0
_VERIFIER = frozenset({Role.TENANT_VERIFIER})
_OPERATOR = frozenset({Role.TENANT_OPERATOR})
_BOTH = _VERIFIER | _OPERATOR
_REGISTRARS = frozenset({Role.TENANT_REGISTRAR, Role.PROVIDER_REGISTRAR})


class Agent:
    """The calls.

    Args:
        vtpm: vouches for the transport key already.
        transport_key: NK.
        shares: collects U and V.
        payload_dir: where the payload goes.
    """

    def __init__(self, vtpm: GuestTpm, transport_key: rsa.RSAPrivateKey, shares: ShareBox, payload_dir: Path) -> None:
        self._vtpm = vtpm
        self._key = transport_key
        self._pem = public_pem(transport_key).decode()
        self._shares = shares
        self._payload_dir = payload_dir

    @property
    def routes(self) -> list[Route]:
        """Keylime's agent API."""
        version = r"/{version:v2\.[1-6]}"
        return [
            Route("GET", "/version", self._version, roles=_BOTH),
            Route("GET", version + "/quotes/identity", self._identity, roles=_BOTH),
            Route("GET", version + "/quotes/integrity", self._integrity, roles=_VERIFIER),
            Route("GET", version + "/keys/pubkey", self._pubkey, roles=_BOTH),
            Route("GET", version + "/keys/verify", self._verify, roles=_OPERATOR),
            Route("POST", version + "/keys/ukey", self._ukey, roles=_OPERATOR),
            Route("POST", version + "/keys/vkey", self._vkey, roles=_VERIFIER),
        ]

    async def _version(self, _request: web.Request) -> object:
        return {"supported_version": VERSIONS[-1], "supported_versions": list(VERSIONS)}

    async def _identity(self, request: web.Request) -> object:
        query = _query(request, required={"nonce"}, optional=set())
        return await self._quote(query["nonce"], 0, with_key=True)

    async def _integrity(self, request: web.Request) -> object:
        query = _query(request, required={"nonce", "mask"}, optional={"partial", "ima_ml_entry"})
        partial = query.get("partial", "1")
        if partial not in {"0", "1"}:
            raise MalformedMessage("partial must be 0 or 1")
        return await self._quote(query["nonce"], parse_mask(query["mask"]), with_key=partial == "0")

    async def _quote(self, nonce: str, mask: int, *, with_key: bool) -> object:
        if not _NONCE.fullmatch(nonce):
            raise MalformedMessage("nonce must be 1 to 31 letters and digits")
        quote = await self._vtpm.quote(nonce.encode(), mask)
        results: dict[str, object] = {
            "quote": encode_quote(quote.attest, quote.signature, quote.pcrs),
            "hash_alg": "sha256",
            "enc_alg": "rsa",
            "sign_alg": "ecdsa",
        }
        if with_key:
            results["pubkey"] = self._pem
        return results

    async def _pubkey(self, _request: web.Request) -> object:
        return {"pubkey": self._pem}

    async def _verify(self, request: web.Request) -> object:
        challenge = _query(request, required={"challenge"}, optional=set())["challenge"]
        if not _CHALLENGE.fullmatch(challenge):
            raise MalformedMessage("challenge must be 1 to 128 letters and digits")
        answer = self._shares.answer(challenge)
        if answer is None:
            raise NotReady("the key is not known yet")
        return {"hmac": answer}

    async def _ukey(self, request: web.Request) -> object:
        body = await read_object(request, members={"encrypted_key", "auth_tag", "payload"})
        auth_tag = body.get("auth_tag")
        if not isinstance(auth_tag, str) or len(auth_tag) > 256:
            raise MalformedMessage("auth_tag must be hex")
        payload = None if body.get("payload") is None else _base64(body, "payload")
        share = unwrap_share(_base64(body, "encrypted_key"), self._key)
        await self._combined(self._shares.offer_u(share, auth_tag, payload))
        return {}

    async def _vkey(self, request: web.Request) -> object:
        body = await read_object(request, members={"encrypted_key"})
        share = unwrap_share(_base64(body, "encrypted_key"), self._key)
        await self._combined(self._shares.offer_v(share))
        return {}

    async def _combined(self, known: bool) -> None:
        if known and self._shares.payload is not None:
            await asyncio.to_thread(write_private, self._payload_dir / "payload", self._shares.payload)
            events.emit("payload_received", size=len(self._shares.payload))


def public_pem(key: rsa.RSAPrivateKey) -> bytes:
    """PEM text of the public part; PCR 16 is extended with its digest."""
    return key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _query(request: web.Request, *, required: set[str], optional: set[str]) -> Mapping[str, str]:
    pairs = list(request.query.items())
    given = dict(pairs)
    if len(given) != len(pairs) or not required <= given.keys() <= required | optional:
        raise MalformedMessage(f"the parameters must be {', '.join(sorted(required | optional))}, each once")
    return given


def _base64(body: Mapping[str, Any], name: str) -> bytes:
    value = body.get(name)
    try:
        return base64.b64decode(value if isinstance(value, str) else "-", validate=True)
    except (binascii.Error, ValueError):
        raise MalformedMessage(f"{name} must be base64") from None


def _health(tpm: Tpm, registrations: Mapping[str, Registration]) -> Health:
    async def answers() -> None:
        try:
            await tpm.banks()
        except TpmError as error:
            raise DeviceUnavailable("the vTPM does not answer") from error

    def states() -> dict[str, str]:
        found = {url: registration.status for url, registration in registrations.items()}
        return {
            url: OK if status.state == "active" else f"{status.state}: {status.detail or 'under way'}"
            for url, status in found.items()
        }

    health = Health()
    health.check("vtpm", answers)
    health.parts("registration at", states)  # an agent that is registered already is asked by its verifier all the same
    return health


class GuestAgent:
    """The service.

    Args:
        settings: from its file.
    """

    def __init__(self, settings: GuestAgentSettings) -> None:
        self._settings = settings

    async def run(self, sock: socket.socket | None = None) -> None:
        """Serves until it is cancelled, and keeps itself registered at every registrar.

        Args:
            sock: bound and listening; else the settings say where.

        Raises:
            ConfigError: unusable settings, files or address.
            TpmError: the vTPM, or a key in it, cannot be used.

        *Cancellation:* calls in work are ended.
        """
        from harness.tpm import Tpm

        settings = self._settings
        agent_id = AgentId(settings.agent_id)
        own_tls = only_authority(settings.tls, settings.tenant)
        making_key = asyncio.create_task(asyncio.to_thread(rsa.generate_private_key, 65537, 2048))
        async with AsyncExitStack() as stack:
            tpm = await stack.enter_async_context(await Tpm.open(settings.tcti, timeout_s=_TPM_S))
            vtpm = await GuestTpm.provision(tpm, settings.state_dir)
            key = await making_key
            await vtpm.vouch_for(public_pem(key))
            agent = Agent(vtpm, key, ShareBox(agent_id), settings.payload_dir)
            registrations: dict[str, Registration] = {}
            health = _health(tpm, registrations)
            app = application("guest-agent", agent.routes, identities_of(own_tls), health=health)
            server = await stack.enter_async_context(serve(app, own_tls, sock or settings.listen))
            events.emit("ready", url=server.url, agent_id=str(agent_id))

            def contact() -> Contact:
                shown = server.own.certificate.public_bytes(serialization.Encoding.PEM).decode()
                return Contact(ip=settings.public_host, port=_port(server.url), mtls_cert=shown)

            peers = [
                (url, await stack.enter_async_context(PeerClient(settings.tls, url, roles=_REGISTRARS)))
                for url in settings.registrars
            ]
            async with asyncio.TaskGroup() as group:
                for url, peer in peers:
                    registration = registrations[url] = Registration(
                        agent_id, vtpm, contact, again_s=settings.register_again_s
                    )
                    group.create_task(registration.run(url, peer))
                await asyncio.Event().wait()


def _port(url: str) -> int:
    return int(url.rsplit(":", 1)[1])
