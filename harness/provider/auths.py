"""The authValues of the host's keys: random, made once, in a file that only the host agent can read.

Invariants:
    1. The file is written once, atomically, with mode 0600; two agents that start together end up with one content.
    2. A file that someone else owns, may read or may have put there as a link is refused, not used.
    3. The values appear in no text: not in errors, not in a repr.

Owner: `keys.HostKeys.provision`.

Spec: DESIGN 3.6 (authValue of at least 16 bytes that only the host agent has).
"""

from __future__ import annotations

import json
import os
import secrets
import stat
from dataclasses import dataclass, field
from pathlib import Path

from harness.errors import ConfigError

FILE_NAME = "auth.json"
_SIZE = 32  # bytes; the digest size of the keys' nameAlg is the most that a TPM takes
_LIMIT = 4096  # bytes of the file


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyAuths:
    """AuthValues of AK and vTPM CA key."""

    ak: bytes = field(repr=False)
    ca: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.ak) != _SIZE or len(self.ca) != _SIZE or self.ak == self.ca:
            raise ValueError(f"authValues must be two different ones of {_SIZE} bytes")


def load(state_dir: Path) -> KeyAuths | None:
    """AuthValues in this state directory; None when there is no file.

    Raises:
        ConfigError: the file cannot be read, is not ours alone, or does not hold two authValues.
    """
    path = state_dir / FILE_NAME
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise ConfigError(f"{path}: must be a plain file of this user with mode 0600")
        data = file.read(_LIMIT)
    try:
        values = json.loads(data)
        return KeyAuths(ak=bytes.fromhex(values["ak"]), ca=bytes.fromhex(values["ca"]))
    except (ValueError, KeyError, TypeError):
        # Not chained: the cause would quote the file.
        raise ConfigError(f"{path}: does not hold two authValues; restore it from a backup") from None


def make(state_dir: Path) -> KeyAuths:
    """Makes the file with new authValues; if another process was first, its content.

    Raises:
        ConfigError: the file cannot be written, or `load` refuses the other process's.
    """
    auths = KeyAuths(ak=secrets.token_bytes(_SIZE), ca=secrets.token_bytes(_SIZE))
    path = state_dir / FILE_NAME
    temporary = state_dir / f".{FILE_NAME}.{secrets.token_hex(8)}"
    try:
        state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        _write(temporary, json.dumps({"ak": auths.ak.hex(), "ca": auths.ca.hex()}).encode())
        try:
            os.link(temporary, path)  # fails if it exists, which rename does not
        except FileExistsError:
            return load(state_dir) or auths
        finally:
            temporary.unlink()
        _sync(state_dir)  # the keys that are made next are lost without this file
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error
    return auths


def _write(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
