"""Watches a service's own certificate: takes a renewed file into use, and warns before it expires.

Events:

| event | level | meaning |
|---|---|---|
| ``certificate_in_use`` | info | another certificate is in use, or the first one |
| ``certificate_refused`` | error | its file changed and cannot be used; the one before stays in use |
| ``certificate_expires`` | warning | it is to be renewed: at the start, then once a day |
| ``certificate_expired`` | error | clients and servers refuse this service: at once, then once a day |
| ``internal_fault`` | error | a look failed; the next one is made all the same |

Owner: the server, one task.

Spec: docs/architecture.md (certificates).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from cryptography import x509

from harness import events
from harness.errors import CertificateRefused
from harness.own_certificate import OwnCertificate

LOOK_S = 2.0
REMIND_S = 86400.0


class CertificateWatch:
    """The task.

    Args:
        own: the certificate.
        also: done at each look.
        monotonic: seconds, for the reminders; a clock that is set makes none and drops none.
    """

    def __init__(
        self,
        own: OwnCertificate,
        also: Callable[[], Awaitable[None]],
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._own = own
        self._also = also
        self._monotonic = monotonic
        self._reminded: tuple[str, float] | None = None
        self._known: x509.Certificate | None = None

    async def run(self) -> None:
        """Looks every two seconds until it is cancelled. *Cancellation:* nothing is left."""
        while True:
            try:
                self.look()
                await self._also()
            except Exception:  # the border of this task: one look that fails must not be the last
                events.emit("internal_fault", level="error", exc_info=True)
            await asyncio.sleep(LOOK_S)

    def look(self) -> None:
        """Looks once."""
        try:
            self._own.refresh()
        except CertificateRefused as error:
            events.emit(
                "certificate_refused",
                level="error",
                file=str(self._own.path),
                detail=error.detail,
                step="renew it again",
            )
        if self._own.certificate is not self._known:
            self._known, self._reminded = self._own.certificate, None
            events.emit("certificate_in_use", file=str(self._own.path), expires=self._expires)
        self._remind()

    @property
    def _expires(self) -> str:
        return self._own.expires.strftime("%Y-%m-%dT%H:%M:%SZ")

    def _remind(self) -> None:
        event, level = (
            ("certificate_expired", "error") if self._own.remaining_s < 0 else ("certificate_expires", "warning")
        )
        if not self._own.is_due:
            return
        at = self._monotonic()
        if self._reminded is not None and self._reminded[0] == event and at - self._reminded[1] < REMIND_S:
            return
        self._reminded = (event, at)
        events.emit(event, level=level, file=str(self._own.path), at=self._expires, step="harness lab renew")
