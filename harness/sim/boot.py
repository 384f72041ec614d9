"""Measured-boot scenarios: what firmware and loaders extend into the PCRs, and the reference values that follow.

Invariants:
    1. `reference_values` follows from the scenario alone; replay in a TPM that was just started gives the same PCRs.
    2. A scenario that is ``based_on`` another one differs from it in the replaced events only, never in their order.

Spec: TCG PC Client Platform Firmware Profile 1.05, 3.3.4 (what goes into which PCR), 10.4 (event types); DESIGN 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Protocol

from pydantic import BaseModel, ConfigDict, Field

from harness.errors import ConfigError
from harness.sim import files
from harness.values import PCR_COUNT, RESETTABLE_PCRS, HashAlg

_FOLDER = "scenarios"
_DYNAMIC_PCRS = range(17, 23)  # start at all ones and need a locality that no firmware event has


@dataclass(frozen=True, slots=True, kw_only=True)
class BootEvent:
    """One measurement: the digest of ``data`` is extended into ``pcr`` of every bank."""

    pcr: int
    type: str
    label: str
    data: bytes


class Extender(Protocol):
    """The part of `harness.tpm.Tpm` that a replay needs."""

    async def banks(self) -> frozenset[HashAlg]:
        """Allocated banks."""

    async def pcr_extend(self, pcr: int, digests: Mapping[HashAlg, bytes]) -> None:
        """TPM2_PCR_Extend."""


class _Event(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    pcr: Annotated[int, Field(ge=0, lt=PCR_COUNT)]
    type: Annotated[str, Field(pattern=r"^EV_[A-Z0-9_]+$")]
    label: Annotated[str, Field(pattern=r"^[a-z0-9-]+$")]
    text: str | None = None
    hex: Annotated[str | None, Field(pattern=r"^(?:[0-9a-f]{2})+$")] = None


class _Replacement(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    label: str
    text: str


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    description: str
    based_on: str | None = None
    replace: tuple[_Replacement, ...] = ()
    events: tuple[_Event, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One boot, as an ordered list of measurements. Made by `load`."""

    name: str
    description: str
    events: tuple[BootEvent, ...]

    @classmethod
    def load(cls, name_or_path: str | Path) -> Scenario:
        """Scenario by name, or from an own file.

        Raises:
            ConfigError: it cannot be used, or replaces an event that its base does not have.
        """
        content = files.load(_FOLDER, name_or_path, _File)
        if (content.based_on is None) != bool(content.events) or (content.replace and not content.based_on):
            raise ConfigError(f"{name_or_path}: a scenario has either events, or based_on and replace")
        if content.based_on is None:
            events = tuple(_event(event, str(name_or_path)) for event in content.events)
        else:
            base = files.load(_FOLDER, _beside(name_or_path, content.based_on), _File)
            replaced = {entry.label: entry.text.encode() for entry in content.replace}
            events = _replace(tuple(_event(event, content.based_on) for event in base.events), replaced, name_or_path)
        if len({event.label for event in events}) != len(events):
            raise ConfigError(f"{name_or_path}: two events have the same label")
        return cls(name=Path(name_or_path).stem, description=content.description, events=events)


def scenario_names() -> list[str]:
    """Scenarios that the package brings."""
    return files.names(_FOLDER)


def reference_values(scenario: Scenario, bank: HashAlg) -> dict[int, bytes]:
    """Values that the PCRs of a bank have after this boot, for every PCR that an event names. No TPM is needed."""
    values: dict[int, bytes] = {}
    for event in scenario.events:
        before = values.get(event.pcr, bytes(bank.digest_size))
        values[event.pcr] = bank.digest(before + bank.digest(event.data))
    return values


async def replay(scenario: Scenario, tpm: Extender) -> None:
    """Extends a TPM that was just started as this boot does, in every allocated bank.

    Raises:
        TpmError: the TPM did not take an event; the PCRs are those of a part of the boot.

    *Cancellation:* as for `TpmError`.
    """
    banks = await tpm.banks()
    for event in scenario.events:
        await tpm.pcr_extend(event.pcr, {bank: bank.digest(event.data) for bank in banks})


def _beside(name_or_path: str | Path, base: str) -> str:
    """Where ``base`` is: an own file names another file beside it, or a scenario of the package."""
    return str(Path(name_or_path).parent / base) if files.is_own(base) else base


def _event(event: _Event, where: str) -> BootEvent:
    if (event.text is None) == (event.hex is None):
        raise ConfigError(f"{where}: {event.label}: an event has either text or hex")
    if event.pcr in _DYNAMIC_PCRS or event.pcr in RESETTABLE_PCRS:
        raise ConfigError(f"{where}: {event.label}: PCR {event.pcr} is not for boot measurements")
    data = event.text.encode() if event.text is not None else bytes.fromhex(event.hex or "")
    return BootEvent(pcr=event.pcr, type=event.type, label=event.label, data=data)


def _replace(events: tuple[BootEvent, ...], replaced: Mapping[str, bytes], where: str | Path) -> tuple[BootEvent, ...]:
    if unknown := replaced.keys() - {event.label for event in events}:
        raise ConfigError(f"{where}: the base has no event {', '.join(sorted(unknown))}")
    return tuple(
        BootEvent(pcr=event.pcr, type=event.type, label=event.label, data=replaced.get(event.label, event.data))
        for event in events
    )
