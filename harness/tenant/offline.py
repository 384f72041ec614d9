"""Appraisal of saved evidence, without any service: for audit, debugging and other implementations.

Invariants:
    1. An unusable request or trust file is no verdict: exit code 2. An unusable answer, a missing one included, is
       one: check 1.
    2. Unknown members are ignored, repeated ones refused, in all three files.
    3. Deadline and use of the nonce need a session and are not checked here; check 11 is made where the guest's
       evidence is given.

Spec: DESIGN 3.9.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from harness.attest import owner_qualified_name, parse_public
from harness.errors import ConfigError, MalformedMessage, MessageTooLarge, ProtocolError
from harness.messages import parse_json
from harness.protocol import QuoteRequest, guest_binding
from harness.tenant.appraisal import HostTrust, Rejected, SentRequest, Verdict, appraise_host
from harness.tenant.policy import parse_policy
from harness.values import (
    ClockBaseline,
    HashAlg,
    Nonce,
    parse_agent_id,
    parse_hex,
    parse_host_id,
    parse_mask,
)

T = TypeVar("T")

FILE_LIMIT = 4 * 1024 * 1024
_MAX_STRUCTURE = 4096
_MAX_TPM2B = 0xFFFF
_MAX_NAME = 68
_EXIT_ACCEPTED, _EXIT_REJECTED = 0, 1


@dataclass(frozen=True, slots=True)
class _Request:
    sent: SentRequest
    guest_binding: bytes | None


def appraise_files(request: Path, response: Path, trust: Path) -> tuple[dict[str, object], int]:
    """Appraises a saved answer.

    Args:
        request: our request (R of DESIGN 3.9).
        response: ``results`` as received (S).
        trust: what is pinned and expected (T).

    Returns:
        The verdict as one JSON object, and the exit code: 0 accepted, 1 rejected.

    Raises:
        ConfigError: request or trust cannot be used; exit code 2.
    """
    asked = _usable(request, _parse_request)
    expected = _usable(trust, _parse_trust)
    verdict = _verdict(response, asked, expected)
    if isinstance(verdict, Rejected):
        finding = {"failed_check": verdict.check, "error": verdict.error, "detail": verdict.detail}
        return {"accepted": False, **finding}, _EXIT_REJECTED
    return {"accepted": True}, _EXIT_ACCEPTED


def _verdict(response: Path, asked: _Request, expected: HostTrust) -> Verdict:
    try:
        results = parse_json(_read(response), limit=FILE_LIMIT)
    except (ConfigError, ProtocolError) as error:
        return Rejected(check=1, error="MalformedEvidence", detail=error.detail)
    return appraise_host(results, asked.sent, expected, guest_binding=asked.guest_binding)


def _usable(path: Path, parse: Callable[[dict[str, Any]], T]) -> T:
    try:
        members = parse_json(_read(path), limit=FILE_LIMIT)
        if not isinstance(members, dict):
            raise MalformedMessage("must be a JSON object")
        return parse(members)
    except ProtocolError as error:
        raise ConfigError(f"{path}: {error.detail}") from error


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(FILE_LIMIT + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    if len(data) > FILE_LIMIT:
        raise MessageTooLarge(f"has more than {FILE_LIMIT} bytes")
    return data


def _parse_request(members: dict[str, Any]) -> _Request:
    together = {"agent_id", "vtpm_ek", "binding"}
    present = together & members.keys()
    if present and present != together:
        raise MalformedMessage("agent_id, vtpm_ek and binding go together: all three or none")
    agent_id, vtpm_ek, binding = (
        _text(members, name) if present else None for name in ("agent_id", "vtpm_ek", "binding")
    )
    request = QuoteRequest(
        nonce=Nonce.parse(_text(members, "nonce")),
        mask=parse_mask(_text(members, "mask")),
        bank=HashAlg.parse(_text(members, "hash_alg")),
        agent_id=None if agent_id is None else parse_agent_id(agent_id),
        binding=None if binding is None else parse_hex(binding, "binding", size=32),
    )
    requester = parse_hex(_text(members, "requester"), "requester", size=32) if "requester" in members else b""
    sent = SentRequest(
        request=request,
        requester=requester,
        vtpm_ek=None if vtpm_ek is None else parse_hex(vtpm_ek, "vtpm_ek", size=32),
    )
    # Without the guest's evidence check 11 is not ours to make: the request is held against its own binding.
    return _Request(sent, _guest(members["guest"], request) if "guest" in members else request.binding)


def _guest(guest: object, request: QuoteRequest) -> bytes:
    if not isinstance(guest, dict):
        raise MalformedMessage("guest must be an object")
    if request.binding is None:
        raise MalformedMessage("guest is given without a binding")
    # Hashed, not parsed: whatever fits into a TPM2B is comparable, and a wrong one is check 11.
    ak_name = parse_hex(_text(guest, "ak_name"), "guest.ak_name", at_most=_MAX_TPM2B)
    return guest_binding(ak_name, _base64(guest, "attest", at_most=_MAX_TPM2B))


def _parse_trust(members: dict[str, Any]) -> HostTrust:
    ak = parse_public(_base64(members, "ak"))
    pinned_name = members.get("ak_qualified_name")
    policy = members.get("policy")
    if "last_clock" not in members:  # null is a statement, silence would be a check switched off
        raise MalformedMessage("last_clock is missing")
    return HostTrust(
        host_id=parse_host_id(_text(members, "host_id")),
        ak=ak,
        # Not given: only an owner primary may serve as a host's AK (DESIGN 3.6), so its qualified name follows.
        ak_qualified_name=owner_qualified_name(ak) if pinned_name is None else _name(members),
        policy=None if policy is None else parse_policy(policy),
        baseline=_baseline(members["last_clock"]),
    )


def _name(members: dict[str, Any]) -> bytes:
    return parse_hex(_text(members, "ak_qualified_name"), "ak_qualified_name", at_most=_MAX_NAME)


def _baseline(clock: object) -> ClockBaseline | None:
    if clock is None:
        return None
    if not isinstance(clock, dict):
        raise MalformedMessage("last_clock must be null or an object")
    return ClockBaseline(
        clock=_counter(clock, "clock"),
        reset_count=_counter(clock, "resetCount"),
        restart_count=_counter(clock, "restartCount"),
        # Not in DESIGN 3.9's form, but part of a baseline: judged where it is given. It uses all 64 bits.
        firmware_version=_counter(clock, "firmwareVersion", bits=64) if "firmwareVersion" in clock else None,
    )


def _counter(members: dict[str, Any], name: str, *, bits: int = 63) -> int:
    value = members.get(name)
    if type(value) is not int or not 0 <= value < 1 << bits:  # a bool is an int to isinstance
        raise MalformedMessage(f"last_clock.{name} must be an integer from 0 to 2^{bits} - 1")
    return value


def _text(members: dict[str, Any], name: str) -> str:
    if name not in members:
        raise MalformedMessage(f"{name} is missing")
    value = members[name]
    if not isinstance(value, str):
        raise MalformedMessage(f"{name} must be a string")
    return value


def _base64(members: dict[str, Any], name: str, *, at_most: int = _MAX_STRUCTURE) -> bytes:
    text = _text(members, name)
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise MalformedMessage(f"{name} is not base64") from None
    if base64.b64encode(data).decode() != text or len(data) > at_most:
        raise MalformedMessage(f"{name} is not canonical base64 of at most {at_most} bytes")
    return data
