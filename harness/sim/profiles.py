"""Latency of real TPM chips, per command and key type, from measured quantiles.

Invariants:
    1. Every profile names its source and every assumption that goes beyond it.
    2. The same profile and seed give the same latencies in the same order.

Owner: the command proxy that holds the sampler.

Spec: TPMScan (CHES 2024), doi 10.46586/tches.v2024.i2.714-734; DESIGN 5.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from harness.sim import files
from harness.sim.commands import PRIVATE_KEY_HANDLE, Command, KeyType

_FOLDER = "profiles"
Milliseconds = Annotated[float, Field(ge=0, le=60_000)]


class Latency(BaseModel):
    """Distribution of a latency in milliseconds, by three quantiles."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    p50: Milliseconds
    p95: Milliseconds
    p99: Milliseconds

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.p50 <= self.p95 <= self.p99:
            raise ValueError("p50, p95 and p99 must not fall")
        return self

    def quantile(self, u: float) -> float:
        """Milliseconds below which a share ``u`` of operations ends.

        Linear through the known quantiles. The sources give nothing below the median, so that half mirrors the part
        up to p95; above p99 the value stays at p99.
        """
        if u <= 0.5:
            return max(0.0, self.p50 - (self.p95 - self.p50) * (0.5 - u) / 0.5)
        if u <= 0.95:
            return self.p50 + (self.p95 - self.p50) * (u - 0.5) / 0.45
        return self.p95 + (self.p99 - self.p95) * min(1.0, (u - 0.95) / 0.04)


class TpmModel(BaseModel):
    """What the chip says it is, as in its EK certificate (TCG EK Credential Profile 2.0, 3.1.2)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    manufacturer: Annotated[str, Field(pattern=r"^id:[0-9A-F]{8}$")]
    model: Annotated[str, Field(min_length=1, max_length=64)]
    version: Annotated[str, Field(pattern=r"^id:[0-9A-F]{1,8}$")]


class ChipProfile(BaseModel):
    """One chip.

    ``private_key`` holds the time of an operation with a private key, by type of the key; ``commands`` the time of
    single other commands by name; ``other`` that of all remaining ones. None means not delayed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    chip: str
    source: Annotated[str, Field(min_length=1)]
    assumptions: tuple[str, ...]
    tpm: TpmModel
    private_key: dict[KeyType, Latency | None]
    commands: dict[str, Latency | None] = {}
    other: Latency | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if missing := [kind.value for kind in KeyType if kind not in self.private_key]:
            raise ValueError(f"private_key has nothing for {', '.join(missing)}")
        for name in self.commands:
            if name not in Command.__members__ or Command[name] in PRIVATE_KEY_HANDLE:
                raise ValueError(f"commands: {name} is not a command without private key")
        return self

    @property
    def needs_key_types(self) -> bool:
        """Whether the time depends on which key is used."""
        return any(self.private_key.values())

    def latency(self, command: Command | None, key: KeyType | None) -> Latency | None:
        """Distribution for one command.

        Args:
            command: None for a command without a name here.
            key: type of the private key in use; None for commands that use none.
        """
        if key is not None:
            return self.private_key[key]
        if command is not None and command.name in self.commands:
            return self.commands[command.name]
        return self.other


def profile_names() -> list[str]:
    """Profiles that the package brings."""
    return files.names(_FOLDER)


def load_profile(name_or_path: str | Path) -> ChipProfile:
    """Profile by name, or from an own file.

    Raises:
        ConfigError: it cannot be used.
    """
    return files.load(_FOLDER, name_or_path, ChipProfile)


class LatencySampler:
    """Draws latencies of one chip.

    Args:
        profile: the chip.
        seed: of the draws.
    """

    def __init__(self, profile: ChipProfile, seed: int) -> None:
        self.profile = profile
        self._random = random.Random(seed)  # noqa: S311 - a simulation, repeatable on purpose

    def draw_s(self, command: Command | None, key: KeyType | None) -> float:
        """Seconds that this command takes this time."""
        latency = self.profile.latency(command, key)
        u = self._random.random()  # drawn for every command, so that one command's profile does not shift the others
        return latency.quantile(u) / 1000 if latency is not None else 0.0
