"""The part of the host agent that answers provider verifiers: batcher, desk and the route of the stream.

Invariants:
    1. Only a certificate of role provider-verifier opens a stream.
    2. After `stop` every waiter has been released and every stream ends.

Owner: `host_agent.HostAgent`.

Spec: DESIGN 4; docs/protocol.md, stream.
"""

from __future__ import annotations

import asyncio

from aiohttp import WSCloseCode, web

from harness import events
from harness.config import BatchSettings
from harness.errors import DeviceUnavailable, MalformedMessage, MessageTooLarge, TransportError
from harness.health import Health
from harness.metrics import Metrics
from harness.pki import Role
from harness.provider.batch import RFC9162, TreeBuilder
from harness.provider.batcher import Batcher, BatchReport, Residency, Surroundings
from harness.provider.batching import costs
from harness.provider.desk import Desk
from harness.provider.host_metrics import HostFigures
from harness.provider.keys import HostKeys
from harness.provider.merklelib_tree import MERKLELIB
from harness.provider.stream_host import StreamSession
from harness.web import Route, accept_channel, peer_of

HUNG_S = 15.0
"""Longer than any chip takes for a quote of every bank; the client of the TPM is given up after twice this time."""


class Quoting:
    """Answers provider verifiers.

    Args:
        keys: the host's keys.
        residency: which guests run here.
        batch: bounds of the batcher, and how trees are built.
        ca_certificate: self-signed certificate of the vTPM CA key, DER.
        metrics: of the service.

    Raises:
        ConfigError: the tree builder is not installed.
    """

    def __init__(
        self,
        keys: HostKeys,
        residency: Residency,
        batch: BatchSettings,
        ca_certificate: bytes,
        metrics: Metrics | None = None,
    ) -> None:
        builder = tree_builder(batch.tree)
        self._costs = costs(batch, builder)
        self._batcher = Batcher(
            keys, residency, batch, builder=builder, surroundings=Surroundings(observe=self._observe)
        )
        self._desk = Desk(keys, self._batcher, ca_certificate)
        self._sessions: set[StreamSession] = set()
        self._keys = keys
        self._last_fault: str | None = None
        self._metrics = metrics or Metrics("host-agent")
        self._figures = HostFigures(self._metrics, self._batcher, keys, lambda: len(self._sessions))

    @property
    def routes(self) -> list[Route]:
        """The stream."""
        return [Route("GET", "/v1/stream", self._stream, roles={Role.PROVIDER_VERIFIER}, deadline_s=None)]

    @property
    def waiting(self) -> int:
        """Requests that have not been answered yet."""
        return self._batcher.waiting

    def add_checks(self, health: Health) -> None:
        """Adds the checks of the TPM to the health of the service."""
        health.check("tpm", self._check_tpm)
        health.check("last batch", self._check_last, vital=False)

    async def _check_tpm(self) -> None:
        if not self._keys.usable:
            raise DeviceUnavailable("the TPM's client was given up; the service is about to start anew")
        if self._batcher.working_s > HUNG_S:
            raise DeviceUnavailable(f"the TPM has worked on one batch for more than {HUNG_S:g} s")

    async def _check_last(self) -> None:
        if self._last_fault is not None:
            raise DeviceUnavailable(f"the last batch was not quoted: {self._last_fault}")

    def _observe(self, report: BatchReport) -> None:
        if report.requests:
            self._last_fault = None if report.tpm_quotes else report.outcome
        self._figures.batch(report)
        events.emit("batch", **report.event())

    async def run(self) -> None:
        """Owns the pools; ends as `Batcher.run` does. Warns of settings that are there for comparison.

        *Cancellation:* every waiter is released.
        """
        for cost in self._costs:
            events.emit("costly_setting", level="warning", detail=cost)
        await self._batcher.run()

    async def stop(self) -> None:
        """Releases every waiter and ends every stream, each after its last answers have left.

        *Cancellation:* streams may be left for the server to close.
        """
        self._batcher.stop()
        await asyncio.gather(*(session.stop() for session in self._sessions))

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        channel, response = await accept_channel(request)
        peer = peer_of(request)
        session = StreamSession(channel, self._desk, self._desk.enrol, self._metrics)
        self._sessions.add(session)
        events.emit("stream_opened", peer=peer.name, authority=peer.authority)
        try:
            await session.serve()
            await response.close()
        except (MalformedMessage, MessageTooLarge) as error:
            events.emit("stream_refused", level="warning", peer=peer.name, detail=error.detail)
            await response.close(code=WSCloseCode.POLICY_VIOLATION, message=error.detail.encode()[:120])
        except TransportError as error:
            events.emit("stream_broken", peer=peer.name, detail=error.detail)
        finally:
            self._sessions.discard(session)
        return response


def tree_builder(name: str) -> TreeBuilder:
    """The tree builder of the settings, tried once.

    Raises:
        ConfigError: it is not installed.
    """
    builder = {builder.name: builder for builder in (RFC9162, MERKLELIB)}[name]
    builder.build([bytes(32)])
    return builder
