"""Which keys are acceptable in which role, and credentials made without a TPM."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given
from hypothesis import strategies as st

from harness.attest import ObjectAttributes, Public, parse_public
from harness.credential import (
    Credential,
    check_ak,
    check_ca_key,
    check_ek,
    check_ek_rsa2048,
    keylime_auth_tag,
    make_credential,
    parse_keylime_blob,
)
from harness.errors import MalformedMessage, UnacceptableKey
from harness.public_area import Scheme, Symmetric
from tests.support import vectors
from tests.support.enrolment_parties import ek_public, open_credential
from tests.support.forge import AK_ATTRIBUTES, NULL, P384, P521, SHA1, SHA256, SHA384, SHA512, ecc_key, rsa_key, u16
from tests.support.soft_tpm import sized

A = ObjectAttributes
FIXED = 0x32  # fixedTPM, fixedParent, sensitiveDataOrigin
CA_ATTRIBUTES = FIXED | A.USER_WITH_AUTH | A.NO_DA | A.SIGN
EK_L = FIXED | A.ADMIN_WITH_POLICY | A.RESTRICTED | A.DECRYPT
EK_H = EK_L | A.USER_WITH_AUTH
CA = ecc_key(attributes=CA_ATTRIBUTES).public
NAME = ecc_key().public.name


# --- EK templates, from the TCG's own definitions ---------------------------------------------------------------------


def policy_a(alg: str) -> bytes:
    """PolicySecret(TPM_RH_ENDORSEMENT) (EK Credential Profile, B.6.2)."""
    start = bytes(hashlib.new(alg).digest_size)
    step = hashlib.new(alg, start + bytes.fromhex("000001514000000b")).digest()
    return hashlib.new(alg, step).digest()


def policy_b(alg: str) -> bytes:
    """PolicyOR of policy A and PolicyAuthorizeNV of the index that the profile fixes (B.6.3, B.6.4)."""
    size, number, index = {"sha256": (32, SHA256, 0x01C07F01), "sha384": (48, SHA384, 0x01C07F02)}[alg]
    nv = index.to_bytes(4, "big") + u16(number) + 0x220F1008.to_bytes(4, "big") + sized(policy_a(alg)) + u16(size + 2)
    name = u16(number) + hashlib.new(alg, nv).digest()
    policy_c = hashlib.new(alg, bytes(size) + bytes.fromhex("00000192") + name).digest()
    return hashlib.new(alg, bytes(size) + bytes.fromhex("00000171") + policy_a(alg) + policy_c).digest()


@cache
def rsa_ek(bits: int, alg: str, policy: bytes, aes: int, attributes: int) -> Public:
    """An RSA EK; nobody has its private part."""
    area = (
        u16(1) + u16({"sha256": SHA256, "sha384": SHA384}[alg]) + attributes.to_bytes(4, "big") + sized(policy)
        + u16(6) + u16(aes) + u16(0x43) + u16(NULL) + u16(bits) + bytes(4) + sized(b"\xc5" * (bits // 8))
    )  # fmt: skip
    return parse_public(sized(area))


@cache
def ecc_ek(curve: int, alg: str, policy: bytes, aes: int, attributes: int) -> Public:
    """An ECC EK."""
    size = {3: 32, P384: 48}[curve]
    area = (
        u16(0x23) + u16({"sha256": SHA256, "sha384": SHA384}[alg]) + attributes.to_bytes(4, "big") + sized(policy)
        + u16(6) + u16(aes) + u16(0x43) + u16(NULL) + u16(curve) + u16(NULL)
        + ecc_key(curve=curve).area[-2 * (size + 2) :]
    )  # fmt: skip
    return parse_public(sized(area))


EKS = {
    "L-1": rsa_ek(2048, "sha256", policy_a("sha256"), 128, EK_L),
    "L-2": ecc_ek(3, "sha256", policy_a("sha256"), 128, EK_L),
    "H-1": rsa_ek(2048, "sha256", policy_b("sha256"), 128, EK_H),
    "H-2": ecc_ek(3, "sha256", policy_b("sha256"), 128, EK_H),
    "H-3": ecc_ek(P384, "sha384", policy_b("sha384"), 256, EK_H),
    "H-6": rsa_ek(3072, "sha384", policy_b("sha384"), 256, EK_H),
    "H-7": rsa_ek(4096, "sha384", policy_b("sha384"), 256, EK_H),
}
L1 = EKS["L-1"]
AES128, AES256 = (Symmetric(algorithm=6, key_bits=bits, mode=0x43) for bits in (128, 256))


@pytest.mark.parametrize("name", EKS)
def test_an_ek_of_a_tcg_template_is_acceptable(name: str) -> None:
    """Policies are those that follow from the profile's definitions. Only L-1 enrols."""
    check_ek(EKS[name])
    with contextlib.nullcontext() if name == "L-1" else pytest.raises(UnacceptableKey):
        check_ek_rsa2048(EKS[name])


EK_LIES: list[tuple[str, dict[str, Any]]] = [
    *((f"without-{flag.name}", {"attributes": L1.attributes & ~flag}) for flag in A if flag & EK_L),
    *((f"with-{flag.name}", {"attributes": L1.attributes | flag}) for flag in A if not flag & EK_L),
    *((f"reserved-bit-{bit}", {"attributes": A(int(L1.attributes) | 1 << bit)}) for bit in (0, 3, 8, 12, 20, 31)),
    ("no-policy", {"auth_policy": b""}),
    ("other-policy", {"auth_policy": bytes(32)}),
    ("policy-of-template-h", {"auth_policy": policy_b("sha256")}),
    ("no-cipher", {"symmetric": None}),
    ("aes-256", {"symmetric": AES256}),
    ("other-cipher", {"symmetric": replace(AES128, algorithm=0x13)}),
    ("other-mode", {"symmetric": replace(AES128, mode=0x42)}),
    ("a-scheme", {"scheme": rsa_key().public.scheme}),
    ("other-name-alg", {"name_alg": SHA384}),
    ("sha1-name", {"name_alg": SHA1}),
    ("other-exponent", {"exponent": 3, "stated_exponent": 3}),
    ("exponent-written-out", {"stated_exponent": 65537}),
    ("fewer-bits", {"size_bits": 1024}),
    ("bits-of-another-template", {"size_bits": 3072}),
    ("even-modulus", {"modulus": L1.modulus & ~1}),
    ("shorter-modulus", {"modulus": L1.modulus >> 1}),
]


@pytest.mark.parametrize("change", [pytest.param(change, id=name) for name, change in EK_LIES])
def test_an_ek_that_differs_in_one_thing_is_refused(change: dict[str, Any]) -> None:
    """There is no EK beside the templates, and no credential for what is none."""
    for use in (check_ek, check_ek_rsa2048, lambda ek: make_credential(ek, NAME, bytes(32))):
        with pytest.raises(UnacceptableKey):
            use(replace(L1, **change))


def test_templates_are_not_mixed() -> None:
    """Size, policy, cipher and attributes belong together."""
    for ek in (
        replace(EKS["H-1"], attributes=EKS["L-1"].attributes),
        replace(EKS["H-6"], symmetric=AES128),
        replace(EKS["H-7"], auth_policy=policy_a("sha384")),
        replace(EKS["H-3"], curve=3),
        replace(EKS["L-2"], point=(1, 1)),
    ):
        with pytest.raises(UnacceptableKey):
            check_ek(ek)


# --- AK ---------------------------------------------------------------------------------------------------------------

FREE = (A.USER_WITH_AUTH, A.ADMIN_WITH_POLICY, A.NO_DA)


@pytest.mark.parametrize(
    "ak",
    [
        pytest.param(rsa_key().public, id="rsa-2048"),
        pytest.param(rsa_key(bits=3072, hash_alg=SHA512).public, id="rsa-3072-sha512"),
        pytest.param(ecc_key().public, id="p256"),
        pytest.param(ecc_key(curve=P384, hash_alg=SHA384).public, id="p384"),
        pytest.param(ecc_key(name_alg=SHA512).public, id="sha512-name"),
        *(pytest.param(ecc_key(attributes=AK_ATTRIBUTES ^ flag).public, id=f"free-{flag.name}") for flag in FREE),
    ],
)
def test_an_honest_ak_is_acceptable(ak: Public) -> None:
    """In its role, and in no other."""
    check_ak(ak)
    for check in (check_ek, check_ca_key):
        with pytest.raises(UnacceptableKey):
            check(ak)


MUST = (A.FIXED_TPM, A.FIXED_PARENT, A.SENSITIVE_DATA_ORIGIN, A.SIGN)
AK_LIES = [
    *((f"not-{flag.name}", ecc_key(attributes=AK_ATTRIBUTES & ~flag).public) for flag in (*MUST, A.RESTRICTED)),
    *(
        (f"also-{flag.name}", ecc_key(attributes=AK_ATTRIBUTES | flag).public)
        for flag in (A.DECRYPT, A.X509_SIGN, A.ENCRYPTED_DUPLICATION, A.ST_CLEAR)
    ),
    *((f"reserved-bit-{bit}", ecc_key(attributes=AK_ATTRIBUTES | 1 << bit).public) for bit in (0, 3, 8, 12, 20, 31)),
    ("sha1-name", ecc_key(name_alg=SHA1).public),
    ("sha1-scheme", ecc_key(hash_alg=SHA1).public),
    ("rsa-1024", rsa_key(bits=1024).public),
    ("exponent-3", rsa_key(exponent=3).public),
    ("rsapss", rsa_key(scheme=0x16).public),
    ("rsa-without-scheme", rsa_key(scheme=NULL).public),
    ("ecc-without-scheme", ecc_key(scheme=NULL).public),
    ("ecschnorr", ecc_key(scheme=0x1C).public),
    ("p521", ecc_key(curve=P521, hash_alg=SHA512).public),
    ("point-off-its-curve", replace(ecc_key().public, point=(5, 5))),
    ("even-modulus", replace(rsa_key().public, modulus=rsa_key().public.modulus & ~1)),
    ("more-bits-stated", replace(rsa_key().public, size_bits=4096)),
]


@pytest.mark.parametrize("ak", [pytest.param(ak, id=name) for name, ak in AK_LIES])
def test_an_ak_that_differs_in_one_thing_is_refused(ak: Public) -> None:
    """A key that could sign a forged attest, or a weak one, attests nothing."""
    with pytest.raises(UnacceptableKey, match="AK"):
        check_ak(ak)


# --- CA key -----------------------------------------------------------------------------------------------------------


def ca(**changes: Any) -> Public:
    """A CA key with other properties."""
    return ecc_key(**({"attributes": CA_ATTRIBUTES} | changes)).public


CA_LIES = [
    *((f"not-{flag.name}", ca(attributes=CA_ATTRIBUTES & ~flag)) for flag in MUST),
    *(
        (f"also-{flag.name}", ca(attributes=CA_ATTRIBUTES | flag))
        for flag in (A.RESTRICTED, A.DECRYPT, A.X509_SIGN)
    ),
    ("reserved-bit", ca(attributes=CA_ATTRIBUTES | 1)),
    ("sha1-name", ca(name_alg=SHA1)),
    ("p384", ca(curve=P384)),
    ("sha384", ca(hash_alg=SHA384)),
    ("without-scheme", ca(scheme=NULL)),
    ("ecdaa", replace(CA, scheme=Scheme.ECDAA)),
    ("rsa", rsa_key(attributes=CA_ATTRIBUTES).public),
    ("point-off-its-curve", replace(CA, point=(5, 5))),
]  # fmt: skip


def test_an_honest_ca_key_is_acceptable() -> None:
    """In its role, and in no other: it signs what it is given, so it must never be an AK."""
    check_ca_key(CA)
    for check in (check_ek, check_ak):
        with pytest.raises(UnacceptableKey):
            check(CA)


@pytest.mark.parametrize("key", [pytest.param(key, id=name) for name, key in CA_LIES])
def test_a_ca_key_that_differs_in_one_thing_is_refused(key: Public) -> None:
    """Attributes, curve, scheme and hash."""
    with pytest.raises(UnacceptableKey, match="CA key"):
        check_ca_key(key)


@pytest.mark.parametrize("ek", EKS.values(), ids=EKS)
def test_no_ek_serves_in_another_role(ek: Public) -> None:
    """It decrypts, it does not sign."""
    for check in (check_ak, check_ca_key):
        with pytest.raises(UnacceptableKey):
            check(ek)


# --- credentials ------------------------------------------------------------------------------------------------------


@cache
def ek_pair(name: str) -> tuple[rsa.RSAPrivateKey, Public]:
    """An EK of template L-1 with its private part."""
    private = rsa.generate_private_key(65537, 2048)
    return private, ek_public(private)


@pytest.mark.parametrize("secret", [b"", b"x", bytes(32)], ids=len)
def test_a_credential_opens_for_its_ek_and_name_only(secret: bytes) -> None:
    """Another EK, another Name or one flipped bit, and it does not open."""
    private, ek = ek_pair("own")
    credential = make_credential(ek, NAME, secret)
    assert open_credential(private, NAME, credential) == secret
    bent = replace(credential, id_object=credential.id_object[:-1] + bytes([credential.id_object[-1] ^ 1]))
    for key, name, made in (
        (ek_pair("other")[0], NAME, credential),
        (private, ecc_key(curve=P384).public.name, credential),
        (private, NAME, bent),
    ):
        with pytest.raises(ValueError):
            open_credential(key, name, made)


def test_each_credential_has_its_own_seed() -> None:
    """Two for the same secret have nothing in common; with the seed given, the encrypted identity is fixed."""
    _, ek = ek_pair("own")
    first, second = (make_credential(ek, NAME, bytes(32)) for _ in range(2))
    assert first.id_object != second.id_object
    fixed = {make_credential(ek, NAME, bytes(32), random=bytes).id_object for _ in range(2)}
    assert len(fixed) == 1


def test_sizes_are_those_of_the_template() -> None:
    """Integrity and encrypted identity of SHA-256, a secret as long as the modulus; SHA-384 for H-6."""
    credential = make_credential(ek_pair("own")[1], NAME, bytes(32))
    assert (credential.id_object[:4], len(credential.id_object)) == (u16(2 + 32 + 34) + u16(32), 70)
    assert (credential.encrypted_secret[:2], len(credential.encrypted_secret)) == (u16(256), 258)
    larger = make_credential(EKS["H-6"], NAME, bytes(48))
    assert (larger.id_object[:4], len(larger.encrypted_secret)) == (u16(2 + 48 + 50) + u16(48), 386)


@pytest.mark.parametrize("name", ["L-2", "H-2", "H-3"])
def test_credentials_are_for_rsa_eks(name: str) -> None:
    """An acceptable ECC EK is refused by name, not by an accident."""
    with pytest.raises(UnacceptableKey, match="RSA EKs only"):
        make_credential(EKS[name], NAME, bytes(32))


def test_a_secret_fits_into_a_digest() -> None:
    """A TPM would refuse the longer one."""
    with pytest.raises(ValueError, match="more than 32 bytes"):
        make_credential(L1, NAME, bytes(33))


# --- Keylime's forms --------------------------------------------------------------------------------------------------

CAPTURED = base64.b64decode(vectors.load("keylime/register_response.json")["results"]["blob"])


def test_the_blob_is_keylimes() -> None:
    """A captured one is read and written again byte by byte."""
    credential = parse_keylime_blob(CAPTURED)
    assert credential.keylime_blob() == CAPTURED
    assert (len(credential.id_object), len(credential.encrypted_secret)) == (70, 258)
    assert Credential(id_object=sized(b"a"), encrypted_secret=sized(b"")).keylime_blob() == (
        bytes.fromhex("badcc0de00000001") + b"\x00\x01a\x00\x00"
    )


BLOB_LIES: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("other-magic", lambda blob: b"\x00" + blob[1:]),
    ("other-version", lambda blob: blob[:7] + b"\x02" + blob[8:]),
    ("little-endian", lambda blob: blob[:4][::-1] + blob[4:8][::-1] + blob[8:]),
    ("trailing-byte", lambda blob: blob + b"\x00"),
    ("first-size-too-large", lambda blob: blob[:8] + u16(1025) + bytes(1025) + sized(b"")),
    ("second-size-too-large", lambda blob: blob[:8] + sized(b"") + u16(1025) + bytes(1025)),
]


@pytest.mark.parametrize("lie", [pytest.param(lie, id=name) for name, lie in BLOB_LIES])
def test_another_form_is_no_blob(lie: Callable[[bytes], bytes]) -> None:
    """Magic, version and both lengths."""
    with pytest.raises(MalformedMessage):
        parse_keylime_blob(lie(CAPTURED))


def test_a_cut_blob_is_none() -> None:
    """At every byte."""
    for size in range(len(CAPTURED)):
        with pytest.raises(MalformedMessage):
            parse_keylime_blob(CAPTURED[:size])


@given(st.binary(max_size=100))
def test_any_bytes_are_a_blob_or_malformed(data: bytes) -> None:
    """Nothing else is raised."""
    for blob in (data, CAPTURED[:8] + data):
        with contextlib.suppress(MalformedMessage):
            assert parse_keylime_blob(blob).keylime_blob() == blob


def test_the_tag_is_keylimes() -> None:
    """HMAC-SHA-384 of the agent's UUID; the key is the *text* of the secret's base64."""
    agent = "a0bb03b7-39bb-4d7b-88e6-14a7e2004c8e"
    secret = bytes(range(32))
    assert keylime_auth_tag(secret, agent) == hmac.digest(base64.b64encode(secret), agent.encode(), "sha384").hex()
    assert len(keylime_auth_tag(secret, agent)) == len(vectors.load("keylime/activate_request.json")["auth_tag"])


def test_captured_keys_are_acceptable() -> None:
    """EK and AK of an agent that stock Keylime accepted."""
    request = vectors.load("keylime/register_request.json")
    check_ek_rsa2048(parse_public(base64.b64decode(request["ek_tpm"])))
    ak = parse_public(base64.b64decode(request["aik_tpm"]))
    check_ak(ak)
    assert not isinstance(ak.key(), ec.EllipticCurvePublicKey)
