"""Asks a local service over its UNIX socket: one JSON object per line, one line as answer.

Spec: docs/architecture.md (local sockets); the servers are `unix_server.UnixServer`s.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path

from harness.errors import DeadlineExceeded, LocalRefusal, MalformedMessage, PeerUnreachable
from harness.messages import parse_json

_LINE_LIMIT = 1 << 20


async def ask(path: Path, request: Mapping[str, object], *, deadline_s: float) -> dict[str, object]:
    """Answer of the service behind a socket.

    Args:
        path: of the socket.
        request: plain data.
        deadline_s: seconds for the whole exchange.

    Raises:
        PeerUnreachable: nobody listens there, or the connection broke.
        DeadlineExceeded: no answer in time.
        LocalRefusal: the service refused; its own words are in the text.
        MalformedMessage: the answer is not a JSON object.

    *Cancellation:* the service may carry on with the request.
    """
    try:
        async with asyncio.timeout(deadline_s):
            reader, writer = await asyncio.open_unix_connection(path, limit=_LINE_LIMIT)
            try:
                writer.write(json.dumps(request).encode() + b"\n")
                await writer.drain()
                line = await reader.readline()
            finally:
                writer.close()
    except TimeoutError as error:
        raise DeadlineExceeded(f"{path} gave no answer within {deadline_s:g} s") from error
    except (OSError, ValueError) as error:  # ValueError: a line above the limit
        raise PeerUnreachable(f"{path}: {error}") from error
    if not line:
        raise PeerUnreachable(f"{path}: the connection was closed without an answer")
    answer = parse_json(line, limit=_LINE_LIMIT)
    if not isinstance(answer, dict):
        raise MalformedMessage(f"{path}: the answer is not an object")
    if "error" in answer:
        raise LocalRefusal(str(answer.get("detail", "no reason given")), error=str(answer["error"]))
    return answer
