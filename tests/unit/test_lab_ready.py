"""Which services of a lab do not run: known by their ends, told in their words, and waited for no longer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from harness.errors import ConfigError, SimulationError
from harness.lab_plan import plan
from harness.lab_ready import broken_services, check_provider, concerned


class Supervisor:
    """Services as its status shows them; each look at one that ends finds one more restart."""

    def __init__(self, *, ends: Sequence[str] = (), silent: Sequence[str] = (), unpowered: Sequence[str] = ()) -> None:
        self._ends = dict.fromkeys(ends, 0)
        self._silent = silent
        self._unpowered = unpowered
        self.names = ["host1-tpm", "provider-registrar", "alice-verifier", "host1-agent"]
        self.restarted_before = 7

    async def services(self) -> list[Mapping[str, Any]]:
        for name in self._ends:
            self._ends[name] += 1
        return [self._shown(name) for name in self.names]

    async def unanswered(self, service: Mapping[str, Any]) -> str | None:
        return "no answer within 10 s" if service["name"] in self._silent else None

    def _shown(self, name: str) -> Mapping[str, Any]:
        if name in self._ends:
            away = self._ends[name] % 2 == 0
            why = f"ended with code 1: {name} is damaged" if away else None
            return {"name": name, "pid": None if away else 1, "restarts": self._ends[name], "why": why}
        pid = None if name in self._unpowered else 2
        return {"name": name, "pid": pid, "restarts": 0 if pid is None else self.restarted_before, "why": None}


async def asked(supervisor: Supervisor, wait_s: float = 60.0) -> dict[str, str]:
    found = await broken_services(supervisor.services, supervisor.unanswered, wait_s=wait_s)
    return {name: error.detail for name, error in found.items()}


async def test_nothing_is_said_of_services_that_answer() -> None:
    """However often they were restarted before."""
    assert await asked(Supervisor()) == {}


async def test_a_service_that_ends_again_and_again_is_told_in_its_words() -> None:
    """The others are not in the answer, and the deadline was not waited for."""
    supervisor = Supervisor(ends=["alice-verifier"], silent=["alice-verifier"])
    assert await asked(supervisor) == {"alice-verifier": "alice-verifier ended with code 1: alice-verifier is damaged"}


async def test_an_agent_without_its_tpm_is_told_with_it() -> None:
    """It is not even started, and the reason is the TPM's."""
    supervisor = Supervisor(ends=["host1-tpm"], silent=["host1-tpm"], unpowered=["host1-agent"])
    found = await asked(supervisor)
    assert found == dict.fromkeys(("host1-tpm", "host1-agent"), "host1-tpm ended with code 1: host1-tpm is damaged")


async def test_a_silent_service_is_waited_for_until_the_deadline() -> None:
    """One that neither ends nor answers."""
    assert await asked(Supervisor(silent=["alice-verifier"]), wait_s=0.2) == {
        "alice-verifier": "alice-verifier does not answer: no answer within 10 s"
    }


async def test_our_own_unusable_files_are_told_at_once() -> None:
    """An operator's certificate that cannot be read is no fault of a service."""

    async def unanswered(service: Mapping[str, Any]) -> str | None:
        raise ConfigError("operator.pem: holds no PEM certificate")

    with pytest.raises(ConfigError, match=r"operator\.pem"):
        await broken_services(Supervisor().services, unanswered)


def test_only_those_who_need_a_service_are_concerned() -> None:
    """A tenant's service concerns the tenant, a host's the host, the provider's everybody."""
    lab = plan(tenants=2, guests=2)
    broken = {name: SimulationError(name) for name in ("bob-registrar", "host1-guests")}
    hosts, tenants = concerned(lab, broken)
    assert (list(hosts), list(tenants)) == (["host1"], ["bob"])
    check_provider(broken)
    with pytest.raises(SimulationError, match="provider-verifier"):
        check_provider(broken | {"provider-verifier": SimulationError("provider-verifier ended")})
