"""A UNIX socket server that owns the tasks of its clients.

Invariants:
    1. After `stop` no client task runs and every connection is closed.
    2. A client that goes away, or does not speak the protocol, ends its own connection only. So does one whose request
       fails for a reason that nobody thought of; the log has it.

Owner: the task that started it.
"""

from __future__ import annotations

import asyncio
from asyncio import StreamReader, StreamWriter
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

from harness import events
from harness.errors import HarnessError, MalformedMessage, SimulationError
from harness.swtpm import SOCKET_PATH_LIMIT

LINE_LIMIT = 64 * 1024
"""Bytes of the longest request."""


def refusal(error: HarnessError) -> Mapping[str, object]:
    """What a client is answered whose request was refused; `unix_client.ask` makes a `LocalRefusal` of it."""
    return {"error": type(error).__name__, "detail": error.detail}


class UnixServer:
    """One listening socket.

    Args:
        path: of the socket; what is there is replaced.
        serve: serves one client until it ends; its connection is closed for it.
        mode: who may connect; others than the owner only where each client is judged by its user id.
    """

    def __init__(
        self,
        path: Path,
        serve: Callable[[StreamReader, StreamWriter], Coroutine[Any, Any, None]],
        *,
        mode: int = 0o600,
    ) -> None:
        self._path = path
        self._serve = serve
        self._mode = mode
        self._clients: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Accepts clients.

        Raises:
            SimulationError: the socket cannot be made there.

        *Cancellation:* call `stop`.
        """
        if len(bytes(self._path)) > SOCKET_PATH_LIMIT:
            raise SimulationError(f"socket path {self._path} is longer than {SOCKET_PATH_LIMIT} bytes")
        try:
            self._clear()
            self._server = await asyncio.start_unix_server(self._accept, self._path, limit=LINE_LIMIT)
            self._protect()
        except OSError as error:
            raise SimulationError(f"socket {self._path} cannot be made: {error.strerror}") from error

    async def stop(self) -> None:
        """Closes the socket and cuts all clients off.

        *Cancellation:* clients are being cut off all the same.
        """
        if self._server is not None:
            self._server.close()
            self._server = None
            self._clear()
        for client in self._clients:
            client.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)

    def _accept(self, reader: StreamReader, writer: StreamWriter) -> None:
        if self._server is None:
            writer.transport.abort()  # it was being accepted while we stopped
            return
        task = asyncio.get_running_loop().create_task(self._client(reader, writer))
        self._clients.add(task)
        task.add_done_callback(self._clients.discard)

    async def _client(self, reader: StreamReader, writer: StreamWriter) -> None:
        try:
            await self._serve(reader, writer)
        except (OSError, EOFError, ValueError, MalformedMessage):
            pass  # either side has gone or does not speak the protocol (ValueError: a line above the limit)
        except Exception:  # the border of a client's task, which nobody waits for
            events.emit("internal_fault", level="error", socket=str(self._path), exc_info=True)
        finally:
            writer.close()

    def _clear(self) -> None:
        self._path.unlink(missing_ok=True)

    def _protect(self) -> None:
        self._path.chmod(self._mode)
