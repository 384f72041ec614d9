"""Which keys are acceptable in which role, and the proof that an AK lives beside an EK.

No TPM is needed here: MakeCredential uses public keys only.

Invariants:
    1. A key is acceptable in at most one of the roles AK, EK and CA key.
    2. Attributes that must be set or clear are listed once, in the tables below; all others are free.

Spec: TPM 2.0 Part 1, 24 (credential protection), 11.4.10 (KDFa), B.10 (secret sharing); TCG EK Credential Profile 2.5,
B (templates); DESIGN 3.6.
"""

from __future__ import annotations

import base64
import hmac
import os
from collections.abc import Callable
from dataclasses import dataclass

from cryptography.hazmat.decrepit.ciphers.modes import CFB
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from harness.attest import RESERVED_ATTRIBUTES, KeyType, ObjectAttributes, Public, Scheme
from harness.errors import MalformedMessage, UnacceptableKey
from harness.protocol import tpm2b
from harness.public_area import DEFAULT_EXPONENT, Symmetric
from harness.reader import Reader
from harness.values import HashAlg

_A = ObjectAttributes
_BLOB_MAGIC = 0xBADCC0DE
_BLOB_VERSION = 1
_MAX_PART = 1024
_P256, _P384 = 0x0003, 0x0004
_AES128_CFB = Symmetric(algorithm=0x0006, key_bits=128, mode=0x0043)
_AES256_CFB = Symmetric(algorithm=0x0006, key_bits=256, mode=0x0043)

_IN_THIS_TPM = _A.FIXED_TPM | _A.FIXED_PARENT | _A.SENSITIVE_DATA_ORIGIN
_AK_SET = _IN_THIS_TPM | _A.RESTRICTED | _A.SIGN
_AK_CLEAR = _A.DECRYPT | _A.X509_SIGN | _A.ENCRYPTED_DUPLICATION | _A.ST_CLEAR
_CA_SET = _IN_THIS_TPM | _A.SIGN
_CA_CLEAR = _A.RESTRICTED | _A.DECRYPT | _A.X509_SIGN
_EK_ATTRIBUTES = _IN_THIS_TPM | _A.ADMIN_WITH_POLICY | _A.RESTRICTED | _A.DECRYPT

_POLICY_A = bytes.fromhex("837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa")
_POLICY_B_SHA256 = bytes.fromhex("ca3d0a99a2b93906f7a3342414efcfb3a385d44cd1fd459089d19b5071c0b7a0")
_POLICY_B_SHA384 = bytes.fromhex(
    "b26e7d28d11a50bc53d882bcf5fd3a1a074148bb35d3b4e4cb1c0ad9bde419cacb47ba09699646150f9fc000f3f80e12"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _EkTemplate:
    """What a TCG template fixes: bits for RSA or curve for ECC, and how the key may be used."""

    name: str
    type: KeyType
    size: int
    hash_alg: HashAlg
    policy: bytes
    symmetric: Symmetric
    with_auth: bool


_EK_TEMPLATES = tuple(
    _EkTemplate(
        name=name, type=key_type, size=size, hash_alg=alg, policy=policy, symmetric=symmetric, with_auth=name[0] == "H"
    )
    for name, key_type, size, alg, policy, symmetric in (
        ("L-1", KeyType.RSA, 2048, HashAlg.SHA256, _POLICY_A, _AES128_CFB),
        ("L-2", KeyType.ECC, _P256, HashAlg.SHA256, _POLICY_A, _AES128_CFB),
        ("H-1", KeyType.RSA, 2048, HashAlg.SHA256, _POLICY_B_SHA256, _AES128_CFB),
        ("H-2", KeyType.ECC, _P256, HashAlg.SHA256, _POLICY_B_SHA256, _AES128_CFB),
        ("H-3", KeyType.ECC, _P384, HashAlg.SHA384, _POLICY_B_SHA384, _AES256_CFB),
        ("H-6", KeyType.RSA, 3072, HashAlg.SHA384, _POLICY_B_SHA384, _AES256_CFB),
        ("H-7", KeyType.RSA, 4096, HashAlg.SHA384, _POLICY_B_SHA384, _AES256_CFB),
    )
)


def check_ak(public: Public) -> None:
    """Checks that a key may serve as AK, of a host or of a guest.

    1. fixedTPM, fixedParent, sensitiveDataOrigin, restricted, sign set: it signs only what its own TPM made.
    2. decrypt, x509sign, encryptedDuplication, stClear clear; reserved bits zero.
    3. nameAlg is SHA-256, SHA-384 or SHA-512.
    4. RSASSA with RSA of at least 2048 bits and e = 65537, or ECDSA on P-256 or P-384; SHA-256, SHA-384 or SHA-512.

    Raises:
        UnacceptableKey: which of these does not hold.
    """
    public.once("acceptable as AK", lambda: _check_ak(public))


def _check_ak(public: Public) -> None:
    _check_attributes(public, "AK", must=_AK_SET, must_not=_AK_CLEAR)
    _check_name_alg(public, "AK")
    if public.scheme_hash is None:
        raise UnacceptableKey("the AK's scheme does not fix SHA-256, SHA-384 or SHA-512")
    if public.type is KeyType.RSA:
        if public.scheme is not Scheme.RSASSA:
            raise UnacceptableKey(f"an RSA AK must sign with RSASSA, not {public.scheme.name}")
        if public.size_bits < 2048 or public.exponent != DEFAULT_EXPONENT:
            raise UnacceptableKey("an RSA AK must have at least 2048 bits and the exponent 65537")
    else:
        if public.scheme is not Scheme.ECDSA:
            raise UnacceptableKey(f"an ECC AK must sign with ECDSA, not {public.scheme.name}")
        if public.curve not in {_P256, _P384}:
            raise UnacceptableKey("an ECC AK must lie on P-256 or P-384")
    _check_usable(public, "AK")


def check_ca_key(public: Public) -> None:
    """Checks that a key may sign vTPM certificates.

    1. fixedTPM, fixedParent, sensitiveDataOrigin, sign set.
    2. restricted, decrypt, x509sign clear; reserved bits zero.
    3. nameAlg is SHA-256, SHA-384 or SHA-512.
    4. ECDSA on P-256 with SHA-256.

    Raises:
        UnacceptableKey: which of these does not hold.
    """
    _check_attributes(public, "CA key", must=_CA_SET, must_not=_CA_CLEAR)
    _check_name_alg(public, "CA key")
    if public.type is not KeyType.ECC or public.curve != _P256:
        raise UnacceptableKey("the CA key must lie on P-256")
    if public.scheme is not Scheme.ECDSA or public.scheme_hash is not HashAlg.SHA256:
        raise UnacceptableKey("the CA key must sign with ECDSA and SHA-256")
    _check_usable(public, "CA key")


def check_ek(public: Public) -> None:
    """Checks that a key was made by one of the TCG's EK templates (L-1, L-2, H-1, H-2, H-3, H-6, H-7).

    Raises:
        UnacceptableKey: attributes, policy, size or symmetric cipher are those of no template.
    """
    if int(public.attributes) & RESERVED_ATTRIBUTES:
        raise UnacceptableKey("the EK has reserved attribute bits set")
    size = public.size_bits if public.type is KeyType.RSA else public.curve
    for template in _EK_TEMPLATES:
        expected = _EK_ATTRIBUTES | _A.USER_WITH_AUTH if template.with_auth else _EK_ATTRIBUTES
        if (
            (public.type, size, public.name_alg) == (template.type, template.size, template.hash_alg.value)
            and public.attributes == expected
            and (public.auth_policy, public.symmetric) == (template.policy, template.symmetric)
            and public.scheme is Scheme.NULL
            # 65537 written out is the same key under another Name: one EK must not be two
            and public.stated_exponent == 0
        ):
            _check_usable(public, "EK")
            return
    raise UnacceptableKey("the EK was not made by a TCG template (L-1, L-2, H-1, H-2, H-3, H-6, H-7)")


def check_ek_rsa2048(public: Public) -> None:
    """Checks that a key is the EK of template L-1, the one that hosts and guests enrol with (DESIGN 3.2, 3.6).

    Raises:
        UnacceptableKey: it is not.
    """
    check_ek(public)
    if public.type is not KeyType.RSA or public.size_bits != 2048 or public.auth_policy != _POLICY_A:
        raise UnacceptableKey("the EK must be the RSA-2048 one of template L-1")


def _check_attributes(public: Public, role: str, *, must: ObjectAttributes, must_not: ObjectAttributes) -> None:
    missing, forbidden = must & ~public.attributes, must_not & public.attributes
    if missing:
        raise UnacceptableKey(f"the {role} must have {_names(missing)} set")
    if forbidden:
        raise UnacceptableKey(f"the {role} must have {_names(forbidden)} clear")
    if int(public.attributes) & RESERVED_ATTRIBUTES:
        raise UnacceptableKey(f"the {role} has reserved attribute bits set")


def _names(attributes: ObjectAttributes) -> str:
    return ", ".join(flag.name or "" for flag in ObjectAttributes if flag in attributes)


def _check_name_alg(public: Public, role: str) -> None:
    if public.name_alg not in {alg.value for alg in HashAlg}:
        raise UnacceptableKey(f"the {role}'s nameAlg must be SHA-256, SHA-384 or SHA-512")


def _check_usable(public: Public, role: str) -> None:
    try:
        public.key()
    except MalformedMessage as error:
        raise UnacceptableKey(f"the {role} is not a usable key: {error.detail}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Credential:
    """What MakeCredential gives: TPM2B_ID_OBJECT and TPM2B_ENCRYPTED_SECRET, marshalled."""

    id_object: bytes
    encrypted_secret: bytes

    def keylime_blob(self) -> bytes:
        """Keylime's form, that of tpm2-tools: magic, version, then both structures."""
        return (
            _BLOB_MAGIC.to_bytes(4, "big") + _BLOB_VERSION.to_bytes(4, "big") + self.id_object + self.encrypted_secret
        )


def parse_keylime_blob(data: bytes) -> Credential:
    """Credential from Keylime's form.

    Raises:
        MalformedMessage: other magic or version, cut short, or trailing bytes.
    """
    reader = Reader(data, "credential blob")
    if (reader.integer(4, "magic"), reader.integer(4, "version")) != (_BLOB_MAGIC, _BLOB_VERSION):
        raise MalformedMessage("credential blob does not start with 0xBADCC0DE and version 1")
    id_object = reader.tpm2b("TPM2B_ID_OBJECT", at_most=_MAX_PART)
    secret = reader.tpm2b("TPM2B_ENCRYPTED_SECRET", at_most=_MAX_PART)
    reader.end()
    return Credential(id_object=tpm2b(id_object), encrypted_secret=tpm2b(secret))


def make_credential(
    ek: Public, name: bytes, secret: bytes, *, random: Callable[[int], bytes] = os.urandom
) -> Credential:
    """TPM2_MakeCredential in software, for an RSA EK.

    Only the TPM that holds the EK's private part gives the secret back, and only if an object with this Name is loaded.

    Args:
        ek: acceptable EK of an RSA template.
        name: Name of the AK.
        secret: at most as long as the EK's nameAlg digest.
        random: source of the seed.

    Raises:
        UnacceptableKey: the EK is not of an acceptable RSA template.
        ValueError: the secret is too long.
    """
    check_ek(ek)
    key = ek.key()
    if not isinstance(key, rsa.RSAPublicKey) or ek.symmetric is None:
        raise UnacceptableKey("credentials are made for RSA EKs only")
    alg = HashAlg(ek.name_alg)
    if len(secret) > alg.digest_size:
        raise ValueError(f"the secret has more than {alg.digest_size} bytes")
    hash_alg: Callable[[], hashes.HashAlgorithm] = hashes.SHA256 if alg is HashAlg.SHA256 else hashes.SHA384
    seed = random(alg.digest_size)
    oaep = padding.OAEP(padding.MGF1(hash_alg()), hash_alg(), b"IDENTITY\x00")
    encrypted_seed = key.encrypt(seed, oaep)
    storage_key = _kdfa(alg, seed, b"STORAGE", name, ek.symmetric.key_bits)
    encryptor = Cipher(algorithms.AES(storage_key), CFB(bytes(16))).encryptor()
    identity = encryptor.update(tpm2b(secret)) + encryptor.finalize()
    hmac_key = _kdfa(alg, seed, b"INTEGRITY", b"", alg.digest_size * 8)
    integrity = hmac.digest(hmac_key, identity + name, alg.text)
    return Credential(id_object=tpm2b(tpm2b(integrity) + identity), encrypted_secret=tpm2b(encrypted_seed))


def _kdfa(alg: HashAlg, key: bytes, label: bytes, context: bytes, bits: int) -> bytes:
    """KDFa with one context (Part 1, 11.4.10.2): HMAC in counter mode over label, zero, context and length."""
    size = (bits + 7) // 8
    rounds = -(-size // alg.digest_size)
    blocks = (
        hmac.digest(key, i.to_bytes(4, "big") + label + b"\x00" + context + bits.to_bytes(4, "big"), alg.text)
        for i in range(1, rounds + 1)
    )
    return b"".join(blocks)[:size]


def keylime_auth_tag(secret: bytes, agent_id: str) -> str:
    """Answer to a Keylime registrar's challenge: hex HMAC-SHA-384, keyed with the secret's base64 text."""
    return hmac.new(base64.b64encode(secret), agent_id.encode(), "sha384").hexdigest()
