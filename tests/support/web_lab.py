"""Authorities, certificates and a small service over real TLS sockets."""

from __future__ import annotations

import asyncio
import datetime
import ssl
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from aiohttp import web

from harness.config import Listen, TlsSettings
from harness.door import Bounds
from harness.errors import HarnessError, PoolFull
from harness.peer import PeerClient
from harness.pki import Authority, Role, now
from harness.tls import Identities, client_context, identities_of
from harness.web import Route, Server, accept_channel, application, peer_of, read_json, read_object, serve

WAIT_S = 120.0
ANYBODY = tuple(Role)


@dataclass(slots=True)
class Pki:
    """Authorities in a folder; ``tls`` issues a certificate and gives the settings that use it."""

    folder: Path
    authorities: dict[str, Authority] = field(default_factory=dict)

    def authority(self, name: str, *, subject: str | None = None) -> Authority:
        """The authority of this name; made when it is first asked for, with ``subject`` as its common name."""
        if name not in self.authorities:
            self.authorities[name] = Authority.create(subject or name)
            self.authorities[name].write(self.folder / name)
        return self.authorities[name]

    def tls(
        self,
        authority: str,
        role: Role = Role.TENANT_VERIFIER,
        name: str = "v",
        *,
        trusts: Iterable[str] = ("provider",),
        hosts: tuple[str, ...] = ("127.0.0.1",),
        expired: bool = False,
    ) -> TlsSettings:
        at = now() - datetime.timedelta(days=10) if expired else now()
        issued = self.authority(authority).issue(role, name, hosts=hosts, at=at, days=1)
        certificate, key = issued.write(self.folder / authority, f"{role.value}-{name}{'-old' if expired else ''}")
        for other in trusts:
            self.authority(other)
        return TlsSettings(
            certificate=certificate, key=key, authorities={other: self.folder / other / "ca.pem" for other in trusts}
        )


@dataclass(slots=True)
class Service:
    """A running service with one handler of each kind; remembers which were called.

    ``/v1/wait`` sets ``entered``, waits for ``release``, and sets ``left`` however it ends.
    """

    server: Server
    identities: Identities
    calls: list[str]
    entered: asyncio.Event
    release: asyncio.Event
    left: asyncio.Event

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])


def _routes(calls: list[str], entered: asyncio.Event, release: asyncio.Event, left: asyncio.Event) -> list[Route]:
    async def whoami(request: web.Request) -> object:
        calls.append("whoami")
        peer = peer_of(request)
        return {"authority": peer.authority, "role": peer.role.value, "name": peer.name, "id": peer.requester.hex()}

    async def echo(request: web.Request) -> object:
        calls.append("echo")
        return {"body": await read_json(request), "query": list(request.query.items())}

    async def named(request: web.Request) -> object:
        calls.append("named")
        return await read_object(request, members={"a", "b"})

    async def wait(_: web.Request) -> object:
        calls.append("wait")
        entered.set()
        try:
            await release.wait()
        finally:
            left.set()
        return {}

    async def fault(_: web.Request) -> object:
        raise ZeroDivisionError("a secret of the inside")

    async def late(_: web.Request) -> object:
        raise TimeoutError("of something inside, not of the call")

    async def full(_: web.Request) -> object:
        raise PoolFull("the pools are full", retry_after_s=1.2)

    async def big(request: web.Request) -> object:
        calls.append("big")
        return {"x": "y" * int(request.query["size"])}

    async def stream(request: web.Request) -> object:
        channel, response = await accept_channel(request, limit=1024)
        entered.set()
        while (text := await channel.receive()) is not None:
            if text == "fault":
                raise ZeroDivisionError("a secret of the inside")
            await channel.send(text)
        calls.append("stream ended")
        left.set()
        return response

    return [
        Route("GET", "/v1/whoami", whoami, roles={Role.TENANT_VERIFIER, Role.TENANT_REGISTRAR}),
        Route("GET", "/v1/operator", whoami, roles={Role.PROVIDER_OPERATOR}, authority="provider"),
        Route("POST", "/v1/echo", echo, roles=ANYBODY, deadline_s=1.0),
        Route("PUT", "/v1/echo", echo, roles=ANYBODY),
        Route("POST", "/v1/named", named, roles=ANYBODY),
        Route("GET", "/v1/wait", wait, roles=ANYBODY),
        Route("GET", "/v1/slow", wait, roles=ANYBODY, deadline_s=0.3),
        Route("GET", "/v1/fault", fault, roles=ANYBODY),
        Route("GET", "/v1/late", late, roles=ANYBODY),
        Route("GET", "/v1/full", full, roles=ANYBODY),
        Route("GET", "/v1/big", big, roles=ANYBODY),
        Route("GET", "/v1/stream", stream, roles={Role.PROVIDER_VERIFIER}, deadline_s=None),
    ]


@asynccontextmanager
async def service(
    pki: Pki, *, trusts: Iterable[str] = ("provider", "alice"), bounds: Bounds | None = None
) -> AsyncIterator[Service]:
    """The service, until the context is left."""
    tls = pki.tls("provider", Role.PROVIDER_VERIFIER, "server", trusts=trusts)
    identities = identities_of(tls)
    calls: list[str] = []
    entered, release, left = asyncio.Event(), asyncio.Event(), asyncio.Event()
    app = application("test", _routes(calls, entered, release, left), identities)
    async with serve(app, tls, Listen(), bounds=bounds or Bounds()) as server:
        yield Service(server, identities, calls, entered, release, left)


async def refusal(running: Service, tls: TlsSettings, path: str = "/v1/whoami") -> HarnessError:
    """Error that a client with this certificate gets."""
    async with PeerClient(tls, running.url, deadline_s=WAIT_S) as client:
        try:
            results = await client.get(path)
        except HarnessError as error:
            return error
    raise AssertionError(f"the call was answered: {results!r}")


@dataclass(slots=True)
class Wire:
    """A bare TLS connection, for bytes that no client of ours would send."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Status, headers (names in lower case) and body of one answer."""
        async with asyncio.timeout(WAIT_S):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in head[1:] if line)}
            body = await self.reader.readexactly(int(headers.get("content-length", "0")))
            return int(head[0].split()[1]), headers, body

    async def ended(self) -> None:
        """Waits until the server has cut the connection."""
        async with asyncio.timeout(WAIT_S):
            try:
                while await self.reader.read(65536):
                    pass
            except (ConnectionError, ssl.SSLError):
                return


@asynccontextmanager
async def wire(tls: TlsSettings, port: int) -> AsyncIterator[Wire]:
    """Opens a bare connection with a client's certificate."""
    async with asyncio.timeout(WAIT_S):
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", port, ssl=client_context(tls), server_hostname="127.0.0.1"
        )
    try:
        yield Wire(reader, writer)
    finally:
        writer.transport.abort()
