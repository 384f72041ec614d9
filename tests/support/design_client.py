"""A tenant's client written from docs/design.md alone: asks for a host quote and verifies it. No harness in it.

Run as a program it reads the object of ``harness lab status --json`` on standard input, asks for one quote as the first
tenant, and prints ``{"verified": true, ...}``. The comments name the sections of the design.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import secrets
import ssl
import sys
import urllib.parse
import uuid
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

PCRS = range(8)


class Refused(Exception):
    """The quote is not to be believed."""


def must(condition: bool, why: str) -> None:
    """Ends the verification with a reason."""
    if not condition:
        raise Refused(why)


def tpm2b(data: bytes) -> bytes:
    """3.2: 2-byte big-endian length, then the bytes."""
    return len(data).to_bytes(2, "big") + data


class Reader:
    """Reads TPM structures (TPM 2.0 Part 2)."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        must(self.at + size <= len(self.data), "structure is cut short")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def sized(self) -> bytes:
        return self.take(self.number(2))


def get(tenant: dict[str, Any], path: str) -> Any:
    """Results of a call to the provider verifier (3.3: Keylime's envelope)."""
    context = ssl.create_default_context(cafile=tenant["ca"])
    context.load_cert_chain(tenant["client_cert"], tenant["client_key"])
    at = urllib.parse.urlsplit(tenant["provider_verifier"])
    connection = http.client.HTTPSConnection(at.hostname or "", at.port, context=context, timeout=120)
    try:
        connection.request("GET", path)
        answer = json.loads(connection.getresponse().read())
    finally:
        connection.close()
    must(answer["code"] == 200, f"the provider answered {answer['status']}")
    return answer["results"]


def name_of(public: bytes) -> bytes:
    """Name of a TPM2B_PUBLIC: nameAlg and digest; SHA-256 here."""
    area = Reader(public).sized()
    must(int.from_bytes(area[2:4], "big") == 0x000B, "nameAlg is not SHA-256")
    return b"\x00\x0b" + hashlib.sha256(area).digest()


def rsa_key(public: bytes) -> rsa.RSAPublicKey:
    """Key of a TPM2B_PUBLIC that is an RSA signing key with RSASSA and SHA-256."""
    reader = Reader(Reader(public).sized())
    must(reader.number(2) == 0x0001, "AK is not RSA")
    reader.take(6)  # nameAlg, attributes
    reader.sized()  # authPolicy
    must(reader.number(2) == 0x0010, "AK has a symmetric algorithm")
    must((reader.number(2), reader.number(2)) == (0x0014, 0x000B), "AK's scheme is not RSASSA with SHA-256")
    reader.take(2)
    exponent = reader.number(4) or 65537
    return rsa.RSAPublicNumbers(exponent, int.from_bytes(reader.sized(), "big")).public_key()


def requester_of(certificate: str) -> bytes:
    """3.2: SHA-256 of the SubjectPublicKeyInfo of our own certificate."""
    with open(certificate, "rb") as file:
        key = x509.load_pem_x509_certificate(file.read()).public_key()
    der = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(key.public_bytes(*der)).digest()


def selection_of(pcrs: range) -> bytes:
    """TPML_PCR_SELECTION of one bank, SHA-256, sizeofSelect 3."""
    mask = sum(1 << pcr for pcr in pcrs)
    return (1).to_bytes(4, "big") + b"\x00\x0b\x03" + mask.to_bytes(3, "little")


def root_of(leaf: bytes, proof: dict[str, Any]) -> bytes:
    """RFC 9162, 2.1.3.2."""
    index, last, node = proof["leaf_index"], proof["tree_size"] - 1, leaf
    must(0 <= index <= last, "leaf index outside the tree")
    for sibling in map(bytes.fromhex, proof["hashes"]):
        must(last > 0, "proof too long")
        if index & 1 or index == last:
            node = hashlib.sha256(b"\x01" + sibling + node).digest()
            while not index & 1 and index:
                index, last = index >> 1, last >> 1
        else:
            node = hashlib.sha256(b"\x01" + node + sibling).digest()
        index, last = index >> 1, last >> 1
    must(last == 0, "proof too short")
    return node


def quote(tenant: dict[str, Any]) -> dict[str, Any]:
    """Asks for a host quote (3.1) and verifies it (3.5, checks 2 to 8)."""
    host_id = tenant["host_id"]
    identity = get(tenant, f"/v1/hosts/{host_id}/identity")
    ek_name = name_of(base64.b64decode(identity["ek"]))
    raw = bytearray(hashlib.sha256(b"kvm-deep-attestation/v1/host" + ek_name).digest()[:16])
    raw[6], raw[8] = raw[6] & 0x0F | 0x80, raw[8] & 0x3F | 0x80
    must(str(uuid.UUID(bytes=bytes(raw))) == host_id, "host_id does not follow from the EK (3.6)")
    ak = base64.b64decode(identity["ak"])

    nonce, mask = secrets.token_bytes(32), sum(1 << pcr for pcr in PCRS)
    asked = {"nonce": nonce.hex(), "mask": f"{mask:#x}", "hash_alg": "sha256", "host_id": host_id}
    answer = get(tenant, f"/v1/verifier?{urllib.parse.urlencode(asked)}")
    must(answer["host_id"] == host_id, "check 2: another host")

    fields = (nonce, selection_of(PCRS), requester_of(tenant["client_cert"]), b"", b"", b"")
    leaf = hashlib.sha256(b"\x00kvm-deep-attestation/v1/leaf" + b"".join(map(tpm2b, fields))).digest()
    root = root_of(leaf, answer["proof"])
    size = answer["proof"]["tree_size"].to_bytes(8, "big")
    qualifying = hashlib.sha256(b"kvm-deep-attestation/v1/root" + size + root).digest()

    attest = base64.b64decode(answer["attest"], validate=True)
    reader = Reader(attest)
    must((reader.number(4), reader.number(2)) == (0xFF544347, 0x8018), "check 4: not a quote of a TPM")
    signer = reader.sized()
    must(secrets.compare_digest(reader.sized(), qualifying), "check 5: our nonce is not in it")
    owner_primary = b"\x00\x0b" + hashlib.sha256(b"\x40\x00\x00\x01" + name_of(ak)).digest()
    must(signer == owner_primary, "check 6: signed by another key")
    reader.take(17 + 8)  # clockInfo, firmwareVersion
    must(reader.number(4) == 1, "check 4: more banks than were asked for in this lab")
    must((reader.number(2), reader.number(1)) == (0x000B, 3), "check 4: another bank")
    signed = int.from_bytes(reader.take(3), "little")
    digest = reader.sized()
    must(reader.at == len(attest), "check 4: trailing bytes")

    signature = Reader(base64.b64decode(answer["signature"], validate=True))
    must((signature.number(2), signature.number(2)) == (0x0014, 0x000B), "check 6: another signature scheme")
    rsa_key(ak).verify(signature.sized(), attest, padding.PKCS1v15(), hashes.SHA256())
    must(signed & mask == mask, "check 7: not every PCR was signed")
    values = {int(pcr): bytes.fromhex(value) for pcr, value in answer["pcrs"]["sha256"].items()}
    must(sum(1 << pcr for pcr in values) == signed, "check 8: values are not those of the signed selection")
    joined = b"".join(values[pcr] for pcr in sorted(values))
    must(digest == hashlib.sha256(joined).digest(), "check 8: values do not give the signed digest")
    return {"verified": True, "tree_size": answer["proof"]["tree_size"], "pcr0": values[0].hex()}


if __name__ == "__main__":
    print(json.dumps(quote(json.load(sys.stdin)["tenants"][0])))
