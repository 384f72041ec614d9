"""Small frozen values that the whole project shares: hash algorithms, ids, PCR selections and values, clock.

Invariants:
    1. A value that exists is valid: ranges and lengths are checked when it is made.
    2. Bytes are bytes; text forms are made and read only by ``parse_*``, ``messages`` and for people.
    3. Nothing here does I/O or imports another module of the project but ``errors``.

Spec: TPM 2.0 Part 2 (TPM_ALG_ID 6.3, TPML_PCR_SELECTION 10.9.7, TPMS_CLOCK_INFO 10.11.1); DESIGN 3.1, 3.2, 3.4.
"""

from __future__ import annotations

import enum
import hashlib
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NewType

from harness.errors import MalformedMessage

AgentId = NewType("AgentId", uuid.UUID)
"""A guest, as its tenant and libvirt know it: the domain's UUID."""

HostId = NewType("HostId", uuid.UUID)
"""A host: UUIDv8 derived from the Name of its hardware TPM's EK (DESIGN 3.6)."""

PCR_COUNT = 24
SIZE_OF_SELECT = 3
RESETTABLE_PCRS = frozenset({16, 23})
"""Anyone may reset these from locality 0: a request never names them (DESIGN 3.1)."""
_RESETTABLE_MASK = sum(1 << pcr for pcr in RESETTABLE_PCRS)
_MASK_TEXT = re.compile(r"0x[0-9a-f]{1,64}")
_UUID_TEXT = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


class HashAlg(enum.Enum):
    """A hash algorithm that the protocol allows as a bank or in a signature; the value is its TPM_ALG_ID."""

    SHA256 = 0x000B
    SHA384 = 0x000C
    SHA512 = 0x000D

    __hash__ = object.__hash__  # each is one object; Enum's own hashes the name, in Python, at every look-up

    @property
    def text(self) -> str:
        """Name on the wire: ``sha256``, ``sha384`` or ``sha512``."""
        return self.name.lower()

    @property
    def digest_size(self) -> int:
        """Length of a digest, in bytes."""
        return _SIZES[self]

    def digest(self, data: bytes) -> bytes:
        """Digest of ``data``."""
        return _DIGESTS[self](data).digest()

    @classmethod
    def parse(cls, text: str) -> HashAlg:
        """Algorithm with this wire name.

        Raises:
            MalformedMessage: any other text (sha1 included).
        """
        if (alg := _BY_TEXT.get(text)) is not None:
            return alg
        raise MalformedMessage(f"hash algorithm {text[:32]!r} is not one of sha256, sha384, sha512")


HASH_ALGS: Mapping[int, HashAlg] = MappingProxyType({alg.value: alg for alg in HashAlg})
"""By TPM_ALG_ID."""
_BY_TEXT = {alg.text: alg for alg in HashAlg}
_SIZES = {HashAlg.SHA256: 32, HashAlg.SHA384: 48, HashAlg.SHA512: 64}
_DIGESTS = {HashAlg.SHA256: hashlib.sha256, HashAlg.SHA384: hashlib.sha384, HashAlg.SHA512: hashlib.sha512}


def parse_hex(text: str, what: str, *, size: int | None = None, at_least: int = 0, at_most: int = 4096) -> bytes:
    """Bytes from lower-case hex, the only text form of bytes that requests use.

    Args:
        text: two lower-case digits a byte, nothing else.
        what: the field's name, for the error.
        size: exact length in bytes; overrides ``at_least`` and ``at_most``.
        at_least: smallest length in bytes.
        at_most: largest length in bytes.

    Raises:
        MalformedMessage: another encoding or length.
    """
    low, high = (size, size) if size is not None else (at_least, at_most)
    try:
        data = bytes.fromhex(text) if 2 * low <= len(text) <= 2 * high else None
    except ValueError:
        data = None
    if data is None or data.hex() != text:  # there are spaces or upper-case digits in it
        bounds = f"{low}" if low == high else f"{low} to {high}"
        raise MalformedMessage(f"{what} must be lower-case hex of {bounds} bytes")
    return data


def parse_uuid(text: str, what: str) -> uuid.UUID:
    """UUID from its canonical lower-case form.

    Raises:
        MalformedMessage: any other form (upper case, braces, no dashes).
    """
    if not _UUID_TEXT.fullmatch(text):
        raise MalformedMessage(f"{what} must be a UUID in canonical lower-case form")
    return uuid.UUID(text)


def parse_agent_id(text: str) -> AgentId:
    """Agent id from its canonical form; see `parse_uuid`."""
    return AgentId(parse_uuid(text, "agent_id"))


def parse_host_id(text: str) -> HostId:
    """Host id from its canonical form; see `parse_uuid`."""
    return HostId(parse_uuid(text, "host_id"))


@dataclass(frozen=True, slots=True)
class Nonce:
    """A tenant's freshness value: 16 to 64 random bytes, used for one attempt only (DESIGN 3.1)."""

    value: bytes = field(repr=False)  # nonces are not logged

    def __post_init__(self) -> None:
        if not 16 <= len(self.value) <= 64:
            raise MalformedMessage("nonce must have 16 to 64 bytes")

    @classmethod
    def parse(cls, text: str) -> Nonce:
        """Nonce from lower-case hex."""
        return cls(parse_hex(text, "nonce", at_least=16, at_most=64))


def parse_mask(text: str) -> int:
    """PCR mask of a request: ``0x`` and lower-case hex, bit *i* = PCR *i*, without resettable PCRs.

    Raises:
        MalformedMessage: another form, no PCR, a bit above 23, or PCR 16 or 23.
    """
    if not _MASK_TEXT.fullmatch(text):
        raise MalformedMessage("mask must be 0x and lower-case hex digits")
    mask = int(text, 16)
    if mask >= 1 << PCR_COUNT:
        raise MalformedMessage("mask names a PCR above 23")
    if mask == 0:
        raise MalformedMessage("mask names no PCR")
    if mask & _RESETTABLE_MASK:
        raise MalformedMessage("mask names PCR 16 or 23, which anyone may reset")
    return mask


def mask_of(pcrs: Iterable[int]) -> int:
    """Mask with these PCR indices set.

    Raises:
        ValueError: an index outside 0 to 23.
    """
    mask = 0
    for pcr in pcrs:
        if not 0 <= pcr < PCR_COUNT:
            raise ValueError(f"PCR {pcr} is not in 0 to 23")
        mask |= 1 << pcr
    return mask


def pcrs_in(mask: int) -> Iterator[int]:
    """PCR indices of a mask, ascending."""
    return (pcr for pcr in range(PCR_COUNT) if mask >> pcr & 1)


@dataclass(frozen=True, slots=True)
class PcrSelection:
    """PCRs to quote, per bank: entries in ascending TPM_ALG_ID, none all-zero (DESIGN 3.4).

    Args:
        banks: pairs (bank, mask), 0 < mask < 2^24, each bank at most once; kept in ascending TPM_ALG_ID.
    """

    banks: tuple[tuple[HashAlg, int], ...] = ()

    def __post_init__(self) -> None:
        for _, mask in self.banks:
            if not 0 < mask < 1 << PCR_COUNT:
                raise ValueError("a mask is outside 1 to 2^24 - 1")
        if len(self.banks) > 1:  # nearly every request asks for one bank
            if len({bank for bank, _ in self.banks}) != len(self.banks):
                raise ValueError("a bank is selected twice")
            object.__setattr__(self, "banks", tuple(sorted(self.banks, key=lambda entry: entry[0].value)))

    @classmethod
    def of(cls, bank: HashAlg, mask: int) -> PcrSelection:
        """Selection in one bank."""
        return cls(((bank, mask),))

    @classmethod
    def from_lists(cls, banks: Mapping[HashAlg, Iterable[int]]) -> PcrSelection:
        """Selection from PCR lists; empty lists vanish."""
        masks = ((bank, mask_of(pcrs)) for bank, pcrs in banks.items())
        return cls(tuple((bank, mask) for bank, mask in masks if mask))

    def mask(self, bank: HashAlg) -> int:
        """Mask of one bank; 0 when the bank is not selected."""
        for selected, mask in self.banks:
            if selected is bank:
                return mask
        return 0

    def union(self, other: PcrSelection) -> PcrSelection:
        """Selection of everything that either names."""
        masks = dict(self.banks)
        for bank, mask in other.banks:
            masks[bank] = masks.get(bank, 0) | mask
        return PcrSelection(tuple(masks.items()))

    def within(self, other: PcrSelection) -> bool:
        """Whether ``other`` names every PCR that this selection names."""
        return all(mask & ~other.mask(bank) == 0 for bank, mask in self.banks)

    def marshal(self) -> bytes:
        """TPML_PCR_SELECTION, sizeofSelect 3 (TPM 2.0 Part 2, 10.9.7)."""
        entries = b"".join(
            bank.value.to_bytes(2, "big") + bytes([SIZE_OF_SELECT]) + mask.to_bytes(SIZE_OF_SELECT, "little")
            for bank, mask in self.banks
        )
        return len(self.banks).to_bytes(4, "big") + entries

    def __iter__(self) -> Iterator[tuple[HashAlg, int]]:
        """Pairs (bank, PCR index) in the order of the signed digest."""
        return ((bank, pcr) for bank, mask in self.banks for pcr in pcrs_in(mask))


PcrValues = Mapping[HashAlg, Mapping[int, bytes]]
"""Values of PCRs: bank, then index, then digest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockInfo:
    """TPMS_CLOCK_INFO: milliseconds and counters of a TPM (TPM 2.0 Part 2, 10.11.1)."""

    clock: int
    reset_count: int
    restart_count: int
    safe: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockBaseline:
    """What is stored of the last believed clock of one AK; the baseline of check 10.

    ``firmware_version`` is None only where a saved trust file (DESIGN 3.9) does not give it.
    """

    clock: int
    reset_count: int
    restart_count: int
    firmware_version: int | None
