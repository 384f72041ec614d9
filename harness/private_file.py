"""Files that only their owner may read, and that appear whole.

Invariants:
    1. A file has mode 0600 from its first byte on.
    2. Whoever opens the path sees the old content or the new one, also after a crash; never a part.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_private(path: Path, data: bytes) -> None:
    """Writes a file, in place of the one that may be there; makes its folder (mode 0700) where it is missing.

    Raises:
        OSError: the folder cannot be made or written to, or the disk is full; it names a file, and nothing has changed.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor, half = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:64]}.")  # 0600
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(half, path)
    except BaseException as error:
        Path(half).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a full disk: the system names no file
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
