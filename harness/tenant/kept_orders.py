"""How guests were attested whose re-enrolment is under way: one private file each, until they are attested again.

Invariants:
    1. No payload is in a file.
    2. A file is written whole, with mode 0600, before the attestation that it describes ends.

Owner: the command line.

Spec: docs/operations.md (give a guest a new vTPM).
"""

from __future__ import annotations

import json
from pathlib import Path

from harness.errors import ConfigError, HarnessError
from harness.private_file import write_private
from harness.tenant.order import Order, order_in_force, terms_of
from harness.values import AgentId


class KeptOrders:
    """The files of one tenant.

    Args:
        folder: for them; made when the first order is kept.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def keep(self, agent_id: AgentId, order: Order) -> None:
        """Writes down how a guest is attested, in place of what was kept of it before.

        Raises:
            ConfigError: the file cannot be written; nothing has changed.
        """
        path = self._path(agent_id)
        try:
            write_private(path, (json.dumps(terms_of(order), indent=2) + "\n").encode())
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error

    def of(self, agent_id: AgentId, payload: bytes | None = None) -> Order | None:
        """How a guest was attested, with this payload; None when nothing is kept of it.

        Raises:
            ConfigError: the file cannot be read, or is no order.
        """
        path = self._path(agent_id)
        try:
            terms = json.loads(path.read_bytes())
            return order_in_force(terms, terms, payload)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
        except (ValueError, TypeError, HarnessError) as error:
            raise ConfigError(f"{path}: is no order; remove it, and state how the guest is to be attested") from error

    def forget(self, agent_id: AgentId) -> None:
        """The guest is attested again, or is not to be.

        Raises:
            ConfigError: the file cannot be removed.
        """
        path = self._path(agent_id)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be removed: {error.strerror}") from error

    def _path(self, agent_id: AgentId) -> Path:
        return self._folder / f"{agent_id}.json"
