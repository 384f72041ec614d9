"""What an operator does about an error or an alarm, in one sentence with the command to type.

The keys are names of error classes, which are also the kinds of alarms and the ``error`` of a guest, and names of
states in which a session has stopped.

Spec: docs/operations.md says the same at length.
"""

from __future__ import annotations

import re

_REBOOT = "if you know of the reboot: `harness tenant guest resume {guest} --accept-reboot --reason TEXT`"
_RESUME = "`harness lab status` tells what runs; then: `harness tenant guest resume {guest} --reason TEXT`"
_ASK = "find out who answered otherwise than expected; then: `harness tenant guest resume {guest} --reason TEXT`"

ACCEPTED_REBOOT = "the reboot was accepted and {guest} goes on; if you know of it, acknowledge the alarm"
"""Instead of the step for ``HostRebooted`` where the guest goes on: by its policy, or because it was resumed."""

_STEPS = {
    "SimulatorMissing": "`harness doctor` tells what is missing and how to install it",
    "PeerUnreachable": "`harness lab status` tells what runs, `harness lab up` starts what does not",
    "DeadlineExceeded": "`harness lab status` tells what runs; a command may be given again",
    "AccessDenied": "the certificate in use has another role or another authority than this call needs",
    "Overloaded": "try again in a moment",
    "KeyChanged": (
        "find out why the key changed; only then: `harness tenant host re-enrol {host} --reason TEXT` for a host, "
        "`harness tenant guest re-enrol {guest} --reason TEXT` for a guest"
    ),
    "CloneSuspected": (
        "find out which of the two guests is the real one, and remove the other: "
        "`harness tenant guest remove {guest} --reason TEXT`"
    ),
    "CertificateRefused": (
        "the vTPM or TPM does not have the certificate that it should: is it on the stated host? after a change: "
        "`harness tenant guest re-enrol {guest} --reason TEXT`"
    ),
    "UnacceptableKey": "the key may be used in ways that an attestation key must not be: replace the TPM or vTPM",
    "ReferenceValueMismatch": (
        "`harness tenant policy show {guest}` compares; if the change is yours: `policy capture`, `policy set --resume`"
    ),
    "HostRebooted": _REBOOT,
    "ClockWentBack": (
        "find out who put an old state of the TPM back, or runs it twice; a guest that was restored on purpose gets a "
        "new vTPM (docs/operations.md), and: `harness tenant guest re-enrol {guest} --reason TEXT`"
    ),
    "ClockNotSafe": (
        "a power loss left the TPM's clock unsafe for longer than allowed; once it is safe again: "
        "`harness tenant guest resume {guest} --reason TEXT`"
    ),
    "AppraisalError": _ASK,
    "GuestNotHere": (
        "is the guest running on the stated host? then: `harness tenant guest resume {guest} --reason TEXT`"
    ),
    "FAILED": _RESUME,
    "INVALID_QUOTE": _ASK,
    "TENANT_FAILED": "the verifier itself failed: `harness lab logs` shows why; " + _RESUME.partition("then: ")[2],
}


def step_for(*names: str | None, guest: str = "AGENT_ID", host: str = "HOST_ID") -> str | None:
    """What to do, by the first of these names that is known.

    Args:
        names: of errors, alarms or states, the most specific first.
        guest: what is put into the command for the guest.
        host: what is put into it for the host.
    """
    found = next((_STEPS[name] for name in names if name in _STEPS), None)
    return None if found is None else found.format(guest=guest, host=host)


def with_tenant(step: str, tenant: str | None) -> str:
    """A step whose `harness tenant` commands name the tenant; None: as it is."""
    return step if tenant is None else re.sub(r"`(harness tenant [^`]*)`", rf"`\1 --tenant {tenant}`", step)


def look_again(guest: str, tenant: str | None) -> str:
    """How an operator sees what became of a guest that is judged anew."""
    return with_tenant(f"`harness tenant guest show {guest} --wait 60`", tenant)


def step_for_class(kind: type[BaseException]) -> str | None:
    """What to do about an error, by its class or the nearest class above it that is known."""
    return step_for(*(parent.__name__ for parent in kind.__mro__))
