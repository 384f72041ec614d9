"""Why guests were refused: what the operator sees of each, and that one refusal is one alarm.

Invariants:
    1. A refusal is noted after its alarm was stored: one that could not be stored is tried again with the next request.
    2. The same refusal again is no new alarm.
    3. A database that fails does not hide from the guest why it is refused.

Owner: `guest_routes.GuestRegistration`, which asks for guests that the operator stated only: their number bounds this.

Spec: DESIGN 3.6; docs/protocol.md (tenant registrar).
"""

from __future__ import annotations

from collections.abc import Mapping

from harness import events
from harness.errors import EnrolmentError, StoreError
from harness.tenant.enrolment_alarms import EnrolmentAlarms
from harness.values import AgentId


class Refusals:
    """The last refusal of each guest.

    Args:
        alarms: told about them.
    """

    def __init__(self, alarms: EnrolmentAlarms) -> None:
        self._alarms = alarms
        self._noted: dict[AgentId, dict[str, str]] = {}
        self._telling: set[AgentId] = set()

    def of(self, agent_id: AgentId) -> Mapping[str, str] | None:
        """Why a guest was last refused, unless that is forgotten."""
        return self._noted.get(agent_id)

    def forget(self, agent_id: AgentId) -> None:
        """The guest has registered, or its record is another one."""
        self._noted.pop(agent_id, None)

    async def note(self, agent_id: AgentId, error: EnrolmentError) -> None:
        """Takes note of a refusal; an agent that tries again does not fill the operator's list.

        *Cancellation:* its alarm may be stored and told once more.
        """
        refusal = {"error": type(error).__name__, "detail": error.detail}
        if self._noted.get(agent_id) == refusal or agent_id in self._telling:
            return
        self._telling.add(agent_id)
        try:
            await self._alarms.tell(error, agent_id=agent_id)
        except StoreError as fault:
            events.emit("not_stored", level="error", agent_id=str(agent_id), detail=fault.detail)
        else:
            self._noted[agent_id] = refusal
        finally:
            self._telling.discard(agent_id)
