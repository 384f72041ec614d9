"""Hosts whose agents announce another id than the known one: their TPM was replaced, or somebody took their name.

Invariants:
    1. Each is told once among the events, however often the agent tries.
    2. Nothing here decides: an operator replaces the host, removes it, or gives the other one another name.

Owner: the provider registrar.

Spec: docs/protocol.md (a host whose TPM was replaced).
"""

from __future__ import annotations

from harness import events
from harness.errors import Conflict
from harness.values import HostId


class Replacements:
    """The last refused announcement of each name."""

    def __init__(self) -> None:
        self._announced: dict[str, HostId] = {}

    def of(self, name: str) -> HostId | None:
        """Host id that the agent of this name announces in vain."""
        return self._announced.get(name)

    def announced(self, name: str, host_id: HostId, known: HostId | None) -> None:
        """Takes note of an announcement.

        Args:
            name: of the host agent.
            host_id: what it announced.
            known: the other host that has this name; None: the announcement was taken.

        Raises:
            Conflict: it was not taken; says what an operator has to do.
        """
        if known is None:
            self._announced.pop(name, None)
            return
        if self._announced.get(name) != host_id:
            self._announced[name] = host_id
            events.emit("host_replaced", level="warning", name=name, host_id=str(host_id), known=str(known))
        raise Conflict(
            f"the name {name} belongs to host {known}: if its TPM was replaced, the provider's operator has to say so "
            f"(harness provider host replace {known} {host_id}); a host without guests can be removed instead "
            f"(harness provider host remove {known})"
        )
