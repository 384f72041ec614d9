"""Which measured boot a simulated host had last: what it boots again when its TPM's service is started anew.

Invariants:
    1. The file appears whole; one that cannot be read ends the service: a guessed boot would be false evidence.
    2. Settings that name another scenario than when the file was written are newer than the file.

Owner: `hardware.HardwareTpm`.

Spec: DESIGN 6 (a swtpm restart is a power cycle and replays its scenario).
"""

from __future__ import annotations

import json
from pathlib import Path

from harness.errors import ConfigError, ProtocolError, SimulationError
from harness.messages import parse_json
from harness.private_file import write_private
from harness.sim import files

FILE = "boot.json"
_LIMIT = 64 * 1024


class BootRecord:
    """The file.

    Args:
        state_dir: of the device.
        configured: scenario in its settings, name or path.
    """

    def __init__(self, state_dir: Path, configured: str) -> None:
        self._path = state_dir / FILE
        self._configured = configured

    def load(self) -> str:
        """Scenario to boot, name or path.

        Raises:
            ConfigError: the file cannot be used; it is named.
        """
        try:
            content = parse_json(self._path.read_bytes(), limit=_LIMIT)
        except FileNotFoundError:
            return self._configured
        except OSError as error:
            raise ConfigError(f"{self._path}: cannot be read: {error.strerror}") from error
        except ProtocolError as error:
            raise self._unusable(error.detail) from error
        match content:
            case {"configured": str(configured), "booted": str(booted), **rest} if not rest:
                return booted if configured == self._configured else self._configured
        raise self._unusable("must have configured and booted")

    def save(self, booted: str) -> str:
        """Keeps what is booted from now on.

        Args:
            booted: name or path; a path is kept as it is seen from everywhere.

        Raises:
            SimulationError: it cannot be kept; the file is as before.
        """
        kept = str(Path(booted).absolute()) if files.is_own(booted) else booted
        try:
            write_private(self._path, json.dumps({"configured": self._configured, "booted": kept}).encode())
        except OSError as error:
            raise SimulationError(f"{self._path}: cannot be written: {error.strerror}") from error
        return kept

    def _unusable(self, why: str) -> ConfigError:
        return ConfigError(f"{self._path}: {why}; remove the file to boot the scenario of the settings")
