"""The protocol's labels and what is hashed under them: leaf, qualifying data, guest binding, enrolment.

The one place that knows the labels. Everything here is pure and the same for whoever proves and whoever appraises.

Spec: DESIGN 3.2 (leaf, tree, qualifying data), 3.1 (binding), 3.6 (enrolment), 3.7 (text form).
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import uuid
from dataclasses import dataclass, field

from harness.errors import MalformedMessage
from harness.values import AgentId, HashAlg, HostId, Nonce, PcrSelection

LEAF_LABEL = b"kvm-deep-attestation/v1/leaf"
ROOT_LABEL = b"kvm-deep-attestation/v1/root"
GUEST_LABEL = b"kvm-deep-attestation/v1/guest"
HOST_LABEL = b"kvm-deep-attestation/v1/host"
ENROL_LABEL = b"kvm-deep-attestation/v1/enrol"
CERTIFY_LABEL = b"kvm-deep-attestation/v1/certify"
_TEXT_PREFIX = b"b1"
_TEXT_BYTES = 20
_DIGEST_SIZE = 32


def tpm2b(data: bytes) -> bytes:
    """Two bytes of length, big-endian, then the data.

    Raises:
        ValueError: more than 65,535 bytes.
    """
    if len(data) > 0xFFFF:
        raise ValueError(f"{len(data)} bytes do not fit a TPM2B")
    return len(data).to_bytes(2, "big") + data


@dataclass(frozen=True, slots=True, kw_only=True)
class QuoteRequest:
    """What a tenant asks of the host's TPM: the fields of `GET /v1/verifier` (DESIGN 3.1).

    Args:
        nonce: fresh for this attempt.
        bank: PCR bank.
        mask: requested PCRs, bit *i* = PCR *i*.
        agent_id: the guest of this round; None for a host-only request.
        binding: 32 bytes that tie the answer to the guest evidence of this round; present exactly when ``agent_id`` is.

    ``selection`` is the requested PCRs as a selection.

    Raises:
        MalformedMessage: one of ``agent_id`` and ``binding`` without the other, or a binding of another length.
        ValueError: a mask outside 1 to 2^24 - 1.
    """

    nonce: Nonce
    bank: HashAlg
    mask: int
    agent_id: AgentId | None = None
    binding: bytes | None = None
    selection: PcrSelection = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if (self.agent_id is None) != (self.binding is None):
            raise MalformedMessage("agent_id and binding go together: both or neither")
        if self.binding is not None and len(self.binding) != _DIGEST_SIZE:
            raise MalformedMessage(f"binding must have {_DIGEST_SIZE} bytes")
        object.__setattr__(self, "selection", PcrSelection.of(self.bank, self.mask))


def leaf_data(request: QuoteRequest, *, requester: bytes, vtpm_ek: bytes | None) -> bytes:
    """The bytes of one leaf: the whole request, who asked, and the vTPM as its host knows it.

    Args:
        request: as sent.
        requester: SHA-256 of the client certificate's SubjectPublicKeyInfo; taken from the connection.
        vtpm_ek: SHA-256 of the SubjectPublicKeyInfo of the guest's EK; present exactly when the request has a guest.

    Raises:
        ValueError: a guest without ``vtpm_ek``, or the reverse.
    """
    if (request.agent_id is None) != (vtpm_ek is None):
        raise ValueError("vtpm_ek is present exactly when agent_id is")
    before, after = leaf_ends(request, requester=requester)
    return before + tpm2b(vtpm_ek or b"") + after


def leaf_ends(request: QuoteRequest, *, requester: bytes) -> tuple[bytes, bytes]:
    """What stands in a leaf before and after TPM2B(vtpm_ek): all that is known before the host looks at its guests.

    Args:
        request: as sent.
        requester: as in `leaf_data`.
    """
    before = (
        LEAF_LABEL
        + tpm2b(request.nonce.value)
        + tpm2b(request.selection.marshal())
        + tpm2b(requester)
        + tpm2b(request.agent_id.bytes if request.agent_id else b"")
    )
    return before, tpm2b(request.binding or b"")


def qualifying_data(tree_size: int, root: bytes) -> bytes:
    """What the TPM signs for a batch: SHA-256 over label, tree size and root hash; 32 bytes."""
    return hashlib.sha256(ROOT_LABEL + tree_size.to_bytes(8, "big") + root).digest()


def qualifying_text(qualifying: bytes) -> bytes:
    """Text form for stock Keylime verifiers: ``b1`` and 32 base32 characters; 34 bytes (DESIGN 3.7)."""
    return _TEXT_PREFIX + base64.b32encode(qualifying[:_TEXT_BYTES])


def guest_binding(ak_name: bytes, attest: bytes) -> bytes:
    """Digest of the guest evidence that a host quote shall follow.

    Args:
        ak_name: Name of the guest's AK, nameAlg ‖ digest.
        attest: the guest's TPMS_ATTEST as received.
    """
    return hashlib.sha256(GUEST_LABEL + tpm2b(ak_name) + tpm2b(attest)).digest()


def requester_of(spki: bytes) -> bytes:
    """Identity of a client in a leaf: SHA-256 of the DER SubjectPublicKeyInfo of its certificate."""
    return hashlib.sha256(spki).digest()


def host_id_of(ek_name: bytes) -> HostId:
    """Host id: UUIDv8 from the first 16 bytes of SHA-256(label ‖ EK Name) (DESIGN 3.6; RFC 9562, 5.8)."""
    value = bytearray(hashlib.sha256(HOST_LABEL + ek_name).digest()[:16])
    value[6] = value[6] & 0x0F | 0x80
    value[8] = value[8] & 0x3F | 0x80
    return HostId(uuid.UUID(bytes=bytes(value)))


def enrol_answer(secret: bytes, *, requester: bytes, host_id: HostId, ak_name: bytes) -> bytes:
    """Answer to an enrolment challenge: HMAC-SHA-256 with the activated secret; 32 bytes (DESIGN 3.6)."""
    message = ENROL_LABEL + tpm2b(requester) + tpm2b(host_id.bytes) + tpm2b(ak_name)
    return hmac.digest(secret, message, "sha256")


def certify_qualifying(nonce: bytes, ca_name: bytes) -> bytes:
    """ExtraData for the TPM2_Certify of the vTPM CA key; 32 bytes (DESIGN 3.6)."""
    return hashlib.sha256(CERTIFY_LABEL + tpm2b(nonce) + tpm2b(ca_name)).digest()
