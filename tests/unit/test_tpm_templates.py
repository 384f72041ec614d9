"""Key templates, field by field, and the command header code of the simulation that must agree with them."""

from __future__ import annotations

import pytest

from harness.errors import MalformedMessage
from harness.sim.commands import (
    Command,
    KeyType,
    failure,
    key_type,
    parse_header,
    private_key_handle,
    read_public,
)
from harness.tpm_templates import KeyTemplate

AUTH = b"a" * 16
FIXED, USER, POLICY, NO_DA, RESTRICTED, DECRYPT, SIGN = 0x32, 0x40, 0x80, 0x400, 0x10000, 0x20000, 0x40000


def as_response(public: bytes) -> bytes:
    """Response of TPM2_ReadPublic that carries this TPM2B_PUBLIC."""
    return b"\x80\x01" + (10 + len(public)).to_bytes(4, "big") + bytes(4) + public


@pytest.mark.parametrize(
    ("template", "auth", "attributes"),
    [
        (KeyTemplate.EK_RSA2048, b"", FIXED | POLICY | RESTRICTED | DECRYPT),
        (KeyTemplate.AK_RSA2048, AUTH, FIXED | USER | NO_DA | RESTRICTED | SIGN),
        (KeyTemplate.AK_P256, AUTH, FIXED | USER | NO_DA | RESTRICTED | SIGN),
        (KeyTemplate.CA_P256, AUTH, FIXED | USER | NO_DA | SIGN),
    ],
)
def test_template_has_the_attributes_of_its_role(template: KeyTemplate, auth: bytes, attributes: int) -> None:
    """Each role has exactly its attributes, SHA-256 as name algorithm, and a size field that fits."""
    public = template.public(auth)
    assert int.from_bytes(public[:2], "big") == len(public) - 2
    assert public[4:6] == b"\x00\x0b"
    assert int.from_bytes(public[6:10], "big") == attributes
    assert template.in_endorsement_hierarchy is (template is KeyTemplate.EK_RSA2048)


def test_ek_template_is_l1() -> None:
    """The EK template is TCG's L-1: its policy digest, AES-128-CFB, RSA-2048 and 256 zero bytes as unique."""
    public = KeyTemplate.EK_RSA2048.public(b"")
    assert public[10:44].hex() == "0020837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa"
    assert public[44:58].hex() == "0006008000430010080000000000"
    assert public[58:] == b"\x01\x00" + bytes(256)


def test_ek_takes_no_auth_value() -> None:
    """The EK is used by policy: an authValue would change nothing but the caller's belief, and is refused."""
    with pytest.raises(ValueError, match="no authValue"):
        KeyTemplate.EK_RSA2048.public(AUTH)


@pytest.mark.parametrize("template", [KeyTemplate.AK_RSA2048, KeyTemplate.AK_P256, KeyTemplate.CA_P256])
def test_another_auth_value_makes_another_key(template: KeyTemplate) -> None:
    """The authValue goes into the template, so nobody can make the same key with an authValue of his own."""
    assert template.public(AUTH) != template.public(b"b" * 16)
    assert template.public(AUTH) == template.public(AUTH)
    assert AUTH not in template.public(AUTH)


@pytest.mark.parametrize(
    ("template", "auth", "expected"),
    [
        (KeyTemplate.EK_RSA2048, b"", KeyType.RSA2048),
        (KeyTemplate.AK_RSA2048, AUTH, KeyType.RSA2048),
        (KeyTemplate.AK_P256, AUTH, KeyType.P256),
        (KeyTemplate.CA_P256, AUTH, KeyType.P256),
    ],
)
def test_key_type_is_read_from_a_public_area(template: KeyTemplate, auth: bytes, expected: KeyType) -> None:
    """The simulation finds type and size behind every mix of symmetric algorithm and scheme."""
    response = as_response(template.public(auth))
    assert key_type(response) is expected


def test_unmeasured_and_missing_keys_are_other() -> None:
    """RSA-3072, P-384 and a failed TPM2_ReadPublic are OTHER."""
    rsa = as_response(KeyTemplate.AK_RSA2048.public(AUTH)).replace(b"\x08\x00\x00", b"\x0c\x00\x00")
    ecc = as_response(KeyTemplate.AK_P256.public(AUTH)).replace(b"\x0b\x00\x03", b"\x0b\x00\x04")
    assert [key_type(response) for response in (rsa, ecc, failure(0x18B))] == [KeyType.OTHER] * 3


@pytest.mark.parametrize(
    ("command", "expected"),
    [(Command.Quote, 0xA), (Command.Certify, 0xB), (Command.ActivateCredential, 0xB), (Command.PCR_Read, None)],
)
def test_private_key_handle_is_found(command: Command, expected: int | None) -> None:
    """The key that works is the first handle of a quote and the second one of Certify and ActivateCredential."""
    handles = (0xA).to_bytes(4, "big") + (0xB).to_bytes(4, "big")
    message = b"\x80\x02" + (18).to_bytes(4, "big") + command.value.to_bytes(4, "big") + handles
    header = parse_header(message)
    assert header.command is command
    assert private_key_handle(header, message) == expected
    assert private_key_handle(header, message[:12]) is None


def test_own_commands_are_well_formed() -> None:
    """TPM2_ReadPublic and a failure are complete messages with the right size."""
    assert read_public(0x81010002).hex() == "80010000000e0000017381010002"
    assert failure(0x922).hex() == "80010000000a00000922"


@pytest.mark.parametrize("data", [b"", bytes(9), bytes(10), b"\x80\x01\xff\xff\xff\xff\x00\x00\x01\x44"])
def test_impossible_sizes_are_refused(data: bytes) -> None:
    """A header that is short, or whose size is below 10 or above 4096, is malformed."""
    with pytest.raises(MalformedMessage):
        parse_header(data)
