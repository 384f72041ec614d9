"""What is hashed under which label. Values of an independent implementation are in `test_vectors`."""

from __future__ import annotations

import hashlib
import hmac
import re
import uuid
from dataclasses import replace
from typing import Any

import pytest

from harness import protocol
from harness.errors import MalformedMessage
from harness.protocol import QuoteRequest, leaf_data
from harness.values import AgentId, HashAlg, HostId, Nonce

AGENT = AgentId(uuid.UUID("a0bb03b7-39bb-4d7b-88e6-14a7e2004c8e"))
HOST_ONLY = QuoteRequest(nonce=Nonce(bytes(16)), bank=HashAlg.SHA256, mask=0x4091)
GUEST = replace(HOST_ONLY, agent_id=AGENT, binding=bytes(range(32)))
REQUESTER, VTPM_EK = bytes([1]) * 32, bytes([2]) * 32


def test_a_leaf_holds_the_whole_request() -> None:
    """Label and six sized parts in their order; absent ones are empty."""
    parts = [bytes(16), bytes.fromhex("00000001000b03914000"), REQUESTER, AGENT.bytes, VTPM_EK, bytes(range(32))]
    expected = b"".join(len(part).to_bytes(2, "big") + part for part in parts)
    assert leaf_data(GUEST, requester=REQUESTER, vtpm_ek=VTPM_EK) == b"kvm-deep-attestation/v1/leaf" + expected
    assert leaf_data(HOST_ONLY, requester=REQUESTER, vtpm_ek=None).endswith(b"\x00\x20" + REQUESTER + bytes(6))


@pytest.mark.parametrize(
    "changes",
    [
        {"nonce": Nonce(bytes(17))},
        {"mask": 0x4090},
        {"bank": HashAlg.SHA384},
        {"agent_id": AgentId(uuid.UUID(int=1))},
        {"binding": bytes(32)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_field_of_the_request_changes_the_leaf(changes: dict[str, Any]) -> None:
    """There is no field that a provider could swap behind the signature."""
    honest = leaf_data(GUEST, requester=REQUESTER, vtpm_ek=VTPM_EK)
    assert leaf_data(replace(GUEST, **changes), requester=REQUESTER, vtpm_ek=VTPM_EK) != honest
    assert leaf_data(GUEST, requester=VTPM_EK, vtpm_ek=VTPM_EK) != honest
    assert leaf_data(GUEST, requester=REQUESTER, vtpm_ek=REQUESTER) != honest


@pytest.mark.parametrize(("request_", "vtpm_ek"), [(GUEST, None), (HOST_ONLY, VTPM_EK)], ids=["missing", "unasked"])
def test_the_vtpm_is_in_the_leaf_exactly_for_a_guest(request_: QuoteRequest, vtpm_ek: bytes | None) -> None:
    """A leaf for a guest without its vTPM would be worth nothing: that is a bug, not a message."""
    with pytest.raises(ValueError, match="vtpm_ek"):
        leaf_data(request_, requester=REQUESTER, vtpm_ek=vtpm_ek)


@pytest.mark.parametrize(
    "changes",
    [{"agent_id": None}, {"binding": None}, {"binding": bytes(31)}, {"binding": bytes(33)}, {"binding": b""}],
    ids=["binding-alone", "agent-alone", "short-binding", "long-binding", "empty-binding"],
)
def test_agent_and_binding_come_together(changes: dict[str, Any]) -> None:
    """A round for a guest is always bound to guest evidence, by 32 bytes."""
    with pytest.raises(MalformedMessage):
        replace(GUEST, **changes)


def test_qualifying_data_holds_size_and_root() -> None:
    """The tree's size is under the signature."""
    root = bytes(range(32))
    expected = hashlib.sha256(b"kvm-deep-attestation/v1/root" + (7).to_bytes(8, "big") + root).digest()
    assert protocol.qualifying_data(7, root) == expected
    assert protocol.qualifying_data(8, root) != expected


def test_the_text_form_is_told_apart_by_its_length() -> None:
    """34 printable characters; a native batch has 32 bytes, a raw nonce at most 31."""
    text = protocol.qualifying_text(protocol.qualifying_data(1, bytes(32)))
    assert len(text) == 34
    assert re.fullmatch(rb"b1[A-Z2-7]{32}", text)


def test_the_binding_is_of_both_parts_and_their_border() -> None:
    """Moving a byte from the Name to the attest gives another binding."""
    expected = hashlib.sha256(b"kvm-deep-attestation/v1/guest\x00\x02ab\x00\x01c").digest()
    assert protocol.guest_binding(b"ab", b"c") == expected
    assert protocol.guest_binding(b"a", b"bc") != expected


def test_a_host_id_is_a_uuid_of_version_8() -> None:
    """It follows from the EK's Name alone, so every tenant can recompute it."""
    name = b"\x00\x0b" + bytes(32)
    made = protocol.host_id_of(name)
    digest = hashlib.sha256(b"kvm-deep-attestation/v1/host" + name).digest()
    assert (made.version, made.variant) == (8, uuid.RFC_4122)
    mask = ~(0xF << 76 | 0x3 << 62)
    assert made.int & mask == int.from_bytes(digest[:16], "big") & mask
    assert protocol.host_id_of(b"\x00\x0b" + bytes([1]) * 32) != made


def test_enrolment_answers_name_who_asked_and_what_for() -> None:
    """Tenant, host and AK are under the secret: nobody can relay another tenant's challenge."""
    host, name = HostId(uuid.UUID(int=5)), b"\x00\x0b" + bytes(32)
    message = b"kvm-deep-attestation/v1/enrol\x00\x20" + REQUESTER + b"\x00\x10" + host.bytes + b"\x00\x22" + name
    made = protocol.enrol_answer(b"secret", requester=REQUESTER, host_id=host, ak_name=name)
    assert made == hmac.digest(b"secret", message, "sha256")


def test_a_certification_names_its_nonce_and_key() -> None:
    """extraData of TPM2_Certify under its own label."""
    made = protocol.certify_qualifying(b"nonce", b"name")
    assert made == hashlib.sha256(b"kvm-deep-attestation/v1/certify\x00\x05nonce\x00\x04name").digest()


def test_the_requester_is_the_digest_of_the_public_key() -> None:
    """Taken from the connection's certificate, never sent."""
    assert protocol.requester_of(b"spki") == hashlib.sha256(b"spki").digest()


def test_a_length_is_never_cut() -> None:
    """65,535 bytes have a length of two bytes; one more is an error of ours and not another structure."""
    assert protocol.tpm2b(bytes(0xFFFF))[:3] == b"\xff\xff\x00"
    with pytest.raises(ValueError, match="do not fit"):
        protocol.tpm2b(bytes(0x10000))
