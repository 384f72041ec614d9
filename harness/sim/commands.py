"""What the simulation must know of TPM commands: header, codes, and which handle names the private key in use.

Invariants:
    1. Only the fixed part of a command is read: the 10-byte header and the handles after it.

Spec: TPM 2.0 Part 1, 18 (command structure); Part 2, 6.5.2 (TPM_CC); Part 3 (handles of each command).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from harness.errors import MalformedMessage

HEADER_SIZE = 10
MAX_MESSAGE = 4096
"""Bytes of the longest command or response (PC Client platforms: MAX_COMMAND_SIZE)."""
_NO_SESSIONS = 0x8001


class Command(enum.Enum):
    """Commands that have a name in latency profiles and fault plans; the value is the TPM_CC."""

    NV_UndefineSpace = 0x122
    EvictControl = 0x120
    Clear = 0x126
    HierarchyChangeAuth = 0x129
    NV_DefineSpace = 0x12A
    CreatePrimary = 0x131
    NV_Write = 0x137
    PCR_Reset = 0x13D
    SelfTest = 0x143
    Startup = 0x144
    Shutdown = 0x145
    ActivateCredential = 0x147
    Certify = 0x148
    CertifyCreation = 0x14A
    GetTime = 0x14C
    NV_Read = 0x14E
    PolicySecret = 0x151
    Create = 0x153
    ECDH_ZGen = 0x154
    Load = 0x157
    Quote = 0x158
    RSA_Decrypt = 0x159
    Sign = 0x15D
    Unseal = 0x15E
    ContextLoad = 0x161
    ContextSave = 0x162
    FlushContext = 0x165
    NV_ReadPublic = 0x169
    ReadPublic = 0x173
    StartAuthSession = 0x176
    GetCapability = 0x17A
    GetRandom = 0x17B
    PCR_Read = 0x17E
    ReadClock = 0x181
    PCR_Extend = 0x182
    NV_Certify = 0x184


PRIVATE_KEY_HANDLE: dict[Command, int] = {
    Command.Quote: 0,
    Command.Sign: 0,
    Command.Certify: 1,
    Command.CertifyCreation: 0,
    Command.GetTime: 1,
    Command.NV_Certify: 0,
    Command.ActivateCredential: 1,
    Command.RSA_Decrypt: 0,
    Command.ECDH_ZGen: 0,
}
"""Commands whose time is that of a private-key operation, and the position of that key among their handles."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Header of a command or response: total ``size`` in bytes, and ``code`` (TPM_CC or TPM_RC)."""

    tag: int
    size: int
    code: int

    @property
    def command(self) -> Command | None:
        """The command, if it is one with a name here."""
        return _BY_CODE.get(self.code)


_BY_CODE = {command.value: command for command in Command}


def parse_header(data: bytes) -> Header:
    """Header from the first 10 bytes of a command or response.

    Raises:
        MalformedMessage: a size below 10 or above `MAX_MESSAGE`.
    """
    size = int.from_bytes(data[2:6], "big")
    if len(data) < HEADER_SIZE or not HEADER_SIZE <= size <= MAX_MESSAGE:
        raise MalformedMessage(f"a TPM message cannot have {size} bytes")
    return Header(tag=int.from_bytes(data[:2], "big"), size=size, code=int.from_bytes(data[6:10], "big"))


def private_key_handle(header: Header, command: bytes) -> int | None:
    """Handle of the key that does the work of this command; None when no private key is used."""
    position = PRIVATE_KEY_HANDLE.get(header.command) if header.command else None
    if position is None:
        return None
    start = HEADER_SIZE + 4 * position
    handle = command[start : start + 4]
    return int.from_bytes(handle, "big") if len(handle) == 4 else None


def read_public(handle: int) -> bytes:
    """TPM2_ReadPublic of this handle, marshalled."""
    return _message(_NO_SESSIONS, Command.ReadPublic.value, handle.to_bytes(4, "big"))


def failure(response_code: int) -> bytes:
    """Response that says nothing but this TPM_RC, marshalled."""
    return _message(_NO_SESSIONS, response_code, b"")


def _message(tag: int, code: int, body: bytes) -> bytes:
    size = HEADER_SIZE + len(body)
    return tag.to_bytes(2, "big") + size.to_bytes(4, "big") + code.to_bytes(4, "big") + body


class KeyType(enum.Enum):
    """Kind of key, as far as it decides the time of an operation."""

    RSA2048 = "rsa2048"
    P256 = "ecc256"
    OTHER = "other"


def key_type(read_public_response: bytes) -> KeyType:
    """Kind of the key in a response of TPM2_ReadPublic; OTHER for failures and kinds that are not measured."""
    public = read_public_response[HEADER_SIZE + 2 :]  # after the header: size of TPM2B_PUBLIC, then TPMT_PUBLIC
    if len(public) < 10:
        return KeyType.OTHER
    kind = int.from_bytes(public[:2], "big")
    rest = public[10 + int.from_bytes(public[8:10], "big") :]  # after type, nameAlg, attributes and authPolicy
    rest = rest[2:] if rest[:2] == b"\x00\x10" else rest[6:]  # symmetric: TPM_ALG_NULL, or algorithm, bits and mode
    rest = rest[2:] if rest[:2] == b"\x00\x10" else rest[4:]  # scheme: TPM_ALG_NULL, or scheme and its hash
    if kind == 0x0001 and rest[:2] == (2048).to_bytes(2, "big"):
        return KeyType.RSA2048
    if kind == 0x0023 and rest[:2] == b"\x00\x03":
        return KeyType.P256
    return KeyType.OTHER
