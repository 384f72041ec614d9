"""A process's own certificate: read from its file, watched there, and replaced by a renewal of it.

::

    own = OwnCertificate(settings.tls)
    own.use_in(context)             # a server's: new handshakes show what is in use
    await own.replace(pem, entry, audit)
    await own.take_file(audit)      # a server: somebody else may have renewed the file
    own.refresh()                   # a client: the same; the process's server tells and audits it

Invariants:
    1. What takes a certificate's place has its key, role, name, addresses and authority: ``requester`` and the rights
       of its owner stay what they were (DESIGN 3.2).
    2. A file that cannot be used leaves the certificate before it in use.
    3. A server audits a renewal before it is in force there, whichever way it came; a file that was replaced while the
       process was down is in force from its start. A file that a server writes appears whole.

Owner: the event loop of the process.

Spec: RFC 5280; docs/architecture.md (certificates).
"""

from __future__ import annotations

import asyncio
import datetime
import os
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import ExtendedKeyUsageOID

from harness import events
from harness.audit import AuditEntry
from harness.config import TlsSettings
from harness.errors import AccessDenied, CertificateRefused, ConfigError, MalformedMessage, StoreError
from harness.pki import TENANT_ROLES, Role, load_certificate, now, public_key_of
from harness.private_file import write_private
from harness.tls import Peer, authority_of, expired, role_and_name

Audit = Callable[[AuditEntry], Awaitable[None]]
"""Keeps an entry of the audit trail, before the act; raises StoreError when it cannot."""
Clock = Callable[[], datetime.datetime]

RENEW_DAYS, RENEW_SHARE = 14, 0.2
"""A certificate is to be renewed when it is valid for fewer days than this, or for less than this share of its time."""
RENEWAL = "certificate-renew"
"""Action of the audit entry."""
FROM_FILE = "(taken from its file)"
"""Reason of a renewal whose reason nobody could state."""
_UNREADABLE = (ValueError, IndexError, x509.InvalidVersion, x509.DuplicateExtension, x509.UnsupportedGeneralNameType)
_MARK = b"-----BEGIN CERTIFICATE-----"
_USES = frozenset({ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pair:
    certificate: x509.Certificate
    pem: bytes
    key: bytes


class OwnCertificate:
    """Certificate and key of a process.

    Args:
        tls: its files, and the authorities that it knows.
        clock: the time by which certificates expire.

    Raises:
        ConfigError: a file is missing or unusable; it is named.
    """

    def __init__(self, tls: TlsSettings, *, clock: Clock = now) -> None:
        self._path, self._key_path = tls.certificate, tls.key
        self._clock = clock
        self._authorities = {name: load_certificate(path) for name, path in tls.authorities.items()}
        self._seen = _stamp(self._path)
        self._contexts: list[ssl.SSLContext] = []
        self._turn = asyncio.Lock()  # or a file that `replace` has just written would be taken for somebody else's
        self.certificate = load_certificate(self._path)
        """The one that is in use."""
        try:
            self._public = public_key_of(self.certificate)
        except CertificateRefused as error:
            raise ConfigError(f"{self._path}: {error.detail}") from error

    @property
    def path(self) -> Path:
        """Its file."""
        return self._path

    @property
    def expires(self) -> datetime.datetime:
        """End of the certificate that is in use."""
        return self.certificate.not_valid_after_utc

    @property
    def authority(self) -> str | None:
        """Name of the authority that signed it, of those that this process knows."""
        return authority_of(self.certificate, self._authorities)

    @property
    def operator(self) -> Role | None:
        """Role of the operator who may renew it: of the party that its owner belongs to."""
        try:
            role, _ = role_and_name(self.certificate)
        except AccessDenied:
            return None
        return Role.TENANT_OPERATOR if role in TENANT_ROLES else Role.PROVIDER_OPERATOR

    def check_operator(self, peer: Peer, refusal: str) -> None:
        """Checks that a peer is an operator of the service's own authority.

        Args:
            peer: who calls.
            refusal: what others are told.

        Raises:
            AccessDenied: it is not.
        """
        if peer.role != self.operator or peer.authority != self.authority:
            raise AccessDenied(refusal)

    @property
    def name(self) -> str:
        """``<role>/<name>``, for the audit trail."""
        role, name = role_and_name(self.certificate)
        return f"{role.value}/{name}"

    def check_valid(self) -> None:
        """Checks that the certificate in use can still be shown.

        Raises:
            CertificateRefused: it has expired; says how to renew it.
        """
        if self._clock() > self.expires:
            raise CertificateRefused(expired(f"our own certificate {self._path}", self.expires))

    @property
    def remaining_s(self) -> float:
        """Seconds until it expires."""
        return (self.expires - self._clock()).total_seconds()

    @property
    def is_due(self) -> bool:
        """Whether it is to be renewed."""
        whole_s = (self.expires - self.certificate.not_valid_before_utc).total_seconds()
        return self.remaining_s < max(RENEW_DAYS * 86400, RENEW_SHARE * whole_s)

    def use_in(self, context: ssl.SSLContext) -> None:
        """New handshakes of this context show the certificate that is in use, also after a renewal."""
        self._contexts.append(context)

    def refresh(self) -> bool:
        """Takes the certificate's file into use if it has changed.

        Returns:
            Whether another certificate is in use now.

        Raises:
            CertificateRefused: the file changed, and cannot be used; told once for each change.
        """
        stamp = _stamp(self._path)
        if stamp == self._seen:
            return False
        self._seen = stamp
        pair = self._in_file()
        if pair is None:
            return False
        self._take(pair)
        return True

    async def take_file(self, audit: Audit) -> bool:
        """As `refresh`, for a server: audited before it is in force.

        Args:
            audit: keeps the entry.

        Raises:
            CertificateRefused: as `refresh`.
            StoreError: it cannot be audited; the certificate before it stays, and the next call tries again.

        *Cancellation:* the entry may be there already; another call takes the file into use.
        """
        async with self._turn:
            stamp = _stamp(self._path)
            if stamp == self._seen:
                return False
            try:
                pair = self._in_file()
            except CertificateRefused:
                self._seen = stamp
                raise
            if pair is not None:
                await audit(self._by_file())
                self._take(pair)
            self._seen = stamp
            return pair is not None

    def _by_file(self) -> AuditEntry:
        try:
            subject = self.name
        except AccessDenied:  # it states no role
            subject = self._path.name
        return AuditEntry(at=self._clock().timestamp(), who="file", action=RENEWAL, subject=subject, reason=FROM_FILE)

    def _in_file(self) -> _Pair | None:
        """What is in the file; None when it is the certificate in use."""
        try:
            pem = self._path.read_bytes()
        except OSError as error:
            raise CertificateRefused(f"{self._path}: cannot be read: {error.strerror}") from error
        try:
            pair = self._judge(pem)
        except MalformedMessage as error:
            raise CertificateRefused(f"{self._path}: {error.detail}") from error
        return None if pair.certificate == self.certificate else pair

    async def replace(self, pem: str, entry: AuditEntry, audit: Audit) -> None:
        """Takes a renewed certificate into use, and writes it to its file.

        Args:
            pem: the certificate, alone.
            entry: who does it and why.
            audit: keeps the entry.

        Raises:
            MalformedMessage: not one certificate in PEM.
            CertificateRefused: not a renewal of the one in use.
            StoreError: it cannot be audited, or the file cannot be written; the old one stays.

        *Cancellation:* the file holds the old or the new certificate; `take_file` takes the new one into use.
        """
        data = pem.encode()
        if data.count(_MARK) != 1:
            raise MalformedMessage("certificate must be one certificate in PEM")
        pair = self._judge(data)
        if self.authority is None:
            raise CertificateRefused("its authority is not one of this service's settings")
        async with self._turn:
            await audit(entry)
            try:
                await asyncio.to_thread(write_private, self._path, data)
            except OSError as error:
                raise StoreError(f"{self._path}: cannot be written: {error.strerror}") from error
            self._seen = _stamp(self._path)
            self._take(pair)

    def _judge(self, pem: bytes) -> _Pair:
        """A renewal of the certificate in use.

        Checks, in this order:
            1. It is a certificate, on the key in use.
            2. It states the same role, name and addresses.
            3. The authority that signed the one in use signed it.
            4. It is valid now, and good for servers and for clients.
        """
        try:
            made = x509.load_pem_x509_certificates(pem)[0]
            names = _names(made)
        except _UNREADABLE as error:
            raise MalformedMessage("certificate must be one certificate in PEM") from error
        if public_key_of(made) != self._public:  # 1
            raise CertificateRefused("it is on another key: a renewal keeps the key, and so the requester")
        if not names >= _names(self.certificate) or _uris(names) != _uris(_names(self.certificate)):  # 2
            raise CertificateRefused("it states another role, name or address than the one in use")
        if authority_of(made, self._authorities) != self.authority:  # 3
            raise CertificateRefused("another authority signed it than the one in use")
        if not made.not_valid_before_utc <= self._clock() <= made.not_valid_after_utc:  # 4
            raise CertificateRefused("it is not valid now")
        if not _uses(made) >= _USES:
            raise CertificateRefused("it is not good for both servers and clients")
        return _Pair(certificate=made, pem=pem, key=self._key())

    def _key(self) -> bytes:
        try:
            key = self._key_path.read_bytes()
            fits = serialization.load_pem_private_key(key, None).public_key() == self._public
        except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise CertificateRefused("the key's file cannot be read") from error
        if not fits:
            raise CertificateRefused("the key's file holds another key")
        return key

    def _take(self, pair: _Pair) -> None:
        for context in self._contexts:
            self._load(context, pair)
        self.certificate = pair.certificate

    def _load(self, context: ssl.SSLContext, pair: _Pair) -> None:
        """Loads from memory what was judged: the files may be changing."""
        descriptor = os.memfd_create("certificate")
        try:
            os.write(descriptor, pair.pem + b"\n" + pair.key)
            context.load_cert_chain(f"/proc/self/fd/{descriptor}", password="")  # no prompt on a terminal
        except (OSError, ssl.SSLError) as error:
            raise CertificateRefused(f"{self._path}: cannot be loaded") from error
        finally:
            os.close(descriptor)


async def to_events(entry: AuditEntry) -> None:
    """The `Audit` of a service without a database. *Cancellation:* nothing is left."""
    events.emit("audit", who=entry.who, action=entry.action, subject=entry.subject, reason=entry.reason)


def _names(certificate: x509.Certificate) -> frozenset[x509.GeneralName]:
    try:
        return frozenset(certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except x509.ExtensionNotFound:
        return frozenset()


def _uris(names: frozenset[x509.GeneralName]) -> frozenset[x509.GeneralName]:
    return frozenset(name for name in names if isinstance(name, x509.UniformResourceIdentifier))


def _uses(certificate: x509.Certificate) -> frozenset[x509.ObjectIdentifier]:
    try:
        return frozenset(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except x509.ExtensionNotFound:
        return _USES  # good for everything


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        found = path.stat()
    except OSError:
        return 0, 0, 0
    return found.st_ino, found.st_mtime_ns, found.st_size
