"""Makes TPMs: runs the real swtpm_setup, as libvirt does.

Invariants:
    1. A state directory that exists is whole: swtpm_setup works in a directory beside it, which is renamed at the end.
    2. An existing state directory is never changed.
    3. swtpm_setup ends with its caller: what it leaves half-made is removed by the next manufacture.

Owner: the caller; two calls for one directory must not run at once.

Spec: swtpm_setup(8), swtpm_setup.conf(5).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
from asyncio.subprocess import PIPE, STDOUT, Process
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.errors import SimulationError, SimulatorMissing
from harness.values import HashAlg

BANKS = (HashAlg.SHA256, HashAlg.SHA384)
"""PCR banks that a TPM of the lab has allocated."""
_SETUP_S = 60.0
_LAST_LINES = 5
_ENDS_WITH_US = (
    "/bin/sh",
    "-c",
    'exec 3<&0 </dev/null; (read -r _ <&3; kill -KILL 0) >/dev/null 2>&1 & exec "$@" 3<&-',
    "swtpm_setup",
)
"""Runs a command; when the other end of its standard input is closed, by us or by our death, its session is killed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateCerts:
    """The program that swtpm_setup asks for certificates.

    Args:
        tool: executable; called with the arguments of swtpm_localca, up to three times (RSA EK, platform, ECC EK).
        config: file that swtpm_setup hands it as ``--configfile``.
        options: file that it hands it as ``--optsfile``.
        vmid: ``NAME:UUID`` of the guest.
    """

    tool: Path
    config: Path
    options: Path
    vmid: str


async def manufacture(
    state_dir: Path, *, create_certs: CreateCerts | None = None, banks: Sequence[HashAlg] = BANKS
) -> None:
    """Makes the state of a new TPM 2.0 with RSA-2048 and ECC EKs in ``state_dir``.

    Args:
        state_dir: must not exist yet.
        create_certs: who issues the certificates; without it the TPM has none.
        banks: PCR banks to allocate.

    Raises:
        SimulatorMissing: swtpm_setup is not installed.
        SimulationError: swtpm_setup failed (its last lines are in the text) or took more than 60 s.

    *Cancellation:* swtpm_setup is killed and nothing is left.
    """
    setup = shutil.which("swtpm_setup")
    if setup is None or shutil.which("swtpm") is None:
        raise SimulatorMissing("swtpm and swtpm_setup are not both installed")
    building = _empty_beside(state_dir)
    try:
        config = building / "swtpm_setup.conf"
        config.write_text(_config(create_certs))
        command = [setup, "--tpm2", "--tpm-state", str(building), "--config", str(config), "--createek"]
        command += ["--pcr-banks", ",".join(bank.text for bank in banks)]
        if create_certs is not None:
            command += ["--create-ek-cert", "--create-platform-cert", "--lock-nvram", "--vmid", create_certs.vmid]
        # swtpm_setup keeps its tool's words to itself unless there is a log that both write to.
        log = building / "swtpm_setup.log"
        await _run([*command, "--logfile", str(log)], log, scratch=building)
        config.unlink()
        log.unlink(missing_ok=True)
        building.rename(state_dir)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _empty_beside(state_dir: Path) -> Path:
    if state_dir.exists():
        raise SimulationError(f"{state_dir} exists; a TPM is made once")
    building = state_dir.with_name(f".{state_dir.name}-new")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True, mode=0o700)
    return building


def _config(create_certs: CreateCerts | None) -> str:
    # The file must name a tool even when no certificate is asked for.
    tool = create_certs or CreateCerts(tool=Path("/bin/false"), config=Path("/"), options=Path("/"), vmid="")
    return (
        f"create_certs_tool = {tool.tool}\n"
        f"create_certs_tool_config = {tool.config}\n"
        f"create_certs_tool_options = {tool.options}\n"
    )


async def _run(command: Sequence[str], log: Path, *, scratch: Path) -> None:
    # A session of its own: swtpm_setup starts swtpm and the tool, and all three must go when we give up or end. So must
    # its folder for certificates, which it removes only when it ends by itself.
    lifeline, ours = os.pipe()
    try:
        await _run_while(lifeline, command, log, scratch)
    finally:
        os.close(ours)
        os.close(lifeline)


async def _run_while(lifeline: int, command: Sequence[str], log: Path, scratch: Path) -> None:
    starting = asyncio.ensure_future(
        asyncio.create_subprocess_exec(
            *_ENDS_WITH_US,
            *command,
            stdin=lifeline,
            stdout=PIPE,
            stderr=STDOUT,
            start_new_session=True,
            env={**os.environ, "TMPDIR": str(scratch)},
        )
    )
    try:
        process = await asyncio.shield(starting)
    except asyncio.CancelledError:
        # Cancelled inside, asyncio would kill swtpm_setup alone, and the swtpm that it started would stay.
        await _end(await starting)
        raise
    try:
        async with asyncio.timeout(_SETUP_S):
            output, _ = await process.communicate()
    except TimeoutError as error:
        raise SimulationError(f"swtpm_setup took more than {_SETUP_S:g} s") from error
    finally:
        await _end(process)
    if process.returncode:
        said = output + await asyncio.to_thread(_logged, log)
        lines = said.decode(errors="replace").strip().splitlines()
        raise SimulationError(f"swtpm_setup failed with code {process.returncode}: {' / '.join(lines[-_LAST_LINES:])}")


def _logged(log: Path) -> bytes:
    try:
        return log.read_bytes()
    except OSError:
        return b""


async def _end(process: Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
