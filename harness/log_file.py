"""The file that a process writes its events to: whole lines, bounded in size, and never in the way of the work.

Invariants:
    1. A line is written whole or not at all; a half one, after a full disk, is ended before the next, also by the
       process that opens the file then.
    2. The file does not grow beyond its bound by more than one line (and what others write to the same streams): it
       becomes ``x.log.1``, the one before that ``x.log.2``, and so on; the oldest goes.
    3. Writing does not raise. Lines that could not be written are counted, and told when writing works again.

Owner: one process for each file; any of its threads.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MAX_BYTES = 10 * 1024 * 1024
KEEP = 5
_AGAIN_S = 60.0
_CLOSED = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """Bounds of a log.

    Args:
        max_bytes: size at which a new file is begun.
        keep: old files that are kept.
    """

    max_bytes: int = MAX_BYTES
    keep: int = KEEP


class LogFile:
    """Destination of lines.

    Args:
        path: appended to, made with mode 0600; standard error when None, which is not rotated.
        service: stands in the line about lost lines.
        rotation: bounds.
        streams: standard output and standard error of this process go into the file too, also after a rotation.
        monotonic: seconds.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        service: str | None = None,
        rotation: Rotation | None = None,
        streams: bool = False,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = path
        self._service = service
        self._rotation = rotation or Rotation()
        self._streams = streams
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._lost = 0
        self._half = False
        self._not_before_s = float("-inf")
        self.descriptor = 2 if path is None else _opened(path)
        if path is not None:
            self._half = _ends_half(path, self.descriptor)
        self._redirect()

    def write(self, line: str) -> None:
        """Writes one line."""
        with self._lock:
            try:
                self._rotate_if_full()
                if self._lost:
                    self._append(self._told())
                    self._lost = 0
                self._append(line)
            except OSError:
                self._lost += 1

    def close(self) -> None:
        """Closes the file; later lines are lost."""
        with self._lock:
            if self._path is not None and self.descriptor != _CLOSED:
                os.close(self.descriptor)
                self.descriptor = _CLOSED  # the number is another file's from now on

    def _append(self, line: str) -> None:
        data = f"\n{line}\n".encode() if self._half else f"{line}\n".encode()
        written = os.write(self.descriptor, data)
        self._half = self._half if written == 0 else written < len(data)
        if written < len(data):
            raise OSError("the disk is full")

    def _told(self) -> str:
        event: dict[str, object] = {"event": "log_lines_lost", "level": "error", "count": self._lost}
        return json.dumps(event if self._service is None else event | {"service": self._service})

    def _rotate_if_full(self) -> None:
        if self._path is None or os.fstat(self.descriptor).st_size < self._rotation.max_bytes:
            return
        if self._monotonic() < self._not_before_s:
            return
        try:
            self._rotate(self._path)
        except OSError:  # a folder that cannot be written: the log goes on where it is
            self._not_before_s = self._monotonic() + _AGAIN_S

    def _rotate(self, path: Path) -> None:
        new = path.with_name(f"{path.name}.new")
        descriptor = _opened(new)
        try:
            numbered = [path, *(path.with_name(f"{path.name}.{n}") for n in range(1, self._rotation.keep + 1))]
            for older, younger in zip(reversed(numbered[1:]), reversed(numbered[:-1]), strict=True):
                with contextlib.suppress(FileNotFoundError):
                    os.replace(younger, older)
            os.replace(new, path)
        except OSError:
            os.close(descriptor)
            raise
        os.close(self.descriptor)
        self.descriptor = descriptor
        self._half = False
        self._redirect()

    def _redirect(self) -> None:
        if self._streams and self._path is not None:
            os.dup2(self.descriptor, 1)
            os.dup2(self.descriptor, 2)


def _opened(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


def _ends_half(path: Path, descriptor: int) -> bool:
    """Whether a file that is appended to ends within a line; a pipe or device has no end to look at."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_size == 0:
        return False
    try:
        with path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"
    except OSError:
        return False  # it may be written, and not read
