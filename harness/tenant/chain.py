"""The chain of trust from the TPM vendor's root to a guest's AK, with fingerprints, as it is shown to people.

Invariants:
    1. Only what is pinned is shown; nothing here is a check.
    2. Names in certificates are somebody else's words: what is not printable is escaped.

Spec: DESIGN 3.6; docs/protocol.md (tenant registrar, chain).
"""

from __future__ import annotations

import hashlib

from cryptography import x509

from harness.attest import parse_public
from harness.tenant.registrar_store import GuestKeys, PinnedHost
from harness.values import AgentId

_LONGEST = 200
_NOT_RECORDED = "issuers not recorded: the host was enrolled by an older program"


def chain_of(agent_id: AgentId, keys: GuestKeys, host: PinnedHost) -> list[dict[str, str]]:
    """Links from the vendor's root to the guest's AK: what each is, a name, and a fingerprint.

    Args:
        agent_id: the guest.
        keys: its own, pinned.
        host: where it was enrolled.
    """
    issuers = list(reversed(host.ek_chain or ()))
    links = [_certificate("vendor issuer" if place else "vendor root", issuer) for place, issuer in enumerate(issuers)]
    certificate = _certificate("host EK certificate", host.ek_certificate)
    if host.ek_chain is None:
        certificate["name"] += f" ({_NOT_RECORDED})"
    return [
        *links,
        certificate,
        _key("host EK", f"host {host.host_id}", host.ek),
        _key("host AK", f"host {host.host_id}", host.ak),
        _key("vTPM CA key", _subject(host.ca_certificate), host.ca),
        _certificate("guest EK certificate", keys.ek_certificate),
        _key("guest EK", f"guest {agent_id}", keys.ek),
        _key("guest AK", f"guest {agent_id}", keys.ak),
    ]


def _certificate(what: str, der: bytes) -> dict[str, str]:
    return {"what": what, "name": _subject(der), "sha256": hashlib.sha256(der).hexdigest()}


def _key(what: str, name: str, public: bytes) -> dict[str, str]:
    return {"what": what, "name": name, "sha256": hashlib.sha256(parse_public(public).name).hexdigest()}


def _subject(der: bytes) -> str:
    """Subject of a certificate; EK certificates often have none, and are named by issuer and number."""
    try:
        certificate = x509.load_der_x509_certificate(der)
        text = certificate.subject.rfc4514_string()
        if not text:
            text = (
                f"number {certificate.serial_number:x} of {certificate.issuer.rfc4514_string() or 'a CA without name'}"
            )
    except ValueError:
        return "unreadable certificate"
    return "".join(each if each.isprintable() else f"\\x{ord(each):02x}" for each in text)[:_LONGEST]
