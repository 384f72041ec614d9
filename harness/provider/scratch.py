"""Reads a vTPM's EK from a copy of its state, in a scratch swtpm that lives for one command.

The EK is created again from the endorsement seed: the persistent object that swtpm_setup left is only a copy of a
public area, and whoever can write the state file can exchange it. Passwords that the guest gave its hierarchies are
cleared first, in the copy: the endorsement seed survives TPM2_Clear, and a guest's own passwords are no reason to keep
it from starting.

Invariants:
    1. The state itself is only read.
    2. Nothing is left: neither the copy nor the process.

Spec: TCG EK Credential Profile 2.5, template L-1; DESIGN 3.1, 3.6.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path

from harness.errors import DeviceUnavailable, MalformedMessage, SimulatorCrashed
from harness.swtpm import STATE_FILE, SwtpmProcess
from harness.tpm import Tpm
from harness.tpm_templates import KeyTemplate

_DEADLINE_S = 20.0
_STATE_LIMIT = 4 * 1024 * 1024


async def read_ek(state_dir: Path) -> bytes:
    """SHA-256 of the SubjectPublicKeyInfo of a vTPM's RSA-2048 EK, template L-1.

    Args:
        state_dir: swtpm's state folder of the vTPM; not in use by a running swtpm.

    Raises:
        MalformedMessage: the state cannot be read.
        SimulationError, TpmError: no swtpm starts on the copy, or it is not done in time.

    *Cancellation:* the scratch swtpm is ended and the copy removed.
    """
    with tempfile.TemporaryDirectory(prefix="ek") as name:
        folder = Path(name)
        try:
            await asyncio.to_thread(_copy, state_dir / STATE_FILE, folder / "tpm" / STATE_FILE)
        except OSError as error:
            raise MalformedMessage(f"{state_dir}: vTPM state cannot be read: {error.strerror}") from error
        swtpm = SwtpmProcess(folder / "tpm", folder / "s", folder / "log")
        try:
            async with asyncio.timeout(_DEADLINE_S):
                await swtpm.start()
                async with await Tpm.open(swtpm.tcti, timeout_s=_DEADLINE_S) as tpm:
                    await tpm.startup()
                    await tpm.clear(by_platform=True)
                    return await _digest(tpm)
        except SimulatorCrashed as error:
            why = error.detail.partition("; see ")[0]  # the copy's log is gone in a moment
            raise SimulatorCrashed(f"{state_dir / STATE_FILE}: no swtpm starts on a copy: {why}") from error
        except TimeoutError as error:
            raise DeviceUnavailable(f"the EK was not read within {_DEADLINE_S:g} s") from error
        finally:
            swtpm.kill()
            await swtpm.stop()


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(mode=0o700)
    if source.stat().st_size > _STATE_LIMIT:
        raise MalformedMessage(f"{source}: has more than {_STATE_LIMIT} bytes")
    shutil.copyfile(source, target)


async def _digest(tpm: Tpm) -> bytes:
    handle = await tpm.create_primary(KeyTemplate.EK_RSA2048, b"")
    public = await tpm.read_public(handle)
    if public is None:
        raise DeviceUnavailable("the EK was created and is not there")
    return public.spki_digest()
