"""Real swtpms for tests: short folders, a started TPM, and the device behind the command proxy."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

from harness.swtpm import SwtpmProcess
from harness.tpm import Tpm
from harness.values import HashAlg, PcrSelection

AUTH = b"an authValue of 24 bytes"
PCRS_0_TO_7 = PcrSelection.of(HashAlg.SHA256, 0xFF)


@contextlib.contextmanager
def short_folder(below: Path | None = None) -> Iterator[Path]:
    """Folder whose path is short enough for the sockets in it, among the temporary files or elsewhere; removed
    afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="h", dir=below))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.asynccontextmanager
async def blank_swtpm(folder: Path) -> AsyncIterator[SwtpmProcess]:
    """A swtpm with empty state that was sent TPM2_Startup(CLEAR)."""
    process = SwtpmProcess(folder / "state", folder / "back", folder / "swtpm.log")
    await process.start()
    try:
        async with await Tpm.open(process.tcti) as tpm:
            await tpm.startup()
        yield process
    finally:
        process.kill()
        await process.stop()


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSettings:
    """Settings of a simulated hardware TPM in one folder."""

    folder: Path
    chip: str = "swtpm"
    scenario: str = "good"
    seed: int = 1

    @property
    def state_dir(self) -> Path:
        return self.folder / "device"

    @property
    def socket(self) -> Path:
        return self.folder / "tpm"

    @property
    def control(self) -> Path:
        return self.folder / "power"

    @property
    def vendor_ca(self) -> Path:
        return self.folder / "vendor"
