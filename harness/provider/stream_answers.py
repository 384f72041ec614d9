"""Answers of the stream: what a host agent says to orders, a line each.

A batch's shared part is written once, by the host agent, and reaches each tenant as those bytes: the provider verifier
reads it once to know that it is an object of JSON, and a proof not at all beyond its form.

Invariants:
    1. What is handed on as text is JSON: the shared part was parsed, and a proof has the one form that is written here.
    2. The shared part has no member ``proof``: no tenant is given two.
    3. What a host agent has handed to many is bounded: a frame is not multiplied into gigabytes of answers.

Spec: DESIGN 3.3, 4; docs/protocol.md, stream.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from harness.errors import HarnessError, MalformedMessage
from harness.messages import ResultsText, compact, error_from_response, retry_after_s, status_of
from harness.provider.stream import id_of, parse_object

ANSWER_LIMIT = 4 * 1024 * 1024
"""Characters of a frame to the provider verifier."""
SHARED_LIMIT = 16 * 1024
"""Bytes of a batch's shared part, of which every member is handed a copy; all PCRs of three banks take 8 KiB."""
PROOFS_PER_LINE = 1000
"""A proof takes at most 1.5 KiB of JSON (20 hashes); a thousand and the shared part stay under `ANSWER_LIMIT`."""

_DETAIL_LIMIT = 500
_BATCH, _PROOFS, _END = '{"batch":', ',"proofs":[', "]}"
_ENTRY = re.compile(
    r'\{"id":(0|[1-9][0-9]{0,15}),"proof":'
    r'(\{"leaf_index":(?:0|[1-9][0-9]{0,6}),"tree_size":[1-9][0-9]{0,6},'
    r'"hashes":\[(?:"[0-9a-f]{64}"(?:,"[0-9a-f]{64}"){0,19})?\]\})\}'
)
"""An id and its proof: as many hashes as a tree of 2^20 leaves has on a path (DESIGN 3.5, check 3)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLine:
    """Answers of one batch, as JSON text: the object that all share, and the proof of each id."""

    shared: bytes
    proofs: Mapping[int, bytes]

    def results(self) -> Iterator[tuple[int, ResultsText]]:
        """What each id is answered: the members of the shared part, and its own proof beside them (DESIGN 3.3)."""
        opened = self.shared[:-1] + b',"proof":'
        return ((number, ResultsText(b"%b%b}" % (opened, proof))) for number, proof in self.proofs.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultLine:
    """Answer to one order that is not a quote."""

    number: int
    result: Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorLine:
    """Refusal or failure of one order."""

    number: int
    error: HarnessError = field(repr=False)


AnswerLine = BatchLine | ResultLine | ErrorLine


def encode_batch(shared: str, proofs: Sequence[tuple[int, str]]) -> Iterator[str]:
    """Lines with the answers of one batch, of up to `PROOFS_PER_LINE` proofs.

    Args:
        shared: the part that all share, compact JSON text.
        proofs: id and proof, as `messages.proof_text` writes it.
    """
    for first in range(0, len(proofs), PROOFS_PER_LINE):
        entries = (f'{{"id":{number},"proof":{proof}}}' for number, proof in proofs[first : first + PROOFS_PER_LINE])
        yield f"{_BATCH}{shared}{_PROOFS}{','.join(entries)}{_END}"


def encode_result(number: int, result: Mapping[str, object]) -> str:
    """Line with the answer to one order."""
    return compact({"id": number, "result": result})


def encode_error(number: int, error: HarnessError) -> str:
    """Line with the refusal of one order."""
    members = {
        "status": status_of(error),
        "error": type(error).__name__,
        "detail": error.detail,
        "retry_after_s": retry_after_s(error),
    }
    return compact({"id": number, "error": members})


def parse_answer(line: str) -> AnswerLine:
    """Answer from its line. What is in it is for the tenant to judge; only its outline is checked here.

    Raises:
        MalformedMessage: another outline.
        MessageTooLarge: longer than `ANSWER_LIMIT`, or a shared part longer than `SHARED_LIMIT`.
    """
    if line.startswith(_BATCH):
        return _parse_batch(line)
    members = parse_object(line, limit=ANSWER_LIMIT)
    match members:
        case {"id": _, "result": dict(result)}:
            return ResultLine(number=id_of(members), result=result)
        case {"id": _, "error": dict(error)}:
            return ErrorLine(number=id_of(members), error=_error_of(error))
    raise MalformedMessage("a line is neither of a batch nor a result nor an error")


def _parse_batch(line: str) -> BatchLine:
    # No string of JSON can hold the separator, because its quotes would be escaped; inside of another member it leaves
    # a shared part that does not parse.
    shared, _, entries = line.removeprefix(_BATCH).partition(_PROOFS)
    members = parse_object(shared, limit=SHARED_LIMIT)
    if not members or "proof" in members or not (shared.startswith("{") and shared.endswith("}")):
        raise MalformedMessage("the shared part of a batch must be an object with members, and without a proof")
    proofs: dict[int, bytes] = {}
    at = 0
    while (entry := _ENTRY.match(entries, at)) is not None:
        proofs[int(entry[1])] = entry[2].encode()
        at = entry.end() + 1
        if entries[entry.end() : at] != ",":
            break
    if entry is None or entries[entry.end() :] != _END:
        raise MalformedMessage("the proofs of a batch must be objects of id and proof in their one form")
    return BatchLine(shared=shared.encode(), proofs=proofs)


def _error_of(members: Mapping[str, object]) -> HarnessError:
    match members:
        case {"status": int(status), "error": str(name), "detail": str(detail)}:
            if (status, name) == (400, MalformedMessage.__name__):
                # It is the tenant's request that is wrong, not our order.
                return MalformedMessage(detail[:_DETAIL_LIMIT])
            wait_s = members.get("retry_after_s")
            retry_after = str(wait_s) if isinstance(wait_s, int | float) else None
            body = {"code": status, "status": detail, "results": {"error": name}}
            return error_from_response(status, body, retry_after)
    raise MalformedMessage("an error must have status, error and detail")
