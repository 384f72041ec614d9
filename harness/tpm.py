"""TPM 2.0 client on the TSS: the one module that knows tpm2-pytss. Services import it lazily.

::

    async with await Tpm.open("swtpm:path=/run/lab/tpm") as tpm:
        transient = await tpm.create_primary(KeyTemplate.AK_P256, auth)
        await tpm.persist(transient, 0x81010002)
        attest, signature = await tpm.quote(0x81010002, auth, qualifying, selection)

Invariants:
    1. ESAPI objects live in one worker thread and never leave it: callers see handles (``int``), bytes and values.
    2. One command is in flight. A call that outlives ``timeout_s`` makes this client unusable for good (`worker`).
    3. After a broken connection the next call connects anew; what is in the TPM is not affected.

Owner: whoever opened it; one event loop.

Spec: TPM 2.0 Part 3; response codes Part 2, 6.6; TCG EK Credential Profile 2.0 (NV attributes, EK policy).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import tpm2_pytss as tss  # type: ignore[import-untyped]
from tpm2_pytss import ESYS_TR

from harness.attest import Public, parse_public
from harness.errors import CapabilityMissing, DeviceFault
from harness.tpm_connection import Connection
from harness.tpm_templates import KeyTemplate
from harness.values import HashAlg, PcrSelection
from harness.worker import CallThread

if TYPE_CHECKING:
    from harness.credential import Credential

__all__ = ["KeyTemplate", "Tpm"]

T = TypeVar("T")

RC_INITIALIZE = 0x100
_RC_HANDLE = 0x08B  # nothing is at this handle
_FORMAT_ONE_ERROR = 0x0BF  # without the number of the handle, parameter or session (Part 2, 6.6.2)
_TRANSIENT_FIRST, _LOADED_SESSION_FIRST, _SAVED_SESSION_FIRST = 0x8000_0000, 0x0200_0000, 0x0300_0000
_NV_CHUNK = 512  # every PC Client TPM takes this much in one TPM2_NV_Read and TPM2_NV_Write
_NV_ATTRIBUTES = 0x4207_2001
"""PPWRITE, WRITEDEFINE, PPREAD, OWNERREAD, AUTHREAD, NO_DA, PLATFORMCREATE: an EK certificate as vendors define it."""
_NO_TICKET = bytes.fromhex("8024 40000007 0000")  # TPMT_TK_HASHCHECK of a digest that the TPM did not make


class Tpm:
    """One TPM, seen by one client. Made by `open`.

    Every method raises `DeviceFault` when the TPM answers with an error and `DeviceUnavailable` when it cannot be
    reached, did not answer in time, or this client is closed.

    *Cancellation:* of any method: the TPM command that was sent is carried out, its result is dropped.
    """

    def __init__(self, tcti: str, *, timeout_s: float) -> None:
        self._connection = Connection(functools.partial(_connect, tcti), tss.TSS2_Exception)
        self._thread = CallThread(f"TPM at {tcti}", timeout_s=timeout_s)

    @classmethod
    async def open(cls, tcti: str, *, timeout_s: float = 30) -> Tpm:
        """Client of the TPM behind this TCTI, connected.

        Args:
            tcti: as in tpm2-tools: ``swtpm:path=/run/lab/tpm``, ``device:/dev/tpmrm0``.
            timeout_s: seconds that a call may take before the client is given up.

        *Cancellation:* nothing stays open.
        """
        tpm = cls(tcti, timeout_s=timeout_s)
        try:
            await tpm._thread.run(functools.partial(tpm._connection.do, "tr_get_name", ESYS_TR.OWNER))
        except BaseException:
            await tpm.close()
            raise
        return tpm

    async def close(self) -> None:
        """Closes the connection; a client that waits for a hung TPM is left to its daemon thread.

        *Cancellation:* the connection is closed by the thread nevertheless.
        """
        await self._thread.finish(self._connection.close, "this TPM client is closed")

    async def __aenter__(self) -> Tpm:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def usable(self) -> bool:
        """False once a call outlived its time or the client was closed."""
        return self._thread.usable

    @property
    def asked_again(self) -> int:
        """How often a command was repeated because the TPM said that it was busy (RETRY, YIELDED, TESTING)."""
        return self._connection.asked_again

    async def _run(self, call: Callable[[Connection], T]) -> T:
        return await self._thread.run(functools.partial(call, self._connection))

    # --- the TPM as a whole ------------------------------------------------------------------------------------

    async def startup(self, *, clear: bool = True) -> None:
        """TPM2_Startup(CLEAR or STATE); a TPM that was started already is left as it is."""

        def call(tpm: Connection) -> None:
            try:
                tpm.do("startup", tss.TPM2_SU.CLEAR if clear else tss.TPM2_SU.STATE)
            except DeviceFault as error:
                if error.response_code != RC_INITIALIZE:
                    raise

        await self._run(call)

    async def shutdown(self, *, clear: bool = True) -> None:
        """TPM2_Shutdown(CLEAR or STATE): what an orderly power-off does first."""
        await self._run(lambda tpm: tpm.do("shutdown", tss.TPM2_SU.CLEAR if clear else tss.TPM2_SU.STATE))

    async def clear(self, *, by_platform: bool = False) -> None:
        """TPM2_Clear by the lockout (or platform) hierarchy with an empty password: all of the owner's is gone."""

        def call(tpm: Connection) -> None:
            if by_platform:
                tpm.do("clear_control", ESYS_TR.PLATFORM, False)  # the owner may have forbidden it
            tpm.do("clear", ESYS_TR.PLATFORM if by_platform else ESYS_TR.LOCKOUT)
            tpm.forget()

        await self._run(call)

    async def flush_transients(self) -> int:
        """Flushes loaded keys and sessions that an earlier client left behind; a TPM has three slots of each.

        Returns:
            How many there were.
        """

        def call(tpm: Connection) -> int:
            tpm.forget()
            flushed = 0
            for first in (_TRANSIENT_FIRST, _LOADED_SESSION_FIRST, _SAVED_SESSION_FIRST):
                _, answer = tpm.do("get_capability", tss.TPM2_CAP.HANDLES, first, 64)
                for handle in [int(handle) for handle in answer.data.handles]:
                    tpm.do("flush_context", tpm.do("tr_from_tpmpublic", handle))
                    flushed += 1
            return flushed

        return await self._run(call)

    async def banks(self) -> frozenset[HashAlg]:
        """PCR banks that are allocated, of those that the protocol knows."""

        def call(tpm: Connection) -> frozenset[HashAlg]:
            _, answer = tpm.do("get_capability", tss.TPM2_CAP.PCRS, 0, 16)
            return frozenset(bank for bank, mask in _entries(answer.data.assignedPCR) if mask)

        return await self._run(call)

    # --- keys --------------------------------------------------------------------------------------------------

    async def create_primary(self, template: KeyTemplate, auth: bytes) -> int:
        """Transient handle of a new primary key; see `KeyTemplate` for hierarchy and attributes.

        The same template and authValue give the same key for as long as the hierarchy is not cleared.

        Args:
            template: what key.
            auth: its authValue; empty for the EK.
        """

        def call(tpm: Connection) -> int:
            public, _ = tss.TPM2B_PUBLIC.unmarshal(template.public(auth))
            sensitive = tss.TPM2B_SENSITIVE_CREATE(tss.TPMS_SENSITIVE_CREATE(userAuth=auth))
            hierarchy = ESYS_TR.ENDORSEMENT if template.in_endorsement_hierarchy else ESYS_TR.OWNER
            return tpm.adopt(tpm.do("create_primary", sensitive, public, hierarchy)[0])

        return await self._run(call)

    async def persist(self, transient: int, handle: int) -> None:
        """Makes a transient key persistent under ``handle``, which must be free, and flushes the transient one."""

        def call(tpm: Connection) -> None:
            tpm.forget(handle)
            tpm.do("evict_control", ESYS_TR.OWNER, tpm.object(transient), handle)
            tpm.do("flush_context", tpm.release(transient))

        await self._run(call)

    async def evict(self, handle: int) -> None:
        """Removes a persistent key."""
        await self._run(lambda tpm: tpm.do("evict_control", ESYS_TR.OWNER, tpm.release(handle), handle))

    async def flush(self, transient: int) -> None:
        """Flushes one transient key."""
        await self._run(lambda tpm: tpm.do("flush_context", tpm.release(transient)))

    async def read_public(self, handle: int) -> Public | None:
        """Public area of a key; None when there is none under this handle.

        Raises:
            MalformedMessage: a key of a kind that the protocol does not know.
        """

        def call(tpm: Connection) -> bytes | None:
            tpm.forget(handle)
            found = _present(tpm, handle)
            return None if found is None else bytes(tpm.do("read_public", found)[0].marshal())

        marshalled = await self._run(call)
        return None if marshalled is None else parse_public(marshalled)

    async def quote(self, handle: int, auth: bytes, qualifying: bytes, selection: PcrSelection) -> tuple[bytes, bytes]:
        """TPM2_Quote with the key's own scheme.

        This client signs whatever qualifying data it is given: the length rule of DESIGN 3.2 is its caller's.

        Returns:
            TPMS_ATTEST exactly as signed, and TPMT_SIGNATURE; both marshalled.
        """

        def call(tpm: Connection) -> tuple[bytes, bytes]:
            selected, _ = tss.TPML_PCR_SELECTION.unmarshal(selection.marshal())
            attest, signature = tpm.do("quote", tpm.object(handle, auth), selected, qualifying)
            return bytes(attest.attestationData), bytes(signature.marshal())

        return await self._run(call)

    async def certify(
        self, handle: int, auth: bytes, signer: int, signer_auth: bytes, qualifying: bytes
    ) -> tuple[bytes, bytes]:
        """TPM2_Certify: ``signer`` states that the key under ``handle`` is in this TPM.

        Returns:
            TPMS_ATTEST exactly as signed, and TPMT_SIGNATURE; both marshalled.
        """

        def call(tpm: Connection) -> tuple[bytes, bytes]:
            certified = tpm.object(handle, auth)
            attest, signature = tpm.do(
                "certify",
                certified,
                tpm.object(signer, signer_auth),
                qualifying,
                tss.TPMT_SIG_SCHEME(scheme=tss.TPM2_ALG.NULL),
            )
            return bytes(attest.attestationData), bytes(signature.marshal())

        return await self._run(call)

    async def sign_digest(self, handle: int, auth: bytes, digest: bytes) -> tuple[int, int]:
        """ECDSA signature (r, s) by a non-restricted key over a digest that the caller computed."""

        def call(tpm: Connection) -> tuple[int, int]:
            scheme, (ticket, _) = (
                tss.TPMT_SIG_SCHEME(scheme=tss.TPM2_ALG.NULL),
                tss.TPMT_TK_HASHCHECK.unmarshal(_NO_TICKET),
            )
            signature = bytes(tpm.do("sign", tpm.object(handle, auth), digest, scheme, ticket).marshal())
            r_size = int.from_bytes(signature[4:6], "big")  # after sigAlg and hash (Part 2, 11.3.4)
            return int.from_bytes(signature[6 : 6 + r_size], "big"), int.from_bytes(signature[8 + r_size :], "big")

        return await self._run(call)

    async def activate_credential(self, ak: int, ak_auth: bytes, ek: int, credential: Credential) -> bytes:
        """TPM2_ActivateCredential; the EK is used by PolicySecret(endorsement) with an empty endorsement password.

        Returns:
            The secret that `make_credential` was given.
        """

        def call(tpm: Connection) -> bytes:
            id_object, _ = tss.TPM2B_ID_OBJECT.unmarshal(credential.id_object)
            secret, _ = tss.TPM2B_ENCRYPTED_SECRET.unmarshal(credential.encrypted_secret)
            keys = tpm.object(ak, ak_auth), tpm.object(ek)
            session = tpm.do(
                "start_auth_session", ESYS_TR.NONE, ESYS_TR.NONE, tss.TPM2_SE.POLICY,
                tss.TPMT_SYM_DEF(algorithm=tss.TPM2_ALG.NULL), tss.TPM2_ALG.SHA256,
            )  # fmt: skip
            try:
                tpm.do("policy_secret", ESYS_TR.ENDORSEMENT, session, expiration=0)
                return bytes(tpm.do("activate_credential", *keys, id_object, secret, ESYS_TR.PASSWORD, session))
            finally:
                tpm.do("flush_context", session)

        return await self._run(call)

    # --- PCRs --------------------------------------------------------------------------------------------------

    async def pcr_read(self, selection: PcrSelection) -> dict[HashAlg, dict[int, bytes]]:
        """Values of the selected PCRs, in as many TPM2_PCR_Read as it takes (8 values come at a time).

        A PCR may be extended between two of these reads; whoever needs one moment compares with a quote's digest.

        Raises:
            CapabilityMissing: a selected bank is not allocated.
        """

        def call(tpm: Connection) -> dict[HashAlg, dict[int, bytes]]:
            values: dict[HashAlg, dict[int, bytes]] = {bank: {} for bank, _ in selection.banks}
            missing = selection
            while missing.banks:
                asked, _ = tss.TPML_PCR_SELECTION.unmarshal(missing.marshal())
                _, selected, digests = tpm.do("pcr_read", asked)
                read = PcrSelection(tuple((bank, mask) for bank, mask in _entries(selected) if mask))
                if not read.banks or not read.within(missing) or len(list(read)) != len(digests):
                    raise CapabilityMissing(f"the TPM does not give PCR values for {missing.banks[0][0].text}")
                for (bank, pcr), digest in zip(read, digests, strict=True):
                    values[bank][pcr] = bytes(digest)
                left = ((bank, mask & ~read.mask(bank)) for bank, mask in missing.banks)
                missing = PcrSelection(tuple((bank, mask) for bank, mask in left if mask))
            return values

        return await self._run(call)

    async def pcr_extend(self, pcr: int, digests: Mapping[HashAlg, bytes]) -> None:
        """TPM2_PCR_Extend with one digest per bank."""
        entries = b"".join(bank.value.to_bytes(2, "big") + digest for bank, digest in digests.items())
        values, _ = tss.TPML_DIGEST_VALUES.unmarshal(len(digests).to_bytes(4, "big") + entries)
        await self._run(lambda tpm: tpm.do("pcr_extend", ESYS_TR(pcr), values))

    async def pcr_reset(self, pcr: int) -> None:
        """TPM2_PCR_Reset; from an application only PCR 16 and 23 can be reset."""
        await self._run(lambda tpm: tpm.do("pcr_reset", ESYS_TR(pcr)))

    # --- NV ----------------------------------------------------------------------------------------------------

    async def nv_read(self, index: int) -> bytes | None:
        """Everything in an NV index, read with its own empty password; None when it is not defined.

        Vendors define indices larger than the certificate in them: what follows the DER is for the caller to cut.
        """

        def call(tpm: Connection) -> bytes | None:
            tpm.forget(index)
            nv = _present(tpm, index)
            if nv is None:
                return None
            size = int(tpm.do("nv_read_public", nv)[0].nvPublic.dataSize)
            chunks = ((offset, min(_NV_CHUNK, size - offset)) for offset in range(0, size, _NV_CHUNK))
            return b"".join(bytes(tpm.do("nv_read", nv, length, offset)) for offset, length in chunks)

        return await self._run(call)

    async def nv_write(self, index: int, data: bytes) -> None:
        """Defines (anew) and writes an NV index as a vendor does at manufacture.

        Needs the platform hierarchy with an empty password: only simulators and factories leave it so.
        """

        def call(tpm: Connection) -> None:
            tpm.forget(index)
            if _present(tpm, index) is not None:
                tpm.do("nv_undefine_space", tpm.release(index), ESYS_TR.PLATFORM)
            area = index.to_bytes(4, "big") + b"\x00\x0b" + _NV_ATTRIBUTES.to_bytes(4, "big") + bytes(2)
            area += len(data).to_bytes(2, "big")
            public, _ = tss.TPM2B_NV_PUBLIC.unmarshal(len(area).to_bytes(2, "big") + area)
            nv = tpm.do("nv_define_space", b"", public, ESYS_TR.PLATFORM)
            for offset in range(0, len(data), _NV_CHUNK):
                tpm.do("nv_write", nv, data[offset : offset + _NV_CHUNK], offset, ESYS_TR.PLATFORM)
            tpm.do("tr_close", nv)

        await self._run(call)


def _present(tpm: Connection, handle: int) -> Any:
    """ESYS object for a key or NV index; None when nothing is there."""
    try:
        return tpm.object(handle)
    except DeviceFault as error:
        if error.response_code & _FORMAT_ONE_ERROR == _RC_HANDLE:
            return None
        raise


def _connect(tcti: str) -> Any:
    # libtss2 writes every error to stderr, expected ones too; an operator's own setting wins.
    os.environ.setdefault("TSS2_LOG", "all+none")
    return tss.ESAPI(tcti)


def _entries(selection: Any) -> list[tuple[HashAlg, int]]:
    """Pairs (bank, mask) of a TPML_PCR_SELECTION, without banks that the protocol does not know."""
    known = {alg.value: alg for alg in HashAlg}
    return [
        (known[int(entry.hash)], int.from_bytes(bytes(entry.pcrSelect)[: entry.sizeofSelect], "little"))
        for entry in selection
        if int(entry.hash) in known
    ]
