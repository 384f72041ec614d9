"""Two ends of a connection in memory."""

from __future__ import annotations

import asyncio

from harness.errors import PeerUnreachable


class Pipe:
    """One end; what it sends, the other receives. `cut` breaks both ends at once."""

    def __init__(self) -> None:
        self._inbox: asyncio.Queue[str | None] = asyncio.Queue()
        self.peer: Pipe = self
        self.sent: list[str] = []
        self.broken = False

    async def send(self, text: str) -> None:
        if self.broken:
            raise PeerUnreachable("the connection is gone")
        self.sent.append(text)
        self.peer._inbox.put_nowait(text)

    async def receive(self) -> str | None:
        text = await self._inbox.get()
        if self.broken:
            raise PeerUnreachable("the connection is gone")
        return text

    def close(self) -> None:
        """The other end sees an orderly end."""
        self.peer._inbox.put_nowait(None)

    def cut(self) -> None:
        """Both ends see a broken connection."""
        for end in (self, self.peer):
            end.broken = True
            end._inbox.put_nowait(None)


def pipe() -> tuple[Pipe, Pipe]:
    """Both ends of a new connection."""
    first, second = Pipe(), Pipe()
    first.peer, second.peer = second, first
    return first, second
