"""The provider verifier's links to all hosts, kept in step with the provider's records.

Invariants:
    1. There is one link for each host in the latest snapshot, at the URL that it has there, and no other.
    2. When the context is left, every link is closed and everything that waited on one has been released.

Owner: `proxy.ProviderVerifier`; `follow` and `link` are called in one event loop.

Spec: DESIGN 4 (one multiplexed stream per host).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from types import TracebackType

from harness import events
from harness.config import TlsSettings
from harness.errors import NotReady
from harness.peer import PeerClient
from harness.pki import Role
from harness.provider.stream_link import Connect, HostLink
from harness.values import HostId

STREAM_PATH = "/v1/stream"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    url: str
    link: HostLink
    task: asyncio.Task[None]


class HostLinks:
    """Links by host; an async context manager.

    Args:
        connect: how the host agent at a URL is connected to; `over_tls` in a service.
    """

    def __init__(self, connect: Callable[[str], Connect]) -> None:
        self._connect = connect
        self._entries: dict[HostId, _Entry] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> HostLinks:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.follow({})
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def follow(self, hosts: Mapping[HostId, str]) -> None:
        """Opens and closes links so that they are those of ``hosts``."""
        for host_id, entry in list(self._entries.items()):
            if hosts.get(host_id) != entry.url or entry.task.done():
                entry.task.cancel()
                del self._entries[host_id]
        for host_id, url in hosts.items():
            if host_id not in self._entries:
                link = HostLink(self._connect(url))
                task = asyncio.create_task(link.run(), name=f"link to {url}")
                self._tasks.add(task)
                task.add_done_callback(self._ended)
                self._entries[host_id] = _Entry(url=url, link=link, task=task)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """The border of a link's task: a fault of ours ends this link, not the others; `follow` opens it anew."""
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            events.emit("link_failed", level="error", link=task.get_name(), exc_info=error)

    def link(self, host_id: HostId) -> HostLink:
        """The link to a host.

        Raises:
            NotReady: the host has just been removed.
        """
        entry = self._entries.get(host_id)
        if entry is None:
            raise NotReady("this host is not connected now")
        return entry.link

    def states(self) -> dict[str, str]:
        """By host: ``ok`` while its link is open, else why it is not."""
        return {str(host_id): entry.link.state for host_id, entry in self._entries.items()}


def over_tls(tls: TlsSettings, clients: AsyncExitStack) -> Callable[[str], Connect]:
    """Connects to host agents over mutual TLS.

    Args:
        tls: our certificate, and the authority of the host agents.
        clients: closes what was opened.
    """

    def connect(url: str) -> Connect:
        client = PeerClient(tls, url, roles={Role.HOST_AGENT})
        clients.push_async_callback(client.close)
        return lambda: client.channel(STREAM_PATH)

    return connect
