"""Frames of the stream between provider verifier and host agent: JSON text over one WebSocket per host.

The provider verifier sends orders, each with an id of its own choice; the host agent answers each once, in any order.
A batch's shared part travels once for all waiters that it is handed to together.

Invariants:
    1. A request travels as fields. A member that the table below does not name (a leaf hash, a root, extra data) is an
       error: nobody can hand the host agent something to sign.
    2. Parsing gives a complete order or raises; ids are integers from 0 to 2^53 - 1 (what JSON carries exactly).

Spec: DESIGN 3.2 (who may compute it), 4 (one multiplexed stream per host); docs/protocol.md, stream.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast

from harness.credential import Credential, parse_keylime_blob
from harness.errors import HarnessError, MalformedMessage
from harness.messages import error_from_response, parse_json, retry_after_s, status_of
from harness.prefer import LONGEST_WAIT_S
from harness.protocol import QuoteRequest
from harness.provider.batch import PendingQuote
from harness.values import HashAlg, Nonce, PcrSelection, parse_agent_id, parse_hex, parse_mask, pcrs_in

ORDER_LIMIT = 64 * 1024
"""Bytes of a frame to the host agent."""
ANSWER_LIMIT = 4 * 1024 * 1024
"""Bytes of a frame from it."""
PROOFS_PER_FRAME = 1000
"""A proof takes at most 1.5 KiB of JSON (20 hashes); a thousand and the shared part stay under `ANSWER_LIMIT`."""
_ID_LIMIT = 1 << 53


class Channel(Protocol):
    """One open connection, as text frames."""

    async def send(self, text: str) -> None:
        """Sends one frame. Raises TransportError when the connection is gone or the peer does not read."""

    async def receive(self) -> str | None:
        """Next frame; None when the peer closed. Raises TransportError when the connection is gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuoteOrder:
    """Quote this request in the next batch."""

    pending: PendingQuote


@dataclass(frozen=True, slots=True, kw_only=True)
class IdentityOrder:
    """Tell the host's keys and certificates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivateOrder:
    """Answer an enrolment challenge."""

    credential: Credential
    requester: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class CertifyOrder:
    """Certify the vTPM CA key."""

    nonce: Nonce


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelOrder:
    """Nobody waits for the answer to this id any more; there will be none."""


Order = QuoteOrder | IdentityOrder | ActivateOrder | CertifyOrder | CancelOrder

_MEMBERS: Mapping[str, tuple[frozenset[str], frozenset[str]]] = {
    "quote": (
        frozenset({"tenant", "allowlist", "nonce", "hash_alg", "mask", "requester", "wait_s"}),
        frozenset({"agent_id", "binding"}),
    ),
    "identity": (frozenset(), frozenset()),
    "activate": (frozenset({"credential", "requester"}), frozenset()),
    "certify": (frozenset({"nonce"}), frozenset()),
    "cancel": (frozenset(), frozenset()),
}
"""Members of each order, required and optional, besides ``id`` and ``op``."""


# --- orders ---------------------------------------------------------------------------------------------------------


def open_order(text: str) -> tuple[int, Mapping[str, object]]:
    """Id and members of an order, not parsed further: an error in them can be answered under the id.

    Raises:
        MalformedMessage: not a JSON object, or without a usable id.
        MessageTooLarge: longer than `ORDER_LIMIT`.
    """
    frame = parse_json(text.encode(), limit=ORDER_LIMIT)
    if not isinstance(frame, dict):
        raise MalformedMessage("a frame must be a JSON object")
    return _id_of(frame), frame


def parse_order(frame: Mapping[str, object]) -> Order:
    """Order from its members.

    Raises:
        MalformedMessage: unknown operation; a member is missing, unknown or malformed.
    """
    operation = _text(frame, "op")
    if operation not in _MEMBERS:
        raise MalformedMessage(f"operation {operation[:32]!r} is unknown")
    required, optional = _MEMBERS[operation]
    names = frame.keys() - {"id", "op"}
    if missing := sorted(required - names):
        raise MalformedMessage(f"{operation}: {missing[0]} is missing")
    if unknown := sorted(names - required - optional):
        raise MalformedMessage(f"{operation}: member {unknown[0][:32]!r} is unknown")
    return _PARSERS[operation](frame)


def _parse_quote(frame: Mapping[str, object]) -> QuoteOrder:
    agent_id = _text(frame, "agent_id") if "agent_id" in frame else None
    binding = _text(frame, "binding") if "binding" in frame else None
    if (agent_id is None) != (binding is None):
        raise MalformedMessage("agent_id and binding come together or not at all")
    request = QuoteRequest(
        nonce=Nonce.parse(_text(frame, "nonce")),
        bank=HashAlg.parse(_text(frame, "hash_alg")),
        mask=parse_mask(_text(frame, "mask")),
        agent_id=None if agent_id is None else parse_agent_id(agent_id),
        binding=None if binding is None else parse_hex(binding, "binding", size=32),
    )
    tenant = _text(frame, "tenant")
    if not tenant:
        raise MalformedMessage("tenant is empty")
    return QuoteOrder(
        pending=PendingQuote(
            request=request,
            tenant=tenant,
            requester=parse_hex(_text(frame, "requester"), "requester", size=32),
            allowlist=parse_allowlist(frame["allowlist"]),
            wait_s=_wait_of(frame),
        )
    )


def _wait_of(frame: Mapping[str, object]) -> float:
    wait_s = frame["wait_s"]
    if isinstance(wait_s, bool) or not isinstance(wait_s, int | float) or not 0 < wait_s <= LONGEST_WAIT_S:
        raise MalformedMessage(f"wait_s must be a number of seconds, more than 0 and at most {LONGEST_WAIT_S}")
    return float(wait_s)


def _parse_activate(frame: Mapping[str, object]) -> ActivateOrder:
    return ActivateOrder(
        credential=parse_keylime_blob(decode_base64(_text(frame, "credential"), "credential")),
        requester=parse_hex(_text(frame, "requester"), "requester", size=32),
    )


_PARSERS: Mapping[str, Callable[[Mapping[str, object]], Order]] = {
    "quote": _parse_quote,
    "identity": lambda _: IdentityOrder(),
    "activate": _parse_activate,
    "certify": lambda frame: CertifyOrder(nonce=Nonce.parse(_text(frame, "nonce"))),
    "cancel": lambda _: CancelOrder(),
}


def encode_order(number: int, order: Order) -> str:
    """Frame of an order."""
    return json.dumps({"id": number, **_members(order)}, separators=(",", ":"))


def _members(order: Order) -> dict[str, object]:
    match order:
        case QuoteOrder(pending=pending):
            return _quote_members(pending)
        case ActivateOrder(credential=credential, requester=requester):
            blob = base64.b64encode(credential.keylime_blob()).decode()
            return {"op": "activate", "credential": blob, "requester": requester.hex()}
        case CertifyOrder(nonce=nonce):
            return {"op": "certify", "nonce": nonce.value.hex()}
        case IdentityOrder():
            return {"op": "identity"}
        case CancelOrder():
            return {"op": "cancel"}


def _quote_members(pending: PendingQuote) -> dict[str, object]:
    request = pending.request
    members: dict[str, object] = {
        "op": "quote",
        "tenant": pending.tenant,
        "allowlist": encode_allowlist(pending.allowlist),
        "nonce": request.nonce.value.hex(),
        "hash_alg": request.bank.text,
        "mask": f"0x{request.mask:x}",
        "requester": pending.requester.hex(),
        "wait_s": pending.wait_s,
    }
    if request.agent_id is not None and request.binding is not None:
        members |= {"agent_id": str(request.agent_id), "binding": request.binding.hex()}
    return members


# --- answers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchFrame:
    """Answers of one batch: the part that all share, and the proof of each id."""

    shared: Mapping[str, object]
    proofs: Mapping[int, Mapping[str, object]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultFrame:
    """Answer to one order that is not a quote."""

    number: int
    result: Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorFrame:
    """Refusal or failure of one order."""

    number: int
    error: HarnessError = field(repr=False)


AnswerFrame = BatchFrame | ResultFrame | ErrorFrame


def encode_batch(shared: Mapping[str, object], proofs: Sequence[tuple[int, Mapping[str, object]]]) -> str:
    """Frame with the answers of one batch."""
    entries = [{"id": number, "proof": proof} for number, proof in proofs]
    return json.dumps({"batch": shared, "proofs": entries}, separators=(",", ":"))


def encode_result(number: int, result: Mapping[str, object]) -> str:
    """Frame with the answer to one order."""
    return json.dumps({"id": number, "result": result}, separators=(",", ":"))


def encode_error(number: int, error: HarnessError) -> str:
    """Frame with the refusal of one order."""
    members = {
        "status": status_of(error),
        "error": type(error).__name__,
        "detail": error.detail,
        "retry_after_s": retry_after_s(error),
    }
    return json.dumps({"id": number, "error": members}, separators=(",", ":"))


def parse_answer(text: str) -> AnswerFrame:
    """Answer frame. What is in it is for the tenant to judge; only its outline is checked here.

    Raises:
        MalformedMessage: another outline.
        MessageTooLarge: longer than `ANSWER_LIMIT`.
    """
    frame = parse_json(text.encode(), limit=ANSWER_LIMIT)
    if not isinstance(frame, dict):
        raise MalformedMessage("a frame must be a JSON object")
    match frame:
        case {"batch": dict(shared), "proofs": list(entries)}:
            return BatchFrame(shared=shared, proofs=dict(map(_proof_entry, entries)))
        case {"id": _, "result": dict(result)}:
            return ResultFrame(number=_id_of(frame), result=result)
        case {"id": _, "error": dict(error)}:
            return ErrorFrame(number=_id_of(frame), error=_error_of(error))
    raise MalformedMessage("a frame is neither a batch nor a result nor an error")


def _proof_entry(entry: object) -> tuple[int, Mapping[str, object]]:
    match entry:
        case {"id": _, "proof": dict(proof)}:
            return _id_of(cast(Mapping[str, object], entry)), proof
    raise MalformedMessage("a proof in a batch frame must have an id and a proof")


def _error_of(members: Mapping[str, object]) -> HarnessError:
    match members:
        case {"status": int(status), "error": str(name), "detail": str(detail)}:
            if (status, name) == (400, MalformedMessage.__name__):
                return MalformedMessage(detail)  # it is the tenant's request that is wrong, not our order
            wait_s = members.get("retry_after_s")
            retry_after = str(wait_s) if isinstance(wait_s, int | float) else None
            body = {"code": status, "status": detail, "results": {"error": name}}
            return error_from_response(status, body, retry_after)
    raise MalformedMessage("an error frame must have status, error and detail")


# --- members ----------------------------------------------------------------------------------------------------------


def parse_allowlist(value: object) -> PcrSelection:
    """Allowlist from ``{bank: [pcr, ...]}``.

    Raises:
        MalformedMessage: another form, an unknown bank, or a PCR outside 0 to 23.
    """
    if not isinstance(value, dict):
        raise MalformedMessage("an allowlist must be an object of bank and PCR list")
    banks: dict[HashAlg, list[int]] = {}
    for bank, pcrs in value.items():
        if not isinstance(pcrs, list) or not all(type(pcr) is int and 0 <= pcr <= 23 for pcr in pcrs):
            raise MalformedMessage("an allowlist must list PCRs from 0 to 23")
        banks[HashAlg.parse(bank)] = pcrs
    return PcrSelection.from_lists(banks)


def encode_allowlist(allowlist: PcrSelection) -> dict[str, list[int]]:
    """``{bank: [pcr, ...]}``, the form in frames and in the provider's database."""
    return {bank.text: list(pcrs_in(mask)) for bank, mask in allowlist.banks}


def decode_base64(text: str, what: str) -> bytes:
    """Bytes from strict, padded base64.

    Raises:
        MalformedMessage: anything else.
    """
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise MalformedMessage(f"{what} must be base64") from error


def _text(frame: Mapping[str, object], name: str) -> str:
    value = frame.get(name)
    if not isinstance(value, str):
        raise MalformedMessage(f"{name} must be text")
    return value


def _id_of(frame: Mapping[str, object]) -> int:
    number = frame.get("id")
    if type(number) is not int or not 0 <= number < _ID_LIMIT:
        raise MalformedMessage("a frame must have an id from 0 to 2^53 - 1")
    return number
