"""What the provider's operator does: onboard tenants, set what they may see, and own the guests of the hosts.

Owner: the command line or the lab.

Spec: DESIGN 3.1 (allowlists, ownership); docs/protocol.md (provider registrar).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from harness.errors import MalformedMessage
from harness.peer import PeerClient
from harness.values import AgentId, HostId, PcrSelection, pcrs_in


class ProviderOperator:
    """The operator.

    Args:
        registrar: the provider registrar.
    """

    def __init__(self, registrar: PeerClient) -> None:
        self._registrar = registrar

    async def add_tenant(self, name: str, ca_pem: str, reason: str | None = None) -> None:
        """Onboards a tenant with the authority whose certificates are its own. Raises Conflict for another CA."""
        stated = {} if reason is None else {"reason": reason}
        await self._registrar.post("/v1/tenants", {"name": name, "ca": ca_pem, **stated})

    async def remove_tenant(self, name: str, reason: str | None = None) -> None:
        """Removes a tenant and its allowlists. Raises NotFound, or Conflict while it has guests."""
        await self._delete(f"/v1/tenants/{name}", reason)

    async def tenants(self) -> list[Mapping[str, Any]]:
        """All tenants with their allowlists."""
        return _list(await self._registrar.get("/v1/tenants"), "tenants")

    async def allow(self, tenant: str, host_id: HostId, allowlist: PcrSelection, reason: str | None = None) -> None:
        """Sets the PCRs that a tenant may see on a host. Raises NotFound for an unknown tenant."""
        banks = {bank.text: list(pcrs_in(mask)) for bank, mask in allowlist.banks}
        path = f"/v1/tenants/{tenant}/allowlists/{host_id}"
        await self._registrar.call("PUT", path, params=_reasoned(reason), body=banks)

    async def hosts(self) -> list[Mapping[str, Any]]:
        """Hosts whose agents have announced themselves."""
        return _list(await self._registrar.get("/v1/hosts"), "hosts")

    async def remove_host(self, host_id: HostId, reason: str) -> None:
        """Forgets a host and its allowlists. Raises NotFound, or Conflict while guests are defined on it."""
        await self._delete(f"/v1/hosts/{host_id}", reason)

    async def replace_host(self, old: HostId, new: HostId, reason: str) -> None:
        """Moves guests and allowlists of a host to the one that it became when its TPM was replaced.

        Raises:
            NotFound: one of the two is not known.
            Conflict: the new one cannot take the old one's place.
        """
        await self._registrar.put(f"/v1/hosts/{old}/replace", {"host_id": str(new), "reason": reason})

    async def define_guest(self, agent_id: AgentId, tenant: str, host_id: HostId, name: str) -> None:
        """Records whose a guest is and where it runs. Raises NotFound or Conflict."""
        body = {"agent_id": str(agent_id), "tenant": tenant, "host_id": str(host_id), "name": name}
        await self._registrar.post("/v1/guests", body)

    async def move_guest(self, agent_id: AgentId, host_id: HostId, reason: str) -> None:
        """Puts a guest on another host, where it registers anew. Raises NotFound, or Conflict when it is there."""
        await self._registrar.put(f"/v1/guests/{agent_id}/host", {"host_id": str(host_id), "reason": reason})

    async def guests(self) -> list[Mapping[str, Any]]:
        """All guests, with what their hosts report."""
        return _list(await self._registrar.get("/v1/guests"), "guests")

    async def remove_guest(self, agent_id: AgentId, reason: str | None = None) -> None:
        """Forgets a guest. Raises NotFound."""
        await self._delete(f"/v1/guests/{agent_id}", reason)

    async def audit(self) -> list[Mapping[str, Any]]:
        """The registrar's audit trail, oldest first."""
        return _list(await self._registrar.get("/v1/audit"), "entries")

    async def _delete(self, path: str, reason: str | None) -> None:
        await self._registrar.call("DELETE", path, params=_reasoned(reason))


def _reasoned(reason: str | None) -> list[tuple[str, str]]:
    return [] if reason is None else [("reason", reason)]


def _list(value: object, name: str) -> list[Mapping[str, Any]]:
    entries = value.get(name) if isinstance(value, dict) else None
    if not isinstance(entries, list):
        raise MalformedMessage(f"the answer has no list of {name}")
    return cast("list[Mapping[str, Any]]", entries)
