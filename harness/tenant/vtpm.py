"""The vTPM as the guest agent uses it: EK and its certificate, AK, and quotes that vouch for the transport key.

Invariants:
    1. AK and authValue outlive the agent: a second `provision` finds the same AK, or stops and says why.
    2. A quote, the PCR values that go with it and PCR 16 are of one critical section; values that do not hash to the
       signed digest are never handed out.
    3. The AK signs TPM2_Quote with the caller's nonce of 1 to 31 bytes, and nothing else (DESIGN 3.2: 32 bytes and
       more are batches).
    4. PCR 16 holds H(0 ‖ H(NK)) whenever a quote is made.

Owner: the guest agent; calls may be concurrent.

Spec: DESIGN 3.5 (guest evidence), 3.6 (noDA, authValue); TCG EK Credential Profile 2.0 (0x81010001, NV 0x01C00002);
Keylime's agent (PCR 16).
"""

from __future__ import annotations

import asyncio
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.attest import Public, QuoteInfo, parse_attest
from harness.credential import Credential, check_ak
from harness.errors import CapabilityMissing, ConfigError, MalformedMessage
from harness.tpm_templates import KeyTemplate
from harness.values import HashAlg, PcrSelection, PcrValues

if TYPE_CHECKING:
    from harness.tpm import Tpm

EK_HANDLE = 0x8101_0001
AK_HANDLE = 0x8101_4B11
EK_CERTIFICATE_INDEX = 0x01C0_0002
TRANSPORT_KEY_PCR = 16
BANK = HashAlg.SHA256
_AUTH_FILE = "ak-auth"
_AUTH_SIZE = 32
_LONGEST_NONCE = 31
_TRIES = 3  # a PCR may be extended between the quote and the read


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestQuote:
    """A quote and exactly the PCR values that it signs."""

    attest: bytes
    signature: bytes
    pcrs: PcrValues


class GuestTpm:
    """The vTPM with its keys found or made. Made by `provision`."""

    def __init__(self, tpm: Tpm, *, ek: Public, ek_certificate: bytes, ak: Public, auth: bytes) -> None:
        self._tpm = tpm
        self._auth = auth
        self._using = asyncio.Lock()
        self._transport_digest: bytes | None = None
        self.ek = ek
        self.ek_certificate = ek_certificate
        self.ak = ak

    @classmethod
    async def provision(cls, tpm: Tpm, state_dir: Path) -> GuestTpm:
        """Finds the vTPM's keys, or makes the AK; the same ones after each restart.

        Args:
            tpm: started; nobody else uses its AK.
            state_dir: where the AK's authValue is kept.

        Raises:
            CapabilityMissing: no EK certificate, or an AK whose authValue is lost.
            ConfigError: the file with the authValue cannot be used.
            TpmError: the vTPM did not do what it was asked.

        *Cancellation:* what was made so far stays and is found the next time.
        """
        await tpm.flush_transients()
        raw = await tpm.nv_read(EK_CERTIFICATE_INDEX)
        if raw is None:
            raise CapabilityMissing("the vTPM has no EK certificate (NV 0x01C00002); it was not made by our provider")
        ek = await _find_or_make_ek(tpm)
        ak, auth = await _find_or_make_ak(tpm, state_dir)
        return cls(tpm, ek=ek, ek_certificate=cut_der(raw), ak=ak, auth=auth)

    async def vouch_for(self, transport_key_pem: bytes) -> None:
        """Binds NK to all later quotes: PCR 16 is reset and extended with its digest."""
        async with self._using:
            self._transport_digest = BANK.digest(transport_key_pem)
            await self._mark()

    async def activate(self, credential: Credential) -> bytes:
        """Secret of a challenge made for this EK and AK.

        Raises:
            DeviceFault: it was made for other keys.
        """
        async with self._using:
            return await self._tpm.activate_credential(AK_HANDLE, self._auth, EK_HANDLE, credential)

    async def quote(self, nonce: bytes, mask: int) -> GuestQuote:
        """Quote over these PCRs and PCR 16, for a verifier's nonce.

        Raises:
            MalformedMessage: nonce of another length than 1 to 31 bytes.
            CapabilityMissing: PCRs kept changing while they were read.
            TpmError: the vTPM did not do what it was asked.

        *Cancellation:* the quote is dropped.
        """
        if not 1 <= len(nonce) <= _LONGEST_NONCE:
            raise MalformedMessage(f"nonce must have 1 to {_LONGEST_NONCE} bytes")
        selection = PcrSelection.of(BANK, mask | 1 << TRANSPORT_KEY_PCR)
        async with self._using:
            for _ in range(_TRIES):
                attest, signature = await self._tpm.quote(AK_HANDLE, self._auth, nonce, selection)
                values = await self._tpm.pcr_read(selection)
                if not self._marked(values):
                    await self._mark()  # somebody in the guest reset or extended PCR 16: NK must not lose its quote
                elif self._digest(values, selection) == _signed_digest(attest):
                    return GuestQuote(attest=attest, signature=signature, pcrs=values)
        raise CapabilityMissing("the PCRs changed each time while they were quoted")

    def _digest(self, values: PcrValues, selection: PcrSelection) -> bytes:
        scheme_hash = self.ak.scheme_hash or BANK
        return scheme_hash.digest(b"".join(values[bank][pcr] for bank, pcr in selection))

    def _marked(self, values: PcrValues) -> bool:
        if self._transport_digest is None:
            return True
        return values[BANK][TRANSPORT_KEY_PCR] == BANK.digest(bytes(BANK.digest_size) + self._transport_digest)

    async def _mark(self) -> None:
        if self._transport_digest is not None:
            await self._tpm.pcr_reset(TRANSPORT_KEY_PCR)
            await self._tpm.pcr_extend(TRANSPORT_KEY_PCR, {BANK: self._transport_digest})


def _signed_digest(attest: bytes) -> bytes:
    attested = parse_attest(attest).attested
    return attested.pcr_digest if isinstance(attested, QuoteInfo) else b""


async def _find_or_make_ek(tpm: Tpm) -> Public:
    found = await tpm.read_public(EK_HANDLE)
    if found is None:
        await tpm.persist(await tpm.create_primary(KeyTemplate.EK_RSA2048, b""), EK_HANDLE)
        found = await tpm.read_public(EK_HANDLE)
    if found is None:
        raise CapabilityMissing("the vTPM does not keep its EK")
    return found


async def _find_or_make_ak(tpm: Tpm, state_dir: Path) -> tuple[Public, bytes]:
    auth = await asyncio.to_thread(_load_auth, state_dir)
    found = await tpm.read_public(AK_HANDLE)
    if found is not None and auth is None:
        raise CapabilityMissing(
            f"the vTPM has an AK at {AK_HANDLE:#x} and {state_dir / _AUTH_FILE} with its authValue is lost; "
            "restore it, or remove the key and enrol the guest anew"
        )
    if auth is None:
        auth = await asyncio.to_thread(_make_auth, state_dir)
    if found is None:
        await tpm.persist(await tpm.create_primary(KeyTemplate.AK_P256, auth), AK_HANDLE)
        found = await tpm.read_public(AK_HANDLE)
    if found is None:
        raise CapabilityMissing("the vTPM does not keep its AK")
    check_ak(found)
    return found, auth


def _load_auth(state_dir: Path) -> bytes | None:
    path = state_dir / _AUTH_FILE
    try:
        auth = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    if len(auth) != _AUTH_SIZE:
        raise ConfigError(f"{path}: must hold {_AUTH_SIZE} bytes; restore it")
    return auth


def _make_auth(state_dir: Path) -> bytes:
    """A new authValue, on the disk before a key is made with it."""
    auth = secrets.token_bytes(_AUTH_SIZE)
    path = state_dir / _AUTH_FILE
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(auth)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error
    return auth


def cut_der(data: bytes) -> bytes:
    """One DER value from the start of an NV index, which may be larger than what is in it.

    Raises:
        CapabilityMissing: no definite-length SEQUENCE that fits.
    """
    if len(data) >= 4 and data[0] == 0x30:
        head, size = 2, data[1]
        if size & 0x80:
            head += size & 0x7F
            size = int.from_bytes(data[2:head], "big")
        if head <= 6 and head + size <= len(data):
            return data[: head + size]
    raise CapabilityMissing("the vTPM's EK certificate is not DER")
