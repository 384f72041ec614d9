"""Everybody a tenant verifier talks to, in one process: its registrar, guest agents, and a provider that batches.

A process of its own: ``python -m harness.bench_peers FILE``. It writes a file that says where it is reached and which
agents can be added, and answers until SIGTERM. Keys are in software (`bench_soft`): what is measured is the verifier.

Invariants:
    1. Each guest has an address, a certificate and an AK of its own, as in a site.
    2. Whoever asks for a host quote is answered when the batch in work is over and its own one too: all members of a
       batch at the same moment, as a host agent with one TPM answers them.

Spec: docs/performance.md, method; DESIGN 3.3, 4.
"""

from __future__ import annotations

import asyncio
import base64
import secrets
import signal
import sys
import uuid
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pydantic import BaseModel, ConfigDict

from harness import events
from harness.bench_soft import BANK, SoftTpm
from harness.config import Listen, TlsSettings
from harness.keylime_wire import encode_quote
from harness.merkle import MerkleTree, leaf_hash
from harness.messages import encode_proof, encode_shared, parse_verifier_query
from harness.pki import Role, load_certificate
from harness.protocol import host_id_of, leaf_data, qualifying_data
from harness.tls import identities_of
from harness.tpm_templates import KeyTemplate
from harness.values import AgentId, PcrSelection, mask_of, parse_mask
from harness.web import Route, application, peer_of, serve

_VERIFIER = frozenset({Role.TENANT_VERIFIER})
_FILLING = 16
_TRANSPORT_KEY_PCR = 16
GUEST_PCRS, HOST_PCRS = range(8), range(8)


class PeersSettings(BaseModel):
    """What the process needs.

    Args:
        registrar, provider: certificates of the two services.
        guests: certificates of the guest agents, one each.
        batch_s: seconds that a host quote takes.
        result: the file to write.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    registrar: TlsSettings
    provider: TlsSettings
    guests: list[TlsSettings]
    batch_s: float
    result: Path


class Addresses(BaseModel):
    """What the file says: URLs of the services, and for each agent the body of the POST that adds it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    registrar: str
    provider: str
    agents: dict[str, dict[str, object]]


class SoftGuest:
    """A guest agent.

    Args:
        tls: its certificate.
        transport_key_pem: its NK; one for all, which saves making them.
    """

    def __init__(self, tls: TlsSettings, transport_key_pem: bytes) -> None:
        self.agent_id = AgentId(uuid.uuid4())
        self.tls = tls
        self.ek = SoftTpm(KeyTemplate.AK_P256).ak
        self.vtpm_ek = self.ek.spki_digest()
        self.tpm = SoftTpm(KeyTemplate.AK_P256)
        self.tpm.pcrs[_TRANSPORT_KEY_PCR] = BANK.digest(bytes(BANK.digest_size) + BANK.digest(transport_key_pem))
        self._pem = transport_key_pem.decode()

    @property
    def routes(self) -> list[Route]:
        """Calls of Keylime's agent API that a verifier makes."""
        return [Route("GET", "/v2.1/quotes/integrity", self._quote, roles=_VERIFIER)]

    async def _quote(self, request: web.Request) -> object:
        selection = PcrSelection.of(BANK, parse_mask(request.query["mask"]) | 1 << _TRANSPORT_KEY_PCR)
        attest, signature = self.tpm.quote(request.query["nonce"].encode(), selection)
        quote = encode_quote(attest, signature, self.tpm.values(selection))
        return {"quote": quote, "pubkey": self._pem, "hash_alg": "sha256", "enc_alg": "rsa", "sign_alg": "ecdsa"}


@dataclass(slots=True)
class _Waiter:
    leaf: bytes
    mask: int
    answer: asyncio.Future[object]


class SoftProvider:
    """A provider verifier and its one host.

    Args:
        vtpm_eks: of the guests that run there.
        batch_s: seconds that a quote takes.
    """

    def __init__(self, vtpm_eks: dict[AgentId, bytes], batch_s: float) -> None:
        self.tpm = SoftTpm(KeyTemplate.AK_RSA2048)
        self.host_id = host_id_of(self.tpm.ak.name)
        self._vtpm_eks = vtpm_eks
        self._batch_s = batch_s
        self._waiting: list[_Waiter] = []
        self._come = asyncio.Event()

    @property
    def routes(self) -> list[Route]:
        """The call that a verifier makes."""
        return [Route("GET", "/v1/verifier", self._ask, roles=_VERIFIER)]

    async def _ask(self, request: web.Request) -> object:
        asked = parse_verifier_query(list(request.query.items())).request
        vtpm_ek = None if asked.agent_id is None else self._vtpm_eks[asked.agent_id]
        leaf = leaf_hash(leaf_data(asked, requester=peer_of(request).requester, vtpm_ek=vtpm_ek))
        waiter = _Waiter(leaf, asked.mask, asyncio.get_running_loop().create_future())
        self._waiting.append(waiter)
        self._come.set()
        return await waiter.answer

    async def run(self) -> None:
        """Quotes for whoever waits, again and again. *Cancellation:* who waits is not answered."""
        while True:
            await self._come.wait()
            self._come.clear()
            members, self._waiting = self._waiting, []
            await asyncio.sleep(self._batch_s)
            self._answer(members)

    def _answer(self, members: list[_Waiter]) -> None:
        size = max(_FILLING, 1 << (len(members) - 1).bit_length())
        filling = [secrets.token_bytes(32) for _ in range(size - len(members))]
        tree = MerkleTree([member.leaf for member in members] + filling)
        mask = 0
        for member in members:
            mask |= member.mask
        selection = PcrSelection.of(BANK, mask)
        attest, signature = self.tpm.quote(qualifying_data(tree.size, tree.root), selection)
        shared = encode_shared(
            host_id=self.host_id,
            attest=attest,
            signature=signature,
            pcrs=self.tpm.values(selection),
            batch_id="1",
            sealed_at="2026-01-01T00:00:00Z",
        )
        for place, member in enumerate(members):
            if not member.answer.done():
                member.answer.set_result(shared | {"proof": encode_proof(tree.proof(place))})


class SoftRegistrar:
    """The tenant's registrar, as far as its verifier asks it.

    Args:
        guests: that have registered.
        provider: of their host.
        urls: where the guests are reached.
    """

    def __init__(self, guests: list[SoftGuest], provider: SoftProvider, urls: dict[AgentId, str]) -> None:
        self._guests = {str(guest.agent_id): guest for guest in guests}
        self._provider = provider
        self._urls = urls

    @property
    def routes(self) -> list[Route]:
        """The calls that a verifier makes."""
        return [
            Route("GET", "/v2.1/agents/{agent_id}", self._agent, roles=_VERIFIER),
            Route("GET", "/v1/hosts/{host_id}", self._host, roles=_VERIFIER),
        ]

    async def _agent(self, request: web.Request) -> object:
        guest = self._guests[request.match_info["agent_id"]]
        host, _, port = self._urls[guest.agent_id].rpartition("/")[2].partition(":")
        certificate = load_certificate(guest.tls.certificate).public_bytes(Encoding.PEM).decode()
        keys = {"ek_tpm": _b64(guest.ek.marshal()), "aik_tpm": _b64(guest.tpm.ak.marshal())}
        return keys | {
            "host_id": str(self._provider.host_id),
            "mtls_cert": certificate,
            "ip": host,
            "port": int(port),
        }

    async def _host(self, _: web.Request) -> object:
        tpm = self._provider.tpm
        baseline = tpm.baseline
        return {
            "ak": _b64(tpm.ak.marshal()),
            "ak_qualified_name": tpm.ak_qualified_name.hex(),
            "enrolled_at": 1.0,
            "baseline": {
                "clock": baseline.clock,
                "reset_count": baseline.reset_count,
                "restart_count": baseline.restart_count,
                "firmware_version": baseline.firmware_version,
            },
        }


async def _answer_all(settings: PeersSettings) -> None:
    events.configure("bench-peers", settings.result.with_suffix(".log"))
    nk = rsa.generate_private_key(65537, 2048).public_key()
    pem = nk.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    guests = [SoftGuest(tls, pem) for tls in settings.guests]
    provider = SoftProvider({guest.agent_id: guest.vtpm_ek for guest in guests}, settings.batch_s)
    async with AsyncExitStack() as stack:

        async def listening(service: str, routes: list[Route], tls: TlsSettings) -> str:
            app = application(service, routes, identities_of(tls))
            return (await stack.enter_async_context(serve(app, tls, Listen()))).url

        urls = {guest.agent_id: await listening("guest-agent", guest.routes, guest.tls) for guest in guests}
        provider_url = await listening("provider-verifier", provider.routes, settings.provider)
        registrar = SoftRegistrar(guests, provider, urls)
        addresses = Addresses(
            registrar=await listening("tenant-registrar", registrar.routes, settings.registrar),
            provider=provider_url,
            agents={str(guest.agent_id): _order(guest, provider, urls, provider_url) for guest in guests},
        )
        settings.result.write_text(addresses.model_dump_json(), encoding="utf-8")
        told = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told.set)
        batching = asyncio.create_task(provider.run())
        print("ready", flush=True)
        await told.wait()
        batching.cancel()
        await asyncio.gather(batching, return_exceptions=True)


def _order(guest: SoftGuest, provider: SoftProvider, urls: dict[AgentId, str], provider_url: str) -> dict[str, object]:
    host, _, port = urls[guest.agent_id].rpartition("/")[2].partition(":")
    guest_values = {str(pcr): [guest.tpm.pcrs[pcr].hex()] for pcr in GUEST_PCRS}
    host_values = {str(pcr): [provider.tpm.pcrs[pcr].hex()] for pcr in HOST_PCRS}
    return {
        "cloudagent_ip": host,
        "cloudagent_port": int(port),
        "provider_verifier": provider_url,
        "guest_mask": f"{mask_of(GUEST_PCRS):#x}",
        "host_mask": f"{mask_of(HOST_PCRS):#x}",
        "guest_policy": {BANK.text: guest_values},
        "host_policy": {BANK.text: host_values},
    }


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def main() -> None:
    """Entry point of the process."""
    settings = PeersSettings.model_validate_json(Path(sys.argv[1]).read_bytes())
    asyncio.run(_answer_all(settings))


if __name__ == "__main__":
    main()
