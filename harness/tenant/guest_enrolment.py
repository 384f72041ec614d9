"""Registration of a guest at the tenant's registrar: Keylime's protocol, and whose vTPM it must be (DESIGN 3.6).

Invariants:
    1. A guest is pinned only after its vTPM opened a challenge made for its EK and AK, and only if its EK certificate
       was signed directly by the pinned CA key of the host that the operator stated.
    2. A challenge is used once and for 60 s; a wrong, late or repeated answer is one and the same error.
    3. Neither a repeated registration nor a wrong answer changes an active record.

Owner: the registrar's event loop.

Spec: DESIGN 3.6; Keylime registrar (POST, PUT /v2.x/agents/{agent_id}).
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from datetime import UTC, datetime

from harness.attest import parse_public
from harness.certificates import verify_vtpm_certificate
from harness.credential import check_ak, check_ek_rsa2048
from harness.errors import CloneSuspected, KeyChanged
from harness.registration import OpenChallenges
from harness.tenant.registrar_store import GuestKeys, GuestRecord, RegistrarStore, changed_keys
from harness.values import AgentId


class GuestEnroller:
    """Takes guests through registration and activation.

    Args:
        store: what is pinned.
        random: source of secrets.
        monotonic: seconds on a clock that never goes back, for the life of challenges.
        now: wall clock, for certificates.
    """

    def __init__(
        self,
        store: RegistrarStore,
        *,
        random: Callable[[int], bytes] = secrets.token_bytes,
        monotonic: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._store = store
        self._now = now
        self._challenges: OpenChallenges[tuple[GuestKeys, bytes]] = OpenChallenges(random=random, monotonic=monotonic)

    async def register(self, agent_id: AgentId, keys: GuestKeys) -> bytes:
        """Challenge for a guest that wants to register (Keylime's blob), after these checks.

        1. the operator stated the guest;
        2. EK and AK are acceptable, and two keys;
        3. the EK certificate was signed directly by the stated host's CA key, for this agent_id and this EK;
        4. EK and AK are the pinned ones, if the guest is active;
        5. neither is pinned elsewhere, or in another role.

        Raises:
            NotFound: check 1.
            UnacceptableKey, CertificateRefused, KeyChanged, CloneSuspected: checks 2 to 5.
            MalformedMessage: a key that does not parse.

        *Cancellation:* an earlier challenge of this guest may still be open.
        """
        record = await self._store.guest(agent_id)  # 1
        host = await self._store.host(record.host_id)
        ek, ak = parse_public(keys.ek), parse_public(keys.ak)
        check_ek_rsa2048(ek)  # 2
        check_ak(ak)
        if ek.name == ak.name:
            raise CloneSuspected("one key is given as EK and as AK")
        verify_vtpm_certificate(  # 3
            keys.ek_certificate, ca=parse_public(host.ca), agent_id=agent_id, ek=ek, now=self._now()
        )
        if record.keys is not None and not record.keys.same_identity(keys):  # 4
            raise KeyChanged(changed_keys(agent_id))
        await self._store.check_names_free(agent_id, ek, ak)  # 5
        return self._challenges.open(agent_id, (keys, host.ca), ek, ak)

    async def activate(self, agent_id: AgentId, auth_tag: str) -> GuestRecord:
        """Pins the guest whose challenge was answered.

        Raises:
            ChallengeFailed: no open challenge, or a wrong answer.
            KeyChanged, CloneSuspected, NotFound, Conflict: the records changed since the challenge was made.

        *Cancellation:* the challenge is used up; the guest is pinned or not.
        """
        keys, ca = self._challenges.answered(agent_id, auth_tag)
        return await self._store.activate_guest(agent_id, keys, ca)

    def forget(self, agent_id: AgentId) -> None:
        """Burns the open challenge of a guest that was removed, or whose keys were forgotten."""
        self._challenges.forget(agent_id)
