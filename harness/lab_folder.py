"""A lab's folder, and a short name for it where its own is too long for the sockets in it.

A UNIX socket's path holds 107 bytes. A lab in a deep folder is reached through a symbolic link among the temporary
files; it is made when the lab is opened, and removed when the lab goes down.

Invariants:
    1. A short name leads to the lab's folder and nowhere else: one that is somebody else's is refused.

Spec: unix(7).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

from harness.errors import ConfigError
from harness.swtpm import SOCKET_PATH_LIMIT

SUPERVISOR_SOCKET = "run/s"
"""Where a lab's supervisor listens, below its folder."""
_SOCKETS = (SUPERVISOR_SOCKET, "h/*/*", "h/*/guests/*/*")
"""Where the processes of a lab have theirs."""
_LONGEST_SOCKET = len("/h//guests/00000000-0000-0000-0000-000000000000/s.ctrl")


def open_folder(folder: Path, *, longest_host: int) -> Path:
    """Makes a lab's folder and gives the path under which it is to be used.

    Args:
        folder: of the lab.
        longest_host: bytes of its longest host name.

    Raises:
        ConfigError: the folder cannot be made, or has no name that is short enough.
    """
    folder = folder.absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be made: {error.strerror}") from error
    if _fits(folder, longest_host):
        return folder
    short = short_name(folder)
    if not _fits(short, longest_host):
        raise ConfigError(f"{folder}: this path is too long for UNIX sockets; choose a shorter folder")
    try:
        with contextlib.suppress(FileExistsError):
            short.symlink_to(folder)
        if not _leads_to(short, folder):
            raise ConfigError(f"{short}: is not this lab's; remove it, or choose a shorter folder for the lab")
    except OSError as error:
        raise ConfigError(f"{short}: cannot be made: {error.strerror}; choose a shorter folder for the lab") from error
    return short


def short_name(folder: Path) -> Path:
    """Where the short name of a lab's folder is, whether there is one or not."""
    digest = hashlib.sha256(os.fsencode(folder.absolute())).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"hl-{digest}"


def supervisor_socket(folder: Path) -> Path:
    """Where a lab's supervisor is reached: in its folder, or under its short name where that is too long.

    Raises:
        ConfigError: the short name is not this lab's.
    """
    own = folder.absolute() / SUPERVISOR_SOCKET
    if len(os.fsencode(own)) <= SOCKET_PATH_LIMIT:
        return own
    short = short_name(folder)
    if short.is_symlink() and not _leads_to(short, folder.absolute()):
        raise ConfigError(f"{short}: is not this lab's; remove it, or choose a shorter folder for the lab")
    return short / SUPERVISOR_SOCKET


def close_folder(folder: Path) -> None:
    """Removes the short name of a folder, if it has one."""
    short = short_name(folder)
    with contextlib.suppress(OSError):
        if _leads_to(short, folder.absolute()):
            short.unlink()


def remove_sockets(folder: Path) -> None:
    """Removes the sockets that processes of a lab left which were killed; nobody of it runs any more."""
    for pattern in _SOCKETS:
        for path in folder.glob(pattern):
            with contextlib.suppress(OSError):
                if path.is_socket():
                    path.unlink()


def _leads_to(short: Path, folder: Path) -> bool:
    return short.lstat().st_uid == os.geteuid() and short.readlink() == folder


def _fits(folder: Path, longest_host: int) -> bool:
    return len(os.fsencode(folder)) + _LONGEST_SOCKET + longest_host <= SOCKET_PATH_LIMIT
