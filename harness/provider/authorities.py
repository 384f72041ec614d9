"""Tenants' authorities at a running server, kept in step with the provider's records.

Invariants:
    1. A tenant's certificates are accepted from the snapshot that names its CA until one that does not.
    2. No tenant can take the name of an authority in the service's own settings.

Owner: the service whose server it is.

Spec: DESIGN 3.1 (client identity), 7.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping

from cryptography import x509

from harness import events
from harness.tls import Identities, trust_also


class TenantAuthorities:
    """The authorities of tenants at one server.

    Args:
        identities: of the server's application; holds the service's own authorities already.
        context: of the server.
    """

    def __init__(self, identities: Identities, context: ssl.SSLContext) -> None:
        self._identities = identities
        self._context = context
        self._reserved = identities.names
        self._seen: dict[str, str] = {}  # also those that were ignored, so that each is reported once

    def follow(self, tenants: Mapping[str, str]) -> None:
        """Accepts the certificates of these tenants, and of no others.

        Args:
            tenants: CA certificate (PEM) by tenant.
        """
        for name in [name for name, pem in self._seen.items() if tenants.get(name) != pem]:
            if name not in self._reserved:
                self._identities.remove(name)
            del self._seen[name]
        for name, pem in tenants.items():
            if name in self._seen:
                continue
            self._seen[name] = pem
            if name in self._reserved:
                events.emit("tenant_ignored", level="error", tenant=name, detail="its name is an authority of ours")
                continue
            try:
                certificate = x509.load_pem_x509_certificate(pem.encode())
            except ValueError:
                events.emit("tenant_ignored", level="error", tenant=name, detail="its CA certificate does not parse")
                continue
            trust_also(self._context, certificate)
            self._identities.add(name, certificate)
