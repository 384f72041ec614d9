"""Watches a service's own certificate: takes a renewed file into use, and warns before it expires.

Events:

| event | level | meaning |
|---|---|---|
| ``certificate_in_use`` | info | another certificate is in use, or the first one |
| ``certificate_refused`` | error | its file changed and cannot be used; the one before stays in use |
| ``certificate_not_audited`` | error | its file was renewed; it is in use as soon as the audit trail takes the entry |
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
from harness.errors import CertificateRefused, StoreError
from harness.own_certificate import Audit, OwnCertificate

LOOK_S = 2.0
REMIND_S = 86400.0


class CertificateWatch:
    """The task.

    Args:
        own: the certificate.
        audit: keeps the entry of a renewed file.
        also: done at each look.
        monotonic: seconds, for the reminders; a clock that is set makes none and drops none.
    """

    def __init__(
        self,
        own: OwnCertificate,
        audit: Audit,
        also: Callable[[], Awaitable[None]],
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._own = own
        self._audit = audit
        self._also = also
        self._monotonic = monotonic
        self._waits: str | None = None
        self._reminded: tuple[str, float] | None = None
        self._known: x509.Certificate | None = None

    async def run(self) -> None:
        """Looks every two seconds until it is cancelled. *Cancellation:* nothing is left."""
        while True:
            try:
                await self.look()
                await self._also()
            except Exception:  # the border of this task: one look that fails must not be the last
                events.emit("internal_fault", level="error", exc_info=True)
            await asyncio.sleep(LOOK_S)

    async def look(self) -> None:
        """Looks once. *Cancellation:* the next look finds what this one did not."""
        try:
            await self._own.take_file(self._audit)
            self._waits = None
        except CertificateRefused as error:
            events.emit(
                "certificate_refused",
                level="error",
                file=str(self._own.path),
                detail=error.detail,
                step="renew it again",
            )
        except StoreError as error:
            if error.detail != self._waits:
                self._waits = error.detail
                events.emit("certificate_not_audited", level="error", file=str(self._own.path), detail=error.detail)
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
