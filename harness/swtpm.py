"""One swtpm process on a state directory: start, readiness, stop, kill.

Invariants:
    1. `start` returns when swtpm accepts commands; TPM2_Startup is left to the caller (firmware does it, not the TPM).
    2. swtpm does not outlive its parent, however that ends, where ``setpriv`` is installed (util-linux).
    3. Two swtpms never work on one state: swtpm locks it, and a start waits for one that is just ending.

Owner: the task that started it. `start` must be called in a thread that lives as long as the process shall (the main
thread): the kernel sends the death signal when the *thread* that forked ends (prctl(2), PR_SET_PDEATHSIG).

Spec: swtpm(8), swtpm_ioctls(3) (CMD_GET_CAPABILITY); tpm2-tss, TCTI swtpm: commands on ``PATH``, control channel on
``PATH.ctrl``.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import shutil
import signal
from asyncio.subprocess import DEVNULL, Process
from pathlib import Path

from harness.errors import SimulatorCrashed, SimulatorMissing

STATE_FILE = "tpm2-00.permall"
"""Where swtpm keeps a TPM 2.0, in its state directory."""
SOCKET_PATH_LIMIT = 107
"""Bytes of a UNIX socket path (unix(7): 108 with the terminator); ``.ctrl`` is part of it."""
_START_S = 10.0
_STOP_S = 5.0
_FREE_S = 10.0
_POLL_S = 0.005
_LAST_BYTES, _LAST_LINES = 4096, 2
_GET_CAPABILITY = (1).to_bytes(4, "big")
_RESULT_SIZE = 4


class SwtpmProcess:
    """One swtpm.

    Args:
        state_dir: where swtpm keeps its state; made by `swtpm_setup`, or empty for a blank TPM.
        socket: path for commands; the control channel is beside it.
        log: swtpm's own log, appended to.
    """

    def __init__(self, state_dir: Path, socket: Path, log: Path) -> None:
        self._state_dir = state_dir
        self._socket = socket
        self._log = log
        self._process: Process | None = None

    @property
    def pid(self) -> int | None:
        """Process id; None before the start."""
        return self._process.pid if self._process else None

    @property
    def running(self) -> bool:
        """Whether the process was started and has not ended."""
        return self._process is not None and self._process.returncode is None

    @property
    def socket(self) -> Path:
        """Path of the command socket."""
        return self._socket

    @property
    def control(self) -> Path:
        """Path of the control socket."""
        return Path(f"{self._socket}.ctrl")

    @property
    def tcti(self) -> str:
        """TCTI that reaches this TPM."""
        return f"swtpm:path={self._socket}"

    async def start(self) -> None:
        """Starts swtpm and waits until it accepts connections.

        Raises:
            SimulatorMissing: swtpm is not installed.
            SimulatorCrashed: it ended at once (its last word is in the text), was not ready in time, or another swtpm
                works on the state; its log is named.

        *Cancellation:* the process is killed.
        """
        if len(bytes(self.control)) > SOCKET_PATH_LIMIT:
            raise SimulatorCrashed(f"socket path {self.control} is longer than {SOCKET_PATH_LIMIT} bytes")
        swtpm = shutil.which("swtpm")
        if swtpm is None:
            raise SimulatorMissing("swtpm is not installed")
        self._state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        await self.until_free()
        for leftover in (self._socket, self.control):
            leftover.unlink(missing_ok=True)
        setpriv = shutil.which("setpriv")
        command = [setpriv, "--pdeathsig", "TERM", swtpm] if setpriv else [swtpm]
        command += [
            "socket",
            "--tpm2",
            "--tpmstate",
            f"dir={self._state_dir}",
            "--flags",
            "not-need-init",
        ]
        command += ["--server", f"type=unixio,path={self._socket},mode=0600"]
        command += ["--ctrl", f"type=unixio,path={self.control},mode=0600", "--log", f"file={self._log},level=1"]
        self._process = await asyncio.create_subprocess_exec(*command, stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL)
        try:
            async with asyncio.timeout(_START_S):
                await self._until_ready(self._process)
        except TimeoutError as error:
            self.kill()
            raise SimulatorCrashed(f"swtpm was not ready within {_START_S:g} s; see {self._log}") from error
        except BaseException:
            self.kill()
            raise

    async def until_free(self) -> None:
        """Waits until no swtpm works on the state: one whose parent was killed needs a moment to end.

        Raises:
            SimulatorCrashed: another swtpm holds the state for more than ten seconds.

        *Cancellation:* nothing has changed.
        """
        try:
            async with asyncio.timeout(_FREE_S):
                while _is_locked(self._state_dir / ".lock"):  # noqa: ASYNC110 - the kernel tells nobody
                    await asyncio.sleep(_POLL_S)
        except TimeoutError as error:
            raise SimulatorCrashed(f"another swtpm works on {self._state_dir} and does not end") from error

    async def _until_ready(self, process: Process) -> None:
        while True:
            if process.returncode is not None:
                raise SimulatorCrashed(
                    f"swtpm ended at once with code {process.returncode}, state {self._state_dir}: "
                    f"{_last_words(self._log)}; see {self._log}"
                )
            with contextlib.suppress(ConnectionError, FileNotFoundError, asyncio.IncompleteReadError):
                await self._answered()
                return
            await asyncio.sleep(_POLL_S)  # swtpm has no readiness signal; the socket appears when it is ready

    async def _answered(self) -> None:
        # The sockets are there before the state was read: only an answer says that there is a TPM.
        reader, writer = await asyncio.open_unix_connection(self.control)
        try:
            writer.write(_GET_CAPABILITY)
            await reader.readexactly(_RESULT_SIZE)
        finally:
            writer.close()

    def kill(self) -> None:
        """Ends the process as a power cut does: without a word to the TPM. `stop` afterwards reaps it."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    async def stop(self) -> None:
        """Ends the process (SIGTERM, then SIGKILL) and waits for its end.

        The TPM sees a power-off without TPM2_Shutdown unless the caller sent that first.

        *Cancellation:* the process is killed.
        """
        process = self._process
        if process is None:
            return
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(_STOP_S):
                await process.wait()
        except TimeoutError:
            self.kill()
            await process.wait()
        except BaseException:
            self.kill()
            raise

    async def wait(self) -> int:
        """Exit code, when the process has ended; no deadline, for a watching task.

        *Cancellation:* the process goes on.
        """
        if self._process is None:
            raise SimulatorCrashed("swtpm was not started")
        return await self._process.wait()


def _is_locked(path: Path) -> bool:
    try:
        with path.open("r+b") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # swtpm's own kind; closing the file releases it
    except BlockingIOError:
        return True
    except OSError:
        return False  # there is none, or it is for swtpm to say that it cannot be used
    return False


def _last_words(log: Path) -> str:
    """What swtpm said before the general line with which it ends, for an error message."""
    try:
        lines = log.read_bytes()[-_LAST_BYTES:].decode(errors="replace").strip().splitlines()
    except OSError:
        return "no log"
    telling = [line for line in lines if not line.startswith("Error: Could not initialize")]
    return " / ".join(telling[-_LAST_LINES:])[:300] or "its log is empty"
