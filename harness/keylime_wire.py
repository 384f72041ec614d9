"""Keylime's text form of a quote: ``r`` and three base64 parts: TPMS_ATTEST, TPMT_SIGNATURE, PCR values.

The values come in the in-memory layout of tpm2-tools: little-endian, 16 selections, then lists of up to 8 digests.

Invariants:
    1. `parse_quote` reads what `encode_quote` and stock agents write, and nothing that is longer or shorter.

Spec: Keylime ``tpm_util.py`` (parser), tpm2-tools ``pcr.h`` (layout of ``tpm2_quote --pcrs_format=values``).
"""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from harness.errors import MalformedEvidence
from harness.values import HASH_ALGS, PCR_COUNT, SIZE_OF_SELECT, HashAlg, PcrSelection, PcrValues, pcrs_in

_SELECTIONS = 16
_PER_LIST = 8
_VALUE_SIZE = 64
_SELECTION = struct.Struct("<HB3s2x")
_DIGEST = struct.Struct(f"<H{_VALUE_SIZE}s")
_COUNT = struct.Struct("<I")
_LIST_SIZE = _COUNT.size + _PER_LIST * _DIGEST.size
_HEAD_SIZE = _COUNT.size + _SELECTIONS * _SELECTION.size
_MAX_TEXT = 64 * 1024
_MAX_STRUCTURE = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestEvidence:
    """A guest's quote as received: not believed yet."""

    attest: bytes
    signature: bytes
    pcrs: PcrValues = field(repr=False)


def encode_quote(attest: bytes, signature: bytes, pcrs: PcrValues) -> str:
    """Text form of a quote."""
    parts = (attest, signature, _encode_pcrs(pcrs))
    return "r" + ":".join(base64.b64encode(part).decode() for part in parts)


def parse_quote(text: str) -> GuestEvidence:
    """Quote from its text form.

    Raises:
        MalformedEvidence: another form, an unknown bank, or bytes left over.
    """
    if len(text) > _MAX_TEXT or not text.startswith("r"):
        raise MalformedEvidence("quote does not start with r, or is too long")
    parts = text[1:].split(":")
    if len(parts) != 3:
        raise MalformedEvidence("quote does not have three parts")
    try:
        attest, signature, values = (base64.b64decode(part, validate=True) for part in parts)
    except (binascii.Error, ValueError):
        raise MalformedEvidence("a part of the quote is not base64") from None
    if max(len(attest), len(signature)) > _MAX_STRUCTURE:
        raise MalformedEvidence(f"attest or signature has more than {_MAX_STRUCTURE} bytes")
    return GuestEvidence(attest=attest, signature=signature, pcrs=_parse_pcrs(values))


def _encode_pcrs(pcrs: PcrValues) -> bytes:
    selection = PcrSelection.from_lists(pcrs)
    entries = [
        _SELECTION.pack(bank.value, SIZE_OF_SELECT, mask.to_bytes(SIZE_OF_SELECT, "little"))
        for bank, mask in selection.banks
    ]
    entries += [bytes(_SELECTION.size)] * (_SELECTIONS - len(entries))
    digests = [_DIGEST.pack(len(value), value) for value in (pcrs[bank][pcr] for bank, pcr in selection)]
    lists = [digests[first : first + _PER_LIST] for first in range(0, len(digests), _PER_LIST)]
    blob = _COUNT.pack(len(selection.banks)) + b"".join(entries) + _COUNT.pack(len(lists))
    for part in lists:
        padding = bytes(_DIGEST.size) * (_PER_LIST - len(part))
        blob += _COUNT.pack(len(part)) + b"".join(part) + padding
    return blob


def _parse_pcrs(data: bytes) -> dict[HashAlg, dict[int, bytes]]:
    if len(data) < _HEAD_SIZE + _COUNT.size:
        raise MalformedEvidence("PCR values are cut short")
    (banks,) = _COUNT.unpack_from(data)
    (lists,) = _COUNT.unpack_from(data, _HEAD_SIZE)
    if banks > _SELECTIONS or len(data) != _HEAD_SIZE + _COUNT.size + lists * _LIST_SIZE:
        raise MalformedEvidence("PCR values do not have the stated length")
    values = _digests(data, lists)
    pcrs: dict[HashAlg, dict[int, bytes]] = {}
    for number in range(banks):
        alg_id, _, bits = _SELECTION.unpack_from(data, _COUNT.size + number * _SELECTION.size)
        bank = HASH_ALGS.get(alg_id)
        if bank is None or bank in pcrs:
            raise MalformedEvidence("PCR values name an unknown bank, or one twice")
        try:
            pcrs[bank] = {pcr: next(values) for pcr in pcrs_in(int.from_bytes(bits, "little"))}
        except (StopIteration, RuntimeError):
            raise MalformedEvidence("fewer PCR values than selected PCRs") from None
    if next(values, None) is not None:
        raise MalformedEvidence("more PCR values than selected PCRs")
    return pcrs


def _digests(data: bytes, lists: int) -> Iterator[bytes]:
    if lists > PCR_COUNT:
        raise MalformedEvidence("too many lists of PCR values")
    for number in range(lists):
        start = _HEAD_SIZE + _COUNT.size + number * _LIST_SIZE
        (count,) = _COUNT.unpack_from(data, start)
        if count > _PER_LIST:
            raise MalformedEvidence("a list has more than 8 PCR values")
        for place in range(count):
            size, value = _DIGEST.unpack_from(data, start + _COUNT.size + place * _DIGEST.size)
            if size > _VALUE_SIZE:
                raise MalformedEvidence("a PCR value is longer than 64 bytes")
            yield value[:size]
