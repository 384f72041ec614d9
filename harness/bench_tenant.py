"""A tenant verifier under measurement: the real service in a process of its own, and everybody it talks to in another.

::

    async with VerifierSite(folder, guests=64) as site:
        cost = await site.cost(6.0)

Invariants:
    1. Nothing is measured before every guest is attested.
    2. Leaving the context ends both processes.

Owner: the task that entered the context.

Spec: docs/performance.md, method.
"""

from __future__ import annotations

import asyncio
import re
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from harness import config
from harness.bench_peers import Addresses, PeersSettings
from harness.bench_process import cpu_s
from harness.bench_run import ended, said_line, started
from harness.errors import SimulationError
from harness.events import read_events
from harness.peer import PeerClient
from harness.pki import Authority, Role

TENANT, PROVIDER = "tenant", "provider"
_READY_S = 120.0
_POLL_S = 0.05
_ACCEPTED = re.compile(r'^harness_rounds_total\{[^}]*outcome="accepted"[^}]*\} ([0-9.e+]+)$', re.MULTILINE)
_ATTESTED = re.compile(r"^harness_attested_guests(?:\{[^}]*\})? ([0-9.e+]+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a time of attestation took.

    Args:
        rounds: accepted, of both layers.
        cpu_s: of the verifier's process.
        elapsed_s: on the wall.
    """

    rounds: int
    cpu_s: float
    elapsed_s: float

    @property
    def per_round_s(self) -> float:
        """Seconds of CPU per round."""
        return self.cpu_s / self.rounds


class VerifierSite:
    """The verifier, its peers and its guests; an async context manager.

    Args:
        folder: where it lives.
        guests: how many.
        interval_s: between two rounds of a guest.
        batch_s: the TPM's time per host quote.
    """

    def __init__(self, folder: Path, *, guests: int, interval_s: float = 2.0, batch_s: float = 0.187) -> None:
        self._folder = folder
        self._guests = guests
        self._interval_s = interval_s
        self._batch_s = batch_s
        self._stack = AsyncExitStack()
        self._log = folder / "verifier.log"

    async def __aenter__(self) -> VerifierSite:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._authorities = {name: Authority.create(f"{name} CA") for name in (TENANT, PROVIDER)}
        for name, authority in self._authorities.items():
            authority.write(self._folder / name)
        try:
            addresses = await self._start_peers()
            await self._start_verifier(addresses)
            await self._add_all(addresses)
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    @property
    def pid(self) -> int:
        """Process id of the verifier."""
        return self._verifier.pid

    async def cost(self, seconds: float) -> Cost:
        """What the rounds of so many seconds take.

        Raises:
            SimulationError: there was no round, or not every guest is attested.

        *Cancellation:* nothing has changed.
        """
        rounds, cpu, begin = await self._accepted(), cpu_s(self.pid), time.monotonic()
        await asyncio.sleep(seconds)
        spent, elapsed = cpu_s(self.pid) - cpu, time.monotonic() - begin
        made = await self._accepted() - rounds
        if made < 1:
            raise SimulationError("no guest was attested anew in the window; the verifier's log says why")
        return Cost(rounds=made, cpu_s=spent, elapsed_s=elapsed)

    async def end_peers(self) -> None:
        """Ends everybody the verifier talks to. *Cancellation:* they may still run."""
        await ended(self._peers)

    def _tls(self, owner: str, role: Role, name: str) -> config.TlsSettings:
        stem = f"{role.value}-{name}"
        certificate, key = self._authorities[owner].issue(role, name).write(self._folder / owner, stem)
        trusted = {each: self._folder / each / "ca.pem" for each in (TENANT, PROVIDER)}
        return config.TlsSettings(certificate=certificate, key=key, authorities=trusted)

    async def _start_peers(self) -> Addresses:
        settings = PeersSettings(
            registrar=self._tls(TENANT, Role.TENANT_REGISTRAR, "registrar"),
            provider=self._tls(PROVIDER, Role.PROVIDER_VERIFIER, "verifier"),
            guests=[self._tls(TENANT, Role.GUEST_AGENT, f"guest{number}") for number in range(self._guests)],
            batch_s=self._batch_s,
            result=self._folder / "peers.json",
        )
        path = self._folder / "peers.settings"
        path.write_text(settings.model_dump_json(), encoding="utf-8")
        self._peers = await started("harness.bench_peers", path)
        self._stack.push_async_callback(ended, self._peers)
        if await said_line(self._peers, _READY_S) != "ready":
            raise SimulationError("the verifier's peers did not start")
        return Addresses.model_validate_json(settings.result.read_bytes())

    async def _start_verifier(self, addresses: Addresses) -> None:
        settings = config.TenantVerifierSettings(
            tls=self._tls(TENANT, Role.TENANT_VERIFIER, "verifier"),
            tenant=TENANT,
            database=f"sqlite+aiosqlite:///{self._folder}/verifier.db",
            registrar=addresses.registrar,
            log=config.LogSettings(file=self._log),
        )
        path = self._folder / "verifier.yml"
        config.dump(settings, path)
        self._verifier = await started("harness", "serve", "tenant-verifier", "--config", path)
        self._stack.push_async_callback(ended, self._verifier)
        tls = self._tls(TENANT, Role.TENANT_OPERATOR, "operator")
        client = PeerClient(tls, await self._url(), roles={Role.TENANT_VERIFIER})
        self._operator = await self._stack.enter_async_context(client)

    async def _url(self) -> str:
        until = time.monotonic() + _READY_S
        while time.monotonic() < until and self._verifier.returncode is None:
            if self._log.exists():
                for event in read_events(self._log):
                    if event["event"] == "ready":
                        url = urlsplit(str(event["url"]))
                        return f"https://{url.hostname}:{url.port}"
            await asyncio.sleep(_POLL_S)
        raise SimulationError(f"the verifier did not start; {self._log} says why")

    async def _add_all(self, addresses: Addresses) -> None:
        for agent_id, body in addresses.agents.items():
            await self._operator.post(f"/v2.1/agents/{agent_id}", body | {"quote_interval_s": self._interval_s})
        until = time.monotonic() + _READY_S
        while await self._figure(_ATTESTED) < self._guests:
            if time.monotonic() > until:
                raise SimulationError(f"not every guest was attested within {_READY_S:g} s; {self._log} says why")
            await asyncio.sleep(self._interval_s / 2)

    async def _accepted(self) -> int:
        if await self._figure(_ATTESTED) < self._guests:
            raise SimulationError("a guest is no longer attested; the verifier's log says why")
        return int(await self._figure(_ACCEPTED))

    async def _figure(self, pattern: re.Pattern[str]) -> float:
        found = pattern.search(await self._operator.text("/metrics"))
        return float(found[1]) if found else 0.0
