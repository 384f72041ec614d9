"""Frames of the stream between provider verifier and host agent, and the orders in them: JSON over one WebSocket.

The provider verifier sends orders, each with an id of its own choice; the host agent answers each once, in any order
(`stream_answers`). Each order and each answer is one line of JSON; a frame has the lines that are ready together.

Invariants:
    1. A request travels as fields. A member that the table below does not name (a leaf hash, a root, extra data) is an
       error: nobody can hand the host agent something to sign.
    2. Parsing gives a complete order or raises; ids are integers from 0 to 2^53 - 1 (what JSON carries exactly).

Spec: DESIGN 3.2 (who may compute it), 4 (one multiplexed stream per host); docs/protocol.md, stream.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from harness.credential import Credential, parse_keylime_blob
from harness.errors import MalformedMessage, MessageTooLarge
from harness.messages import compact, parse_json
from harness.prefer import LONGEST_WAIT_S
from harness.protocol import QuoteRequest
from harness.provider.batch import PendingQuote
from harness.values import HashAlg, Nonce, PcrSelection, parse_agent_id, parse_hex, parse_mask

ORDER_LIMIT = 64 * 1024
"""Bytes of a frame to the host agent."""
_ID_LIMIT = 1 << 53
_MASK = re.compile(r"0x[0-9a-f]{1,6}")


class Channel(Protocol):
    """One open connection, as text frames."""

    async def send(self, text: str) -> None:
        """Sends one frame. Raises TransportError when the connection is gone or the peer does not read."""

    async def receive(self) -> str | None:
        """Next frame; None when the peer closed. Raises TransportError when the connection is gone."""


# --- frames -----------------------------------------------------------------------------------------------------------


def frames_of(lines: Iterable[str], limit: int) -> Iterator[str]:
    """Frames with these lines in their order, as many in each as fit into ``limit`` characters; a longer one alone."""
    frame: list[str] = []
    length = 0
    for line in lines:
        if frame and length + len(line) > limit:
            yield "\n".join(frame)
            frame, length = [], 0
        frame.append(line)
        length += len(line) + 1
    if frame:
        yield "\n".join(frame)


def lines_of(frame: str, limit: int) -> list[str]:
    """Lines of a frame.

    Raises:
        MessageTooLarge: longer than ``limit`` characters.
    """
    if len(frame) > limit:
        raise MessageTooLarge(f"frame of {len(frame)} characters, at most {limit} are allowed")
    return frame.split("\n")


# --- orders -----------------------------------------------------------------------------------------------------------


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
"""Members of each order, required and optional, besides those that every order has."""
_EVERY = frozenset({"id", "op"})


def open_order(line: str) -> tuple[int, Mapping[str, object]]:
    """Id and members of an order, not parsed further: an error in them can be answered under the id.

    Raises:
        MalformedMessage: not a JSON object, or without a usable id.
        MessageTooLarge: longer than `ORDER_LIMIT`.
    """
    members = parse_object(line, limit=ORDER_LIMIT)
    return id_of(members), members


def parse_object(line: str, *, limit: int) -> dict[str, object]:
    """Members of a line.

    Raises:
        MalformedMessage: not a JSON object.
        MessageTooLarge: more than ``limit`` bytes.
    """
    members = parse_json(line.encode(), limit=limit)
    if not isinstance(members, dict):
        raise MalformedMessage("a line of a frame must be a JSON object")
    return members


def parse_order(frame: Mapping[str, object]) -> Order:
    """Order from its members.

    Raises:
        MalformedMessage: unknown operation; a member is missing, unknown or malformed.
    """
    operation = _text(frame, "op")
    if operation not in _MEMBERS:
        raise MalformedMessage(f"operation {operation[:32]!r} is unknown")
    required, optional = _MEMBERS[operation]
    if missing := required - frame.keys():
        raise MalformedMessage(f"{operation}: {min(missing)} is missing")
    if unknown := frame.keys() - required - optional - _EVERY:
        raise MalformedMessage(f"{operation}: member {min(unknown)[:32]!r} is unknown")
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
            allowlist=_masks_of(frame["allowlist"]),
            wait_s=_wait_of(frame),
        )
    )


def _masks_of(value: object) -> PcrSelection:
    """Allowlist from ``{bank: mask}``: shorter than a list of PCRs, and read with every request."""
    if not isinstance(value, dict):
        raise MalformedMessage("an allowlist must be an object of bank and mask")
    try:
        return PcrSelection(tuple((HashAlg.parse(bank), _mask_of(mask)) for bank, mask in value.items()))
    except ValueError:
        raise MalformedMessage("a mask of an allowlist must name PCRs from 0 to 23") from None


def _mask_of(text: object) -> int:
    if not isinstance(text, str) or not _MASK.fullmatch(text):
        raise MalformedMessage("a mask of an allowlist must be 0x and lower-case hex digits")
    return int(text, 16)


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
    """Line of an order."""
    return compact({"id": number, **_members(order)})


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
        "allowlist": {bank.text: f"0x{mask:x}" for bank, mask in pending.allowlist.banks},
        "nonce": request.nonce.value.hex(),
        "hash_alg": request.bank.text,
        "mask": f"0x{request.mask:x}",
        "requester": pending.requester.hex(),
        "wait_s": pending.wait_s,
    }
    if request.agent_id is not None and request.binding is not None:
        members |= {"agent_id": str(request.agent_id), "binding": request.binding.hex()}
    return members


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


def id_of(frame: Mapping[str, object]) -> int:
    """Id of a line.

    Raises:
        MalformedMessage: there is none, or not one from 0 to 2^53 - 1.
    """
    number = frame.get("id")
    if type(number) is not int or not 0 <= number < _ID_LIMIT:
        raise MalformedMessage("a line of a frame must have an id from 0 to 2^53 - 1")
    return number
