"""The exception tree: every error that a caller may handle.

::

    HarnessError                  root; never raised itself
      ConfigError                 bad settings or topology; exit code 2
      ProtocolError               MalformedMessage, UnsupportedVersion, MessageTooLarge
      TransportError              PeerUnreachable, DeadlineExceeded, CertificateExpired  (retryable), PeerRefusedUs,
                                  LocalRefusal
      Overloaded                  PoolFull, ShareExhausted, WouldBeLate, TooManyConnections, ShuttingDown, NotReady
                                  (retryable, retry_after_s)
      Refused                     NotYourGuest (unknown ones too), GuestNotHere, SelectionNotAllowed, AccessDenied
      BatchFailed                 carries batch id and cause                           (retryable)
      TpmError                    DeviceUnavailable, DeviceFault (response code), CapabilityMissing
      EnrolmentError              UnacceptableKey, CertificateRefused, ChallengeFailed, KeyChanged, CloneSuspected
      AppraisalError              one class per failure, each with the number of its check (DESIGN 3.5)
      StoreError                  the database cannot be used
      SimulationError             SimulatorMissing, SimulatorCrashed, GuestDidNotStart
    IllegalTransition             outside the tree on purpose: a bug of ours, never retried, never a verdict

Invariants:
    1. Every error says in one sentence what is wrong; ``detail`` is that sentence.
    2. ``retryable`` is a property of the class, never of the place that catches it.
    3. An AppraisalError is a finding: it is never retryable.
"""

from __future__ import annotations

from typing import ClassVar


class HarnessError(Exception):
    """Root of all errors of the harness; never raised itself.

    Args:
        detail: one sentence that says what is wrong, where, and if possible what to do.
    """

    retryable: ClassVar[bool] = False

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


# --- settings ---------------------------------------------------------------------------------------------


class ConfigError(HarnessError):
    """Settings, topology or a file named by them cannot be used."""


# --- what came over the wire --------------------------------------------------------------------------------


class ProtocolError(HarnessError):
    """A peer sent something that the protocol does not allow."""


class MalformedMessage(ProtocolError):
    """Bytes or JSON that do not have the required form."""


class UnsupportedVersion(ProtocolError):
    """The peer speaks a version that we do not."""


class MessageTooLarge(ProtocolError):
    """A message above its size limit."""


# --- transport ----------------------------------------------------------------------------------------------


class TransportError(HarnessError):
    """The peer could not be asked, or did not answer as a service of ours."""


class PeerUnreachable(TransportError):
    """No connection, a broken one, or an answer that says "later" (408, 5xx)."""

    retryable = True


class DeadlineExceeded(TransportError):
    """No complete answer in time."""

    retryable = True


class CertificateExpired(TransportError):
    """The certificate of a connection has expired: nothing is done on it until its owner shows a renewed one."""

    retryable = True


class PeerRefusedUs(TransportError):
    """The peer answered 4xx: it understood, and says that our request is wrong.

    Args:
        detail: the sentence the peer gave.
        status: the HTTP status.
        error: the peer's error name, or None when it gave none.
    """

    def __init__(self, detail: str, *, status: int, error: str | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.error = error


class LocalRefusal(TransportError):
    """A service behind a local socket understood, and refused.

    Args:
        detail: the sentence it gave.
        error: its error's name.
    """

    def __init__(self, detail: str, *, error: str) -> None:
        super().__init__(detail)
        self.error = error


# --- overload -----------------------------------------------------------------------------------------------


class Overloaded(HarnessError):
    """The service cannot take the request now.

    Args:
        detail: what is full.
        retry_after_s: seconds after which a new try makes sense.
    """

    retryable = True

    def __init__(self, detail: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(detail)
        self.retry_after_s = retry_after_s


class PoolFull(Overloaded):
    """The open pool, or the number of pools, is at its bound."""


class ShareExhausted(Overloaded):
    """This tenant has as many requests waiting as it may."""


class WouldBeLate(Overloaded):
    """The request cannot be served in the time in which an answer is of use: refused at once rather than late."""


class TooManyConnections(Overloaded):
    """This party has as many connections open as it may, or the service has."""


class ShuttingDown(Overloaded):
    """The service is stopping; waiters are released with this error."""


class NotReady(Overloaded):
    """The service does not know enough yet, for example which guests run here."""


# --- refusals -----------------------------------------------------------------------------------------------


class Refused(HarnessError):
    """The request is well-formed and is not granted."""


class NotYourGuest(Refused):
    """An unknown guest, or one of another tenant; the same answer for both, so that there is no oracle."""


class GuestNotHere(Refused):
    """The tenant's own guest does not run on this host now, or runs with another vTPM."""


class SelectionNotAllowed(Refused):
    """A PCR outside the tenant's allowlist on this host."""


class AccessDenied(Refused):
    """The certificate's role or authority may not make this call."""


class NotFound(Refused):
    """A record that the caller names does not exist."""


class Conflict(Refused):
    """The record exists already, in a state that this call does not change."""


# --- batching and TPM -----------------------------------------------------------------------------------------


class BatchFailed(HarnessError):
    """The TPM, or a check around it, failed for one batch; all its waiters get this error.

    Args:
        detail: what failed.
        batch_id: the batch, as in the answer's ``batch.id``.
    """

    retryable = True

    def __init__(self, detail: str, *, batch_id: str) -> None:
        super().__init__(detail)
        self.batch_id = batch_id


class TpmError(HarnessError):
    """The TPM did not do what it was asked."""


class DeviceUnavailable(TpmError):
    """The TPM cannot be reached, or did not answer in time."""

    retryable = True


class DeviceFault(TpmError):
    """The TPM answered with an error.

    Args:
        detail: the decoded response code.
        response_code: TPM_RC as the TPM gave it (TPM 2.0 Part 2, 6.6).
    """

    def __init__(self, detail: str, *, response_code: int) -> None:
        super().__init__(detail)
        self.response_code = response_code


class CapabilityMissing(TpmError):
    """The TPM lacks an algorithm, bank or object that we need."""


# --- enrolment ----------------------------------------------------------------------------------------------


class EnrolmentError(HarnessError):
    """A key or certificate may not be pinned."""


class UnacceptableKey(EnrolmentError):
    """The public area does not have the attributes that DESIGN 3.6 asks of its role."""


class CertificateRefused(EnrolmentError):
    """The certificate does not chain to the pinned key, or says the wrong thing."""


class ChallengeFailed(EnrolmentError):
    """The answer to a challenge is wrong, late or repeated; one text for all, so that there is no oracle."""

    def __init__(self) -> None:
        super().__init__("the challenge was not answered correctly in time")


class KeyChanged(EnrolmentError):
    """Another key, certificate or host than the pinned one: an alarm for the operator, never a silent update."""


class CloneSuspected(EnrolmentError):
    """One key under two identities, or in two roles."""


# --- appraisal ------------------------------------------------------------------------------------------------


class AppraisalError(HarnessError):
    """Evidence is not believed. ``check`` is the number in DESIGN 3.5."""

    check: ClassVar[int] = 0


class MalformedEvidence(AppraisalError):
    """JSON types, bounds or encodings (check 1)."""

    check = 1


class WrongHost(AppraisalError):
    """Evidence of another host than the one this guest is enrolled under (check 2)."""

    check = 2


class InclusionProofInvalid(AppraisalError):
    """Index, size or length of the inclusion path (check 3)."""

    check = 3


class NotATpmQuote(AppraisalError):
    """The attest does not parse completely as a quote made inside a TPM (check 4)."""

    check = 4


class QualifyingDataMismatch(AppraisalError):
    """The quote was not made for our request (check 5)."""

    check = 5


class UntrustedKey(AppraisalError):
    """The pinned AK is not acceptable, or another key signed (check 6)."""

    check = 6


class QuoteSignatureInvalid(AppraisalError):
    """The signature does not parse, or does not verify over the received bytes (check 6)."""

    check = 6


class SelectionNotCovered(AppraisalError):
    """The signed selection does not cover what we asked for (check 7)."""

    check = 7


class PcrDigestMismatch(AppraisalError):
    """The values are not exactly the signed selection, or do not hash to the signed digest (check 8)."""

    check = 8


class ReferenceValueMismatch(AppraisalError):
    """A PCR does not have an allowed value, or the policy is missing, empty or wider than the request (check 9)."""

    check = 9


class HostRebooted(AppraisalError):
    """Reset count, restart count or firmware version differ from the baseline (check 10)."""

    check = 10


class ClockNotSafe(AppraisalError):
    """The TPM's clock may have gone back after an unorderly power loss (check 10)."""

    check = 10


class ClockWentBack(AppraisalError):
    """Equal counters and a clock that is not greater: replayed or rolled-back state (check 10)."""

    check = 10


class BindingMismatch(AppraisalError):
    """The host quote is bound to other guest evidence than that of this round (check 11)."""

    check = 11


# --- storage and simulation -----------------------------------------------------------------------------------


class StoreError(HarnessError):
    """The database cannot be opened, read or written."""


class SimulationError(HarnessError):
    """The simulated hardware did not do what the lab needs."""


class SimulatorMissing(SimulationError):
    """A program that the simulation needs is not installed."""


class SimulatorCrashed(SimulationError):
    """A simulator ended by itself or never came up."""


class GuestDidNotStart(SimulationError):
    """A guest could not be defined, manufactured or started."""


class IllegalTransition(Exception):
    """The session saw an event that its state does not allow: a bug of ours. The state is unchanged."""
