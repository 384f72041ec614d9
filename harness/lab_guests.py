"""The lab's guest manager: `sim.guest_manager` with guest agents that are forked like every other service."""

from __future__ import annotations

from pathlib import Path

from harness.config import GuestManagerSettings
from harness.lab_processes import ServiceProcess
from harness.sim.guest_manager import GuestManager


class LabGuestManager(GuestManager):
    """The service.

    Args:
        settings: from its file.
    """

    def __init__(self, settings: GuestManagerSettings) -> None:
        def agent_of(name: str, config: Path) -> ServiceProcess:
            return ServiceProcess(f"agent of {name}", "guest-agent", config, settings.logs / f"agent-{name}.log")

        super().__init__(settings, agent_of)
