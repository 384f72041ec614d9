"""Reads big-endian TPM structures from bytes that somebody else chose.

Spec: TPM 2.0 Part 1, 11 (marshalling); Part 2, 3 (types).
"""

from __future__ import annotations

from harness.errors import MalformedMessage


class Reader:
    """Cursor over bytes; every read says what it was for when the bytes run out.

    Args:
        data: the structure, not changed.
        what: its name, for errors.
    """

    def __init__(self, data: bytes, what: str) -> None:
        self._data = data
        self._at = 0
        self._what = what

    def take(self, size: int, field: str) -> bytes:
        """The next ``size`` bytes.

        Raises:
            MalformedMessage: fewer are left.
        """
        taken = self._data[self._at : self._at + size]
        if len(taken) != size:
            raise MalformedMessage(f"{self._what} ends inside {field}")
        self._at += size
        return taken

    def integer(self, size: int, field: str) -> int:
        """Unsigned integer of ``size`` bytes."""
        return int.from_bytes(self.take(size, field), "big")

    def tpm2b(self, field: str, *, at_most: int) -> bytes:
        """Content of a TPM2B.

        Raises:
            MalformedMessage: it is longer than ``at_most`` bytes, or cut short.
        """
        size = self.integer(2, field)
        if size > at_most:
            raise MalformedMessage(f"{self._what}: {field} has {size} bytes, at most {at_most} are allowed")
        return self.take(size, field)

    def end(self) -> None:
        """Says that the structure is complete.

        Raises:
            MalformedMessage: bytes are left over.
        """
        left = len(self._data) - self._at
        if left:
            raise MalformedMessage(f"{self._what} has {left} trailing bytes")
