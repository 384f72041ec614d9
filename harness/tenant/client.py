"""Calls of the tenant's services: to the provider verifier, to guest agents, and from verifier to registrar.

Invariants:
    1. What comes back is a typed value that is received, not believed.
    2. An answer that cannot be read as evidence is `MalformedEvidence` (check 1), never a transport error.
    3. The guest agent shows the certificate that it registered; the registrar one of the tenant's own authority.

Owner: whoever made the client; a client may be shared by tasks.

Spec: DESIGN 3.1, 3.6; docs/protocol.md (enrolment exchange); Keylime agent API v2.1; RFC 7240, 4.3 (wait).
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from cryptography import x509

from harness import prefer
from harness.config import TlsSettings
from harness.errors import ConfigError, MalformedEvidence, MalformedMessage, ProtocolError
from harness.keylime_wire import parse_quote
from harness.messages import VerifierQuery, verifier_query
from harness.peer import PeerClient
from harness.protocol import QuoteRequest
from harness.tenant.agent_request import Contact, Snapshot
from harness.tenant.enrolment import HostIdentity
from harness.tenant.payload import parse_transport_key
from harness.tenant.ports import GuestAnswer
from harness.values import AgentId, ClockBaseline, HashAlg, HostId, PcrSelection, parse_hex, parse_host_id

AGENT_API = "v2.1"
"""The oldest version that every agent speaks; nothing newer is needed."""
_MOST_CERTIFICATES = 8


class ProviderClient:
    """The provider verifier, for rounds and for enrolment.

    Args:
        peer: connection to it.
    """

    def __init__(self, peer: PeerClient) -> None:
        self._peer = peer

    async def quote(self, request: QuoteRequest, *, wait_s: float) -> object:
        """See `harness.tenant.ports.ProviderPort`."""
        query = verifier_query(VerifierQuery(request=request, host_id=None))
        with _as_evidence():
            return await self._peer.get("/v1/verifier", query, headers={prefer.HEADER: prefer.prefer_wait(wait_s)})

    async def hosts(self) -> list[HostId]:
        """Hosts on which this tenant has an allowlist.

        Raises:
            HarnessError: as `PeerClient.call`.

        *Cancellation:* nothing has changed.
        """
        results = _object(await self._peer.get("/v1/hosts"))
        ids = results.get("hosts")
        if not isinstance(ids, list):
            raise MalformedMessage("the answer has no list of hosts")
        return [parse_host_id(_text(each, "host_id")) for each in ids]

    async def identity(self, host_id: HostId) -> HostIdentity:
        """See `harness.tenant.enrolment.HostAccess`. *Cancellation:* nothing has changed."""
        results = _object(await self._peer.get(f"/v1/hosts/{host_id}/identity"))
        certificates = results.get("ek_certificates")
        if not isinstance(certificates, list) or len(certificates) > _MOST_CERTIFICATES:
            raise MalformedMessage(f"ek_certificates is not a list of at most {_MOST_CERTIFICATES}")
        return HostIdentity(
            host_id=parse_host_id(_text(results.get("host_id"), "host_id")),
            ek=_bytes(results, "ek"),
            ek_certificates=tuple(_decode(each, "ek_certificates") for each in certificates),
            ak=_bytes(results, "ak"),
            ca=_bytes(results, "ca"),
            ca_certificate=_bytes(results, "ca_certificate"),
        )

    async def activate(self, host_id: HostId, credential: bytes) -> bytes:
        """See `harness.tenant.enrolment.HostAccess`. *Cancellation:* the host may have opened the challenge."""
        body = {"credential": base64.b64encode(credential).decode()}
        results = _object(await self._peer.post(f"/v1/hosts/{host_id}/activate", body))
        return parse_hex(_text(results.get("answer"), "answer"), "answer", size=32)

    async def certify(self, host_id: HostId, nonce: bytes) -> tuple[bytes, bytes]:
        """See `harness.tenant.enrolment.HostAccess`. *Cancellation:* the host may have certified."""
        results = _object(await self._peer.post(f"/v1/hosts/{host_id}/certify", {"nonce": nonce.hex()}))
        return _bytes(results, "attest"), _bytes(results, "signature")


class GuestClient:
    """One guest agent.

    Args:
        peer: connection that accepts the registered certificate only.
    """

    def __init__(self, peer: PeerClient) -> None:
        self._peer = peer
        self._usable_key = b""  # the PEM text of the transport key that was parsed last

    async def quote(self, nonce: str, selection: PcrSelection) -> GuestAnswer:
        """See `harness.tenant.ports.GuestPort`."""
        mask = selection.mask(HashAlg.SHA256)
        params = [("nonce", nonce), ("mask", f"{mask:#x}"), ("partial", "0")]
        with _as_evidence():
            results = _object(await self._peer.get(f"/{AGENT_API}/quotes/integrity", params))
            evidence = parse_quote(_text(results.get("quote"), "quote"))
            transport_key_pem = _text(results.get("pubkey"), "pubkey").encode("ascii", "replace")
            if transport_key_pem != self._usable_key:
                parse_transport_key(transport_key_pem)  # a guest can vouch for a key to which nothing can be wrapped
                self._usable_key = transport_key_pem
            return GuestAnswer(evidence=evidence, transport_key_pem=transport_key_pem)

    async def provide_v(self, wrapped: bytes) -> None:
        """See `harness.tenant.ports.GuestPort`."""
        body = {"encrypted_key": base64.b64encode(wrapped).decode()}
        await self._peer.post(f"/{AGENT_API}/keys/vkey", body)


class RegistrarClient:
    """The tenant's own registrar, as its verifier asks it.

    Args:
        peer: connection that accepts the tenant's own authority only.
    """

    def __init__(self, peer: PeerClient) -> None:
        self._peer = peer

    async def snapshot(self, agent_id: AgentId) -> Snapshot:
        """Pinned keys of a guest and its host.

        Raises:
            NotFound: the guest is not known, or has not registered.
            HarnessError: as `PeerClient.call`.

        *Cancellation:* nothing has changed.
        """
        guest = _object(await self._peer.get(f"/{AGENT_API}/agents/{agent_id}"))
        host_id = parse_host_id(_text(guest.get("host_id"), "host_id"))
        host = _object(await self._peer.get(f"/v1/hosts/{host_id}"))
        return Snapshot(
            host_id=host_id,
            guest_ek=_bytes(guest, "ek_tpm"),
            guest_ak=_bytes(guest, "aik_tpm"),
            mtls_cert=_text(guest.get("mtls_cert"), "mtls_cert"),
            host_ak=_bytes(host, "ak"),
            host_ak_qualified_name=parse_hex(_text(host.get("ak_qualified_name"), "qualified name"), "qualified name"),
            host_baseline=parse_baseline(host.get("baseline")),
            host_enrolled_at=_number(host.get("enrolled_at"), "enrolled_at"),
            ip=_optional_text(guest.get("ip"), "ip"),
            port=_optional_port(guest.get("port")),
        )

    async def contact(self, agent_id: AgentId) -> Contact:
        """Where a guest is reached now, as it registered last.

        Raises: as `snapshot`.

        *Cancellation:* nothing has changed.
        """
        guest = _object(await self._peer.get(f"/{AGENT_API}/agents/{agent_id}"))
        return Contact(
            guest_ek=_bytes(guest, "ek_tpm"),
            guest_ak=_bytes(guest, "aik_tpm"),
            mtls_cert=_text(guest.get("mtls_cert"), "mtls_cert"),
            ip=_optional_text(guest.get("ip"), "ip"),
            port=_optional_port(guest.get("port")),
        )


def parse_baseline(value: object) -> ClockBaseline:
    """Clock baseline from its JSON form.

    Raises:
        MalformedMessage: a member is missing or not an integer.
    """
    members = _object(value)
    numbers = {name: members.get(name) for name in ("clock", "reset_count", "restart_count", "firmware_version")}
    if any(type(number) is not int or not 0 <= number < 1 << 64 for number in numbers.values()):
        raise MalformedMessage("baseline does not have four integers of 64 bits")
    return ClockBaseline(**numbers)  # type: ignore[arg-type]


def encode_baseline(baseline: ClockBaseline) -> dict[str, int | None]:
    """JSON form of a clock baseline."""
    return {
        "clock": baseline.clock,
        "reset_count": baseline.reset_count,
        "restart_count": baseline.restart_count,
        "firmware_version": baseline.firmware_version,
    }


def only_authority(tls: TlsSettings, name: str) -> TlsSettings:
    """The same certificate and key, trusting one authority alone.

    Raises:
        ConfigError: the authority is not among the settings.
    """
    if name not in tls.authorities:
        raise ConfigError(f"tls.authorities: the tenant's own authority {name!r} is missing")
    return tls.model_copy(update={"authorities": {name: tls.authorities[name]}})


def without_authority(tls: TlsSettings, name: str) -> TlsSettings:
    """The same certificate and key, trusting all authorities but this one: for calls to others' services."""
    others = {other: path for other, path in tls.authorities.items() if other != name}
    return tls.model_copy(update={"authorities": others})


def parse_pem(pem: str) -> x509.Certificate:
    """Certificate from PEM text.

    Raises:
        MalformedMessage: it is none.
    """
    try:
        return x509.load_pem_x509_certificate(pem.encode("ascii", "replace"))
    except ValueError as error:
        raise MalformedMessage("mtls_cert is not a certificate in PEM") from error


@contextmanager
def _as_evidence() -> Iterator[None]:
    """A ProtocolError that is raised here is about the peer's answer: its own refusals come as other errors."""
    try:
        yield
    except ProtocolError as error:
        raise MalformedEvidence(error.detail) from error


def _object(value: object) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise MalformedMessage("the results are not an object")
    return value


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise MalformedMessage(f"{what} is missing or not a string")
    return value


def _optional_text(value: object, what: str) -> str | None:
    return None if value is None else _text(value, what)


def _optional_port(value: object) -> int | None:
    if value is not None and (type(value) is not int or not 0 < value < 1 << 16):
        raise MalformedMessage("port is not a port")
    return value


def _number(value: object, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise MalformedMessage(f"{what} is missing or not a number")
    return float(value)


def _bytes(members: Mapping[str, Any], name: str) -> bytes:
    return _decode(members.get(name), name)


def _decode(value: object, what: str) -> bytes:
    try:
        return base64.b64decode(_text(value, what), validate=True)
    except (binascii.Error, ValueError) as error:
        raise MalformedMessage(f"{what} is not base64") from error
