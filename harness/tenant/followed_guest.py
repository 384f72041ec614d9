"""A guest agent that is found again after it moved: restarted elsewhere, or with a renewed certificate.

Invariants:
    1. The registrar is asked only when the last question to the guest had no answer, once before the next one.
    2. Another contact is used for the same EK and AK only, and only after it was stored.
    3. What the new contact answers is judged by the same pinned keys: nothing is believed for having been found.

Owner: the session's task.

Spec: DESIGN 3.8 (transport), docs/protocol.md (tenant verifier).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from harness import events
from harness.errors import DeadlineExceeded, HarnessError, KeyChanged, StoreError
from harness.tenant.ports import Clock, GuestAnswer, GuestPort
from harness.values import AgentId, PcrSelection

LOOK_S = 10.0


class FollowedGuest:
    """The guest of one session; implements `harness.tenant.ports.GuestPort`.

    Args:
        agent_id: the guest.
        client: where it was reached last.
        look: asks where the guest is, and calls `switch` once another contact is stored.
        clock: for the deadline of looking.
    """

    def __init__(
        self,
        agent_id: AgentId,
        client: GuestPort,
        look: Callable[[], Awaitable[None]],
        clock: Clock,
    ) -> None:
        self._agent_id = agent_id
        self._client = client
        self._look = look
        self._clock = clock
        self._lost = False

    @property
    def client(self) -> GuestPort:
        """Where the guest is reached now."""
        return self._client

    def switch(self, client: GuestPort) -> GuestPort:
        """Uses another client from now on; gives the one that is left."""
        left, self._client = self._client, client
        return left

    async def quote(self, nonce: str, selection: PcrSelection) -> GuestAnswer:
        """See `GuestPort`.

        Raises:
            KeyChanged: the registrar has other keys for this guest.
            StoreError: a new contact cannot be stored; the old one stays.
        """
        if self._lost:
            await self._find()
        self._lost = True
        answer = await self._client.quote(nonce, selection)
        self._lost = False
        return answer

    async def provide_v(self, wrapped: bytes) -> None:
        """See `GuestPort`. Nobody is looked for: V is wrapped for the very agent that was quoted."""
        self._lost = True
        await self._client.provide_v(wrapped)
        self._lost = False

    async def _find(self) -> None:
        try:
            async with self._clock.timeout(LOOK_S):
                await self._look()
        except (KeyChanged, StoreError):
            raise
        except (HarnessError, TimeoutError) as error:
            reason = error if isinstance(error, HarnessError) else DeadlineExceeded("the registrar gave no answer")
            events.emit("contact_not_found", level="debug", agent_id=str(self._agent_id), detail=reason.detail)
