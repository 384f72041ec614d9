"""Registers the guest agent at one registrar by Keylime's protocol, until it is accepted, and keeps it registered.

A tenant may remove a guest and state it again, a registrar's database may come from a backup, and the agent's
certificate is renewed: the agent asks now and then what the registrar knows of it, and registers anew where that is
something else. A registrar that does not know the question (stock Keylime's) is left alone after the first time.

Invariants:
    1. A registrar is answered with the secret that the vTPM opened, never with one from elsewhere.
    2. A refusal of this vTPM's keys or certificate is final for what the agent can do: it is shown in the status, and
       tried again slowly, because only an operator can change it.
    3. Registrars are independent: one that does not answer keeps no other from being asked.
    4. The vTPM opens a challenge only when the registrar says that its record is another one: not knowing is no reason.

Owner: one task for each registrar.

Spec: DESIGN 3.6; Keylime registrar API (POST, PUT /v2.x/agents/{agent_id}); docs/protocol.md (.../registration).
"""

from __future__ import annotations

import asyncio
import base64
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from harness import events
from harness.credential import keylime_auth_tag, parse_keylime_blob
from harness.errors import (
    CertificateRefused,
    CloneSuspected,
    HarnessError,
    KeyChanged,
    MalformedMessage,
    UnacceptableKey,
)
from harness.messages import retry_after_s
from harness.registration import registration_view
from harness.tenant.vtpm import GuestTpm
from harness.values import AgentId

API = "v2.1"
FINAL = (CertificateRefused, KeyChanged, UnacceptableKey, CloneSuspected)
AGAIN_S = 30.0
_FIRST_S, _LONGEST_S = 0.25, 2.0


class RegistrarPeer(Protocol):
    """The calls that a registration makes; `harness.web.PeerClient` has them."""

    async def get(self, path: str) -> object:
        """Results of a GET."""

    async def post(self, path: str, body: object) -> object:
        """Results of a POST."""

    async def put(self, path: str, body: object) -> object:
        """Results of a PUT."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contact:
    """Where the agent is reached, and which certificate it shows there."""

    ip: str
    port: int
    mtls_cert: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistrationStatus:
    """How a registration stands: ``pending``, ``active`` or ``refused``."""

    state: str
    error: str | None = None
    detail: str | None = None


class Registration:
    """One agent at one registrar.

    Args:
        agent_id: the guest.
        vtpm: its keys.
        contact: where verifiers find it, asked before each registration: its certificate may be renewed.
        again_s: seconds between two looks at what the registrar knows, at most.
        sleep: waits; tests give their own.
    """

    def __init__(
        self,
        agent_id: AgentId,
        vtpm: GuestTpm,
        contact: Callable[[], Contact],
        *,
        again_s: float = AGAIN_S,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._agent_id = agent_id
        self._vtpm = vtpm
        self._contact = contact
        self._again_s = again_s
        self._sleep = sleep
        self.status = RegistrationStatus(state="pending")

    async def run(self, url: str, peer: RegistrarPeer) -> None:
        """Registers, and again whenever the registrar's record is not this agent's; for ever.

        *Cancellation:* as for `register`.
        """
        while True:
            await self.register(url, peer)
            known = True
            while known:
                await self._sleep(self._again_s * (1 + random.random()) / 2)  # noqa: S311 - jitter
                known = await self._is_known(peer)
            events.emit("registration", level="warning", registrar=url, state="lost", agent_id=str(self._agent_id))
            self.status = RegistrationStatus(state="pending")

    async def _is_known(self, peer: RegistrarPeer) -> bool:
        try:
            known = await peer.get(f"/{API}/agents/{self._agent_id}/registration")
        except HarnessError:
            return True  # it does not answer, or does not know the question
        if not isinstance(known, dict) or "registered" not in known:
            return True
        contact = self._contact()
        mine = registration_view(
            ek=self._vtpm.ek.marshal(),
            ak=self._vtpm.ak.marshal(),
            mtls_cert=contact.mtls_cert,
            ip=contact.ip,
            port=contact.port,
        )
        return known == mine

    async def register(self, url: str, peer: RegistrarPeer) -> None:
        """Registers until accepted.

        *Cancellation:* the registrar may hold a pending record, which it forgets.
        """
        tries = 0
        while self.status.state != "active":
            try:
                await self.once(peer)
            except HarnessError as error:
                final = isinstance(error, FINAL)
                shown = RegistrationStatus(
                    state="refused" if final else "pending", error=type(error).__name__, detail=error.detail
                )
                if shown != self.status:
                    level = "error" if final else "info"
                    events.emit("registration", level=level, registrar=url, state=shown.state, error=shown.error)
                self.status = shown
                await self._sleep(self._again_s if final else _wait_s(tries, retry_after_s(error)))
                tries += 1
        events.emit("registration", registrar=url, state="active", agent_id=str(self._agent_id))

    async def once(self, peer: RegistrarPeer) -> None:
        """One registration: keys, challenge, answer.

        Raises:
            HarnessError: the registrar did not answer, or refused.
        """
        path = f"/{API}/agents/{self._agent_id}"
        answered = await peer.post(path, self._keys())
        blob = answered.get("blob") if isinstance(answered, dict) else None
        if not isinstance(blob, str):
            raise MalformedMessage("the registrar's answer has no challenge")
        try:
            credential = parse_keylime_blob(base64.b64decode(blob, validate=True))
        except ValueError as error:
            raise MalformedMessage("the registrar's challenge is not base64") from error
        secret = await self._vtpm.activate(credential)
        await peer.put(path, {"auth_tag": keylime_auth_tag(secret, str(self._agent_id))})
        self.status = RegistrationStatus(state="active")

    def _keys(self) -> dict[str, object]:
        contact = self._contact()
        return {
            "ek_tpm": _base64(self._vtpm.ek.marshal()),
            "ekcert": _base64(self._vtpm.ek_certificate),
            "aik_tpm": _base64(self._vtpm.ak.marshal()),
            "mtls_cert": contact.mtls_cert,
            "ip": contact.ip,
            "port": contact.port,
        }


def _wait_s(tries: int, asked_s: float | None) -> float:
    own: float = min(_LONGEST_S, _FIRST_S * 2 ** min(tries, 8))
    return (asked_s or 0.0) + own * (1 + random.random()) / 2  # noqa: S311 - jitter


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
