"""What a person asks `harness demo` for; the command line fills it, the demo reads it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """Options of one demo run.

    Args:
        tenants: number of tenants.
        guests: guests of each tenant.
        chip: latency profile of the hardware TPM, by name or path; None for the lab's default.
        tamper: one of the tamper cases, or None for an honest lab.
        keep: leave the lab running afterwards, until it is interrupted.
        json: print one JSON object instead of the tree.
        lab: folder for the lab's state; None for a temporary one.
    """

    tenants: int = 2
    guests: int = 3
    chip: str | None = None
    tamper: str | None = None
    keep: bool = False
    json: bool = False
    lab: Path | None = None
