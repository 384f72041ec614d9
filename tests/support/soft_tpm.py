"""A TPM in software: the same bytes as a real one, signed by a real key, without a device."""

from __future__ import annotations

import hashlib

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from harness import protocol
from harness.attest import Public, owner_qualified_name, parse_public
from harness.provider.batch import Quote, SealedBatch
from harness.tpm_templates import KeyTemplate
from harness.values import HashAlg, HostId, PcrSelection

_MAGIC, _ST_CERTIFY, _ST_QUOTE = 0xFF544347, 0x8017, 0x8018
_ECDSA, _SHA256 = 0x0018, 0x000B


def sized(data: bytes) -> bytes:
    """TPM2B of ``data``."""
    return len(data).to_bytes(2, "big") + data


def public_of(key: ec.EllipticCurvePrivateKey, template: KeyTemplate = KeyTemplate.AK_P256) -> Public:
    """Public area of a P-256 key, as a TPM that made it from the template would give it."""
    numbers = key.public_key().public_numbers()
    unique = sized(numbers.x.to_bytes(32, "big")) + sized(numbers.y.to_bytes(32, "big"))
    return parse_public(sized(template.public(b"")[2:-4] + unique))


class SoftTpm:
    """PCRs, a clock and one P-256 AK.

    ``before_read`` is called between a quote and the reading of PCR values: a race is made there.
    """

    def __init__(self, *, banks: tuple[HashAlg, ...] = (HashAlg.SHA256, HashAlg.SHA384)) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self.ak = public_of(self._key)
        self.host_id: HostId = protocol.host_id_of(b"\x00\x0b" + hashlib.sha256(self.ak.name).digest())
        self.pcrs = {bank: {pcr: bytes(bank.digest_size) for pcr in range(24)} for bank in banks}
        self.clock_ms = 1_000_000
        self.quotes = 0

    def extend(self, pcr: int, digest: bytes) -> None:
        """Extends a PCR in every bank."""
        for bank, values in self.pcrs.items():
            values[pcr] = bank.digest(values[pcr] + bank.digest(digest))

    def quote(self, qualifying: bytes, selection: PcrSelection) -> tuple[bytes, bytes]:
        """TPMS_ATTEST of a quote, and its TPMT_SIGNATURE."""
        self.quotes += 1
        values = b"".join(self.pcrs[bank][pcr] for bank, pcr in selection)
        return self._attest(_ST_QUOTE, qualifying, selection.marshal() + sized(hashlib.sha256(values).digest()))

    def certify(self, name: bytes, qualifying: bytes) -> tuple[bytes, bytes]:
        """TPMS_ATTEST that a key with this Name is in this TPM, and its TPMT_SIGNATURE."""
        return self._attest(_ST_CERTIFY, qualifying, sized(name) + sized(name))

    def _attest(self, kind: int, qualifying: bytes, attested: bytes) -> tuple[bytes, bytes]:
        attest = (
            _MAGIC.to_bytes(4, "big")
            + kind.to_bytes(2, "big")
            + sized(owner_qualified_name(self.ak))
            + sized(qualifying)
            + self.clock_ms.to_bytes(8, "big")
            + (7).to_bytes(4, "big")
            + (3).to_bytes(4, "big")
            + b"\x01"
            + (0x20260101).to_bytes(8, "big")
            + attested
        )
        r, s = decode_dss_signature(self._key.sign(attest, ec.ECDSA(hashes.SHA256())))
        signature = _ECDSA.to_bytes(2, "big") + _SHA256.to_bytes(2, "big")
        return attest, signature + sized(r.to_bytes(32, "big")) + sized(s.to_bytes(32, "big"))

    def values(self, selection: PcrSelection) -> dict[HashAlg, dict[int, bytes]]:
        """Values of the selected PCRs."""
        return {bank: {pcr: self.pcrs[bank][pcr] for of, pcr in selection if of is bank} for bank, _ in selection.banks}

    def quote_batch(self, batch: SealedBatch) -> Quote:
        """What the host agent's keys would make of a batch."""
        self.clock_ms += 1
        attest, signature = self.quote(protocol.qualifying_data(batch.tree.size, batch.tree.root), batch.selection)
        return Quote(host_id=self.host_id, attest=attest, signature=signature, pcrs=self.values(batch.selection))
