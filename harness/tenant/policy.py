"""Reference values: which digests a PCR may have.

Invariants:
    1. A policy is plain data without defaults: what it does not name is not judged, and an empty one accepts nothing.

Spec: RFC 9334, 8.3 (reference values); DESIGN 3.5 (check 9), 3.9 (text form).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from harness.errors import MalformedMessage
from harness.values import HashAlg, PcrSelection, parse_hex

_PCR_INDEX = re.compile(r"[0-9]|1[0-9]|2[0-3]")
_MAX_VALUE = 64


@dataclass(frozen=True, slots=True)
class Policy:
    """Allowed digests by bank and PCR index."""

    allowed: Mapping[HashAlg, Mapping[int, frozenset[bytes]]]
    selection: PcrSelection = field(init=False, compare=False)
    """The PCRs that the policy names."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "selection", PcrSelection.from_lists(self.allowed))

    @classmethod
    def of(cls, bank: HashAlg, values: Mapping[int, bytes]) -> Policy:
        """Policy with exactly one allowed value for each PCR of one bank."""
        return cls({bank: {pcr: frozenset({value}) for pcr, value in values.items()}})

    def encode(self) -> dict[str, dict[str, list[str]]]:
        """Text form ``{bank: {index: [hex, ...]}}``; `parse_policy` reads it back."""
        return {
            bank.text: {str(pcr): sorted(value.hex() for value in values) for pcr, values in pcrs.items()}
            for bank, pcrs in self.allowed.items()
        }


def parse_policy(data: object) -> Policy:
    """Policy from its text form.

    Raises:
        MalformedMessage: another shape, an unknown bank, an index that is not a decimal from 0 to 23, or bad hex.
    """
    if not isinstance(data, dict):
        raise MalformedMessage("a policy must be an object of banks")
    return Policy({HashAlg.parse(bank): _pcrs(bank, pcrs) for bank, pcrs in data.items()})


def _pcrs(bank: str, data: object) -> dict[int, frozenset[bytes]]:
    if not isinstance(data, dict):
        raise MalformedMessage(f"policy {bank} must be an object of PCR indices")
    pcrs = {}
    for index, values in data.items():
        if not isinstance(index, str) or not _PCR_INDEX.fullmatch(index):
            raise MalformedMessage(f"policy {bank} has an index that is not a decimal from 0 to 23")
        if not isinstance(values, list):
            raise MalformedMessage(f"policy {bank}.{index} must be a list of digests")
        pcrs[int(index)] = frozenset(_values(f"policy {bank}.{index}", values))
    return pcrs


def _values(what: str, values: list[object]) -> Iterable[bytes]:
    for value in values:
        if not isinstance(value, str):
            raise MalformedMessage(f"{what} must be a list of hex strings")
        yield parse_hex(value, what, at_most=_MAX_VALUE)
