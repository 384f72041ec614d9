"""Refusals of an enrolment that the operator must see: which they are, and how they become alarms.

Spec: DESIGN 3.6; docs/operations.md (alarms).
"""

from __future__ import annotations

import time
from collections.abc import Callable

from harness import events
from harness.errors import (
    CertificateRefused,
    CloneSuspected,
    EnrolmentError,
    KeyChanged,
    UnacceptableKey,
)
from harness.tenant.alarms_store import AlarmStore
from harness.tenant.ports import Alarm
from harness.values import AgentId, HostId

_ALARMS = (KeyChanged, CloneSuspected, CertificateRefused, UnacceptableKey)


class EnrolmentAlarms:
    """Raises alarms of the registrar.

    Args:
        store: where they are kept.
        now: seconds since the epoch.
    """

    def __init__(self, store: AlarmStore, *, now: Callable[[], float] = time.time) -> None:
        self._store = store
        self._now = now

    async def tell(
        self, error: EnrolmentError, *, agent_id: AgentId | None = None, host_id: HostId | None = None
    ) -> None:
        """Keeps an alarm for a refusal, unless it is one that happens (a challenge that was not answered).

        *Cancellation:* the alarm is kept or not.
        """
        if not isinstance(error, _ALARMS):
            return
        kind, host = type(error).__name__, None if host_id is None else str(host_id)
        guest = None if agent_id is None else str(agent_id)
        events.emit("alarm", level="warning", kind=kind, agent_id=guest, host_id=host, detail=error.detail)
        await self._store.add(Alarm(kind=kind, agent_id=agent_id, host_id=host, detail=error.detail), self._now())
