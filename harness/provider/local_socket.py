"""The host agent's local socket: certificates for vTPMs that are being manufactured, and reports of starting guests.

One JSON object per line, one line as answer: ``{"op": "issue", "type", "ek", "vmid", "tpm"}`` is answered with
``{"certificate": base64 DER}``, ``{"op": "starting", "agent_id", "state_dir", "run"}`` (``run`` may be left out) with
``{"resident": bool}``, ``{"op": "release", "agent_id", "reason"}`` with ``{}``, ``{"op": "audit"}`` with
``{"entries": [...]}``; a refusal with ``{"error", "detail"}``.

Invariants:
    1. Only processes of the users in the settings are listened to; the kernel says who they are (SO_PEERCRED). All but
       certificates is for root and the agent's own user: swtpm's user, which runs the create_certs_tool, may neither
       say what a guest starts with nor free its own entry in the journal.
    2. A request ends within its deadline, and so does a connection without one.

Owner: the host agent.

Spec: DESIGN 3.6; unix(7).
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import socket
import struct
from asyncio import StreamReader, StreamWriter
from collections.abc import Collection, Mapping
from pathlib import Path

from harness import events
from harness.audit import parse_reason
from harness.errors import AccessDenied, DeadlineExceeded, HarnessError, MalformedMessage
from harness.messages import parse_json
from harness.provider.guests import parse_run
from harness.provider.journal import Journal
from harness.provider.residency import GuestResidency
from harness.provider.vtpm_ca import VtpmCa, parse_issue_request
from harness.unix_server import LINE_LIMIT, UnixServer, refusal
from harness.values import parse_agent_id

_REQUEST_S = 30.0
_IDLE_S = 30.0
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


class LocalSocket:
    """The socket.

    Args:
        path: of the socket.
        peer_uids: user ids that may use it.
        ca: issues.
        residency: is told about starts.
        journal: releases.
    """

    def __init__(
        self, path: Path, peer_uids: Collection[int], ca: VtpmCa, residency: GuestResidency, journal: Journal
    ) -> None:
        self._uids = frozenset(peer_uids)
        self._ca = ca
        self._residency = residency
        self._journal = journal
        shared = self._uids - {0, os.geteuid()}  # swtpm's user must be able to connect; `_answer` judges who it is
        self._server = UnixServer(path, self._serve, mode=0o666 if shared else 0o600)

    async def start(self) -> None:
        """Listens. Raises SimulationError when the socket cannot be made there."""
        await self._server.start()

    async def stop(self) -> None:
        """Closes the socket and all connections."""
        await self._server.stop()

    async def _serve(self, reader: StreamReader, writer: StreamWriter) -> None:
        uid = _peer_uid(writer)
        while True:
            try:
                async with asyncio.timeout(_IDLE_S):
                    line = await reader.readline()
            except TimeoutError:
                return
            if not line:
                return
            writer.write(json.dumps(await self._answer(line, uid)).encode() + b"\n")
            await writer.drain()

    async def _answer(self, line: bytes, uid: int) -> Mapping[str, object]:
        try:
            if uid not in self._uids:
                raise AccessDenied(f"user {uid} may not use the host agent's local socket")
            async with asyncio.timeout(_REQUEST_S):
                return await self._carry_out(parse_json(line, limit=LINE_LIMIT), uid)
        except TimeoutError:
            return refusal(DeadlineExceeded(f"not done within {_REQUEST_S:g} s"))
        except HarnessError as error:
            events.emit("local_refused", level="warning", error=type(error).__name__, detail=error.detail)
            return refusal(error)

    async def _carry_out(self, request: object, uid: int) -> Mapping[str, object]:
        match request:
            case {"op": "issue", **members}:
                issue = parse_issue_request({str(name): value for name, value in members.items()})
                certificate = await self._ca.issue(issue)
                events.emit("issued", agent_id=str(issue.agent_id), kind=issue.kind)
                return {"certificate": base64.b64encode(certificate).decode()}
            case {"op": "starting" | "release" | "audit"} if uid not in {0, os.geteuid()}:
                raise AccessDenied(f"user {uid} may ask for certificates only")
            case {"op": "starting", "agent_id": str(uuid), "state_dir": str(folder), **rest} if rest.keys() <= {"run"}:
                run = parse_run(rest.get("run"))
                return {"resident": await self._residency.starting(parse_agent_id(uuid), Path(folder), run=run)}
            case {"op": "release", "agent_id": str(agent_id), **rest} if rest.keys() <= {"reason"}:
                reason = parse_reason(rest.get("reason"))
                await self._journal.release(parse_agent_id(agent_id), reason, who=f"uid {uid}")
                return {}
            case {"op": "audit", **rest} if not rest:
                return {"entries": [entry.as_json() for entry in await self._journal.audit()]}
        raise MalformedMessage(
            '"op" is issue, starting (agent_id, state_dir, run), release (agent_id, reason) or audit'
        )


def _peer_uid(writer: StreamWriter) -> int:
    connection: socket.socket = writer.get_extra_info("socket")
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(credentials)[1])
