"""Mutual TLS: contexts for both sides, and who a peer is.

Invariants:
    1. Both sides show a certificate and check the other's; nothing here can turn that off.
    2. A peer's authority is the one whose *key* signed its certificate: two tenants' authorities may have equal names.
    3. Role and name are in exactly one URI among the certificate's alternative names (`pki`).
    4. An authority that was added while the server runs, a tenant's, vouches for tenants' roles only: whoever has a
       certification authority can write any role into a certificate.
    5. A session is never resumed: each connection is a handshake in which the certificates are checked.
    6. A client sends nothing before it has judged the server's certificate: its chain and host name, its role, and
       where one is pinned its key.
    7. A certificate that expires ends its owner's rights at once, also on a connection that is open.

Spec: RFC 8446 (TLS 1.3), RFC 5246 (1.2); DESIGN 3.1, 3.2 (requester), 7.
"""

from __future__ import annotations

import datetime
import ssl
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

from harness.config import TlsSettings
from harness.errors import AccessDenied, CertificateExpired, CertificateRefused, ConfigError
from harness.pki import TENANT_ROLES, URN, Role, load_certificate, now, public_key_of
from harness.protocol import requester_of

_CACHED = 4096

C = TypeVar("C", bound=ssl.SSLContext)


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """The other end of a connection, from its certificate.

    Args:
        authority: name under which its authority is known here.
        role: what it may be.
        name: its name within the authority.
        requester: SHA-256 of its SubjectPublicKeyInfo.
        expires: end of its certificate.
    """

    authority: str
    role: Role
    name: str
    requester: bytes
    expires: datetime.datetime

    @property
    def who(self) -> str:
        """For the audit trail: ``<authority>/<role>/<name>``."""
        return f"{self.authority}/{self.role.value}/{self.name}"


class Identities:
    """Known authorities; tells who a certificate's owner is.

    Args:
        authorities: certificates by the name under which each is known here; from the service's own settings, and
            so trusted with every role.
        clock: the time by which certificates expire.
    """

    def __init__(
        self, authorities: Mapping[str, x509.Certificate], *, clock: Callable[[], datetime.datetime] = now
    ) -> None:
        self._clock = clock
        self._authorities = dict(authorities)
        self._roles = {name: frozenset(Role) for name in authorities}
        self._cache: dict[bytes, Peer] = {}
        self._signers: dict[bytes, str | None] = {}

    def add(self, name: str, certificate: x509.Certificate, *, roles: Collection[Role] = TENANT_ROLES) -> None:
        """Adds an authority, or replaces the one of this name.

        Args:
            name: under which it is known here.
            certificate: its own.
            roles: what it may make somebody.
        """
        self._authorities[name] = certificate
        self._roles[name] = frozenset(roles)
        self._forget()

    def remove(self, name: str) -> None:
        """Forgets an authority: its certificates are refused from now on."""
        self._authorities.pop(name, None)
        self._forget()

    def _forget(self) -> None:
        self._cache.clear()
        self._signers.clear()

    @property
    def names(self) -> frozenset[str]:
        """Names of the known authorities."""
        return frozenset(self._authorities)

    def authority(self, certificate: bytes) -> str | None:
        """Name of the authority whose key signed a certificate (DER), whatever it says; None when none is known."""
        if certificate not in self._signers:
            if len(self._signers) >= _CACHED:
                self._signers.clear()
            try:
                self._signers[certificate] = authority_of(
                    x509.load_der_x509_certificate(certificate), self._authorities
                )
            except (ValueError, x509.InvalidVersion):
                self._signers[certificate] = None
        return self._signers[certificate]

    def peer(self, certificate: bytes) -> Peer:
        """Owner of a certificate that the TLS layer has accepted.

        Args:
            certificate: DER.

        Raises:
            AccessDenied: it cannot be read, no known authority signed it, it does not state one role and name, its key
                is of no known kind, or its authority may not give that role.
            CertificateExpired: it was good when the connection was made, and is not any more.
        """
        known = self._cache.get(certificate)
        if known is None:
            known = self._identify(certificate)
            if len(self._cache) >= _CACHED:
                self._cache.clear()
            self._cache[certificate] = known
        if self._clock() > known.expires:
            raise CertificateExpired(expired("the client certificate", known.expires))
        return known

    def _identify(self, der: bytes) -> Peer:
        try:
            certificate = x509.load_der_x509_certificate(der)
        except (ValueError, x509.InvalidVersion):
            raise AccessDenied("the client certificate cannot be read") from None
        authority = authority_of(certificate, self._authorities)
        if authority is None:
            raise AccessDenied("the client certificate is of no authority that is known here")
        role, name = role_and_name(certificate)
        if role not in self._roles[authority]:
            raise AccessDenied(f"{authority} cannot make anybody a {role.value}")
        try:
            requester = certificate_requester(certificate)
        except CertificateRefused as error:
            raise AccessDenied(f"the client certificate is refused: {error.detail}") from error
        return Peer(
            authority=authority,
            role=role,
            name=name,
            requester=requester,
            expires=certificate.not_valid_after_utc,
        )


def expired(whose: str, at: datetime.datetime) -> str:
    """The sentence about a certificate that has expired; it names the way back."""
    return f"{whose} expired at {at:%Y-%m-%dT%H:%M:%SZ}; renew it with `harness lab renew` or PUT /v1/certificate"


def authority_of(certificate: x509.Certificate, authorities: Mapping[str, x509.Certificate]) -> str | None:
    """Name of the authority whose key signed a certificate; None when it is none of these."""
    return next((name for name, ca in authorities.items() if _signed_by(certificate, ca)), None)


def certificate_requester(certificate: x509.Certificate) -> bytes:
    """``requester`` of whoever owns a certificate (DESIGN 3.2); 32 bytes.

    Raises:
        CertificateRefused: its key is of no known kind.
    """
    spki = public_key_of(certificate).public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return requester_of(spki)


def _signed_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def role_and_name(certificate: x509.Certificate, *, whose: str = "the client certificate") -> tuple[Role, str]:
    """What a certificate's owner may be, and its name.

    Args:
        certificate: accepted by the TLS layer, or about to be.
        whose: begin of the sentence when it states neither.

    Raises:
        AccessDenied: it does not state exactly one role and name.
    """
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, x509.DuplicateExtension, x509.UnsupportedGeneralNameType, ValueError):
        raise AccessDenied(f"{whose} states no role") from None
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if len(uris) != 1 or not uris[0].startswith(URN):
        raise AccessDenied(f"{whose} does not state exactly one role")
    role, _, name = uris[0].removeprefix(URN).partition(":")
    if role not in set(Role) or not name:
        raise AccessDenied(f"{whose} states an unknown role, or no name")
    return Role(role), name


def identities_of(tls: TlsSettings) -> Identities:
    """Authorities of a service's settings.

    Raises:
        ConfigError: a certificate cannot be read.
    """
    return Identities({name: load_certificate(path) for name, path in tls.authorities.items()})


def server_context(tls: TlsSettings) -> ssl.SSLContext:
    """Context of a server that asks every client for a certificate.

    Raises:
        ConfigError: a file is missing or unusable; it is named.
    """
    context = _context(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), tls)
    context.num_tickets = 0
    for authority in tls.authorities.values():
        trust_also(context, load_certificate(authority))
    return context


class ServerJudge:
    """What a client demands of a server's certificate beyond its chain and host name.

    Args:
        roles: what the server may be; None: anything that the authority made it.
        pinned: the server's certificate as it is known; the server shows it, or another one on the same key.
    """

    def __init__(self, *, roles: Collection[Role] | None = None, pinned: x509.Certificate | None = None) -> None:
        self.expires: datetime.datetime | None = None
        """Earliest end of a certificate that was accepted."""
        self._roles = None if roles is None else frozenset(roles)
        self._pinned = pinned

    def __call__(self, der: bytes) -> None:
        """Judges a certificate whose chain and host name hold.

        Raises:
            AccessDenied: it is on another key than the pinned one, or its owner is not one of the roles.
            CertificateRefused: its key, or the pinned one's, is of no known kind.
        """
        certificate = x509.load_der_x509_certificate(der)
        if self._pinned is not None and public_key_of(certificate) != public_key_of(self._pinned):
            raise AccessDenied("it is not the pinned one, nor a renewal on its key")
        if self._roles is not None:
            role, _ = role_and_name(certificate, whose="it")
            if role not in self._roles:
                raise AccessDenied(f"its owner is a {role.value}, not a {' or '.join(sorted(self._roles))}")
        end = certificate.not_valid_after_utc
        self.expires = end if self.expires is None else min(self.expires, end)


class _JudgedConnection(ssl.SSLObject):
    def do_handshake(self) -> None:
        super().do_handshake()
        context = self.context
        certificate = self.getpeercert(binary_form=True)
        if not isinstance(context, _ClientContext) or context.judge is None or certificate is None:
            raise ssl.SSLCertVerificationError(1, "nobody judges this certificate")
        try:
            context.judge(certificate)
        except (AccessDenied, CertificateRefused, ValueError, x509.InvalidVersion) as error:
            raise ssl.SSLCertVerificationError(1, str(error)) from error


class _ClientContext(ssl.SSLContext):
    sslobject_class = _JudgedConnection
    judge: ServerJudge | None = None


def client_context(
    tls: TlsSettings, *, pinned: x509.Certificate | None = None, judge: ServerJudge | None = None
) -> ssl.SSLContext:
    """Context of a client: shows its certificate, checks the server's chain and host name, and has it judged.

    Args:
        tls: our certificate, key, and the authorities that may vouch for the server.
        pinned: the server's own certificate: it may show that one, whoever signed it, or a renewal on the same key
            that one of the authorities vouches for. Another one fails in the handshake, before anything was sent.
        judge: judges each certificate; by default by ``pinned`` alone.

    Raises:
        ConfigError: a file is missing or unusable; it is named.
    """
    context = _context(_ClientContext(ssl.PROTOCOL_TLS_CLIENT), tls)
    context.judge = judge or ServerJudge(pinned=pinned)
    if pinned is not None:
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # the chain may end at the pinned one
        trust_also(context, pinned)
    for authority in tls.authorities.values():
        trust_also(context, load_certificate(authority))
    return context


def trust_also(context: ssl.SSLContext, authority: x509.Certificate) -> None:
    """Lets a running server accept one more authority's certificates in its handshakes."""
    context.load_verify_locations(cadata=authority.public_bytes(serialization.Encoding.DER))


def _context(context: C, tls: TlsSettings) -> C:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    context.options |= ssl.OP_NO_TICKET  # a resumed session would not show the certificate again
    for path in (tls.certificate, tls.key):
        _must_be_readable(path)
    try:
        context.load_cert_chain(tls.certificate, tls.key, password="")
    except (ssl.SSLError, OSError, ValueError) as error:
        raise ConfigError(f"{tls.certificate} and {tls.key} are not a certificate and its key") from error
    return context


def _must_be_readable(path: Path) -> None:
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
