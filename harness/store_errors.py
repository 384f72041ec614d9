"""What a database's error means: one sentence that names the database and says what to do.

Invariants:
    1. No password of a URL gets into a sentence.
    2. An error that is not known here is told in the database's own words.

Spec: SQLite, "Result and Error Codes"; PostgreSQL, appendix A (error codes).
"""

from __future__ import annotations

import errno

from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError

from harness.errors import StoreError

_RESTORE = "restore a backup with `harness db restore`"
_WRITABLE = "make the file, its folder and its file system writable for this user"
_SPACE = "free some space; the service goes on by itself"
_SERVER = "start the server, or wait for it; the service goes on by itself"

_NEXT_STEPS: tuple[tuple[str, str], ...] = (
    ("database is locked", "another program holds its lock: end that program"),
    ("readonly database", _WRITABLE),
    ("unable to open database file", _WRITABLE),
    ("database or disk is full", _SPACE),
    ("No space left on device", _SPACE),
    ("disk I/O error", "look at the disk: it is full, over a limit, or failing"),
    ("malformed", _RESTORE),
    ("file is not a database", _RESTORE),
    ("is shutting down", _SERVER),
    ("is starting up", _SERVER),
    ("connection was closed", _SERVER),
    ("connection is closed", _SERVER),
    ("terminating connection", _SERVER),
    ("could not serialize", "another program wrote at the same time; try again"),
    ("deadlock detected", "another program wrote at the same time; try again"),
)
"""Words in a database's message, and what to do then."""

_OF_SYSTEM = {
    errno.ECONNREFUSED: _SERVER,
    errno.ECONNRESET: _SERVER,
    errno.EACCES: _WRITABLE,
    errno.EROFS: _WRITABLE,
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
}


def name_of(url: URL) -> str:
    """The database as an error names it: its URL without the password."""
    return f"database {url.render_as_string(hide_password=True)}"


def store_error(url: URL, error: Exception) -> StoreError:
    """What went wrong with this database, and what to do about it."""
    reason = reason_of(error)
    step = _next_step(url, error, reason)
    return StoreError(f"{name_of(url)}: {reason}; {step}" if step else f"{name_of(url)}: {reason}")


def late(url: URL, deadline_s: float) -> StoreError:
    """A transaction that was not done in time."""
    step = "another program may hold its lock, or the disk is slow; the service goes on by itself"
    return StoreError(f"{name_of(url)}: not done within {deadline_s:g} s; {step}")


def reason_of(error: Exception) -> str:
    """The error in the database's own words, on one line."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    text = str(error.orig if isinstance(error, DBAPIError) and error.orig is not None else error)
    # The asyncpg dialect puts the class in front: "<class 'asyncpg.exceptions.X'>: text\nDETAIL: ..."
    text = text.removeprefix("<class ").split("'>: ", 1)[-1]
    return " ".join(text.split()) or type(error).__name__


def _next_step(url: URL, error: Exception, reason: str) -> str | None:
    if isinstance(error, OSError):
        if url.get_backend_name() != "sqlite" and isinstance(error, FileNotFoundError):
            return _SERVER  # its UNIX socket
        return _OF_SYSTEM.get(error.errno or 0)
    return next((step for words, step in _NEXT_STEPS if words in reason), None)
