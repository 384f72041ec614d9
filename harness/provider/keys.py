"""The hardware TPM's keys and the few things they are used for: EK, AK and vTPM CA key of one host.

Invariants:
    1. TPM2_Quote is called in one place, `HostKeys._quote`, behind `check_extra_data`: 32 bytes of extraData always
       are a batch whose tree this process built, never what a caller chose.
    2. The AK signs quotes and TPM2_Certify of the CA key; nothing else here uses it.
    3. Two signatures of the AK that are handed out never carry the same millisecond of the TPM's clock.
    4. The values in a `Quote` hash to the digest that the TPM signed.
    5. Keys outlive this process; a second `provision` on the same TPM and state directory finds the same keys.
       A key whose authValue is lost is an error that says what to do, never a silent new key.

Owner: the host agent; calls may be concurrent.

Spec: DESIGN 3.2 (who may compute it), 3.6 (acceptable keys), 4 (PCR values); TCG EK Credential Profile 2.0 (handles,
NV indices 2.2.1.4 and 2.2.1.5); TCG Registry of Reserved TPM 2.0 Handles (owner: 0x81000000 to 0x817FFFFF).
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from cryptography import x509

from harness import protocol
from harness.attest import Public, QuoteInfo, parse_attest
from harness.credential import Credential, check_ak, check_ca_key
from harness.errors import CapabilityMissing, ChallengeFailed, DeviceFault, MalformedMessage, TpmError, UnacceptableKey
from harness.provider import auths as auth_file
from harness.provider.auths import KeyAuths
from harness.provider.batch import Quote, SealedBatch
from harness.provider.clock import Clock, SystemClock
from harness.provider.endorsement import ek_certificates, find_ek
from harness.provider.extra_data import ExtraData, check_extra_data
from harness.provider.tpm_certificate import assemble, to_be_signed
from harness.tpm_templates import KeyTemplate
from harness.values import HashAlg, HostId, PcrSelection, PcrValues

if TYPE_CHECKING:
    from harness.tpm import Tpm

T = TypeVar("T")

AK_HANDLES = {"rsa2048": 0x81014B01, "ecc256": 0x81014B02}
"""Persistent handle of the AK, by the name of its kind in the settings."""
CA_HANDLE = 0x81014B03
_AK_TEMPLATES = {"rsa2048": KeyTemplate.AK_RSA2048, "ecc256": KeyTemplate.AK_P256}
_CLOCK_TICK_S = 0.001
_QUOTE_TRIES = 2  # a PCR may be extended between quote and read once; twice means that something keeps doing it

_WAY_OUT = (
    "restore that file from a backup, or remove the keys (tpm2_evictcontrol -c HANDLE) and enrol this host anew "
    "with every tenant"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostIdentity:
    """Public parts of the host's keys."""

    ek: Public
    ak: Public
    ca: Public
    ek_certificates: tuple[bytes, ...] = field(repr=False)
    host_id: HostId
    banks: frozenset[HashAlg]


class HostKeys:
    """The keys of one host, found or made by `provision`.

    Args:
        tpm: the TPM that holds them; nobody else uses its AK.
        identity: their public parts.
        auths: their authValues.
        handles: persistent handles of EK and AK.
        clock: for the pause between two signatures.
    """

    def __init__(
        self, tpm: Tpm, identity: HostIdentity, auths: KeyAuths, *, handles: tuple[int, int], clock: Clock
    ) -> None:
        self._tpm = tpm
        self._auths = auths
        self._ek_handle, self._ak_handle = handles
        self._clock = clock
        self._signing = asyncio.Lock()
        self._signed_s = float("-inf")
        self._known: dict[tuple[HashAlg, int], bytes] = {}
        self._quotes_made = 0
        self._races = 0
        self.identity = identity

    @classmethod
    async def provision(cls, tpm: Tpm, state_dir: Path, *, ak: str, clock: Clock | None = None) -> HostKeys:
        """Finds the host's keys, or makes them; the same ones after each restart.

        Args:
            tpm: started, and not in use by anybody else.
            state_dir: where the authValues are kept.
            ak: ``rsa2048`` or ``ecc256``.
            clock: for the pause between two signatures.

        Raises:
            CapabilityMissing: a key in the TPM cannot be used; the text says why and what to do.
            ConfigError: the file with the authValues cannot be used.
            TpmError: the TPM did not do what it was asked.

        *Cancellation:* what was made so far stays and is found the next time.
        """
        await tpm.flush_transients()
        auths = auth_file.load(state_dir)
        if auths is None:
            await _refuse_orphans(tpm, state_dir)
            auths = auth_file.make(state_dir)
        certificates = await ek_certificates(tpm)
        ek_handle, ek = await find_ek(tpm, certificates)
        ak_handle = AK_HANDLES[ak]
        ak_public = await _find_or_make(tpm, ak_handle, _AK_TEMPLATES[ak], auths.ak, check_ak)
        ca_public = await _find_or_make(tpm, CA_HANDLE, KeyTemplate.CA_P256, auths.ca, check_ca_key)
        identity = HostIdentity(
            ek=ek,
            ak=ak_public,
            ca=ca_public,
            ek_certificates=certificates,
            host_id=protocol.host_id_of(ek.name),
            banks=await tpm.banks(),
        )
        keys = cls(tpm, identity, auths, handles=(ek_handle, ak_handle), clock=clock or SystemClock())
        await keys._prove_auths(state_dir)
        return keys

    async def _prove_auths(self, state_dir: Path) -> None:
        """One use of both keys: a wrong authValue shows at the start, not with the first tenant."""
        try:
            await self.certify_ca(secrets.token_bytes(32))
        except DeviceFault as error:
            raise CapabilityMissing(
                f"the persistent keys do not open with the authValues in {state_dir / auth_file.FILE_NAME}: "
                f"{_WAY_OUT} ({error.detail})"
            ) from error

    @property
    def usable(self) -> bool:
        """False when the TPM client has been given up: no later quote can succeed."""
        return self._tpm.usable

    @property
    def quotes_made(self) -> int:
        """TPM2_Quote commands that the TPM has carried out, for whatever came of them."""
        return self._quotes_made

    @property
    def races(self) -> int:
        """Quotes that were of no use, because a PCR was extended before its value was read."""
        return self._races

    @property
    def asked_again(self) -> int:
        """TPM commands that were repeated because the TPM was busy."""
        return self._tpm.asked_again

    # --- quotes ---------------------------------------------------------------------------------------------------

    async def quote_batch(self, batch: SealedBatch) -> Quote:
        """Quote over the qualifying data of the batch's own tree and the union of its selections.

        Raises:
            TpmError: the TPM made no quote, or a PCR was extended during each of two quotes.

        *Cancellation:* a command that was sent is carried out, and its result is dropped.
        """
        qualifying = protocol.qualifying_data(batch.tree.size, batch.tree.root)
        return await self._quote(ExtraData.NATIVE_BATCH, qualifying, batch.selection)

    async def quote_raw(self, nonce: bytes, selection: PcrSelection) -> Quote:
        """Quote over a nonce that the caller chose (Keylime pass-through).

        Args:
            nonce: 1 to 31 bytes; no caller can choose 32, which would pass for a batch.
            selection: PCRs to quote.

        Raises:
            MalformedMessage: a nonce of another length.
            TpmError: as in `quote_batch`.

        *Cancellation:* as in `quote_batch`.
        """
        return await self._quote(ExtraData.RAW_NONCE, nonce, selection)

    async def _quote(self, kind: ExtraData, extra_data: bytes, selection: PcrSelection) -> Quote:
        check_extra_data(kind, extra_data)
        for tpm_quotes in range(1, _QUOTE_TRIES + 1):
            attest, signature = await self._sign(
                lambda: self._tpm.quote(self._ak_handle, self._auths.ak, extra_data, selection)
            )
            self._quotes_made += 1
            pcrs = await self._values(attest, selection)
            if pcrs is not None:
                return Quote(
                    host_id=self.identity.host_id,
                    attest=attest,
                    signature=signature,
                    pcrs=pcrs,
                    tpm_quotes=tpm_quotes,
                )
            self._races += 1
        raise TpmError(f"a PCR was extended during each of {_QUOTE_TRIES} quotes")

    async def _values(self, attest: bytes, selection: PcrSelection) -> PcrValues | None:
        """Values that hash to the signed digest: those read earlier if they still do, else as read now."""
        attested = parse_attest(attest).attested
        signed = attested.pcr_digest if isinstance(attested, QuoteInfo) else b""
        if self._digest(selection) != signed:
            for bank, values in (await self._tpm.pcr_read(selection)).items():
                self._known |= {(bank, pcr): value for pcr, value in values.items()}
            if self._digest(selection) != signed:
                return None
        pcrs: dict[HashAlg, dict[int, bytes]] = {bank: {} for bank, _ in selection.banks}
        for bank, pcr in selection:
            pcrs[bank][pcr] = self._known[bank, pcr]
        return pcrs

    def _digest(self, selection: PcrSelection) -> bytes | None:
        """PcrDigest that the known values would have: by the hash of the AK's scheme (Part 2, 10.12.1)."""
        if any(entry not in self._known for entry in selection):
            return None
        scheme_hash = self.identity.ak.scheme_hash or HashAlg.SHA256
        return scheme_hash.digest(b"".join(self._known[entry] for entry in selection))

    async def _sign(self, command: Callable[[], Awaitable[T]]) -> T:
        """One signature of the AK, at least a tick of the TPM's clock after the one before (check 10 asks for >)."""
        async with self._signing:
            early_s = self._signed_s + _CLOCK_TICK_S - self._clock.monotonic()
            if early_s > 0:
                await self._clock.sleep(early_s)
            try:
                return await command()
            finally:
                self._signed_s = self._clock.monotonic()

    # --- enrolment --------------------------------------------------------------------------------------------------

    async def certify_ca(self, nonce: bytes) -> tuple[bytes, bytes]:
        """TPM2_Certify of the vTPM CA key by the AK.

        Args:
            nonce: the tenant's; goes into the qualifying data with a label, never raw.

        Returns:
            TPMS_ATTEST as signed, and TPMT_SIGNATURE.

        Raises:
            TpmError: the TPM did not certify.

        *Cancellation:* a command that was sent is carried out, and its result is dropped.
        """
        qualifying = protocol.certify_qualifying(nonce, self.identity.ca.name)
        return await self._sign(
            lambda: self._tpm.certify(CA_HANDLE, self._auths.ca, self._ak_handle, self._auths.ak, qualifying)
        )

    async def activate(self, credential: Credential, requester: bytes) -> bytes:
        """Answer to a tenant's enrolment challenge; the secret itself never leaves this process.

        Args:
            credential: made for our EK and AK by the tenant's registrar.
            requester: SHA-256 of the public key in the certificate of the connection that brought it.

        Raises:
            ChallengeFailed: the credential is not for these keys, or is damaged; one answer for all.
            DeviceUnavailable: the TPM cannot be reached.

        *Cancellation:* as in `certify_ca`.
        """
        try:
            secret = await self._tpm.activate_credential(self._ak_handle, self._auths.ak, self._ek_handle, credential)
        except DeviceFault as error:
            raise ChallengeFailed from error
        return protocol.enrol_answer(
            secret, requester=requester, host_id=self.identity.host_id, ak_name=self.identity.ak.name
        )

    async def sign_certificate(self, builder: x509.CertificateBuilder) -> bytes:
        """DER certificate signed by the vTPM CA key (ECDSA P-256, SHA-256).

        Args:
            builder: everything but the signature.

        Raises:
            TpmError: the TPM did not sign.

        *Cancellation:* as in `certify_ca`.
        """
        tbs, digest = to_be_signed(builder)
        return assemble(tbs, await self._tpm.sign_digest(CA_HANDLE, self._auths.ca, digest))


async def _refuse_orphans(tpm: Tpm, state_dir: Path) -> None:
    """Keys without the file with their authValues are of no use, and must not be replaced without a word."""
    for handle in (*AK_HANDLES.values(), CA_HANDLE):
        if await _read(tpm, handle) is not None:
            raise CapabilityMissing(
                f"the TPM holds a key of this host at 0x{handle:08x}, but {state_dir / auth_file.FILE_NAME} with its "
                f"authValue is gone: {_WAY_OUT}"
            )


async def _find_or_make(
    tpm: Tpm, handle: int, template: KeyTemplate, auth: bytes, check: Callable[[Public], None]
) -> Public:
    public = await _read(tpm, handle)
    if public is None:
        await tpm.persist(await tpm.create_primary(template, auth), handle)
        public = await _read(tpm, handle)
    if public is None:
        raise CapabilityMissing(f"the TPM did not keep a key at 0x{handle:08x}")
    try:
        check(public)
    except UnacceptableKey as error:
        raise CapabilityMissing(f"the key at 0x{handle:08x} is not ours: {error.detail}; {_WAY_OUT}") from error
    return public


async def _read(tpm: Tpm, handle: int) -> Public | None:
    try:
        return await tpm.read_public(handle)
    except MalformedMessage as error:
        raise CapabilityMissing(f"the key at 0x{handle:08x} is of an unknown kind: {error.detail}") from error
