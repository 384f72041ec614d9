"""Payload, its key halves and the guest's box that combines them."""

from __future__ import annotations

import hashlib
import hmac
import uuid

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from harness.errors import MalformedMessage
from harness.tenant.payload import (
    ShareBox,
    open_payload,
    parse_transport_key,
    seal_payload,
    unwrap_share,
    wrap_share,
)
from harness.values import AgentId

AGENT = AgentId(uuid.UUID("d432fbb3-d2f1-4a97-9ef7-75bd81c00000"))


@pytest.fixture(scope="module")
def transport_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def pem_of(key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def test_both_halves_open_the_payload_in_any_order() -> None:
    """U then V, and V then U, both lead to the payload; one half alone does not."""
    sealed = seal_payload(b"secret", AGENT)
    for first in ("u", "v"):
        box = ShareBox(AGENT)
        if first == "u":
            assert not box.offer_u(sealed.u, sealed.auth_tag, sealed.ciphertext)
            assert box.payload is None
            assert box.offer_v(sealed.v)
        else:
            assert not box.offer_v(sealed.v)
            assert box.payload is None
            assert box.offer_u(sealed.u, sealed.auth_tag, sealed.ciphertext)
        assert box.payload == b"secret"


def test_the_forms_are_keylimes() -> None:
    """IV in front, tag behind, AES-256-GCM; the auth_tag is hex HMAC-SHA384(K, agent_id)."""
    sealed = seal_payload(b"secret", AGENT)
    key = bytes(a ^ b for a, b in zip(sealed.u, sealed.v, strict=True))
    iv, body, tag = sealed.ciphertext[:16], sealed.ciphertext[16:-16], sealed.ciphertext[-16:]
    decryptor = Cipher(algorithms.AES(key), modes.GCM(iv, tag)).decryptor()
    assert decryptor.update(body) + decryptor.finalize() == b"secret"
    assert sealed.auth_tag == hmac.new(key, str(AGENT).encode(), hashlib.sha384).hexdigest()


def test_a_wrong_half_leaves_the_box_closed_and_a_right_one_still_opens_it() -> None:
    """A V that does not match is kept without effect; the right V afterwards opens the payload."""
    sealed, other = seal_payload(b"secret", AGENT), seal_payload(b"other", AGENT)
    box = ShareBox(AGENT)
    box.offer_u(sealed.u, sealed.auth_tag, sealed.ciphertext)
    assert not box.offer_v(other.v)
    assert box.payload is None
    assert box.answer("challenge") is None
    assert box.offer_v(sealed.v)
    assert box.payload == b"secret"


def test_halves_of_another_agent_do_not_combine() -> None:
    """The auth_tag binds the agent_id: the same halves are nothing to another guest."""
    sealed = seal_payload(b"secret", AgentId(uuid.uuid4()))
    box = ShareBox(AGENT)
    box.offer_u(sealed.u, sealed.auth_tag, sealed.ciphertext)
    assert not box.offer_v(sealed.v)


@pytest.mark.parametrize("spoil", [lambda c: c[:-1] + bytes([c[-1] ^ 1]), lambda c: c[:20], lambda _: b""])
def test_a_spoiled_payload_is_refused(spoil) -> None:  # type: ignore[no-untyped-def]
    """A changed or cut ciphertext is an error, and the box stays closed."""
    sealed = seal_payload(b"secret", AGENT)
    box = ShareBox(AGENT)
    box.offer_u(sealed.u, sealed.auth_tag, spoil(sealed.ciphertext))
    with pytest.raises(MalformedMessage):
        box.offer_v(sealed.v)
    assert box.payload is None


def test_the_box_answers_a_challenge_once_it_knows_k() -> None:
    """keys/verify is hex HMAC-SHA384(K, challenge)."""
    sealed = seal_payload(b"", AGENT)
    key = bytes(a ^ b for a, b in zip(sealed.u, sealed.v, strict=True))
    box = ShareBox(AGENT)
    box.offer_u(sealed.u, sealed.auth_tag, None)
    box.offer_v(sealed.v)
    assert box.payload is None
    assert box.answer("abc") == hmac.new(key, b"abc", hashlib.sha384).hexdigest()


def test_a_share_travels_wrapped_to_the_transport_key(transport_key: rsa.RSAPrivateKey) -> None:
    """RSA-OAEP with SHA-1 to NK, and back."""
    share = bytes(range(32))
    assert unwrap_share(wrap_share(share, transport_key.public_key()), transport_key) == share


@pytest.mark.parametrize("wrapped", [b"", b"\0" * 256, b"short"])
def test_a_share_that_is_not_for_this_key_is_refused(transport_key: rsa.RSAPrivateKey, wrapped: bytes) -> None:
    """Bytes that do not decrypt are one named error."""
    with pytest.raises(MalformedMessage, match="encrypted_key"):
        unwrap_share(wrapped, transport_key)


def test_a_share_of_another_length_is_refused(transport_key: rsa.RSAPrivateKey) -> None:
    """A decrypted value that is not 32 bytes is no share."""
    oaep = padding.OAEP(mgf=padding.MGF1(hashes.SHA1()), algorithm=hashes.SHA1(), label=None)  # noqa: S303
    with pytest.raises(MalformedMessage, match="encrypted_key"):
        unwrap_share(transport_key.public_key().encrypt(b"x" * 31, oaep), transport_key)


def test_only_an_rsa_key_is_a_transport_key(transport_key: rsa.RSAPrivateKey) -> None:
    """NK must be RSA of at least 2048 bits: V is wrapped with RSA-OAEP."""
    good = pem_of(transport_key.public_key())
    assert parse_transport_key(good).key_size == 2048
    small = pem_of(rsa.generate_private_key(public_exponent=65537, key_size=1024).public_key())  # noqa: S505
    for bad in (b"", b"nonsense", good[:100], small, pem_of(ec.generate_private_key(ec.SECP256R1()).public_key())):
        with pytest.raises(MalformedMessage, match="pubkey"):
            parse_transport_key(bad)


def test_open_payload_refuses_another_key() -> None:
    """Authentication is checked before anything is returned."""
    with pytest.raises(MalformedMessage, match="authenticate"):
        open_payload(seal_payload(b"secret", AGENT).ciphertext, bytes(32))
