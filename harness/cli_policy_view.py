"""Reference values beside what was last proven: what differs, and how people see it.

Invariants:
    1. Only PCRs that the policy in force names are compared and captured: a policy never grows by itself.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from harness import cli_show
from harness.errors import MalformedMessage

LAYERS = ("guest", "host")
_COLUMNS = ("PCR", "allowed", "last proven", "")
_DIGEST = 16
"""Characters of a digest in a table; complete ones are in --json."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One PCR of a policy.

    Args:
        bank: its bank.
        pcr: its index.
        allowed: digests that the policy allows, in hex.
        seen: what was last proven, in hex; None: nothing yet.
    """

    bank: str
    pcr: int
    allowed: tuple[str, ...]
    seen: str | None

    @property
    def differs(self) -> bool:
        """Whether something was proven that the policy does not allow."""
        return self.seen is not None and self.seen not in self.allowed

    def as_json(self) -> dict[str, object]:
        """Members for programs."""
        return {"bank": self.bank, "pcr": self.pcr, "allowed": list(self.allowed), "seen": self.seen}


def compared(answer: Mapping[str, Any], layer: str) -> list[Compared]:
    """The PCRs of a layer's policy, as the verifier's answer has them.

    Raises:
        MalformedMessage: the answer has another form.
    """
    policy, seen = answer.get(f"{layer}_policy") or {}, proven(answer, layer)
    try:
        return [
            Compared(bank=bank, pcr=int(pcr), allowed=tuple(allowed), seen=(seen.get(bank) or {}).get(pcr))
            for bank, pcrs in policy.items()
            for pcr, allowed in sorted(pcrs.items(), key=lambda entry: int(entry[0]))
        ]
    except (AttributeError, TypeError, ValueError) as error:
        raise MalformedMessage(f"the verifier's answer holds no policy: {error}") from None


def proven(answer: Mapping[str, Any], layer: str) -> Mapping[str, Mapping[str, str]]:
    """PCRs of a layer that were last proven, by bank and index; empty when nothing was."""
    found = (answer.get("seen") or {}).get(layer) or {}
    pcrs = found.get("pcrs") or {}
    return pcrs if isinstance(pcrs, Mapping) else {}


def captured(answer: Mapping[str, Any], layer: str) -> dict[str, dict[str, list[str]]]:
    """Policy that allows exactly what was last proven, for the PCRs that the one in force names."""
    policy: dict[str, dict[str, list[str]]] = {}
    for entry in compared(answer, layer):
        if entry.seen is not None:
            policy.setdefault(entry.bank, {})[str(entry.pcr)] = [entry.seen]
    return policy


def summary(answer: Mapping[str, Any], layer: str) -> str:
    """One line: the PCRs of a layer's policy, and whether what was last proven differs."""
    entries = compared(answer, layer)
    if not entries:
        return f"{layer} policy: none"
    banks = dict.fromkeys(entry.bank for entry in entries)
    named = "; ".join(f"{bank} {ranges(entry.pcr for entry in entries if entry.bank == bank)}" for bank in banks)
    differing = [f"{entry.bank}:{entry.pcr}" for entry in entries if entry.differs]
    return f"{layer} policy: {named}" + (
        f"; what was last proven differs in {', '.join(differing)}" if differing else ""
    )


def draw(answer: Mapping[str, Any], layer: str) -> None:
    """Print one layer as a table."""
    from harness.console import print_table

    found = (answer.get("seen") or {}).get(layer) or {}
    when = f"last proven {cli_show.ago(found.get('at'), time.time())}" if found else "nothing proven yet"
    print(f"{layer}: {when}")
    print_table(_COLUMNS, [_row(entry) for entry in compared(answer, layer)], empty="  no reference values")


def differences(answer: Mapping[str, Any], layer: str) -> list[str]:
    """A line for each PCR of a layer that differs, such as ``host sha256:4: 3f0a... -> 9b11...``."""
    return [
        f"{layer} {entry.bank}:{entry.pcr}: {_short(entry.allowed)} -> {_digest(entry.seen)}"
        for entry in compared(answer, layer)
        if entry.differs
    ]


def ranges(pcrs: Iterable[int]) -> str:
    """PCRs as people give them, such as 0-7,14."""
    known = sorted(set(pcrs))
    firsts = [pcr for pcr in known if pcr - 1 not in known]
    lasts = [pcr for pcr in known if pcr + 1 not in known]
    return ",".join(
        str(first) if first == last else f"{first}-{last}" for first, last in zip(firsts, lasts, strict=True)
    )


def _row(entry: Compared) -> tuple[str, ...]:
    return f"{entry.bank}:{entry.pcr}", _short(entry.allowed), _digest(entry.seen), "differs" if entry.differs else ""


def _short(allowed: tuple[str, ...]) -> str:
    more = f" and {len(allowed) - 1} more" if len(allowed) > 1 else ""
    return _digest(allowed[0] if allowed else None) + more


def _digest(value: str | None) -> str:
    return "-" if value is None else value[:_DIGEST] + ("…" if len(value) > _DIGEST else "")
