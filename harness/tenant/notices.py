"""What a receiver of alarms is told: our own form, and that of Keylime's revocation notifications.

Invariants:
    1. No secret is in a notice: neither V nor nonces, only what the operator's list of alarms shows.
    2. Keylime's form is signed over the bytes of ``msg``: RSA-2048, PSS with MGF1 and SHA-256, the longest salt.

Spec: docs/protocol.md (notifications); Keylime's ``prepare_error`` and ``rsa_sign``.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from harness import errors
from harness.errors import AppraisalError, ConfigError
from harness.pki import now
from harness.private_file import write_private
from harness.tenant.agent_request import AddAgent

_LAYERS = ("guest", "host", "payload", "verifier")
_KEY_BITS = 2048
_VALID = timedelta(days=3650)
_NAME = "revocation notifier"


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """An alarm to be told.

    Args:
        id, at, kind, agent_id, host_id, detail: of its row.
        request: JSON text with which its agent was added; None when the agent is gone.
    """

    id: int
    at: float
    kind: str
    agent_id: str | None
    host_id: str | None
    detail: str
    request: str | None = field(default=None, repr=False)

    @property
    def layer(self) -> str | None:
        """Where it was found; sessions begin their sentence with it."""
        layer, found, _ = self.detail.partition(": ")
        return layer if found and layer in _LAYERS else None

    @property
    def failed_check(self) -> int | None:
        """Number of the check (DESIGN 3.5), for a rejection."""
        kind = getattr(errors, self.kind, None)
        return kind.check if isinstance(kind, type) and issubclass(kind, AppraisalError) and kind.check else None

    def _agent(self) -> AddAgent | None:
        try:
            return None if self.request is None else AddAgent.model_validate_json(self.request)
        except ValueError:  # a row that nobody of ours wrote: the alarm is told all the same
            return None

    def native(self) -> dict[str, object]:
        """Our own form."""
        return {
            "id": self.id,
            "at": self.at,
            "kind": self.kind,
            "agent_id": self.agent_id,
            "host_id": self.host_id,
            "layer": self.layer,
            "failed_check": self.failed_check,
            "detail": self.detail,
        }

    def revocation(self) -> dict[str, object]:
        """Keylime's message, before it is signed."""
        agent = self._agent()
        own = {"host_id": self.host_id, "layer": self.layer, "failed_check": self.failed_check}
        return {
            "type": "revocation",
            "ip": None if agent is None else agent.cloudagent_ip,
            "port": None if agent is None else agent.cloudagent_port,
            "agent_id": self.agent_id,
            "tpm_policy": json.dumps({} if agent is None else agent.guest_policy),
            "meta_data": json.dumps(own),
            "event_time": time.asctime(time.gmtime(self.at)),
            "event_id": f"{self.layer or 'registrar'}.{self.kind}",
            "severity_label": "CRITICAL",
            "context": json.dumps({"message": self.detail}),
        }


class RevocationKey:
    """Signs Keylime's form.

    Args:
        key: RSA.
        certificate: PEM of its self-signed certificate, for the receivers.
    """

    def __init__(self, key: rsa.RSAPrivateKey, certificate: bytes) -> None:
        self._key = key
        self.certificate = certificate

    def signed(self, notice: Notice) -> dict[str, str]:
        """``msg`` and ``signature`` of a notice."""
        message = json.dumps(notice.revocation())
        pss = padding.PSS(mgf=padding.MGF1(hashes.SHA256()), salt_length=padding.PSS.MAX_LENGTH)
        signature = self._key.sign(message.encode(), pss, hashes.SHA256())
        return {"msg": message, "signature": base64.b64encode(signature).decode()}


def load_or_make(path: Path) -> RevocationKey:
    """The key in a file, made where there is none; its certificate is beside it, with the ending ``.crt``.

    Raises:
        ConfigError: the file holds no RSA key, or cannot be read or written.
    """
    try:
        with _alone_in(path.parent):  # registrar and verifier may start at once
            if not path.exists():
                made = rsa.generate_private_key(public_exponent=65537, key_size=_KEY_BITS)
                write_private(path, made.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
            key = load_pem_private_key(path.read_bytes(), None)
            if not isinstance(key, rsa.RSAPrivateKey):
                raise ConfigError(f"{path}: is no RSA key")
            beside = path.with_suffix(".crt")
            if not beside.exists():  # not a secret, but written as whole as the key
                write_private(beside, _certify(key))
            return RevocationKey(key, beside.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read or written: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}: is no private key in PEM") from error


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Only one process at a time works in the folder; the kernel lets go when that ends."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _certify(key: rsa.RSAPrivateKey) -> bytes:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, _NAME)])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now())
        .not_valid_after(now() + _VALID)
        .sign(key, hashes.SHA256())
    )
    return made.public_bytes(Encoding.PEM)
