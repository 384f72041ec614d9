"""How a tenant's operator finds the way back: alarms, new reference values, resumed and re-enrolled guests, the trail.

Invariants:
    1. Each act carries the operator's reason; the service that carries it out writes it into its audit trail.
    2. Alarms of the registrar and of the verifier are told apart by the first letter of their id, ``r`` or ``v``.

Owner: the command line or the lab.

Spec: docs/protocol.md (tenant registrar, tenant verifier), docs/operations.md.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from harness.errors import ConfigError, MalformedMessage
from harness.peer import PeerClient
from harness.tenant.client import AGENT_API
from harness.tenant.policy import Policy
from harness.values import AgentId, HostId

_ALARM_ID = re.compile(r"([rv])([1-9][0-9]{0,17})")


class OperatorActs:
    """The acts that overrule a finding, and what is needed to judge it.

    Args:
        registrar: the tenant's registrar.
        verifier: the tenant's verifier.
    """

    def __init__(self, registrar: PeerClient, verifier: PeerClient) -> None:
        self._registrar = registrar
        self._verifier = verifier

    # --- stopped guests -----------------------------------------------------------------------------------

    async def resume(self, agent_id: AgentId, reason: str, *, accept_reboot: bool = False) -> None:
        """Lets a stopped session start anew.

        Args:
            agent_id: the guest.
            reason: why.
            accept_reboot: take the counters that check 10 refused as the new baseline.

        Raises:
            NotFound: it is not under attestation.
            Conflict: it has not stopped, or no reboot was refused.
        """
        body = {"reason": reason, **({"accept_reboot": True} if accept_reboot else {})}
        await self._verifier.put(f"/{AGENT_API}/agents/{agent_id}/resume", body)

    async def policy(self, agent_id: AgentId) -> Mapping[str, Any]:
        """Reference values in force and what was last proven, by layer. Raises NotFound."""
        return object_of(await self._verifier.get(f"/{AGENT_API}/agents/{agent_id}/policy"))

    async def set_policy(
        self, agent_id: AgentId, reason: str, *, guest: Policy | None = None, host: Policy | None = None
    ) -> None:
        """Replaces reference values of a guest, from its next round on.

        Raises:
            NotFound: it is not under attestation.
            PeerRefusedUs: the verifier cannot use them; its sentence says why.
        """
        body: dict[str, object] = {"reason": reason}
        if guest is not None:
            body["guest_policy"] = guest.encode()
        if host is not None:
            body["host_policy"] = host.encode()
        await self._verifier.put(f"/{AGENT_API}/agents/{agent_id}/policy", body)

    # --- changed keys -------------------------------------------------------------------------------------

    async def re_enrol_host(self, host_id: HostId, reason: str) -> Mapping[str, Any]:
        """Takes a host through enrolment anew and replaces its keys.

        Raises:
            NotFound: it is not enrolled.
            HarnessError: an enrolment check failed, or the provider does not answer; nothing has changed.
        """
        return object_of(await self._registrar.put(f"/v1/hosts/{host_id}/re-enrol", {"reason": reason}))

    async def re_enrol_guest(self, agent_id: AgentId, reason: str, *, host_id: HostId | None = None) -> None:
        """Forgets a guest's keys; it may register anew.

        Args:
            agent_id: the guest.
            reason: why.
            host_id: where it belongs from now on; None: where it did.

        Raises:
            NotFound: it is not stated, or the host is not enrolled.
        """
        body = {"reason": reason, **({} if host_id is None else {"host_id": str(host_id)})}
        await self._registrar.put(f"/v1/guests/{agent_id}/re-enrol", body)

    # --- alarms and audit ---------------------------------------------------------------------------------

    async def alarms(self, *, everything: bool = False) -> list[Mapping[str, Any]]:
        """Alarms of both services, oldest first; ``id`` is ``r`` or ``v`` and the service's own number.

        Args:
            everything: with those that were acknowledged.
        """
        params = [("all", "true")] if everything else []
        found = await self._from_both("/v1/alarms", "alarms", params)
        named = [{**alarm, "id": f"{letter}{alarm.get('id')}"} for letter, alarm in found]
        return sorted(named, key=lambda alarm: alarm.get("at") or 0.0)

    async def acknowledge(self, alarm: str, reason: str) -> None:
        """Acknowledges an alarm.

        Raises:
            ConfigError: an id of another form.
            NotFound: there is no such alarm.
            Conflict: it was acknowledged before.
        """
        letter, number = parse_alarm_id(alarm)
        await self._service(letter).put(f"/v1/alarms/{number}/acknowledge", {"reason": reason})

    async def audit(self) -> list[Mapping[str, Any]]:
        """The audit trail of both services, oldest first; ``service`` says whose entry it is."""
        services = {"r": "registrar", "v": "verifier"}
        found = [
            {"service": services[letter], **entry} for letter, entry in await self._from_both("/v1/audit", "entries")
        ]
        return sorted(found, key=lambda entry: entry.get("at") or 0.0)

    async def _from_both(
        self, path: str, name: str, params: Sequence[tuple[str, str]] = ()
    ) -> list[tuple[str, Mapping[str, Any]]]:
        answers = await asyncio.gather(self._registrar.get(path, params), self._verifier.get(path, params))
        entries: list[tuple[str, Mapping[str, Any]]] = []
        for letter, answer in zip("rv", answers, strict=True):
            entries += [(letter, entry) for entry in list_of(answer, name)]
        return entries

    def _service(self, letter: str) -> PeerClient:
        return self._registrar if letter == "r" else self._verifier


def parse_alarm_id(text: str) -> tuple[str, int]:
    """Letter and number of an alarm's id.

    Raises:
        ConfigError: another form.
    """
    found = _ALARM_ID.fullmatch(text)
    if found is None:
        raise ConfigError(f"{text[:80]}: an alarm's id is r or v and a number, as `harness tenant alarms` shows it")
    return found[1], int(found[2])


def reasoned(reason: str | None) -> list[tuple[str, str]]:
    """Query of a DELETE that carries a reason, if there is one."""
    return [] if reason is None else [("reason", reason)]


def object_of(value: object) -> Mapping[str, Any]:
    """An answer that must be an object. Raises MalformedMessage."""
    if not isinstance(value, dict):
        raise MalformedMessage("the answer is not an object")
    return value


def list_of(value: object, name: str) -> list[Mapping[str, Any]]:
    """A list in an answer. Raises MalformedMessage."""
    entries = object_of(value).get(name)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise MalformedMessage(f"the answer has no list of {name}")
    return cast("list[Mapping[str, Any]]", entries)
