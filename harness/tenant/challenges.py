"""How many challenges a tenant may have open, and how fast it may make them (DESIGN 3.6).

Invariants:
    1. At most one challenge per host is open.
    2. At most six are opened in any minute.
    3. A challenge is closed however its use ends.

Owner: the registrar's event loop.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator

from harness.errors import ShareExhausted
from harness.values import HostId

PER_MINUTE = 6
_MINUTE_S = 60.0


class Challenges:
    """The open challenges of one tenant.

    Args:
        monotonic: seconds on a clock that never goes back.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._open: set[HostId] = set()
        self._made: deque[float] = deque()

    @contextlib.contextmanager
    def open(self, host_id: HostId) -> Iterator[None]:
        """Holds the host's one challenge open during the body.

        Raises:
            ShareExhausted: one is open for this host, or six were made within a minute.
        """
        now = self._monotonic()
        while self._made and now - self._made[0] >= _MINUTE_S:
            self._made.popleft()
        if host_id in self._open:
            raise ShareExhausted(f"a challenge is open for host {host_id}", retry_after_s=1.0)
        if len(self._made) >= PER_MINUTE:
            wait_s = _MINUTE_S - (now - self._made[0])
            raise ShareExhausted(f"{PER_MINUTE} challenges were made within a minute", retry_after_s=max(1.0, wait_s))
        self._made.append(now)
        self._open.add(host_id)
        try:
            yield
        finally:
            self._open.discard(host_id)
