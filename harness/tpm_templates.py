"""Public-area templates of the keys that the harness creates, as the bytes that TPM2_CreatePrimary takes.

Invariants:
    1. Every key but the EK has noDA set: a few hard power cuts would else lock the TPM out for everybody.
    2. AK and CA key are primaries of the owner hierarchy: TPM2_Clear destroys them, so a clear cannot hide a reboot.
    3. Only AKs are restricted: they sign nothing but what the TPM itself made.

Spec: TPM 2.0 Part 2, 8.3 and 12.2; TCG EK Credential Profile 2.0, template L-1; DESIGN 3.6.
"""

from __future__ import annotations

import enum
import hashlib

_RSA, _ECC, _NULL = 0x0001, 0x0023, 0x0010
_SHA256, _RSASSA, _ECDSA, _NIST_P256 = 0x000B, 0x0014, 0x0018, 0x0003
_FIXED = 0x0002 | 0x0010 | 0x0020  # fixedTPM, fixedParent, sensitiveDataOrigin
_USER_WITH_AUTH, _ADMIN_WITH_POLICY, _NO_DA = 0x0040, 0x0080, 0x0400
_RESTRICTED, _DECRYPT, _SIGN = 0x1_0000, 0x2_0000, 0x4_0000
_EK_POLICY = bytes.fromhex("837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa")
"""PolicySecret(TPM_RH_ENDORSEMENT) with SHA-256 (EK Credential Profile, B.6.2)."""


class KeyTemplate(enum.Enum):
    """What key to create; the value is its name in texts."""

    EK_RSA2048 = "ek-rsa2048"
    """Endorsement key, template L-1."""
    AK_RSA2048 = "ak-rsa2048"
    """Attestation key, RSASSA with SHA-256."""
    AK_P256 = "ak-ecc256"
    """Attestation key, ECDSA P-256 with SHA-256."""
    CA_P256 = "ca-ecc256"
    """Key that signs vTPM certificates: ECDSA P-256 with SHA-256, not restricted."""

    @property
    def in_endorsement_hierarchy(self) -> bool:
        """True for the EK; the others belong to the owner."""
        return self is KeyTemplate.EK_RSA2048

    def public(self, auth: bytes) -> bytes:
        """Marshalled TPM2B_PUBLIC to create this key from.

        A primary follows from the hierarchy's seed and the template alone: with a fixed template anyone who may use the
        owner hierarchy could create the same key again under an authValue of his own. Therefore a digest of our
        authValue goes into ``unique``, which the TPM mixes into the key and never gives out.

        Args:
            auth: the authValue that the key will have; empty for the EK, whose template is fixed by the TCG.

        Raises:
            ValueError: an authValue for the EK.
        """
        if self is KeyTemplate.EK_RSA2048:
            if auth:
                raise ValueError("the EK is used by policy and takes no authValue")
            attributes = _FIXED | _ADMIN_WITH_POLICY | _RESTRICTED | _DECRYPT
            aes128_cfb = b"".join(value.to_bytes(2, "big") for value in (0x0006, 128, 0x0043))
            parameters = aes128_cfb + _rsa_details(_NULL, unique=bytes(256))
            return _sized(_header(_RSA, attributes, _EK_POLICY) + parameters)
        unique = hashlib.sha256(b"kvm-deep-attestation/v1/unique" + auth).digest() if auth else b""
        attributes = _FIXED | _USER_WITH_AUTH | _NO_DA | _SIGN
        if self is not KeyTemplate.CA_P256:
            attributes |= _RESTRICTED
        if self is KeyTemplate.AK_RSA2048:
            parameters = _u16(_NULL) + _rsa_details(_RSASSA, unique=unique)
            return _sized(_header(_RSA, attributes, b"") + parameters)
        curve = _u16(_NULL) + _u16(_ECDSA) + _u16(_SHA256) + _u16(_NIST_P256) + _u16(_NULL)
        return _sized(_header(_ECC, attributes, b"") + curve + _sized(unique) + _sized(b""))


def _u16(value: int) -> bytes:
    return value.to_bytes(2, "big")


def _sized(data: bytes) -> bytes:
    return _u16(len(data)) + data


def _header(key_type: int, attributes: int, policy: bytes) -> bytes:
    return _u16(key_type) + _u16(_SHA256) + attributes.to_bytes(4, "big") + _sized(policy)


def _rsa_details(scheme: int, *, unique: bytes) -> bytes:
    scheme_bytes = _u16(scheme) + (_u16(_SHA256) if scheme != _NULL else b"")
    exponent_65537 = bytes(4)  # zero stands for the default
    return scheme_bytes + _u16(2048) + exponent_65537 + _sized(unique)
