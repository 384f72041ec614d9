"""The decoy: another vTPM runs under a guest's UUID on the good host, and the guest's own runs elsewhere.

The provider stops the guest, puts a blank vTPM in the place of its state, and starts it again under the same UUID. The
real state runs on a machine of the attacker's, with the guest agent in front. The guest's quotes are genuine; what
gives it away is that the host agent reads the EK of every vTPM before it runs. Refused by: host agent, GuestNotHere.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from pathlib import Path

from harness import config
from harness.errors import SimulationError
from harness.lab_plan import GuestPlan
from harness.lab_processes import ServiceProcess
from harness.lab_site import LabSite
from harness.sim.boot import Scenario, replay
from harness.sim.swtpm import manufacture
from harness.swtpm import SwtpmProcess
from harness.tenant.operator import TenantOperator
from harness.tenant.order import GuestContact
from harness.tpm import Tpm
from harness.unix_client import ask

_GUEST_S = 90.0
_POLL_S = 0.1


class Decoy:
    """One exchange; an async context manager that ends what runs elsewhere.

    Args:
        files: of the lab.
        guest: whose vTPM is exchanged.
        image: settings of its guest agent.
    """

    def __init__(self, files: LabSite, guest: GuestPlan, image: Path) -> None:
        self._files = files
        self._guest = guest
        self._image = image
        self._elsewhere = files.folder / "x"
        self._swtpm = SwtpmProcess(self._elsewhere / "tpm", self._elsewhere / "s", self._elsewhere / "swtpm.log")
        self._agent: ServiceProcess | None = None

    async def __aenter__(self) -> Decoy:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._agent is not None:
            await self._agent.stop()
        await self._swtpm.stop()

    async def take_place(self, operator: TenantOperator, before: GuestContact) -> GuestContact:
        """Makes the exchange; returns where the real guest agent is reached now.

        Raises:
            SimulationError: the real guest did not come up elsewhere.

        *Cancellation:* call `__aexit__`; the guest is left as it is.
        """
        host, uuid = self._files.host(self._guest.host), str(self._guest.agent_id)
        manager, state = host.guest_manager, host.guests / uuid / "tpm"
        await ask(manager, {"op": "stop", "uuid": uuid}, deadline_s=_GUEST_S)
        self._elsewhere.mkdir(exist_ok=True, mode=0o700)
        await asyncio.to_thread(shutil.move, state, self._elsewhere / "tpm")
        await manufacture(state)
        await self._start_elsewhere()
        await ask(manager, {"op": "start", "uuid": uuid}, deadline_s=_GUEST_S)
        return await self._reached(operator, before)

    async def _start_elsewhere(self) -> None:
        await self._swtpm.start()
        async with await Tpm.open(self._swtpm.tcti) as tpm:
            await tpm.startup()
            await replay(Scenario.load(self._guest.scenario), tpm)
        settings = config.load(self._image, config.GuestAgentSettings)
        moved = settings.model_copy(update={"tcti": self._swtpm.tcti, "listen": config.Listen()})
        config.dump(moved, self._elsewhere / "agent.yml")
        log = self._files.log(f"agent-{self._guest.name}-elsewhere")
        self._agent = ServiceProcess("agent elsewhere", "guest-agent", self._elsewhere / "agent.yml", log)
        self._agent.start()

    async def _reached(self, operator: TenantOperator, before: GuestContact) -> GuestContact:
        until = time.monotonic() + _GUEST_S
        while time.monotonic() < until:
            contact = await operator.registered(self._guest.agent_id, deadline_s=_GUEST_S)
            if contact.port != before.port:
                return contact
            await asyncio.sleep(_POLL_S)
        raise SimulationError("the guest's own vTPM did not come up elsewhere")
