"""TPM command proxy: gives a swtpm the latency and the faults of a chip, for any client that speaks to swtpm.

Stands between client and swtpm at the command layer: our own client, tpm2-tools and a stock Keylime agent see the
same. Nothing above the TCTI knows of it.

Invariants:
    1. One command at a time reaches the TPM, in the order of arrival over all clients.
    2. A command takes max(time drawn from the profile, time that swtpm needed), from the moment its turn comes. A
       command that the TPM refused takes the time of an ordinary command: chips refuse before they use the key.
    3. While the proxy is held, no command reaches the TPM; clients wait.
    4. A client that is cut off sees a closed connection, never half a response.

Owner: the event loop in which it was started.

Spec: DESIGN 5; TPM 2.0 Part 1, 18; tpm2-tss TCTI swtpm: for each command one connection to ``PATH.ctrl`` that sets the
locality, then one to ``PATH``. Locality 0 is acknowledged here while nobody has changed it; all else on the control
channel is passed on. QEMU hands over a file descriptor there (CMD_SET_DATAFD), which a stream cannot carry: a VM
cannot be a client.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from asyncio import StreamReader, StreamWriter
from pathlib import Path

from harness.sim.commands import (
    HEADER_SIZE,
    MAX_MESSAGE,
    PRIVATE_KEY_HANDLE,
    Header,
    KeyType,
    failure,
    key_type,
    parse_header,
    private_key_handle,
    read_public,
)
from harness.sim.faults import Action, Effect, Fault, FaultInjector
from harness.sim.profiles import ChipProfile, LatencySampler
from harness.unix_server import UnixServer

_BACKEND_S = 60.0  # longer than any command of swtpm; RSA-2048 key creation takes seconds on a busy machine
_HOLD_S = 5.0
_TIMER_LATE_S = 0.002
_RC_SUCCESS = 0
_SET_LOCALITY_0 = bytes.fromhex("00000005 00")
_CONTROL_SUCCESS = bytes(4)


class TpmProxy:
    """Proxy in front of one swtpm.

    Args:
        front: socket path for clients; the control channel is at ``<front>.ctrl``.
        back: socket path of swtpm.
        profile: the chip.
        seed: of the latencies.
        faults: what goes wrong; nothing by default.
    """

    def __init__(
        self, front: Path, back: Path, profile: ChipProfile, *, seed: int, faults: FaultInjector | None = None
    ) -> None:
        self._front = front
        self._back = back
        self._sampler = LatencySampler(profile, seed)
        self.faults = faults or FaultInjector()
        self.commands = 0
        self._turn = asyncio.Lock()
        self._released = asyncio.Event()
        self._released.set()
        self._at_locality_0 = True  # as swtpm starts
        self._in_flight: asyncio.Task[None] | None = None
        self._servers = (
            UnixServer(front, self._serve_commands),
            UnixServer(Path(f"{front}.ctrl"), self._serve_control),
        )

    @property
    def tcti(self) -> str:
        """TCTI for clients."""
        return f"swtpm:path={self._front}"

    @property
    def held(self) -> bool:
        """Whether clients wait."""
        return not self._released.is_set()

    async def start(self) -> None:
        """Accepts clients; they wait while the proxy is held.

        Raises:
            SimulationError: a socket cannot be made.

        *Cancellation:* call `stop`.
        """
        for server in self._servers:
            await server.start()

    async def stop(self) -> None:
        """Cuts all clients off and stops accepting.

        *Cancellation:* clients are being cut off all the same.
        """
        for server in self._servers:
            await server.stop()

    async def hold(self, *, cut: bool, within_s: float = _HOLD_S) -> None:
        """Keeps commands back from now on; returns when none is in flight.

        Args:
            cut: as a power cut: the client whose command is in flight is cut off. Else that command may end first.
            within_s: how long it may take.

        *Cancellation:* the proxy stays held.
        """
        self._released.clear()
        self._at_locality_0 = True  # clients are held back for a power cycle
        if not cut:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(within_s), self._turn:
                    return
        if self._in_flight is not None:
            self._in_flight.cancel()
        async with self._turn:  # free at once: the only other holder was just cancelled
            return

    def release(self) -> None:
        """Lets the waiting clients go on."""
        self._released.set()

    # --- commands ----------------------------------------------------------------------------------------------

    async def _serve_commands(self, reader: StreamReader, writer: StreamWriter) -> None:
        while command := await _read_message(reader):
            response = await self._in_turn(command, reader)
            if response is None:
                return
            writer.write(response)
            async with asyncio.timeout(_BACKEND_S):
                await writer.drain()

    async def _in_turn(self, command: bytes, client: StreamReader) -> bytes | None:
        while True:
            await self._released.wait()
            async with self._turn:
                if not self._released.is_set():
                    continue
                self._in_flight = asyncio.current_task()
                try:
                    return await self._execute(command, client)
                finally:
                    self._in_flight = None

    async def _execute(self, command: bytes, client: StreamReader) -> bytes | None:
        """Response to give, or None to cut the client off."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        header = parse_header(command)
        self.commands += 1
        fault = self.faults.next(header.command)
        if fault is not None and fault.effect is Effect.BEFORE:
            return await _strike(fault, client)
        key = await self._key_type(header, command)
        response = await self._ask(command)
        if parse_header(response).code != _RC_SUCCESS:
            key = None
        await _sleep_until(started + self._sampler.draw_s(header.command, key))
        return response if fault is None else await _strike(fault, client)

    async def _key_type(self, header: Header, command: bytes) -> KeyType | None:
        """Type of the private key in use, asked from the TPM each time: transient handles are used again and again."""
        if header.command not in PRIVATE_KEY_HANDLE:
            return None
        handle = private_key_handle(header, command)
        if handle is None or not self._sampler.profile.needs_key_types:
            return KeyType.OTHER
        return key_type(await self._ask(read_public(handle)))

    async def _ask(self, command: bytes) -> bytes:
        """Response of swtpm, over a connection of its own: swtpm serves one, and others may need it in between."""
        loop = asyncio.get_running_loop()
        # Bare sockets: with streams the proxy costs 0.6 ms a command instead of 0.35.
        async with asyncio.timeout(_BACKEND_S):
            with socket.socket(socket.AF_UNIX) as connection:
                connection.setblocking(False)
                await loop.sock_connect(connection, str(self._back))
                await loop.sock_sendall(connection, command)
                response = b""
                while len(response) < HEADER_SIZE or len(response) < parse_header(response).size:
                    chunk = await loop.sock_recv(connection, MAX_MESSAGE)
                    if not chunk:
                        raise EOFError("swtpm closed the connection")
                    response += chunk
        return response

    # --- control channel ---------------------------------------------------------------------------------------

    async def _serve_control(self, reader: StreamReader, writer: StreamWriter) -> None:
        await self._released.wait()
        # Bounded as a whole: swtpm serves one control connection at a time, and an idle client would keep it.
        async with asyncio.timeout(_BACKEND_S):
            while (request := await reader.read(MAX_MESSAGE)) == _SET_LOCALITY_0 and self._at_locality_0:
                writer.write(_CONTROL_SUCCESS)
            if request:
                await self._relay_control(request, reader, writer)

    async def _relay_control(self, request: bytes, reader: StreamReader, writer: StreamWriter) -> None:
        self._at_locality_0 = False  # whatever it is, we do not follow what it does
        back_reader, back_writer = await asyncio.open_unix_connection(Path(f"{self._back}.ctrl"))
        back_writer.write(request)
        pumps = [asyncio.ensure_future(_pump(reader, back_writer)), asyncio.ensure_future(_pump(back_reader, writer))]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            back_writer.close()


async def _sleep_until(when: float) -> None:
    """Sleeps until this time of the loop's clock, to a fraction of a millisecond.

    Timers of the loop are late by 1 to 2 ms (epoll counts whole milliseconds), a fifth of a firmware TPM's time: the
    last part is spent polling the loop's other work.
    """
    loop = asyncio.get_running_loop()
    await asyncio.sleep(max(0.0, when - loop.time() - _TIMER_LATE_S))
    while loop.time() < when:  # noqa: ASYNC110 - there is no event to wait for, only time
        await asyncio.sleep(0)


async def _strike(fault: Fault, client: StreamReader) -> bytes | None:
    if fault.action is Action.FAIL:
        return failure(fault.response_code)
    if fault.action is Action.HANG:
        await client.read(1)  # no deadline: that is what a hung TPM is; ends when the client goes or power is cut
    return None


async def _read_message(reader: StreamReader) -> bytes | None:
    """One command or response; None at the end of the connection. No deadline: clients may be idle for long."""
    try:
        start = await reader.readexactly(HEADER_SIZE)
        return start + await reader.readexactly(parse_header(start).size - HEADER_SIZE)
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise EOFError("the connection ended within a message") from error
        return None


async def _pump(source: StreamReader, sink: StreamWriter) -> None:
    while chunk := await source.read(4096):
        sink.write(chunk)
        await sink.drain()
