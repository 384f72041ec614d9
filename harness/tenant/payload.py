"""The tenant's secret payload: sealed under K, K split into U and V as in Keylime.

The tenant's operator hands U to the guest agent at once; the verifier hands V over only after it accepted both layers.
Neither half says anything about K.

::

    sealed = seal_payload(b"secret", agent_id)
    wrapped = wrap_share(sealed.u, transport_key)      # to the guest agent's NK
    keys = ShareBox(agent_id)                          # in the guest agent
    keys.offer_u(u, sealed.auth_tag, sealed.ciphertext); keys.offer_v(v)
    keys.payload                                       # b"secret"

Invariants:
    1. K is never sent and never stored by the tenant: K = U xor V exists in the operator's tool and in the guest only.
    2. The guest accepts a pair (U, V) only if HMAC-SHA384(K, agent_id) is the auth_tag that came with U.
    3. Nothing is decrypted before that, and a ciphertext that does not authenticate is refused.

Owner: `ShareBox` belongs to the guest agent's event loop.

Spec: Keylime ``crypto.py`` and ``user_data_encrypt.py`` (AES-256-GCM with a 16-byte IV in front and the tag behind,
RSA-OAEP with SHA-1 to NK, HMAC-SHA384 in hex).
"""

from __future__ import annotations

import hmac
import secrets
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from harness.errors import MalformedMessage
from harness.values import AgentId

SHARE_SIZE = 32
_IV_SIZE = 16  # Keylime uses the AES block size, not GCM's usual 12
_TAG_SIZE = 16
_PENDING = 4
"""Halves kept of each kind: an operator may send U again; more is a caller that guesses."""
_OAEP = padding.OAEP(mgf=padding.MGF1(hashes.SHA1()), algorithm=hashes.SHA1(), label=None)  # noqa: S303 - Keylime's


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedPayload:
    """A payload encrypted under K, with the two halves of K; only the operator's tool has all of it."""

    ciphertext: bytes
    auth_tag: str
    u: bytes = field(repr=False)
    v: bytes = field(repr=False)


def seal_payload(
    payload: bytes, agent_id: AgentId, *, random: Callable[[int], bytes] = secrets.token_bytes
) -> SealedPayload:
    """Payload encrypted under a fresh K.

    Args:
        payload: what the guest shall get.
        agent_id: the guest; bound into the auth_tag.
        random: source of random bytes.
    """
    key, u, iv = random(SHARE_SIZE), random(SHARE_SIZE), random(_IV_SIZE)
    return SealedPayload(
        ciphertext=iv + AESGCM(key).encrypt(iv, payload, None),
        auth_tag=share_hmac(key, str(agent_id)),
        u=u,
        v=_xor(key, u),
    )


def share_hmac(key: bytes, text: str) -> str:
    """Keylime's keyed digest: hex HMAC-SHA384 of the text's bytes."""
    return hmac.new(key, text.encode(), "sha384").hexdigest()


def wrap_share(share: bytes, transport_key: rsa.RSAPublicKey) -> bytes:
    """Half of K, encrypted to the guest agent's NK (RSA-OAEP, SHA-1)."""
    return transport_key.encrypt(share, _OAEP)


def unwrap_share(wrapped: bytes, transport_key: rsa.RSAPrivateKey) -> bytes:
    """Half of K from its wrapped form.

    Raises:
        MalformedMessage: not encrypted to this key, or not 32 bytes inside.
    """
    try:
        share = transport_key.decrypt(wrapped, _OAEP)
    except ValueError:
        share = b""
    if len(share) != SHARE_SIZE:
        raise MalformedMessage("encrypted_key does not hold a key share for this agent's transport key")
    return share


def parse_transport_key(pem: bytes) -> rsa.RSAPublicKey:
    """NK from the PEM text in a guest's answer.

    Raises:
        MalformedMessage: not PEM, not RSA, or not 2048 to 4096 bits.
    """
    try:
        key = load_pem_public_key(pem)
    except ValueError as error:
        raise MalformedMessage("pubkey is not a public key in PEM") from error
    if not isinstance(key, rsa.RSAPublicKey) or not 2048 <= key.key_size <= 4096:
        raise MalformedMessage("pubkey is not an RSA key of 2048 to 4096 bits")
    return key


@dataclass(frozen=True, slots=True)
class _Offer:
    u: bytes
    auth_tag: str
    ciphertext: bytes | None


class ShareBox:
    """The guest's side: collects halves until a pair is confirmed by its auth_tag.

    Args:
        agent_id: this guest.
    """

    def __init__(self, agent_id: AgentId) -> None:
        self._agent_id = agent_id
        self._offers: deque[_Offer] = deque(maxlen=_PENDING)
        self._v: deque[bytes] = deque(maxlen=_PENDING)
        self._key: bytes | None = None
        self.payload: bytes | None = None

    def offer_u(self, u: bytes, auth_tag: str, ciphertext: bytes | None) -> bool:
        """Takes the operator's half; True when K is known after it.

        Raises:
            MalformedMessage: K is confirmed and the ciphertext does not authenticate under it.
        """
        self._offers.append(_Offer(u, auth_tag, ciphertext))
        return self._combine()

    def offer_v(self, v: bytes) -> bool:
        """Takes the verifier's half; True when K is known after it. Raises as `offer_u`."""
        self._v.append(v)
        return self._combine()

    def answer(self, challenge: str) -> str | None:
        """Proof that K is known: its HMAC over the challenge; None while K is not known."""
        return None if self._key is None else share_hmac(self._key, challenge)

    def _combine(self) -> bool:
        for offer in reversed(self._offers):
            for v in reversed(self._v):
                key = _xor(offer.u, v)
                if hmac.compare_digest(share_hmac(key, str(self._agent_id)).encode(), offer.auth_tag.encode()):
                    payload = None if offer.ciphertext is None else open_payload(offer.ciphertext, key)
                    self._key, self.payload = key, payload
                    return True
        return False


def open_payload(ciphertext: bytes, key: bytes) -> bytes:
    """Plain payload.

    Raises:
        MalformedMessage: too short, or not encrypted under this key.
    """
    if len(ciphertext) < _IV_SIZE + _TAG_SIZE:
        raise MalformedMessage("payload is shorter than its IV and tag")
    try:
        return AESGCM(key).decrypt(ciphertext[:_IV_SIZE], ciphertext[_IV_SIZE:], None)
    except InvalidTag as error:
        raise MalformedMessage("payload does not authenticate under the agreed key") from error


def _xor(left: bytes, right: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(left, right, strict=True))
