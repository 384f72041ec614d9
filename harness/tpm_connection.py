"""The thread's side of the TPM client: one ESAPI context, its objects, and what its errors mean.

Knows how ESAPI behaves and not how it is imported: `tpm` hands it the means to connect.

Invariants:
    1. After an error of a layer below the TPM (connection, marshalling) the context is dropped; the next call connects
       anew. ESAPI refuses every call on a context whose command was lost.
    2. A busy TPM is asked again at most 20 times, 50 ms apart; a self-test after start takes up to a second.

Owner: the thread that calls it.

Spec: TCG TSS 2.0 Overview and Common Structures, 2.3 (error layers); TPM 2.0 Part 2, 6.6.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from harness.errors import DeviceFault, DeviceUnavailable

_RC_BUSY = frozenset({0x922, 0x908, 0x90A})  # TPM_RC_RETRY, TPM_RC_YIELDED, TPM_RC_TESTING
_BUSY_TRIES = 20
_BUSY_WAIT_S = 0.05
_TPM_LAYERS = frozenset({0, 11})  # answers of the TPM itself, plain or through the kernel's resource manager


class Connection:
    """An ESAPI context, opened when it is needed, and the objects known in it. Used in one thread only.

    Args:
        connect: makes an ESAPI context.
        failure: the exception that ESAPI raises; has the response code as ``rc``.
        wait: sleeps that many seconds between two tries.
    """

    def __init__(
        self, connect: Callable[[], Any], failure: type[Exception], *, wait: Callable[[float], None] = time.sleep
    ) -> None:
        self._connect = connect
        self._failure = failure
        self._wait = wait
        self._esapi: Any = None
        self._objects: dict[int, Any] = {}
        self.asked_again = 0
        """How often a command was repeated because the TPM was busy; one thread writes it, anybody may read it."""

    def open(self) -> Any:
        """ESAPI context, connected anew if there is none."""
        if self._esapi is None:
            self._objects = {}
            self._esapi = self._connect()
        return self._esapi

    def close(self) -> None:
        """Drops the context; what is loaded in the TPM stays there."""
        esapi, self._esapi = self._esapi, None
        self._objects = {}
        if esapi is not None:
            esapi.close()

    def do(self, command: str, *args: Any, **kwargs: Any) -> Any:
        """Result of one ESAPI method; repeated a bounded number of times while the TPM says that it is busy.

        Raises:
            DeviceFault: the TPM answered with an error.
            DeviceUnavailable: anything else; the connection is dropped.
        """
        tries = 1
        while True:
            try:
                return getattr(self.open(), command)(*args, **kwargs)
            except self._failure as error:
                layer, code = divmod(int(error.rc), 1 << 16)  # type: ignore[attr-defined]
                if layer not in _TPM_LAYERS:
                    self.close()  # the context is in an undefined state now
                    raise DeviceUnavailable(f"the TPM cannot be reached: {command}: {error}") from error
                if code not in _RC_BUSY or tries == _BUSY_TRIES:
                    raise DeviceFault(f"{command}: {error}", response_code=code) from error
            tries += 1
            self.asked_again += 1
            self._wait(_BUSY_WAIT_S)

    def object(self, handle: int, auth: bytes | None = None) -> Any:
        """ESYS object for a key or NV index in the TPM, with the authValue to use next."""
        known = self._objects.get(handle)
        if known is None:
            known = self._objects[handle] = self.do("tr_from_tpmpublic", handle)
        if auth is not None:
            self.do("tr_set_auth", known, auth)
        return known

    def adopt(self, created: Any) -> int:
        """Handle of a transient object that was just created."""
        handle = int(self.do("tr_get_tpm_handle", created))
        self._objects[handle] = created
        return handle

    def release(self, handle: int) -> Any:
        """ESYS object for an object that the next command removes; not known here any more."""
        found = self.object(handle)
        del self._objects[handle]
        return found

    def forget(self, *handles: int) -> None:
        """Drops what is known about objects that have changed in the TPM; all of them without arguments."""
        for handle in handles or tuple(self._objects):
            if (known := self._objects.pop(handle, None)) is not None:
                self.do("tr_close", known)
