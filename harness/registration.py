"""Keylime's registration protocol, the part that both registrars share: the body of the POST, and open challenges.

::

    blob = challenges.open(agent_id, keys, keys.ek, keys.ak)     # POST: keys in, challenge out
    keys = challenges.answered(agent_id, auth_tag)               # PUT: the answer; keys may be recorded now
    registration_view(...)                                       # GET .../registration: is my record what I am?

Invariants:
    1. A challenge is used once, within 60 s; a wrong, late or repeated answer is one and the same error.
    2. Nothing is recorded before the answer, so a wrong one changes no record.

Owner: the registrar's event loop.

Spec: Keylime registrar (POST, PUT /v2.x/agents/{agent_id}); DESIGN 3.6.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from harness.attest import Public, parse_public
from harness.credential import check_ak, check_ek_rsa2048, keylime_auth_tag, make_credential
from harness.errors import ChallengeFailed, CloneSuspected, MalformedMessage, PoolFull
from harness.values import AgentId

T = TypeVar("T")
CHALLENGE_S = 60.0
_SECRET_SIZE = 32
_OPEN_LIMIT = 65_536
_MAX_TEXT = 16 * 1024
_MAX_TAG = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistrationRequest:
    """Body of the POST.

    Args:
        ek: public area of the EK.
        ak: public area of the AK.
        ek_certificate: DER.
        mtls_cert: PEM of the certificate that the agent shows, or None.
        ip: contact address, or None.
        port: contact port, or None.
    """

    ek: Public
    ak: Public
    ek_certificate: bytes
    mtls_cert: str | None
    ip: str | None
    port: int | None


def parse_registration(body: object) -> RegistrationRequest:
    """Registration from the POST's body; members that we do not use (iak_tpm, ...) are ignored, as Keylime does.

    Raises:
        MalformedMessage: a missing member, a wrong type, or a structure that does not parse.
        UnacceptableKey: EK or AK are not acceptable (DESIGN 3.6).
        CloneSuspected: one key in both roles.
    """
    if not isinstance(body, dict):
        raise MalformedMessage("the body must be a JSON object")
    ek, ak = parse_public(_base64(body, "ek_tpm")), parse_public(_base64(body, "aik_tpm"))
    check_ek_rsa2048(ek)
    check_ak(ak)
    if ek.name == ak.name:
        raise CloneSuspected("one key is given as EK and as AK")
    port = body.get("port")
    if port is not None and (type(port) is not int or not 0 < port < 65536):
        raise MalformedMessage("port must be an integer from 1 to 65535")
    mtls_cert = _optional_text(body, "mtls_cert")
    if mtls_cert is not None:
        _pem(mtls_cert, "mtls_cert")
    return RegistrationRequest(
        ek=ek,
        ak=ak,
        ek_certificate=_certificate(body),
        mtls_cert=mtls_cert,
        ip=_optional_text(body, "ip"),
        port=port,
    )


def registration_view(
    *, ek: bytes, ak: bytes, mtls_cert: str | None, ip: str | None, port: int | None
) -> dict[str, object]:
    """What a registrar tells a guest agent of its record, and what the agent compares with itself: digests suffice.

    Args:
        ek: TPM2B_PUBLIC.
        ak: TPM2B_PUBLIC.
        mtls_cert: PEM text as it was registered.
        ip: contact address.
        port: contact port.
    """
    return {
        "registered": True,
        "ek_tpm": hashlib.sha256(ek).hexdigest(),
        "aik_tpm": hashlib.sha256(ak).hexdigest(),
        "mtls_cert": None if mtls_cert is None else hashlib.sha256(mtls_cert.encode()).hexdigest(),
        "ip": ip,
        "port": port,
    }


NOT_REGISTERED: Mapping[str, object] = {"registered": False}


def parse_auth_tag(body: object) -> str:
    """Answer from the PUT's body.

    Raises:
        MalformedMessage: no ``auth_tag``, or not a short text.
    """
    tag = body.get("auth_tag") if isinstance(body, dict) else None
    if not isinstance(tag, str) or len(tag) > _MAX_TAG or not tag.isascii():
        raise MalformedMessage("auth_tag must be hex")
    return tag


def _text(body: Mapping[str, object], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or len(value) > _MAX_TEXT:
        raise MalformedMessage(f"{name} must be a text of at most {_MAX_TEXT} characters")
    return value


def _optional_text(body: Mapping[str, object], name: str) -> str | None:
    return None if body.get(name) is None else _text(body, name)


def _base64(body: Mapping[str, object], name: str) -> bytes:
    try:
        return base64.b64decode(_text(body, name), validate=True)
    except (binascii.Error, ValueError):
        raise MalformedMessage(f"{name} must be base64") from None


def _certificate(body: Mapping[str, object]) -> bytes:
    text = _text(body, "ekcert")
    if text.startswith("-----BEGIN"):
        return _pem(text, "ekcert").public_bytes(Encoding.DER)
    return _base64(body, "ekcert")


def _pem(text: str, name: str) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(text.encode())
    except ValueError:
        raise MalformedMessage(f"{name} must be a PEM certificate") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Open(Generic[T]):
    value: T
    auth_tag: str = field(repr=False)
    until: float


class OpenChallenges(Generic[T]):
    """Challenges that wait for their answer; one per agent, the newest.

    Args:
        random: source of secrets.
        monotonic: seconds on a clock that never goes back.
        limit: of open challenges; one for each agent.
    """

    def __init__(
        self,
        *,
        random: Callable[[int], bytes] = secrets.token_bytes,
        monotonic: Callable[[], float] = time.monotonic,
        limit: int = _OPEN_LIMIT,
    ) -> None:
        self._random = random
        self._limit = limit
        self._monotonic = monotonic
        self._open: dict[AgentId, _Open[T]] = {}

    def open(self, agent_id: AgentId, value: T, ek: Public, ak: Public) -> bytes:
        """Challenge in Keylime's form; the right answer gives ``value`` back.

        Raises:
            PoolFull: too many challenges are open.
            UnacceptableKey: the EK is of no RSA template.
        """
        now = self._monotonic()
        self._open.pop(agent_id, None)  # replaced, so that it needs no room
        if len(self._open) >= self._limit:
            self._open = {other: entry for other, entry in self._open.items() if entry.until >= now}
        if len(self._open) >= self._limit:
            raise PoolFull("too many registrations are open", retry_after_s=CHALLENGE_S / 2)
        secret = self._random(_SECRET_SIZE)
        tag = keylime_auth_tag(secret, str(agent_id))
        self._open[agent_id] = _Open(value=value, auth_tag=tag, until=now + CHALLENGE_S)
        return make_credential(ek, ak.name, secret).keylime_blob()

    def answered(self, agent_id: AgentId, auth_tag: str) -> T:
        """What was kept with the challenge.

        Raises:
            ChallengeFailed: no open challenge, a wrong answer, or a late one.
        """
        entry = self._open.pop(agent_id, None)
        expected = entry.auth_tag if entry is not None else "-"
        right = hmac.compare_digest(expected.encode(), auth_tag.encode())
        if entry is None or not right or self._monotonic() > entry.until:
            raise ChallengeFailed
        return entry.value

    def forget(self, agent_id: AgentId) -> None:
        """Drops the open challenge of an agent."""
        self._open.pop(agent_id, None)
